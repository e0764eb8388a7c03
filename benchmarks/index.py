"""The exported candidate index against other libraries: recall, speed, build time and size.

Example:
  python -m benchmarks.index build --items 200000 --width 128 --dir runs/index-200k
  python -m benchmarks.index measure --dir runs/index-200k
  python -m benchmarks.index build --items 1000000 --width 64 --dir runs/index-1m
  python -m benchmarks.index measure --dir runs/index-1m

Needs the extras `benchmarks` and `index-benchmark`. Building takes minutes and may share the machine;
measuring takes two and wants it idle. Every library is tuned to the same recall at 100 by its own settings,
and then all take turns, one thread per query. Exported models are called as the model server calls them.
Speed is counted in queries per second of processor time, all threads together; a busy machine lowers all
figures, by what the contenders lose of its caches.

Vectors: see benchmarks/vectors.py.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import trainer  # noqa: F401  # isort: skip  selects Keras 2, before TensorFlow is imported
import click
import faiss
import hnswlib
import numpy as np
import scann
import tensorflow as tf
import tensorflow_recommenders as tfrs

from benchmarks.vectors import clustered_vectors
from serving.servable import Servable
from trainer.config import IndexConfig
from trainer.index import PARTITION_AVQ
from trainer.index_build import build_index
from trainer.served_index import EXCLUDED, K, ServedIndex

NEIGHBOURS = 100
BATCH = 256
# Folders of what is built.
FUNNEL, SCANN, TFRS, HNSWLIB, FAISS = "funnel", "scann", "tfrs", "hnswlib", "faiss"
_SAMPLE_QUERIES, _QUERIES, _EXCLUDED = 1_024, 2_048, 50
_REPEATS = 5
_SECONDS_PER_REPEAT = 1.0
_HNSW_EFFORTS = (100, 125, 150, 200, 250, 300, 400, 500, 700, 1_000, 1_500, 2_000, 3_000)
# Candidates that faiss scores exactly, in neighbours.
_K_FACTORS = (4, 8, 16, 32, 64)
_IVF_SHARES = (0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.12, 0.18, 0.25)

Settings = dict[str, Any]
_Effort = TypeVar("_Effort")
# Takes float32 [B, D] and returns rows [B, NEIGHBOURS], or ids b"i<row>".
Search = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class World:
    """Vectors of items, of queries to tune on and of others to measure with, and the exact answers."""

    items: np.ndarray
    sample_queries: np.ndarray
    queries: np.ndarray
    sample_exact: np.ndarray
    exact: np.ndarray

    @classmethod
    def draw(cls, num_items: int, width: int, seed: int, decay: float) -> World:
        """Makes one up."""
        items, queries = clustered_vectors(num_items, width, _SAMPLE_QUERIES + _QUERIES, seed, decay)
        return cls(
            items,
            queries[:_SAMPLE_QUERIES],
            queries[_SAMPLE_QUERIES:],
            exact_rows(items, queries[:_SAMPLE_QUERIES]),
            exact_rows(items, queries[_SAMPLE_QUERIES : _SAMPLE_QUERIES + 4 * BATCH]),
        )


@dataclasses.dataclass
class Built:
    """What building cost, and how the index is searched.

    Attributes:
      wall_s, cpu_s: of the build, tuning by the library's own means included.
      size_bytes: on disk, which is about what it takes in memory.
      settings: of the build, and those that reach the recall.
    """

    wall_s: float
    cpu_s: float
    size_bytes: int
    settings: Settings


@dataclasses.dataclass
class Contender:
    """A loaded index and its measurements.

    Attributes:
      name: in the table.
      search: what is measured.
      built: what building it cost.
      exact: what finds all that it should; None where that is the best items of all.
    """

    name: str
    search: Search
    built: Built
    exact: Search | None = None
    recall: float = float("nan")
    queries_per_cpu_s: dict[int, list[float]] = dataclasses.field(default_factory=lambda: {1: [], BATCH: []})
    p50_ms: list[float] = dataclasses.field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        """What was measured, the median of the repeats."""
        return {
            "recall_at_100": self.recall,
            "queries_per_cpu_s_batch_1": statistics.median(self.queries_per_cpu_s[1]),
            f"queries_per_cpu_s_batch_{BATCH}": statistics.median(self.queries_per_cpu_s[BATCH]),
            "p50_ms_batch_1": statistics.median(self.p50_ms),
            "build_wall_s": self.built.wall_s,
            "build_cpu_s": self.built.cpu_s,
            "size_bytes": self.built.size_bytes,
            "settings": self.built.settings,
        }


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


def _tuned(
    search_with: Callable[[_Effort], np.ndarray], efforts: Sequence[_Effort], world: World, target: float
) -> _Effort:
    """The first effort whose recall on the sample queries reaches the target, else the last."""
    return next((e for e in efforts if recall(search_with(e), world.sample_exact) >= target), efforts[-1])


class ExportedIndex(tf.Module):
    """The index as the retrieval model exports it, behind a query tower that does nothing."""

    def __init__(self, served: ServedIndex) -> None:
        """Takes the index, `served`; its items have the width of the queries."""
        super().__init__()
        self.index = served

    def save(self, folder: Path, width: int) -> None:
        """Writes the SavedModel, for queries of a width."""
        tf.saved_model.save(self, str(folder), signatures=self._signatures(width), options=_SAVE_OPTIONS)

    def _signatures(self, width: int) -> dict[str, Any]:
        def serve(exact: bool) -> Any:
            def search(queries: tf.Tensor, **request: tf.Tensor) -> dict[str, tf.Tensor]:
                found = self.index.search(queries, request, exact)
                return {"item_ids": self.index.ids(found.rows), "scores": found.scores}

            queries = tf.TensorSpec([None, width], tf.float32, name="queries")
            signature = self.index.request_signature()
            return tf.function(search, autograph=False).get_concrete_function(queries, **signature)

        return {"serving_default": serve(exact=False), "serving_exact": serve(exact=True)}


_SAVE_OPTIONS = tf.saved_model.SaveOptions(namespace_whitelist=["Scann"])


def build_funnel(world: World, target: float, folder: Path) -> Settings:
    """Our index, as it is exported."""
    ids = [f"i{row}" for row in range(len(world.items))]
    index, facts = build_index(
        ids, world.items, world.sample_queries, IndexConfig(min_recall=target), NEIGHBOURS
    )
    if not facts.settings["num_leaves"]:
        raise click.ClickException(
            f"among {len(ids):,} items of width {world.items.shape[1]} it takes least to score every one: "
            "there is nothing to compare; give more --items or a larger --width"
        )
    ExportedIndex(ServedIndex(index, ids, NEIGHBOURS)).save(folder, world.items.shape[1])
    effort = dataclasses.asdict(facts.efforts[-1])
    del effort["recall"]
    return {**facts.settings, **effort}


def load_funnel(world: World, settings: Settings, folder: Path) -> dict[str, Search]:
    """Our index, loaded again: plain requests, requests that exclude items, and exact search."""
    servable = Servable(FUNNEL, 1, folder)
    rng = np.random.default_rng(1)
    excluded_ids = rng.integers(len(world.items), size=(BATCH, _EXCLUDED))
    excluded = np.array([[b"i%d" % row for row in rows] for rows in excluded_ids], object)
    nothing = np.full((BATCH, 1), b"", object)

    return {
        "funnel, exported": served_search(servable, "serving_default", {EXCLUDED: nothing}),
        f"funnel, {_EXCLUDED} excluded": served_search(servable, "serving_default", {EXCLUDED: excluded}),
        "funnel, exact twin": served_search(servable, "serving_exact", {EXCLUDED: nothing}),
    }


def served_search(servable: Servable, signature: str, inputs: Mapping[str, np.ndarray]) -> Search:
    """Asks a signature for the ids of the top NEIGHBOURS, with further inputs [BATCH, ...] of a request."""
    requests = {
        size: {K: np.full(size, NEIGHBOURS, np.int32), **{name: of[:size] for name, of in inputs.items()}}
        for size in (1, BATCH)
    }
    return lambda queries: servable.predict(signature, {"queries": queries, **requests[len(queries)]})[
        "item_ids"
    ]


def build_scann(world: World, target: float, folder: Path) -> Settings:
    """ScaNN without TensorFlow, with the settings that our index was tuned to."""
    ours = read_built(folder.parent)[FUNNEL].settings
    searcher = (
        scann.scann_ops_pybind.builder(world.items, NEIGHBOURS, "dot_product")
        .tree(ours["num_leaves"], ours["num_leaves_to_search"], avq=PARTITION_AVQ)
        .score_ah(ours["dimensions_per_block"], anisotropic_quantization_threshold=0.2)
        .reorder(ours["num_reordering_candidates"])
        .build()
    )
    folder.mkdir()
    searcher.serialize(str(folder))
    return {"as": FUNNEL}


def load_scann(world: World, settings: Settings, folder: Path) -> dict[str, Search]:
    """ScaNN's Python binding."""
    searcher = scann.scann_ops_pybind.load_searcher(str(folder))

    def search(queries: np.ndarray) -> np.ndarray:
        return (
            searcher.search(queries[0])[0][None] if len(queries) == 1 else searcher.search_batched(queries)[0]
        )

    return {"ScaNN, pybind": search}


