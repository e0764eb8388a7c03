"""Compares the lists of a retrieval model with those of its rivals, user by user.

Letters: U = judged users, K = length of the lists, P = pairs of a user and a held-out positive.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl

from schema.errors import ShapeError
from trainer import features, metrics
from trainer.comparison import (
    CANDIDATE,
    BootstrapSettings,
    Comparison,
    Measured,
    Rival,
    slice_result,
    worst_first,
)
from trainer.metrics import BoolArray, FloatArray, IntArray
from trainer.progress import tracked
from trainer.slices import Slice, slices_of
from trainer.uncertainty import UserSums, retrieval_sums

STAGE = "retrieval"
_NO_POSITIVE = "no user with a positive"
_EMPTY_LISTS = "no list with an item"
_NO_COLD_POSITIVE = "no user with a positive that training did not meet"


@dataclasses.dataclass(frozen=True)
class JudgedLists:
    """Users, what they went on to choose, and what each model recommended to them.

    Attributes:
      user_ids: [U], each once.
      positives: pairs of a user and a held-out item, each once: `user` (place in user_ids, int), `item`
        (code, int), `is_cold` (bool, whether nobody met the item in training), and a text column per
        dimension.
      lists: model -> int64 [U, K] item codes, best first, negative where a list is short; `candidate` and
        the rivals in the order of tables.
      catalogue: about the first items by code, those of the catalogue; None leaves out what needs it.
      asked_unix_s: when the lists were asked for, unix seconds.
    """

    user_ids: Sequence[str]
    positives: pl.DataFrame
    lists: Mapping[str, IntArray]
    catalogue: metrics.CatalogueFacts | None = None
    asked_unix_s: int = 0


def compare_retrieval(
    judged: JudgedLists,
    ks: Sequence[int],
    by: Sequence[tuple[str, ...]],
    notes: Mapping[str, str],
    absent: Mapping[str, str],
    settings: BootstrapSettings,
) -> Comparison:
    """Every metric on the whole split and by slice, with intervals, against every rival.

    In a slice of items (`item_popularity`) only the positives in it count: recall is the share of these that
    was found.

    Args:
      judged: what was recommended.
      ks: cut-offs, each at most K.
      by: dimensions and crosses to slice by.
      notes: rival -> how it was made.
      absent: rivals that could not be compared, and why.
      settings: of the intervals.
    """
    if CANDIDATE not in judged.lists:
        raise ShapeError(
            f"lists of {', '.join(judged.lists) or 'no model'}; expected those of {CANDIDATE!r}."
        )
    user, item = (judged.positives[name].to_numpy() for name in ("user", "item"))
    ranks = {name: positive_ranks(lists, user, item) for name, lists in judged.lists.items()}
    is_cold = judged.positives["is_cold"].to_numpy()
    of_lists = _list_metrics(judged, min(ks))
    results = []
    for part in tracked(slices_of(judged.positives, by), "slices compared"):
        measured = _measure(judged, ranks, of_lists, user, is_cold, part, ks)
        num_users = len(np.unique(user[part.mask]))
        results.append(slice_result(part.key, num_users, num_users, measured, settings))
    headline = metrics.metric_key(STAGE, "recall", k=max(ks))
    rivals = tuple(Rival(name, notes.get(name, "")) for name in judged.lists if name != CANDIDATE)
    return Comparison(
        model=STAGE,
        headline=headline,
        confidence=settings.confidence,
        num_resamples=settings.num_resamples,
        rivals=rivals,
        absent=absent,
        slices=tuple(worst_first(results, headline)),
    )


def metric_keys(ks: Sequence[int]) -> list[str]:
    """Keys of every metric that `compare_retrieval` measures, if the catalogue tells what they need."""
    of_lists = (*metrics.LIST_METRICS, *metrics.AGGREGATE_METRICS)
    names = [*metrics.retrieval_metric_names(ks), *(f"{name}_at_{min(ks)}" for name in of_lists)]
    return [metrics.metric_key(STAGE, name) for name in names]


def positive_ranks(lists: IntArray, user: IntArray, item: IntArray) -> IntArray:
    """Where each positive stands in its user's list: 1 is the first place, 0 is nowhere.

    Args:
      lists: int64 [U, K] item codes; negative ones are padding, a repeated one counts at its first place.
      user, item: int64 [P].

    Returns:
      int64 [P].

    >>> positive_ranks(np.array([[5, 7, -1], [7, 5, 6]]), np.array([0, 0, 1]), np.array([7, 9, 6])).tolist()
    [2, 0, 3]
    """
    width = int(max(lists.max(initial=0), item.max(initial=0))) + 1
    listed = np.arange(len(lists))[:, None] * width + lists
    keys, first = np.unique(np.where(lists < 0, -1, listed), return_index=True)
    wanted = user * width + item
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, first[place] % lists.shape[1] + 1, 0)


def _measure(
    judged: JudgedLists,
    ranks: Mapping[str, IntArray],
    of_lists: Mapping[str, Mapping[str, FloatArray]],
    user: IntArray,
    is_cold: BoolArray,
    part: Slice,
    ks: Sequence[int],
) -> dict[str, Measured]:
    """The metrics of all models over the users with a positive in the slice."""
    users, codes = np.unique(user[part.mask], return_inverse=True)
    cold = is_cold[part.mask]
    sums: dict[str, dict[str, UserSums]] = {}
    num_distinct = {}
    for model, lists in judged.lists.items():
        rank = ranks[model][part.mask]
        values = _by_user(codes, rank, len(users), lists.shape[1], ks, metrics.RETRIEVAL_METRICS)
        of_cold = _by_user(codes[cold], rank[cold], len(users), lists.shape[1], ks, ("recall",))
        values |= {f"cold_item_{name}": column for name, column in of_cold.items()}
        sums[model] = retrieval_sums(values)
        num_distinct[model] = float(metrics.distinct_items_at_k(lists[users], min(ks)))
    rivals = [model for model in judged.lists if model != CANDIDATE]
    num_cold_users = len(np.unique(codes[cold]))
    measured = {}
    for name in sums[CANDIDATE]:
        of_cold_items = name.startswith("cold_item_")
        measured[metrics.metric_key(STAGE, name)] = Measured(
            num_cold_users if of_cold_items else len(users),
            sums[CANDIDATE][name],
            {rival: sums[rival][name] for rival in rivals},
            _NO_COLD_POSITIVE if of_cold_items else _NO_POSITIVE,
        )
    measured[metrics.metric_key(STAGE, metrics.DISTINCT_ITEMS, k=min(ks))] = Measured(
        len(users),
        num_distinct[CANDIDATE],
        {rival: num_distinct[rival] for rival in rivals},
        _NO_POSITIVE,
    )
    return measured | _measure_lists(judged, of_lists, users, min(ks))


def _list_metrics(judged: JudgedLists, k: int) -> dict[str, dict[str, FloatArray]]:
    """What the first k of each list say by themselves: model -> metric -> float64 [U]."""
    facts = judged.catalogue
    if facts is None:
        return {}
    return {
        model: metrics.list_metrics(_known(lists, facts), k, facts, judged.asked_unix_s)
        for model, lists in judged.lists.items()
    }


def _known(lists: IntArray, facts: metrics.CatalogueFacts) -> IntArray:
    """The lists with items outside the catalogue as padding."""
    return np.where(lists < len(facts.num_choosers), lists, -1)


def _measure_lists(
    judged: JudgedLists, of_lists: Mapping[str, Mapping[str, FloatArray]], users: IntArray, k: int
) -> dict[str, Measured]:
    """How wide, new, alike, popular and fresh the first k of the lists of some users are."""
    facts = judged.catalogue
    if facts is None:
        return {}
    by_user = {
        model: retrieval_sums({name: column[users] for name, column in values.items()})
        for model, values in of_lists.items()
    }
    together = {
        model: metrics.aggregate_metrics(_known(lists[users], facts), k, len(facts.num_choosers))
        for model, lists in judged.lists.items()
    }
    rivals = [model for model in judged.lists if model != CANDIDATE]
    return {
        metrics.metric_key(STAGE, name): Measured(
            len(users), found[CANDIDATE][name], {rival: found[rival][name] for rival in rivals}, _EMPTY_LISTS
        )
        for found in (by_user, together)
        for name in found[CANDIDATE]
    }


def _by_user(
    codes: IntArray, rank: IntArray, num_users: int, width: int, ks: Sequence[int], names: Sequence[str]
) -> dict[str, FloatArray]:
    """Metrics of each user over some positives, whose users are `codes` and whose places are `rank`."""
    hits = np.zeros((num_users, width), np.bool_)
    found = rank > 0
    hits[codes[found], rank[found] - 1] = True
    num_positives = np.bincount(codes, minlength=num_users).astype(np.int64)
    return metrics.retrieval_metrics(hits, num_positives, ks, names)


def positives_table(judged: JudgedLists, item_ids: Sequence[str]) -> pl.DataFrame:
    """Every held-out positive and where each model put it: what all numbers but counts of items come from.

    Args:
      judged: what was compared.
      item_ids: the id of each item code.

    Returns:
      user_id, item_id, is_cold, the dimensions, and per model int64 under its name: the place in its list
      from 1, 0 where it is not in the list.
    """
    user, item = (judged.positives[name].to_numpy() for name in ("user", "item"))
    ranks = [pl.Series(name, positive_ranks(lists, user, item)) for name, lists in judged.lists.items()]
    return judged.positives.select(
        pl.Series(features.USER_ID, list(judged.user_ids), dtype=pl.String).gather(user),
        pl.Series(features.ITEM_ID, list(item_ids), dtype=pl.String).gather(item),
        pl.exclude("user", "item"),
        *ranks,
    )


def lists_table(judged: JudgedLists, item_ids: Sequence[str]) -> pl.DataFrame:
    """What was recommended: user_id, and per model a list of at most K item ids under its name."""
    ids = np.array([*item_ids, ""], dtype=object)
    columns = [pl.Series(features.USER_ID, list(judged.user_ids), dtype=pl.String)]
    for name, lists in judged.lists.items():
        columns.append(pl.Series(name, [ids[row[row >= 0]] for row in lists], dtype=pl.List(pl.String)))
    return pl.DataFrame(columns)
