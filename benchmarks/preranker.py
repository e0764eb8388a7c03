"""Speed and survival of the pre-ranker: 5,000 candidates cut to 500, and what the ranker then misses.

With --run-dir the ranker of a finished run is distilled anew on its training examples, without the users who
are asked afterwards, and both signatures are asked in process: the ranker for the scores of all candidates,
the pre-ranker for the best of them. Survival is the share of the ranker's best that the pre-ranker keeps. The
requests are user states, of the end of training; the candidates are drawn from the whole catalogue.

Without --run-dir only speed is measured, of untrained models of the same build on made-up data in the form of
KuaiRand-Pure.

One thread does all the work. Wall time includes waiting for a core where others want it; CPU time does not.

Example, from the root of the repository:
  python -m benchmarks.preranker --run-dir runs/seed0 --json out/preranker.json
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import trainer  # noqa: F401  # isort: skip  selects Keras 2, before TensorFlow is imported
import apache_beam as beam
import click
import numpy as np
import tensorflow as tf
import tensorflow_transform as tft
import tensorflow_transform.beam as tft_beam
from tensorflow_transform.tf_metadata import dataset_metadata, metadata_io
from tfx_bsl.tfxio import tf_example_record

from schema.contract import DatasetSpec, load_dataset_spec
from schema.errors import DataError
from schema.point_in_time import count_names
from schema.tables import read_summary
from tfx_pipeline.config import RANKING, RunPaths
from tfx_pipeline.recommend import serving_folder
from tfx_pipeline.run_result import RunResult, read_run
from tfx_pipeline.user_states import ranking_arrays, read_user_states
from trainer import features as ft
from trainer import raw_inputs
from trainer.calibration import Calibrator
from trainer.catalogue import Catalogue
from trainer.checkpoint import Network, catalogue_files, read_checkpoint
from trainer.config import RankingConfig
from trainer.debiasing import PositionStatistics
from trainer.distillation import Labelled, distil, item_popularity, latest_requests, mean_scores, survival
from trainer.impressions import ItemAttributes
from trainer.input_pipeline import Window, load_catalogue, windows
from trainer.label_statistics import LabelStatistics, label_statistics
from trainer.preprocessing import preprocessing_fn, vocabulary_sizes
from trainer.preranker import (
    PreRanker,
    PreRanking,
    ServedPreRanker,
    catalogue_features,
    describe_items,
    describe_query,
)
from trainer.preranker_config import PrerankerConfig
from trainer.ranking import SCORE, RankingModel
from trainer.ranking_export import CANDIDATES, ServedRanker
from trainer.served_index import K
from trainer.tfx_schema import interactions_schema
from trainer.transform_graph import TransformGraph

NUM_CANDIDATES, NUM_KEPT = 5_000, 500
TARGET_P50_MS = 10.0
BEST, KEPT = (10, 50), (100, 200, 500, 1_000)
RANK, PRE_RANK = "rank", "pre_rank"
# Requests that are timed, and how often each is asked.
_TIMED_REQUESTS, _REPEATS = 20, 5
# The made-up world.
_NUM_ITEMS, _NUM_VALUES = 7_583, 20
_TRAIN_END_UNIX_S = 1_700_000_000
_SECONDS_PER_DAY = 86_400

Request = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Exported:
    """A ranker and its pre-ranker in one SavedModel.

    Attributes:
      path: its folder.
      item_ids: object [I] of str, of its catalogue.
      popularity: float32 [I], see `trainer.distillation.item_popularity`.
      requests: raw inputs of the ranker without candidates, one request each: [1], lists [1, L].
      facts: how the pre-ranker came about.
    """

    path: Path
    item_ids: np.ndarray
    popularity: np.ndarray
    requests: Sequence[Request]
    facts: Mapping[str, Any]


def distilled(run_dir: Path, folder: Path, num_users: int, config: PrerankerConfig) -> Exported:
    """Distils the released ranker of a run on users who are not asked afterwards.

    Args:
      run_dir: output directory of a finished `funnel run`.
      folder: where to write the SavedModel.
      num_users: users with impressions who are asked, at most.
      config: of the pre-ranker.

    Raises:
      DataError: there is no finished run, or its examples are gone.
      CheckpointError: the ranker was exported by other code.
      ServingError: no ranker was released.
    """
    run, paths = read_run(run_dir), RunPaths(run_dir)
    ranker, catalogue, spec, output = restored(serving_folder(run, paths, RANKING))
    layer = TransformGraph(output)
    user_id = ft.feature_space(spec).find(ft.USER_ID).id_name

    requests = asked_requests(run, spec, num_users, config.seed)
    transform = raw_inputs.compiled(raw_inputs.transform_query, layer, spec)
    asked = [int(transform(_query(request, spec))[user_id][0]) for request in requests]
    examples = _latest(paths.pipeline_root / "InteractionGen" / "examples")
    # The checkpoint's graph has no declaration of raw examples, the run's has.
    graph = tft.TFTransformOutput(str(_latest(paths.pipeline_root / "Transform" / "transform_graph")))
    train = windows([f"{examples}/Split-train/*.gz"], graph)
    others = [without_users(window, user_id, asked) for window in train]
    learnt_from = latest_requests(others, config.num_queries + config.num_validation_users, config.seed)

    served = ServedRanker(ranker, layer, catalogue, spec)
    moment = read_summary(Path(run.tables_dir)).train_end_unix_s
    start_s = time.process_time()
    items = catalogue_features(served.ranker, layer, spec, moment)
    found = distil(ranker, learnt_from, items, spec, config)
    facts = {
        "num_requests": len(learnt_from[user_id]),
        "cpu_s": time.process_time() - start_s,
        "log": found.log,
        "held_out": found.survival,
    }
    preranking = PreRanking(found.student, moment, config.num_kept)
    _save(served, ServedPreRanker(preranking, served, layer, spec), folder)
    popularity = item_popularity(items, spec)[:-1]
    return Exported(folder, catalogue.item_ids, popularity, requests, facts)


def restored(model_dir: Path) -> tuple[RankingModel, Catalogue, DatasetSpec, Any]:
    """The ranker of an exported model, its catalogue, its declaration and its Transform graph."""
    checkpoint = read_checkpoint(model_dir)
    spec, output, settings = checkpoint.spec, checkpoint.transform_output, checkpoint.settings
    catalogue = load_catalogue(catalogue_files(model_dir), output, spec)
    sizes = vocabulary_sizes(output, spec)
    ranker = RankingModel(
        spec,
        sizes,
        {name: LabelStatistics(**value) for name, value in settings["statistics"].items()},
        ItemAttributes(catalogue, sizes[ft.ITEM_SPACE], spec),
        checkpoint.read_config(RankingConfig),
        {name: PositionStatistics(**value) for name, value in settings["positions"].items()} or None,
    )
    checkpoint.restore(Network(ranker, [ranker], ranker))
    ranker.calibrators = {
        name: Calibrator.from_dict(value) for name, value in settings["calibrators"].items()
    }
    return ranker, catalogue, spec, output


def asked_requests(run: RunResult, spec: DatasetSpec, num_users: int, seed: int) -> list[Request]:
    """Requests of users with impressions as of the end of training, drawn at random."""
    states = [state for state in read_user_states([run.user_states], spec) if state.impressions]
    chosen = np.random.default_rng(seed).permutation(len(states))[:num_users]
    return [ranking_arrays([states[place]], spec) for place in chosen]


def without_users(window: Window, user_id: str, users: Sequence[int]) -> dict[str, tf.Tensor]:
    """The rows of a window that are of none of these users."""
    of_others = ~np.isin(window[user_id], users)
    return {name: tf.boolean_mask(column, of_others) for name, column in window.items()}


def made_up(folder: Path, spec: DatasetSpec, config: PrerankerConfig) -> Exported:
    """An untrained ranker and pre-ranker on made-up users and items.

    Args:
      folder: where to write the Transform graph and the SavedModel.
      spec: the features.
      config: of the pre-ranker.
    """
    rng = np.random.default_rng(config.seed)
    item_ids = np.array([f"item{number}" for number in range(_NUM_ITEMS)], object)
    output = _transform_graph(folder, _raw_examples(spec, item_ids, rng), spec)
    layer = TransformGraph(output)
    catalogue = _catalogue(spec, layer, item_ids, rng)
    sizes = vocabulary_sizes(output, spec)
    labels = {label: rng.integers(2, size=1_000).astype(np.float32) for label in spec.task_labels}
    buckets = {f"{f.name}_bucket": rng.integers(33, size=1_000) for f in spec.items.features}
    statistics = label_statistics([{**labels, **buckets}], spec.tasks)
    attributes = ItemAttributes(catalogue, sizes[ft.ITEM_SPACE], spec)
    ranker = RankingModel(spec, sizes, statistics, attributes, RankingConfig())
    requests = [_raw_request(spec, item_ids, rng) for _ in range(_TIMED_REQUESTS)]

    served = ServedRanker(ranker, layer, catalogue, spec)
    # The variables of the layers exist once they have been asked.
    served.rank(_tensors(requests[0]), tf.constant([list(item_ids[:2])]))
    served = ServedRanker(ranker, layer, catalogue, spec)
    items = catalogue_features(served.ranker, layer, spec, _TRAIN_END_UNIX_S)
    described = describe_items(ranker, items)
    features = raw_inputs.transform_request(layer, _tensors(requests[0]), spec)
    queries = describe_query(ranker, ranker.encode_query(features))
    student = PreRanker(queries.shape[1], described.shape[1], config)
    # A pre-ranker that was fitted to nothing reads nothing.
    student.query_inputs.fit(tf.random.normal([100, queries.shape[1]]))
    student.item_inputs.fit(described)
    preranking = PreRanking(student, _TRAIN_END_UNIX_S, config.num_kept)
    pre_ranker = ServedPreRanker(preranking, served, layer, spec)
    _save(served, pre_ranker, folder / "model")
    return Exported(folder / "model", item_ids, item_popularity(items, spec)[:-1], requests, {})


def _save(served: ServedRanker, pre_ranker: ServedPreRanker, folder: Path) -> None:
    both = tf.Module()
    both.served, both.pre_ranker = served, pre_ranker
    signatures = {RANK: served.signatures()["serving_default"], PRE_RANK: pre_ranker.signature().traced()}
    tf.saved_model.save(both, str(folder), signatures=signatures)


def _raw_request(spec: DatasetSpec, item_ids: np.ndarray, rng: np.random.Generator) -> Request:
    """A request with as long a history and as many impressions as there may be."""
    request = {raw.name: _values(raw, 1, rng) for raw in ft.raw_query_inputs(spec)}
    for raw in ft.raw_impression_inputs(spec):
        request[raw.name] = _values(raw, spec.max_impressions, rng)
    request[ft.HISTORY] = rng.choice(item_ids, spec.max_history)
    request[ft.IMPRESSION_ITEMS] = rng.choice(item_ids, spec.max_impressions)
    is_list = {raw.name: raw.is_list for raw in ft.raw_query_inputs(spec)}
    return {
        name: values[np.newaxis] if is_list.get(name, True) else values for name, values in request.items()
    }


def _values(raw: ft.RawInput, count: int, rng: np.random.Generator) -> np.ndarray:
    if raw.dtype == "int64":
        return _TRAIN_END_UNIX_S - rng.integers(30 * _SECONDS_PER_DAY, size=count)
    if raw.dtype == "float32":
        return rng.random(count).astype(np.float32)
    return np.array([f"v{number}" for number in rng.integers(_NUM_VALUES, size=count)], object)


def _raw_examples(spec: DatasetSpec, item_ids: np.ndarray, rng: np.random.Generator) -> list[bytes]:
    """Serialized interaction examples that hold every feature; every item at least once."""
    inputs = (*ft.raw_query_inputs(spec), *ft.raw_candidate_inputs(spec), *ft.raw_impression_inputs(spec))
    examples = []
    for item_id in item_ids:
        columns = {raw.name: _values(raw, 1, rng) for raw in inputs}
        columns[ft.ITEM_ID] = np.array([item_id], object)
        columns[ft.ITEM_COUNTS] = rng.integers(1_000, size=len(count_names(spec))).astype(np.float32)
        example = tf.train.Example()
        for name, values in columns.items():
            feature = example.features.feature[name]
            if values.dtype == object:
                feature.bytes_list.value.extend(value.encode() for value in values)
            elif values.dtype == np.float32:
                feature.float_list.value.extend(values)
            else:
                feature.int64_list.value.extend(values)
        examples.append(example.SerializeToString())
    return examples


def _transform_graph(folder: Path, examples: Sequence[bytes], spec: DatasetSpec) -> tft.TFTransformOutput:
    pattern = str(folder / "examples.gz")
    with tf.io.TFRecordWriter(pattern, "GZIP") as writer:
        for example in examples:
            writer.write(example)
    metadata = dataset_metadata.DatasetMetadata(interactions_schema(spec))
    config = {"dataset": spec.model_dump_json(), "train_end_unix_s": _TRAIN_END_UNIX_S}
    source = tf_example_record.TFExampleRecord(pattern, schema=metadata.schema)
    with beam.Pipeline() as pipeline, tft_beam.Context(temp_dir=str(folder / "tmp")):
        data = pipeline | source.BeamSource()
        transform_fn = (data, source.TensorAdapterConfig()) | tft_beam.AnalyzeDataset(
            lambda inputs: preprocessing_fn(inputs, config)
        )
        _ = transform_fn | tft_beam.WriteTransformFn(str(folder / "transform"))
    output = folder / "transform"
    metadata_io.write_metadata(metadata, str(output / tft.TFTransformOutput.RAW_METADATA_DIR))
    return tft.TFTransformOutput(str(output))


def _catalogue(spec: DatasetSpec, layer: Any, item_ids: np.ndarray, rng: np.random.Generator) -> Catalogue:
    raw = {}
    for feature in ft.raw_candidate_inputs(spec):
        values = _values(feature, len(item_ids), rng)
        raw[feature.name] = tf.constant(values[:, np.newaxis] if feature.is_list else values)
    raw[ft.ITEM_ID] = tf.constant(item_ids)
    transformed = raw_inputs.transform_candidates(layer, raw, spec)
    counts = rng.integers(1_000, size=(len(item_ids) + 1, len(count_names(spec)))).astype(np.float32)
    counters = raw_inputs.transform_counts(layer, tf.constant(counts))
    return Catalogue(
        item_ids,
        {name: column.numpy() for name, column in transformed.items()},
        raw[ft.UPLOAD_TIME].numpy() if ft.UPLOAD_TIME in raw else None,
        {name: column.numpy() for name, column in counters.items()},
    )


def _query(request: Request, spec: DatasetSpec) -> dict[str, tf.Tensor]:
    tensors = _tensors(request)
    return {name: tensors[name] for name in raw_inputs.query_signature(spec)}


def _tensors(request: Request) -> dict[str, tf.Tensor]:
    return {name: tf.constant(values) for name, values in request.items()}


def _latest(folder: Path) -> Path:
    executions = sorted(folder.glob("[0-9]*"), key=lambda path: int(path.name))
    if not executions:
        raise DataError(f"{folder} is empty: the run's examples are gone; run 'funnel run' again")
    return executions[-1]


def latency(ask: Callable[..., Any], requests: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Milliseconds that one request takes, after one round to warm up.

    Args:
      ask: takes the inputs of a request by name.
      requests: are asked in turn.

    Returns:
      `p50_ms`, `p95_ms` and `min_ms` of wall time, `cpu_p50_ms` of the processor time of the process.
    """
    wall, cpu = [], []
    for repeat in range(_REPEATS + 1):
        for request in requests:
            start, cpu_start = time.perf_counter(), time.process_time()
            ask(**request)
            if repeat:
                wall.append(1e3 * (time.perf_counter() - start))
                cpu.append(1e3 * (time.process_time() - cpu_start))
    return {
        "p50_ms": float(np.percentile(wall, 50)),
        "p95_ms": float(np.percentile(wall, 95)),
        "min_ms": min(wall),
        "cpu_p50_ms": float(np.percentile(cpu, 50)),
    }


