"""Follows held-out positives through the exported models: the work of FunnelWaterfall and `funnel waterfall`.

Users are asked about as of the end of training, as `funnel batch-recommend` asks; what they had chosen before
is left out, as the clients of the model server do.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import scann  # noqa: F401  registers the operations of the index
import tensorflow as tf

from schema.contract import DatasetSpec
from schema.errors import DataError, ServingError
from schema.tables import INTERACTIONS, ITEMS
from tfx_pipeline.user_states import UserState, find_user_states, padded, query_arrays, ranking_arrays
from trainer import features
from trainer.metrics import BoolArray
from trainer.ranking_export import CANDIDATES, PRE_RANK
from trainer.slices import ITEM_POPULARITY, MISSING, popularity_segments
from trainer.waterfall import (
    Positives,
    SliceLosses,
    SourceFacts,
    Stage,
    Waterfall,
    in_lists,
    losses,
    rule,
    source_facts,
)

TWO_TOWER = "two-tower"
WATCHED = "chosen before"
_SERVED = "serving_default"
_SEED = 7
_USERS_PER_SEARCH = 256
_PAIRS_PER_CALL = 8_192

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class FunnelSettings:
    """How the funnel is asked; the defaults are those of the client.

    Attributes:
      k: items shown.
      num_candidates: items that the ranker scores.
      depth: candidates of a source, the largest k of the retrieval model.
      max_users: users followed, drawn at random among those with a positive in the test split.
    """

    depth: int
    k: int = 20
    num_candidates: int = 100
    max_users: int = 500


@dataclasses.dataclass(frozen=True)
class FunnelLists:
    """Item ids that each of U users gets at the steps of the funnel, best first.

    Attributes:
      sources: source of candidates -> [U] lists, at most `depth` long.
      to_ranker: [U], what the ranker scores.
      shown: [U].
      has_preranker: whether a pre-ranker chose what the ranker scores.
    """

    sources: Mapping[str, Sequence[Sequence[str]]]
    to_ranker: Sequence[Sequence[str]]
    shown: Sequence[Sequence[str]]
    has_preranker: bool


def measure_waterfall(
    tables_dir: Path,
    user_states: str,
    models: Mapping[str, Path],
    spec: DatasetSpec,
    settings: FunnelSettings,
) -> Waterfall:
    """Asks the models for a sample of test users and tells where their positives were lost.

    Args:
      tables_dir: contract tables.
      user_states: file pattern of the user-state examples.
      models: SavedModel folders of `retrieval` and `ranking`.
      spec: the declaration.
      settings: how the funnel is asked.

    Raises:
      DataError: no user has a positive in the test split.
      ServingError: a model does not take the request.
    """
    started = time.monotonic()
    interactions = pl.read_parquet(tables_dir / INTERACTIONS)
    catalogue = pl.read_parquet(tables_dir / ITEMS)[features.ITEM_ID].unique(maintain_order=True)
    positives = _test_positives(interactions, spec)
    everyone = positives[features.USER_ID].unique().sort()
    if everyone.is_empty():
        raise DataError("no positive in the test split: nothing can be followed through the funnel")
    sampled = everyone.sample(min(settings.max_users, len(everyone)), seed=_SEED)
    found = find_user_states([user_states], spec, sampled.to_list())
    states = [found[user_id] for user_id in sampled if user_id in found]
    if len(states) < len(sampled):
        raise DataError(f"{len(sampled) - len(states)} test users have no user state; run 'funnel run' again")
    lists = _ask(models, states, spec, settings)

    place = {state.user_id: row for row, state in enumerate(states)}
    table = positives.filter(pl.col(features.USER_ID).is_in(sampled.implode()))
    followed = Positives(
        np.array([place[user_id] for user_id in table[features.USER_ID]], np.int64),
        table[features.ITEM_ID].to_list(),
        _dimensions(table, states, interactions, catalogue, spec),
    )
    known = set(catalogue)
    in_catalogue = np.fromiter((item in known for item in followed.items), np.bool_, len(followed))
    watched = in_lists(followed, [state.seen_item_ids for state in states])
    slices, sources = follow(followed, in_catalogue, {WATCHED: watched}, lists, settings)
    waterfall = Waterfall(len(states), len(everyone), settings.k, settings.num_candidates, slices, sources)
    seconds = time.monotonic() - started
    _logger.info("phase=waterfall users=%d positives=%d wall=%.1f s", len(states), len(followed), seconds)
    return waterfall


def follow(
    positives: Positives,
    in_catalogue: BoolArray,
    rules: Mapping[str, BoolArray],
    lists: FunnelLists,
    settings: FunnelSettings,
) -> tuple[tuple[SliceLosses, ...], tuple[SourceFacts, ...]]:
    """Sends positives through the stages of the funnel, whatever its sources and rules.

    Args:
      positives: P pairs of one of U users and an item.
      in_catalogue: bool [P], whether there is such an item.
      rules: name -> bool [P], whether the rule removes each positive; they apply before candidates are
        looked for.
      lists: what the users get.
      settings: how the funnel was asked.

    Returns:
      What became of the positives, in all and by slice; what each source contributes.
    """
    sources = {name: in_lists(positives, found) for name, found in lists.sources.items()}
    cut = "cut by the pre-ranker" if lists.has_preranker else "cut after retrieval"
    stages = [
        Stage("not in the catalogue", in_catalogue),
        *(rule(name, removed) for name, removed in rules.items()),
        Stage(f"not among the {settings.depth} of any source", np.any(list(sources.values()), axis=0)),
        Stage(f"{cut} at {settings.num_candidates}", in_lists(positives, lists.to_ranker)),
        Stage(f"ranked below {settings.k}", in_lists(positives, lists.shown)),
    ]
    findable = np.all([in_catalogue, *(~removed for removed in rules.values())], axis=0)
    depths = dict.fromkeys(sources, settings.depth)
    return losses(positives, stages), source_facts(positives, sources, depths, findable)


def _test_positives(interactions: pl.DataFrame, spec: DatasetSpec) -> pl.DataFrame:
    """The first interaction of each positive pair of a user and an item in the test split."""
    test = interactions.filter((pl.col("split") == "test") & (pl.col(spec.positive).fill_null(0) > 0))
    in_order = test.sort(features.EVENT_TIME, "row_number")
    return in_order.unique([features.USER_ID, features.ITEM_ID], keep="first", maintain_order=True)


def _dimensions(
    positives: pl.DataFrame,
    states: Sequence[UserState],
    interactions: pl.DataFrame,
    catalogue: pl.Series,
    spec: DatasetSpec,
) -> dict[str, list[str]]:
    """User type, popularity of the item, surface where the positive happened."""
    is_warm = {state.user_id: bool(state.query.get(features.HISTORY)) for state in states}
    train = interactions.filter(pl.col("split") == "train")
    chosen = train.filter(pl.col(spec.positive).fill_null(0) > 0)[features.ITEM_ID].value_counts(name="n")
    counts = catalogue.to_frame().join(chosen, on=features.ITEM_ID, how="left", maintain_order="left")
    is_known = catalogue.is_in(train[features.ITEM_ID].unique().implode()).to_numpy()
    segments = popularity_segments(counts["n"].fill_null(0).to_numpy(), is_known)
    segment_of = dict(zip(catalogue, segments, strict=True))
    dimensions = {
        features.USER_TYPE: [
            features.WARM if is_warm[user_id] else features.COLD for user_id in positives[features.USER_ID]
        ],
        ITEM_POPULARITY: [segment_of.get(item, MISSING) for item in positives[features.ITEM_ID]],
    }
    if spec.surface_is_mapped:
        dimensions[features.SURFACE] = positives[features.SURFACE].fill_null(MISSING).to_list()
    return dimensions


def _ask(
    models: Mapping[str, Path], states: Sequence[UserState], spec: DatasetSpec, settings: FunnelSettings
) -> FunnelLists:
    retrieval, ranking = (_Model(models[name]) for name in ("retrieval", "ranking"))
    has_preranker = ranking.has(PRE_RANK)
    retrieved: list[list[str]] = []
    for start in range(0, len(states), _USERS_PER_SEARCH):
        batch = states[start : start + _USERS_PER_SEARCH]
        inputs = query_arrays(batch, spec)
        inputs["k"] = np.full(len(batch), settings.depth, np.int32)
        inputs["exclude_item_ids"] = padded([state.seen_item_ids for state in batch])
        retrieved += _text(retrieval.ask(_SERVED, inputs)["item_ids"])
    to_ranker: list[list[str]] = []
    shown: list[list[str]] = []
    width = settings.depth if has_preranker else settings.num_candidates
    users_per_call = max(1, _PAIRS_PER_CALL // width)
    for start in range(0, len(states), users_per_call):
        batch = states[start : start + users_per_call]
        inputs = ranking_arrays(batch, spec)
        candidates = [ids[:width] for ids in retrieved[start : start + len(batch)]]
        if has_preranker:
            kept = np.full(len(batch), settings.num_candidates, np.int32)
            answer = ranking.ask(PRE_RANK, {**inputs, CANDIDATES: padded(candidates), "k": kept})
            candidates = _text(answer["item_ids"])
        scores = ranking.ask(_SERVED, {**inputs, CANDIDATES: padded(candidates)})["score"]
        to_ranker += candidates
        # Equal scores keep the order of retrieval, as in the client.
        shown += [
            [ids[place] for place in np.argsort(-row[: len(ids)], kind="stable")[: settings.k]]
            for ids, row in zip(candidates, scores, strict=True)
        ]
    return FunnelLists({TWO_TOWER: retrieved}, to_ranker, shown, has_preranker)


class _Model:
    """A loaded SavedModel, asked by signature."""

    def __init__(self, folder: Path) -> None:
        if not (folder / "saved_model.pb").is_file():
            raise ServingError(
                f"{folder} holds no SavedModel; 'funnel run' with the same settings makes it again"
            )
        self._folder = folder
        self._loaded = tf.saved_model.load(str(folder))

    def has(self, signature: str) -> bool:
        return signature in self._loaded.signatures

    def ask(self, signature: str, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        function: Callable[..., Mapping[str, tf.Tensor]] = self._loaded.signatures[signature]
        wanted = function.structured_input_signature[1]  # type: ignore[attr-defined]
        rows = len(next(iter(inputs.values())))
        # Allow-lists; empty ones allow everything.
        absent = {name: np.full((rows, 0), "", object) for name in wanted.keys() - inputs.keys()}
        try:
            answer = function(**{n: tf.constant(value) for n, value in {**absent, **inputs}.items()})
        except tf.errors.InvalidArgumentError as error:
            raise ServingError(f"{self._folder} refused the request: {error.message}") from error
        return {name: value.numpy() for name, value in answer.items()}


def _text(ids: np.ndarray) -> list[list[str]]:
    """Item ids per user, padding left out."""
    return [[value.decode() for value in row if value] for row in ids]