def build_tfrs(world: World, target: float, folder: Path) -> Settings:
    """The ScaNN layer of TensorFlow Recommenders, with the same settings as far as it takes them."""
    ours = read_built(folder.parent)[FUNNEL].settings
    layer = tfrs.layers.factorized_top_k.ScaNN(
        k=NEIGHBOURS,
        num_leaves=ours["num_leaves"],
        num_leaves_to_search=ours["num_leaves_to_search"],
        dimensions_per_block=ours["dimensions_per_block"],
        num_reordering_candidates=ours["num_reordering_candidates"],
    )
    layer.index(world.items, tf.constant([f"i{row}" for row in range(len(world.items))]))
    layer(world.queries[:1])  # Keras saves a layer that was called
    tf.saved_model.save(layer, str(folder), options=_SAVE_OPTIONS)
    return {"as": f"{FUNNEL}, without the anisotropic threshold"}


def load_tfrs(world: World, settings: Settings, folder: Path) -> dict[str, Search]:
    """TFRS's layer."""
    servable = Servable(TFRS, 1, folder)
    signature = servable.signature("serving_default")
    (queries_name,) = signature.inputs
    (ids_name,) = (
        name for name, info in signature.outputs.items() if info.dtype == tf.string.as_datatype_enum
    )
    return {"TFRS layer": lambda queries: servable.predict("", {queries_name: queries})[ids_name]}