def speed(exported: Exported, seed: int) -> dict[str, dict[str, float]]:
    """Latency of pre-ranking NUM_CANDIDATES and ranking NUM_KEPT candidates, given as tensors."""
    signatures = tf.saved_model.load(str(exported.path)).signatures
    rng = np.random.default_rng(seed)
    figures = {}
    for name, count in ((PRE_RANK, NUM_CANDIDATES), (RANK, NUM_KEPT)):
        timed = []
        for request in exported.requests[:_TIMED_REQUESTS]:
            candidates = rng.permutation(exported.item_ids)[:count]
            asked = {**_tensors(request), CANDIDATES: tf.constant([list(candidates)])}
            timed.append(asked | {K: tf.constant([NUM_KEPT])} if name == PRE_RANK else asked)
        figures[f"{name} {len(candidates):,} candidates"] = latency(signatures[name], timed)
    return figures


def survivors(exported: Exported, seed: int) -> dict[str, Any]:
    """Survival of the ranker's best, by the answers of both signatures.

    Args:
      exported: distilled.
      seed: of the candidates.

    Returns:
      "survival": order -> number kept -> number of best -> mean over requests. Orders: the pre-ranker's; the
      same for all, by the ranker's mean score over the requests asked here; popularity; random.
      "standard_error": of the pre-ranker's, in the same form.
    """
    signatures = tf.saved_model.load(str(exported.path)).signatures
    rng = np.random.default_rng(seed)
    place = {item_id: row for row, item_id in enumerate(exported.item_ids)}
    rows, ranked, ours = [], [], []
    for request in exported.requests:
        candidates = rng.permutation(len(place))[:NUM_CANDIDATES]
        asked = {**_tensors(request), CANDIDATES: tf.constant([list(exported.item_ids[candidates])])}
        ranked.append(signatures[RANK](**asked)[SCORE].numpy()[0])
        found = signatures[PRE_RANK](**asked, k=tf.constant([max(KEPT)]))["item_ids"].numpy()[0]
        # The first gets the highest number, those that were cut get 0.
        order = np.zeros(len(place))
        order[[place[item_id.decode()] for item_id in found]] = np.arange(len(found), 0, -1)
        ours.append(order[candidates])
        rows.append(candidates)
    labelled = Labelled(np.zeros((len(rows), 0)), np.array(rows), np.array(ranked))
    orders = {
        "pre-ranker": np.array(ours),
        "the same for all": mean_scores(labelled, len(place))[labelled.rows],
        "popularity": exported.popularity[labelled.rows],
        "random": rng.random(labelled.rows.shape),
    }

    def figures(scores: np.ndarray, of: Callable[[np.ndarray], float]) -> dict[str, dict[str, float]]:
        return {
            str(kept): {str(best): of(survival(labelled.scores, scores, kept, best)) for best in BEST}
            for kept in KEPT
        }

    def standard_error(values: np.ndarray) -> float:
        return float(values.std(ddof=1) / np.sqrt(len(values)))

    return {
        "num_requests": len(rows),
        "num_candidates": labelled.rows.shape[1],
        "survival": {name: figures(scores, lambda v: float(v.mean())) for name, scores in orders.items()},
        "standard_error": figures(orders["pre-ranker"], standard_error),
    }


