"""What an export tells of its index: assets.extra/index.json, as plain data for gates and reports."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class EffortFacts:
    """How hard ScaNN searches for up to k neighbours, and what share of the exact top k that finds."""

    k: int
    num_leaves_to_search: int
    num_reordering_candidates: int
    recall: float


@dataclasses.dataclass(frozen=True)
class SearchPoint:
    """One way to search for k neighbours: what it finds, and how long one query takes.

    Attributes:
      k: neighbours.
      num_leaves_to_search, num_reordering_candidates: ScaNN's effort, by the library's names; None = exact
        search.
      is_chosen: whether requests for k neighbours are answered this way.
      recall: share of the exact top k that is found, mean over the sample queries, 0 to 1.
      recall_by_slice: the same of the exact results that belong to a slice of items; None where they are too
        few to tell.
      p50_ms, p95_ms: percentiles of the time of a query by itself, as `trainer.index_tradeoff` measures it.
    """

    k: int
    num_leaves_to_search: int | None
    num_reordering_candidates: int | None
    is_chosen: bool
    recall: float
    recall_by_slice: Mapping[str, float | None]
    p50_ms: float
    p95_ms: float


@dataclasses.dataclass(frozen=True)
class IndexFacts:
    """What was built.

    Attributes:
      num_items: catalogue rows, all of which are indexed.
      vector_width: width of a vector, the item bias included.
      settings: ScaNN settings that hold for every k, by the library's names; num_leaves 0 = no partition. And
        num_exact_items, see `trainer.index.ExactItems`, where there are such.
      efforts: settings that depend on k, ascending; none when every search is exact.
      k: neighbours per query in the comparison with exact search: the largest k of a request.
      recall: share of the exact top k that the index finds, mean over the sample queries, 0 to 1.
      recall_by_slice: of the exact top k that belong to a slice of items, the share that the index finds;
        None where too few of them do to tell.
      num_sample_queries: queries that recall was measured on.
      build_s: seconds for building and tuning.
      points: recall against time, by ascending k: efforts around the chosen one, then exact search.
    """

    num_items: int
    vector_width: int
    settings: Mapping[str, int]
    efforts: tuple[EffortFacts, ...]
    k: int
    recall: float
    recall_by_slice: Mapping[str, float | None]
    num_sample_queries: int
    build_s: float
    points: tuple[SearchPoint, ...] = ()