def build_hnswlib(world: World, target: float, folder: Path) -> Settings:
    """hnswlib's graph. Dot products become distances by one more dimension that makes all norms equal.

    That is the reduction of Bachrach et al. (RecSys 2014). In hnswlib's own inner-product space, no metric,
    it takes a search several times as wide for the same recall on these vectors.
    """
    squares = np.sum(world.items**2, axis=1, keepdims=True)
    items = np.hstack([world.items, np.sqrt(squares.max() - squares)])
    index = hnswlib.Index(space="l2", dim=items.shape[1])
    index.init_index(max_elements=len(items), M=16, ef_construction=200)
    index.add_items(items)
    index.save_index(str(folder))

    def found(ef: int) -> np.ndarray:
        index.set_ef(ef)
        return index.knn_query(np.pad(world.sample_queries, ((0, 0), (0, 1))), k=NEIGHBOURS)[0]

    return {"M": 16, "ef_construction": 200, "ef": _tuned(found, _HNSW_EFFORTS, world, target)}


def load_hnswlib(world: World, settings: Settings, folder: Path) -> dict[str, Search]:
    """hnswlib on one thread."""
    index = hnswlib.Index(space="l2", dim=world.items.shape[1] + 1)
    index.load_index(str(folder))
    index.set_num_threads(1)
    index.set_ef(settings["ef"])
    return {
        "hnswlib": lambda queries: index.knn_query(np.pad(queries, ((0, 0), (0, 1))), k=NEIGHBOURS)[0],
    }


