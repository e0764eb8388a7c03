"""New items into the models that are served, without training: `funnel refresh-index`."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import polars as pl
import tensorflow as tf
from tfx_bsl.coders import example_coder

from schema.contract import DatasetSpec
from schema.errors import DataError
from schema.point_in_time import log_count_names
from schema.tables import read_items
from tfx_pipeline.components.infra_validator import choose_users, validate_serving
from tfx_pipeline.components.pusher import REFRESHED_FINGERPRINT
from tfx_pipeline.config import BUNDLES, MODELS, RANKING, RETRIEVAL, RunPaths
from tfx_pipeline.examples import catalogue_columns, catalogue_inputs, example_batch
from tfx_pipeline.recommend import serving_folder
from tfx_pipeline.run_result import RunResult
from tfx_pipeline.user_states import read_user_states
from tfx_pipeline.warmup import add_warmup_requests
from trainer import features, run_bundles, run_ranking, run_retrieval
from trainer.checkpoint import Checkpoint, catalogue_files, read_checkpoint
from trainer.fingerprint import Fingerprint, check_together
from trainer.index_facts import IndexFacts

# The Pusher's, which clears it too.
_STAGING = ".staging"
_FINGERPRINT = "fingerprint.pb"
# Examples parsed at a time.
_ROWS = 8_192

# Serialized catalogue example by item id, in the order of the catalogue.
Examples = Mapping[str, bytes]


@dataclasses.dataclass(frozen=True)
class CatalogueChange:
    """Item ids by what happened to them; an item whose features and title are as before is in none."""

    added: tuple[str, ...]
    changed: tuple[str, ...]
    removed: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.added or self.changed or self.removed)


@dataclasses.dataclass(frozen=True)
class Refresh:
    """What a refresh did.

    Attributes:
      change: of the catalogue.
      num_items: items in the catalogue now.
      num_untrained: those outside the training vocabulary, whose vectors come from their content.
      index: the new index; None when nothing changed.
      version: of all bundles; None when nothing changed.
      seconds: elapsed time by phase.
    """

    change: CatalogueChange
    num_items: int
    num_untrained: int
    index: IndexFacts | None
    version: int | None
    seconds: Mapping[str, float]


def refresh_index(
    run: RunResult,
    paths: RunPaths,
    files: Sequence[Path],
    complete: bool,
    on_phase: Callable[[str], None] = lambda phase: None,
) -> Refresh:
    """Publishes the newest pushed bundles once more, over newer items.

    Vectors of new and changed items come from the candidate tower as it was trained; an item that training
    has not met gets its vector from its content. The ranker gets the same catalogue, so that it knows the
    features of what retrieval finds. All bundles answer real questions from a model server before any
    appears.

    Args:
      run: the last finished run.
      paths: its folders; the caller holds the run's lock.
      files: items in the dataset's own format. Empty values, times and repeated ids are checked as in a run.
      complete: whether the files hold the whole catalogue, so that items that are not in them are removed;
        otherwise they are added to it and replace what it knows of them.
      on_phase: called with the name of each phase as it starts.

    Returns:
      What was done; nothing is published when no item is new, changed or removed.

    Raises:
      DataError: the files break the contract, or the pushed models have different item features.
      ServingError: no pushed model, or the new ones do not answer as they should.
      CheckpointError: a pushed model has no checkpoint, or one that does not fit this code.
      IndexBuildError: the index does not reach the required recall.
    """
    seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(name: str) -> Iterator[None]:
        on_phase(name)
        started = time.monotonic()
        yield
        seconds[name] = time.monotonic() - started

    pushed = {name: serving_folder(run, paths, name) for name in BUNDLES}
    checkpoints = {model: read_checkpoint(pushed[model]) for model in MODELS}
    check_together({name: Fingerprint.read(folder) for name, folder in pushed.items()})
    _check_pair(checkpoints)
    spec = checkpoints[RETRIEVAL].spec
    with phase("read items"):
        before = read_catalogue(catalogue_files(pushed[RETRIEVAL]))
        items = with_counts(read_items(spec, files), before, spec)
        given = encode_items(items, spec, as_of_unix_s=int(time.time()))
        after = given if complete else {**before, **given}
        change = compare(before, after)
    trained = checkpoints[RETRIEVAL].transform_output.vocabulary_by_name(features.ITEM_SPACE)
    num_untrained = len(after.keys() - {value.decode() for value in trained})
    if not change:
        return Refresh(change, len(after), num_untrained, None, None, seconds)

    users = [run.user_states]
    version = max(int(time.time()), *(int(folder.name) + 1 for folder in pushed.values()))
    staged = {name: paths.serving_models / name / _STAGING / str(version) for name in BUNDLES}
    try:
        for folder in staged.values():
            _clear(folder.parent)
            folder.parent.mkdir()
        catalogue = staged[RETRIEVAL].parent / "catalogue.gz"
        write_catalogue(after, catalogue)
        with phase("embed items, build index"):
            index = run_retrieval.refresh(pushed[RETRIEVAL], [str(catalogue)], users, staged[RETRIEVAL])
        with phase("export ranking"):
            run_ranking.refresh(pushed[RANKING], [str(catalogue)], users, staged[RANKING])
        with phase("build bundles"):
            run_bundles.build(
                staged[RETRIEVAL],
                staged[RANKING],
                users,
                run_bundles.BundleFolders(
                    **{name: folder for name, folder in staged.items() if name not in MODELS}
                ),
            )
        with phase("ask a model server"):
            for name, folder in staged.items():
                add_warmup_requests(folder, name, users, spec)
                _remember_origin(pushed[name], folder)
            states = choose_users(read_user_states([run.user_states], spec))
            validate_serving(staged, states, checkpoints[RANKING].spec)
        with phase("publish"):
            # The ranker first: it may know items that retrieval does not find, not the other way round.
            for name in (RANKING, *(name for name in BUNDLES if name != RANKING)):
                os.rename(staged[name], paths.serving_models / name / str(version))
    finally:
        for folder in staged.values():
            _clear(folder.parent)
    return Refresh(change, len(after), num_untrained, index, version, seconds)


def with_counts(items: pl.DataFrame, before: Examples, spec: DatasetSpec) -> pl.DataFrame:
    """Adds the counts of the log as the last run knew them: a new item has none, the log is that of all."""
    counts: dict[str, list[float]] = {}
    for item_id, example in before.items():
        held = tf.train.Example.FromString(example).features.feature[features.ITEM_COUNTS]
        counts[item_id] = list(held.float_list.value)
    of_log = len(log_count_names(spec))
    anything = next(iter(counts.values()))
    unmet = anything[:of_log] + [0.0] * (len(anything) - of_log)
    column = [counts.get(item_id, unmet) for item_id in items[features.ITEM_ID]]
    return items.with_columns(pl.Series(features.ITEM_COUNTS, column, dtype=pl.List(pl.Float32)))


def encode_items(items: pl.DataFrame, spec: DatasetSpec, as_of_unix_s: int) -> dict[str, bytes]:
    """Catalogue examples of a contract table of items, with the values valid at a moment."""
    table = catalogue_columns(items, as_of_unix_s)
    encoder = example_coder.RecordBatchToExamplesEncoder()
    examples = encoder.encode(example_batch(table, catalogue_inputs(spec)))
    return dict(zip(table[features.ITEM_ID], examples, strict=True))


def read_catalogue(files: Sequence[str]) -> dict[str, bytes]:
    """Catalogue examples of gzipped TFRecord files."""
    records = tf.data.TFRecordDataset(files, compression_type="GZIP")
    parser = {features.ITEM_ID: tf.io.FixedLenFeature([], tf.string)}
    examples: dict[str, bytes] = {}
    for batch in records.batch(_ROWS):
        ids = tf.io.parse_example(batch, parser)[features.ITEM_ID].numpy()
        examples.update(zip((item_id.decode() for item_id in ids), batch.numpy(), strict=True))
    return examples


def write_catalogue(examples: Examples, path: Path) -> None:
    """Writes catalogue examples as a gzipped TFRecord file."""
    options = tf.io.TFRecordOptions(compression_type="GZIP", compression_level=1)
    with tf.io.TFRecordWriter(str(path), options) as writer:
        for example in examples.values():
            writer.write(example)


def compare(before: Examples, after: Examples) -> CatalogueChange:
    """Which items are new, different and gone."""
    return CatalogueChange(
        added=tuple(item_id for item_id in after if item_id not in before),
        changed=tuple(i for i, example in after.items() if i in before and not _equal(before[i], example)),
        removed=tuple(item_id for item_id in before if item_id not in after),
    )


def _equal(one: bytes, other: bytes) -> bool:
    # The features of an example are a map, which is serialized in any order.
    return one == other or tf.train.Example.FromString(one) == tf.train.Example.FromString(other)


def _check_pair(checkpoints: Mapping[str, Checkpoint]) -> None:
    wanted = {model: catalogue_inputs(checkpoint.spec) for model, checkpoint in checkpoints.items()}
    if wanted[RETRIEVAL] != wanted[RANKING]:
        differing = {name for name, _ in wanted[RETRIEVAL].items() ^ wanted[RANKING].items()}
        raise DataError(
            "the pushed models come from runs with different item features "
            f"({', '.join(sorted(differing))}); 'funnel run' until both are pushed"
        )


def _remember_origin(pushed: Path, refreshed: Path) -> None:
    """Lets a later Pusher see that a version is an earlier model with newer items, not another model."""
    origin = pushed / REFRESHED_FINGERPRINT
    shutil.copyfile(origin if origin.is_file() else pushed / _FINGERPRINT, refreshed / REFRESHED_FINGERPRINT)


def _clear(folder: Path) -> None:
    if folder.is_dir():
        shutil.rmtree(folder)
