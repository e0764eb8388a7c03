"""How a SavedModel is loaded and called; requests and answers are tested with the server."""

import numpy as np
import pytest
import tensorflow as tf

from serving.servable import Servable, _is_old, _read_meta_graph, _session_config

_V1 = tf.compat.v1


def save_old_model(path, *, control_flow_v2, use_resource):
    """Doubles `x` as often as `times` says, and adds a variable, 0.5, as a TensorFlow 1 program does."""
    (_V1.enable_control_flow_v2 if control_flow_v2 else _V1.disable_control_flow_v2)()
    try:
        with tf.Graph().as_default(), _V1.Session() as session:
            x, times = _V1.placeholder(tf.float32, [None], "x"), _V1.placeholder(tf.int32, [None], "times")
            start = _V1.get_variable("start", initializer=0.5, use_resource=use_resource)
            _, doubled = _V1.while_loop(
                lambda step, _: step < tf.reduce_max(times),
                lambda step, value: (step + 1, 2.0 * value),
                (0, x),
            )
            session.run(_V1.global_variables_initializer())
            _V1.saved_model.simple_save(session, str(path), {"x": x, "times": times}, {"y": doubled + start})
    finally:
        _V1.enable_control_flow_v2()


@pytest.mark.parametrize(
    ("control_flow_v2", "use_resource", "is_old"),
    [(False, True, True), (True, False, True), (True, True, False)],
    ids=["old control flow", "old variable", "neither"],
)
def test_a_model_of_tensorflow_1_loads_and_answers(tmp_path, control_flow_v2, use_resource, is_old):
    save_old_model(tmp_path / "1", control_flow_v2=control_flow_v2, use_resource=use_resource)
    graph = _read_meta_graph(tmp_path / "1").graph_def
    assert _is_old(graph) == is_old
    assert bool(_session_config(graph).experimental.executor_type) == (not is_old)
    inputs = {"x": np.array([1.0, 3.0], np.float32), "times": np.array([2, 2], np.int32)}
    outputs = Servable("old", 1, tmp_path / "1").predict("", inputs)
    assert outputs["y"].tolist() == [4.5, 12.5]


class Collatz(tf.Module):
    """Counts the steps from `n` to 1: half of an even number, three times an odd one and 1 more."""

    @tf.function(input_signature=[tf.TensorSpec([], tf.int64, name="n")])
    def serve(self, n):
        _, steps = tf.while_loop(
            lambda n, _: n > 1, lambda n, steps: (self.after(n), steps + 1), (n, tf.constant(0, tf.int64))
        )
        return {"steps": steps}

    @tf.function
    def after(self, n):
        return tf.cond(n % 2 == 0, lambda: n // 2, lambda: 3 * n + 1)


def test_branches_and_loops_of_tensorflow_2_run_by_the_executor_for_one_thread(tmp_path):
    model = Collatz()
    tf.saved_model.save(model, str(tmp_path / "1"), signatures=model.serve)
    graph = _read_meta_graph(tmp_path / "1").graph_def
    ops = {node.op for function in graph.library.function for node in function.node_def}
    assert any(op.endswith("While") for op in ops), ops
    assert any(op.endswith("If") for op in ops), ops
    assert _session_config(graph).experimental.executor_type == "SINGLE_THREADED_EXECUTOR"
    servable = Servable("collatz", 1, tmp_path / "1")
    # 6, 3, 10, 5, 16, 8, 4, 2, 1
    for n, steps in ((1, 0), (2, 1), (6, 8), (27, 111)):
        assert servable.predict("", {"n": np.array(n, np.int64)})["steps"] == steps


@pytest.mark.parametrize(
    ("num_threads", "gpus", "inter_op_threads", "executor"),
    [
        (0, [], -1, "SINGLE_THREADED_EXECUTOR"),
        (1, [], 1, ""),
        (2, [], 2, ""),
        (0, ["GPU:0"], -1, ""),
    ],
    ids=["neither", "one thread asked for", "two threads asked for", "GPU"],
)
def test_the_executor_for_one_thread_needs_calls_in_their_own_thread_and_no_gpu(
    monkeypatch, num_threads, gpus, inter_op_threads, executor
):
    monkeypatch.setattr(tf.config.threading, "get_inter_op_parallelism_threads", lambda: num_threads)
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: gpus if kind == "GPU" else ["CPU:0"])
    config = _session_config(tf.Graph().as_graph_def())
    assert config.inter_op_parallelism_threads == inter_op_threads
    assert config.experimental.executor_type == executor