def to_markdown(figures: Mapping[str, Any]) -> str:
    """The figures as tables."""
    lines = [
        "| one request, one thread | p50 ms | p95 ms | min ms | CPU p50 ms |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, row in figures["speed"].items():
        cells = " | ".join(f"{row[key]:.2f}" for key in ("p50_ms", "p95_ms", "min_ms", "cpu_p50_ms"))
        lines.append(f"| {name} | {cells} |")
    if "survival" in figures:
        found = figures["survival"]
        columns = [f"best {best} in {kept:,}" for kept in KEPT for best in BEST]
        lines += ["", f"| order of {found['num_candidates']:,} candidates | " + " | ".join(columns) + " |"]
        lines.append("| --- |" + " ---: |" * len(columns))
        for name, by_kept in found["survival"].items():
            cells = " | ".join(f"{by_kept[str(kept)][str(best)]:.4f}" for kept in KEPT for best in BEST)
            lines.append(f"| {name} | {cells} |")
    return "\n".join(lines)


@click.command(help=__doc__)
@click.option(
    "--run-dir", type=click.Path(exists=True, path_type=Path), help="Output directory of a finished run."
)
@click.option("--users", type=click.IntRange(2), default=300, show_default=True, help="Users who are asked.")
@click.option(
    "--loss", type=click.Choice(["listwise", "squared"]), default=PrerankerConfig().loss, show_default=True
)
@click.option("--seed", type=int, default=PrerankerConfig().seed, show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write the figures here.")
def main(run_dir: Path | None, users: int, loss: Any, seed: int, json_path: Path | None) -> None:
    """See the docstring of the module."""
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    config = PrerankerConfig(loss=loss, seed=seed)
    with tempfile.TemporaryDirectory(prefix="funnel-benchmark-") as name:
        folder = Path(name)
        if run_dir is None:
            exported = made_up(folder, load_dataset_spec("kuairand-pure"), config)
            figures: dict[str, Any] = {"speed": speed(exported, seed)}
        else:
            exported = distilled(run_dir, folder / "model", users, config)
            figures = {"distillation": exported.facts, "speed": speed(exported, seed)}
            figures["survival"] = survivors(exported, seed)
    click.echo(to_markdown(figures))
    ours = figures["speed"][next(iter(figures["speed"]))]["p50_ms"]
    click.echo(f"\np50 of pre-ranking: {ours:.2f} ms, target {TARGET_P50_MS:.0f} ms")
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