def build_faiss(world: World, target: float, folder: Path) -> Settings:
    """faiss: partition, 4-bit product quantisation with fast scan, true scores for the best candidates."""
    num_items, width = world.items.shape
    num_leaves = round(2 * num_items**0.5)
    recipe = f"IVF{num_leaves},PQ{width // 2}x4fs,RFlat"
    index = faiss.index_factory(width, recipe, faiss.METRIC_INNER_PRODUCT)
    index.train(world.items[:: max(1, num_items // 200_000)])
    index.add(world.items)

    def found(effort: tuple[int, int]) -> np.ndarray:
        return index.search(world.sample_queries, NEIGHBOURS, params=_faiss_effort(*effort))[1]

    def cpu_s(effort: tuple[int, int]) -> float:
        started = time.process_time()
        found(effort)
        return time.process_time() - started

    ladder = [max(1, round(num_leaves * share)) for share in _IVF_SHARES]
    # The fewest leaves by each number of candidates, and of these what costs least.
    tuned = [_tuned(found, [(nprobe, k) for nprobe in ladder], world, target) for k in _K_FACTORS]
    enough = [effort for effort in tuned if recall(found(effort), world.sample_exact) >= target]
    nprobe, k_factor = min(enough, key=cpu_s) if enough else tuned[-1]
    faiss.write_index(index, str(folder))
    return {"recipe": recipe, "nprobe": nprobe, "k_factor": k_factor}


def _faiss_effort(nprobe: int, k_factor: int) -> faiss.SearchParameters:
    lists = faiss.SearchParametersIVF(nprobe=nprobe)
    return faiss.IndexRefineSearchParameters(k_factor=k_factor, base_index_params=lists)


def load_faiss(world: World, settings: Settings, folder: Path) -> dict[str, Search]:
    """faiss on one thread."""
    faiss.omp_set_num_threads(1)
    index, effort = faiss.read_index(str(folder)), _faiss_effort(settings["nprobe"], settings["k_factor"])
    return {"faiss IVF-PQ": lambda queries: index.search(queries, NEIGHBOURS, params=effort)[1]}


# In the order of building: some take the settings of the first.
_BUILDS: Mapping[str, Callable[[World, float, Path], Settings]] = {
    FUNNEL: build_funnel,
    SCANN: build_scann,
    TFRS: build_tfrs,
    HNSWLIB: build_hnswlib,
    FAISS: build_faiss,
}
_LOADS: Mapping[str, Callable[[World, Settings, Path], dict[str, Search]]] = {
    FUNNEL: load_funnel,
    SCANN: load_scann,
    TFRS: load_tfrs,
    HNSWLIB: load_hnswlib,
    FAISS: load_faiss,
}


def read_built(folder: Path) -> dict[str, Built]:
    """What `build` has written to a folder so far."""
    return {
        name: Built(**json.loads((folder / f"{name}.json").read_text()))
        for name in _BUILDS
        if (folder / f"{name}.json").exists()
    }


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file())


def _rows(found: np.ndarray) -> np.ndarray:
    if found.dtype != object:
        return found
    return np.array([[int(item_id[1:] or -1) for item_id in row] for row in found])


def measure_in_turns(contenders: list[Contender], world: World) -> None:
    """Lets the contenders take turns, so that a slow minute of the machine hits all of them."""
    batches = {
        size: [world.queries[start : start + size] for start in range(0, len(world.queries), size)]
        for size in (1, BATCH)
    }
    for contender in contenders:
        asked = batches[BATCH][:4]
        exact = world.exact
        if contender.exact is not None:
            exact = np.concatenate([_rows(contender.exact(batch)) for batch in asked])
        contender.recall = recall(np.concatenate([_rows(contender.search(batch)) for batch in asked]), exact)
        contender.search(batches[1][0])
    for repeat in range(_REPEATS):
        click.echo(f"measuring, round {repeat + 1} of {_REPEATS}", err=True)
        for contender in contenders:
            for size, of_size in batches.items():
                walls: list[float] = []
                cpu_s = -time.process_time()
                for batch in _for_a_second(of_size):
                    started = time.perf_counter()
                    contender.search(batch)
                    walls.append(time.perf_counter() - started)
                cpu_s += time.process_time()
                contender.queries_per_cpu_s[size].append(len(walls) * size / cpu_s)
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


@click.group(help=__doc__)
def main() -> None:
    """See the docstring of the module."""


_DIR = click.option("--dir", "folder", type=click.Path(path_type=Path), required=True, help="of the indexes")


@main.command()
@click.option("--items", default=200_000, show_default=True, type=click.IntRange(5_000), help="items")
@click.option("--width", default=128, show_default=True, type=click.IntRange(2), help="width of a vector")
@click.option("--min-recall", default=0.95, show_default=True, type=click.FloatRange(0, 1), help="at 100")
@click.option("--seed", default=0, show_default=True, help="of the vectors")
@click.option(
    "--decay",
    default=0.7,
    show_default=True,
    type=click.FloatRange(0),
    help="how unevenly vectors spread over directions; 0.7 as trained ones, 0 evenly, which is far harder",
)
@_DIR
def build(items: int, width: int, min_recall: float, seed: int, decay: float, folder: Path) -> None:
    """Draws the vectors, and builds and tunes every index that the folder does not hold yet."""
    folder.mkdir(parents=True, exist_ok=True)
    vectors = folder / "vectors.npz"
    if not vectors.exists():
        click.echo(f"{items:,} items of width {width}: exact search for the comparison", err=True)
        world = World.draw(items, width, seed, decay)
        partial = folder / "partial.npz"
        np.savez(partial, **vars(world))
        partial.rename(vectors)
    world = read_world(folder)
    for name, build_one in _BUILDS.items():
        if name in read_built(folder):
            continue
        wall_s, cpu_s = -time.perf_counter(), -time.process_time()
        settings = build_one(world, min_recall, folder / name)
        wall_s, cpu_s = wall_s + time.perf_counter(), cpu_s + time.process_time()
        built = Built(wall_s, cpu_s, _size(folder / name), settings)
        (folder / f"{name}.json").write_text(json.dumps(dataclasses.asdict(built)), encoding="utf-8")
        click.echo(f"built {name} in {wall_s:.0f} s: {settings}", err=True)


@main.command()
@_DIR
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="also write the figures here")
def measure(folder: Path, json_file: Path | None) -> None:
    """Measures all indexes of a folder and prints the table."""
    # As the model server does.
    tf.config.threading.set_intra_op_parallelism_threads(1)
    world, built = read_world(folder), read_built(folder)
    contenders = [
        Contender(contender, search, built[name])
        for name in built
        for contender, search in _LOADS[name](world, built[name].settings, folder / name).items()
    ]
    measure_in_turns(contenders, world)
    figures = {contender.name: contender.figures() for contender in contenders}
    items, width = world.items.shape
    click.echo(f"\n{items:,} items of width {width}, top {NEIGHBOURS}; load {os.getloadavg()[0]:.1f}")
    click.echo(table(figures))
    rate = f"queries_per_cpu_s_batch_{BATCH}"
    for other in contenders[3:]:
        ratio = figures[contenders[0].name][rate] / figures[other.name][rate]
        click.echo(f"exported index / {other.name}: {ratio:.2f} x at batch {BATCH}")
    if json_file is not None:
        json_file.write_text(
            json.dumps({"items": items, "width": width, "figures": figures}, indent=1), encoding="utf-8"
        )


def read_world(folder: Path) -> World:
    """The vectors that `build` has drawn."""
    with np.load(folder / "vectors.npz") as arrays:
        return World(**arrays)


if __name__ == "__main__":
    main()
