"""The pool's calls: where they run, how many at a time, and which are not made at all."""

import asyncio
import gc
import threading
import weakref

import pytest

from serving.thread_pool import ThreadPool


def test_a_call_runs_in_a_named_thread_and_its_answer_or_error_comes_back():
    async def run():
        pool = ThreadPool(2, "work")
        assert await pool.submit(lambda: threading.current_thread().name) == "work_1"
        with pytest.raises(KeyError, match="what was asked"):
            await pool.submit(lambda: {}["what was asked"])
        assert await pool.submit(lambda: threading.current_thread().name) == "work_1", "idle, so used again"

    asyncio.run(run())


def test_a_call_may_raise_what_no_future_takes():
    async def run():
        with pytest.raises(RuntimeError, match="StopIteration"):
            await asyncio.wait_for(ThreadPool(1, "work").submit(lambda: next(iter(()))), 10)

    asyncio.run(run())


def test_where_the_system_gives_no_thread_calls_are_refused_or_wait_for_those_there_are(monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    async def run():
        pool = ThreadPool(2, "work")
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            with pytest.raises(RuntimeError, match="can't start"):
                pool.submit(lambda: "refused")
        assert await pool.submit(lambda: "first") == "first"
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            answers = [pool.submit(lambda: "waits") for _ in range(3)]
            assert await asyncio.gather(*answers) == ["waits"] * 3

    asyncio.run(run())


def test_calls_run_at_the_same_time_up_to_the_limit_and_the_event_loop_goes_on():
    async def run():
        pool, together = ThreadPool(2, "pair"), threading.Barrier(2)
        # Each pair waits for one another: one thread would never pass, and three would break a pair.
        answers = [pool.submit(lambda: together.wait(timeout=10) >= 0) for _ in range(6)]
        assert await asyncio.gather(*answers) == [True] * 6
        assert sum(thread.name.startswith("pair_") for thread in threading.enumerate()) == 2

    asyncio.run(run())


def test_a_call_that_is_cancelled_while_it_waits_is_not_made():
    async def run():
        pool, go_on, made = ThreadPool(1, "work"), threading.Event(), []
        running = pool.submit(go_on.wait)
        waiting = pool.submit(lambda: made.append("cancelled"))
        last = pool.submit(lambda: made.append("last"))
        waiting.cancel()
        go_on.set()
        await asyncio.gather(running, last)
        assert made == ["last"]

    asyncio.run(run())


def test_a_call_that_is_cancelled_while_it_runs_leaves_the_pool_usable():
    async def run():
        pool, started, go_on = ThreadPool(1, "work"), threading.Event(), threading.Event()
        running = pool.submit(lambda: started.set() or go_on.wait())
        await asyncio.to_thread(started.wait)
        running.cancel()
        go_on.set()
        assert await pool.submit(lambda: "next") == "next"

    asyncio.run(run())


def test_a_thread_that_waits_holds_nothing_of_its_last_call():
    class Request:
        pass

    async def run():
        pool, request = ThreadPool(1, "work"), Request()
        gone = weakref.ref(request)
        await pool.submit(lambda request=request: None)
        del request
        await pool.submit(lambda: None)
        gc.collect()
        assert gone() is None

    asyncio.run(run())
