"""The exported candidate index against other libraries, in one run: recall, speed, build time and size.

Example:
  python -m benchmarks.index --items 200000 --width 128
  python -m benchmarks.index --items 1000000 --width 64

Needs the extras `benchmarks` and `index-benchmark`. Every library is tuned to the same recall at 100 by its
own settings, and then all take turns, one thread per query. Speed is counted in queries per second of
processor time, all threads of the process together; a busy machine lowers all figures, by what the
contenders lose of its caches.

Vectors: see benchmarks/vectors.py.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import trainer  # noqa: F401  # isort: skip  selects Keras 2, before TensorFlow is imported
import click
import faiss
import hnswlib
import numpy as np
import scann
import tensorflow as tf
import tensorflow_recommenders as tfrs

from benchmarks.vectors import clustered_vectors
from trainer.config import IndexConfig
from trainer.index_build import build_index
from trainer.index_facts import IndexFacts
from trainer.served_index import EXCLUDED, K, ServedIndex

NEIGHBOURS = 100
BATCH = 256
_SAMPLE_QUERIES, _QUERIES, _EXCLUDED = 1_024, 2_048, 50
_REPEATS = 5
_SECONDS_PER_REPEAT = 1.0


@dataclass
class Contender:
    """A built index; `search` takes float32 [B, D] and returns rows [B, NEIGHBOURS], or ids "i<row>"."""

    name: str
    search: Callable[[np.ndarray], Any]
    build_wall_s: float
    build_cpu_s: float
    size_bytes: int
    settings: dict[str, Any]
    recall: float = float("nan")
    queries_per_cpu_s: dict[int, list[float]] = field(default_factory=lambda: {1: [], BATCH: []})
    p50_ms: list[float] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        """What was measured, the median of the repeats."""
        return {
            "recall_at_100": self.recall,
            "queries_per_cpu_s_batch_1": statistics.median(self.queries_per_cpu_s[1]),
            f"queries_per_cpu_s_batch_{BATCH}": statistics.median(self.queries_per_cpu_s[BATCH]),
            "p50_ms_batch_1": statistics.median(self.p50_ms),
            "build_wall_s": self.build_wall_s,
            "build_cpu_s": self.build_cpu_s,
            "size_bytes": self.size_bytes,
            "settings": self.settings,
        }


@dataclass(frozen=True)
class World:
    """Vectors of items, of queries to tune on and of others to measure with, and the exact answers."""

    items: np.ndarray
    sample_queries: np.ndarray
    queries: np.ndarray
    sample_exact: np.ndarray
    exact: np.ndarray


def exact_rows(items: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """The best NEIGHBOURS rows of each query, in any order, by a matrix product."""
    parts = []
    for start in range(0, len(queries), 64):
        scores = queries[start : start + 64] @ items.T
        parts.append(np.argpartition(-scores, NEIGHBOURS, axis=1)[:, :NEIGHBOURS])
    return np.concatenate(parts)


def recall(found: np.ndarray, exact: np.ndarray) -> float:
    """Mean share of the exact rows that were found."""
    return float(np.mean([len(np.intersect1d(a, b)) / len(b) for a, b in zip(found, exact, strict=True)]))


class _Clock:
    def __enter__(self) -> _Clock:
        self.wall_s, self.cpu_s = -time.perf_counter(), -time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall_s += time.perf_counter()
        self.cpu_s += time.process_time()


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file())


def _tuned(found: Callable[[int], np.ndarray], efforts: list[int], world: World, target: float) -> int:
    """The first effort whose recall on the sample queries reaches the target, else the last."""
    return next((e for e in efforts if recall(found(e), world.sample_exact) >= target), efforts[-1])


class _ExportedIndex(tf.Module):
    """The index as the retrieval model exports it, behind a query tower that does nothing."""

    def __init__(self, served: ServedIndex) -> None:
        super().__init__()
        self.index = served

    def signatures(self, width: int) -> dict[str, Any]:
        def serve(exact: bool) -> Any:
            def search(queries: tf.Tensor, **request: tf.Tensor) -> dict[str, tf.Tensor]:
                found = self.index.search(queries, request, exact)
                return {"item_ids": self.index.ids(found.rows), "scores": found.scores}

            queries = tf.TensorSpec([None, width], tf.float32, name="queries")
            signature = self.index.request_signature()
            return tf.function(search, autograph=False).get_concrete_function(queries, **signature)

        return {"serving_default": serve(exact=False), "serving_exact": serve(exact=True)}


def funnel(world: World, target: float, folder: Path) -> tuple[IndexFacts, list[Contender]]:
    """Our index: built, exported, and loaded again."""
    ids = [f"i{row}" for row in range(len(world.items))]
    with _Clock() as clock:
        index, facts = build_index(
            ids, world.items, world.sample_queries, IndexConfig(min_recall=target), NEIGHBOURS
        )
    module = _ExportedIndex(ServedIndex(index, ids, NEIGHBOURS))
    options = tf.saved_model.SaveOptions(namespace_whitelist=["Scann"])
    signatures = module.signatures(world.items.shape[1])
    tf.saved_model.save(module, str(folder), signatures=signatures, options=options)
    loaded = tf.saved_model.load(str(folder))
    rng = np.random.default_rng(1)
    excluded_ids = np.array(ids, object)[rng.integers(len(ids), size=(BATCH, _EXCLUDED))]

    def contender(name: str, signature: str, excluded: np.ndarray) -> Contender:
        serve = loaded.signatures[signature]
        requests = {
            size: {
                K: tf.fill([size], NEIGHBOURS),
                EXCLUDED: tf.constant(excluded[:size], tf.string),
            }
            for size in (1, BATCH)
        }

        def search(queries: np.ndarray) -> tf.Tensor:
            return serve(queries=tf.constant(queries), **requests[len(queries)])["item_ids"]

        search.keep = loaded  # type: ignore[attr-defined]  # a signature does not keep its model alive
        settings = {**facts.settings, **{k: v for k, v in asdict(facts.efforts[-1]).items() if k != "recall"}}
        return Contender(name, search, clock.wall_s, clock.cpu_s, _size(folder), settings)

    nothing = np.full((BATCH, 1), "", object)
    return facts, [
        contender("funnel, exported", "serving_default", nothing),
        contender(f"funnel, {_EXCLUDED} excluded", "serving_default", excluded_ids),
        contender("funnel, exact twin", "serving_exact", nothing),
    ]


def scann_pybind(world: World, facts: IndexFacts, folder: Path) -> Contender:
    """ScaNN without TensorFlow, with the settings that our index was tuned to."""
    effort = facts.efforts[-1]
    with _Clock() as clock:
        searcher = (
            scann.scann_ops_pybind.builder(world.items, NEIGHBOURS, "dot_product")
            .tree(facts.settings["num_leaves"], effort.num_leaves_to_search)
            .score_ah(facts.settings["dimensions_per_block"], anisotropic_quantization_threshold=0.2)
            .reorder(effort.num_reordering_candidates)
            .build()
        )
    folder.mkdir()
    searcher.serialize(str(folder))

    def search(queries: np.ndarray) -> np.ndarray:
        return (
            searcher.search(queries[0])[0][None] if len(queries) == 1 else searcher.search_batched(queries)[0]
        )

    return Contender("ScaNN, pybind", search, clock.wall_s, clock.cpu_s, _size(folder), {"as": "funnel"})


def tfrs_layer(world: World, facts: IndexFacts) -> Contender:
    """The ScaNN layer of TensorFlow Recommenders, with the same settings as far as it takes them."""
    effort = facts.efforts[-1]
    layer = tfrs.layers.factorized_top_k.ScaNN(
        k=NEIGHBOURS,
        num_leaves=facts.settings["num_leaves"],
        num_leaves_to_search=effort.num_leaves_to_search,
        dimensions_per_block=facts.settings["dimensions_per_block"],
        num_reordering_candidates=effort.num_reordering_candidates,
    )
    ids = tf.constant([f"i{row}" for row in range(len(world.items))])
    with _Clock() as clock:
        layer.index(world.items, ids)
    serve = tf.function(layer, input_signature=[tf.TensorSpec([None, world.items.shape[1]])])
    size = sum(
        tf.size(v).numpy() * v.dtype.size for v in layer._serialized_searcher.variables if v.dtype.size
    )
    return Contender(
        "TFRS layer",
        lambda queries: serve(tf.constant(queries))[1],
        clock.wall_s,
        clock.cpu_s,
        int(size),
        {"as": "funnel, without the anisotropic threshold"},
    )


def hnsw(world: World, target: float, folder: Path) -> Contender:
    """hnswlib's graph. Dot products become distances by one more dimension that makes all norms equal.

    That is the reduction of Bachrach et al. (RecSys 2014). In hnswlib's own inner-product space, no metric,
    it takes a search several times as wide for the same recall on these vectors.
    """
    squares = np.sum(world.items**2, axis=1, keepdims=True)
    items = np.hstack([world.items, np.sqrt(squares.max() - squares)])
    index = hnswlib.Index(space="l2", dim=items.shape[1])
    with _Clock() as clock:
        index.init_index(max_elements=len(items), M=16, ef_construction=200)
        index.add_items(items)
    index.set_num_threads(1)

    def search(queries: np.ndarray) -> np.ndarray:
        return index.knn_query(np.pad(queries, ((0, 0), (0, 1))), k=NEIGHBOURS)[0]

    def found(ef: int) -> np.ndarray:
        index.set_ef(ef)
        return search(world.sample_queries)

    ef = _tuned(found, [100, 125, 150, 200, 250, 300, 400, 500, 700, 1_000, 1_500, 2_000], world, target)
    index.set_ef(ef)
    index.save_index(str(folder))
    settings = {"M": 16, "ef_construction": 200, "ef": ef}
    return Contender("hnswlib", search, clock.wall_s, clock.cpu_s, _size(folder), settings)


def faiss_ivf_pq(world: World, target: float, folder: Path) -> Contender:
    """faiss: partition, 4-bit product quantisation with fast scan, true scores for the best candidates."""
    num_items, width = world.items.shape
    num_leaves = round(2 * num_items**0.5)
    recipe = f"IVF{num_leaves},PQ{width // 2}x4fs,RFlat"
    index = faiss.index_factory(width, recipe, faiss.METRIC_INNER_PRODUCT)
    with _Clock() as clock:
        index.train(world.items[:: max(1, num_items // 200_000)])
        index.add(world.items)
    faiss.omp_set_num_threads(1)
    lists = faiss.extract_index_ivf(faiss.downcast_index(index.base_index))
    index.k_factor = 4

    def found(nprobe: int) -> np.ndarray:
        lists.nprobe = nprobe
        return index.search(world.sample_queries, NEIGHBOURS)[1]

    ladder = [
        max(1, round(num_leaves * share)) for share in (0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.12, 0.18, 0.25)
    ]
    nprobe = _tuned(found, ladder, world, target)
    lists.nprobe = nprobe
    faiss.write_index(index, str(folder))
    return Contender(
        "faiss IVF-PQ",
        lambda queries: index.search(queries, NEIGHBOURS)[1],
        clock.wall_s,
        clock.cpu_s,
        _size(folder),
        {"recipe": recipe, "nprobe": nprobe, "k_factor": 4},
    )


def _rows(found: np.ndarray | tf.Tensor) -> np.ndarray:
    if isinstance(found, np.ndarray):
        return found
    return np.array([[int(item_id[1:] or -1) for item_id in row] for row in found.numpy()])


def measure(contenders: list[Contender], world: World) -> None:
    """Lets the contenders take turns, so that a slow minute of the machine hits all of them."""
    batches = {
        size: [world.queries[start : start + size] for start in range(0, len(world.queries), size)]
        for size in (1, BATCH)
    }
    for contender in contenders:
        found = [_rows(contender.search(batch)) for batch in batches[BATCH][:4]]
        contender.recall = recall(np.concatenate(found), world.exact)
        contender.search(batches[1][0])
    for repeat in range(_REPEATS):
        click.echo(f"measuring, round {repeat + 1} of {_REPEATS}", err=True)
        for contender in contenders:
            for size, of_size in batches.items():
                walls: list[float] = []
                with _Clock() as clock:
                    for batch in _for_a_second(of_size):
                        started = time.perf_counter()
                        contender.search(batch)
                        walls.append(time.perf_counter() - started)
                contender.queries_per_cpu_s[size].append(len(walls) * size / clock.cpu_s)
                if size == 1:
                    contender.p50_ms.append(1e3 * statistics.median(walls))


def _for_a_second(batches: list[np.ndarray]) -> Iterator[np.ndarray]:
    end = time.perf_counter() + _SECONDS_PER_REPEAT
    yield batches[0]
    for batch in batches[1:]:
        if time.perf_counter() > end:
            return
        yield batch


def table(figures: dict[str, dict[str, Any]]) -> str:
    """The figures as text, one contender per line."""
    lines = [
        f"{'':<22}{'recall@100':>11}{'q/CPU-s, 1':>12}{f'q/CPU-s, {BATCH}':>14}{'p50 ms, 1':>11}"
        f"{'build CPU s':>13}{'build s':>9}{'size MB':>9}"
    ]
    for name, row in figures.items():
        lines.append(
            f"{name:<22}{row['recall_at_100']:>11.4f}{row['queries_per_cpu_s_batch_1']:>12,.0f}"
            f"{row[f'queries_per_cpu_s_batch_{BATCH}']:>14,.0f}{row['p50_ms_batch_1']:>11.3f}"
            f"{row['build_cpu_s']:>13.1f}{row['build_wall_s']:>9.1f}{row['size_bytes'] / 1e6:>9.0f}"
        )
    return "\n".join(lines)


@click.command(help=__doc__.split("\n", 1)[0])
@click.option("--items", default=200_000, show_default=True, type=click.IntRange(5_000), help="items")
@click.option("--width", default=128, show_default=True, type=click.IntRange(2), help="width of a vector")
@click.option("--min-recall", default=0.95, show_default=True, type=click.FloatRange(0, 1), help="at 100")
@click.option("--seed", default=0, show_default=True, help="of the vectors")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="also write the figures here")
def main(items: int, width: int, min_recall: float, seed: int, json_file: Path | None) -> None:
    """Builds all, measures all, prints the table."""
    vectors, queries = clustered_vectors(items, width, _SAMPLE_QUERIES + _QUERIES, seed)
    click.echo(f"{items:,} items of width {width}: exact search for the comparison", err=True)
    world = World(
        items=vectors,
        sample_queries=queries[:_SAMPLE_QUERIES],
        queries=queries[_SAMPLE_QUERIES:],
        sample_exact=exact_rows(vectors, queries[:_SAMPLE_QUERIES]),
        exact=exact_rows(vectors, queries[_SAMPLE_QUERIES : _SAMPLE_QUERIES + 4 * BATCH]),
    )
    with tempfile.TemporaryDirectory(prefix="funnel-index-") as name:
        folder = Path(name)
        facts, contenders = funnel(world, min_recall, folder / "funnel")
        _announce(contenders[0])
        for build in (
            lambda: scann_pybind(world, facts, folder / "scann"),
            lambda: tfrs_layer(world, facts),
            lambda: hnsw(world, min_recall, folder / "hnswlib"),
            lambda: faiss_ivf_pq(world, min_recall, folder / "faiss"),
        ):
            contenders.append(build())
            _announce(contenders[-1])
        measure(contenders, world)
    figures = {contender.name: contender.figures() for contender in contenders}
    click.echo(f"\n{items:,} items of width {width}, top {NEIGHBOURS}, tuned to recall {min_recall}")
    click.echo(table(figures))
    rate = f"queries_per_cpu_s_batch_{BATCH}"
    ours = figures[contenders[0].name][rate]
    for name in ("ScaNN, pybind", "TFRS layer", "hnswlib", "faiss IVF-PQ"):
        click.echo(f"exported index / {name}: {ours / figures[name][rate]:.2f} x at batch {BATCH}")
    if json_file is not None:
        json_file.write_text(
            json.dumps({"items": items, "width": width, "seed": seed, "figures": figures}, indent=1),
            encoding="utf-8",
        )


def _announce(contender: Contender) -> None:
    click.echo(f"built {contender.name} in {contender.build_wall_s:.0f} s: {contender.settings}", err=True)


if __name__ == "__main__":
    main()
