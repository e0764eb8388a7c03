"""Builds the candidate index of an export: checks, tuning, its recall and time against exact search.

Letters: I = items, D = width of a vector, S = sample queries.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow as tf

from schema.errors import IndexBuildError
from trainer.allow_lists import AllowLists
from trainer.config import IndexConfig
from trainer.index import DIMENSIONS_PER_BLOCK, CandidateIndex, ExactIndex, Restriction
from trainer.index_facts import EffortFacts, IndexFacts
from trainer.index_tradeoff import search_points
from trainer.index_tuning import ExactResults, RequiredRecall, recall_by_slice, tuned_index

logger = logging.getLogger(__name__)


def build_index(
    item_ids: Sequence[str] | np.ndarray,
    vectors: np.ndarray,
    sample_queries: np.ndarray,
    config: IndexConfig,
    max_k: int,
    slices: Mapping[str, np.ndarray] | None = None,
    attributes: Mapping[str, np.ndarray] | None = None,
) -> tuple[CandidateIndex, IndexFacts]:
    """Builds an index over the catalogue and tunes it until it finds enough of the exact results.

    Args:
      item_ids: [I] str, the id of each row.
      vectors: float32 [I, D].
      sample_queries: float32 [S, D] or [S, M, D], real query vectors to measure recall on.
      config: kind of index, required recall, and attributes with allow-lists.
      max_k: the largest k of a request.
      slices: bool [I] by name, groups of items whose recall is judged and reported apart.
      attributes: values of the items, str [I] or [I, W], by attribute of `config.allow_list`.

    Raises:
      IndexBuildError: ids are repeated, empty or not one per vector; a vector or query is not finite; there
        is no sample query; an attribute lacks its values; the index does not reach the required recall.
    """
    started = time.monotonic()
    _check_catalogue(item_ids, vectors)
    if len(sample_queries) == 0 or not np.isfinite(sample_queries).all():
        raise IndexBuildError(
            f"expected finite query vectors of some users to measure recall on, got {len(sample_queries):,}, "
            f"{np.sum(~np.isfinite(sample_queries)):,} of whose numbers are not finite; check the users and "
            "whether the training diverged."
        )
    allow_lists = _allow_lists(config.allow_list, attributes or {}, len(vectors))
    k = min(max_k, len(vectors))
    vectors = np.ascontiguousarray(vectors, np.float32)
    exact_index = ExactIndex(vectors)
    exact = ExactResults.of(exact_index, sample_queries, k)
    if config.kind == "exact":
        index = CandidateIndex(exact_index, None, allow_lists)
        settings = {}
    else:
        required = RequiredRecall(config.min_recall, config.min_slice_recall, slices or {})
        approximate = tuned_index(vectors, exact, required)
        # The exact twin reads the vectors that ScaNN keeps for reordering: they are stored and loaded once.
        index = CandidateIndex(ExactIndex(approximate.vectors), approximate, allow_lists)
        settings = {"num_leaves": approximate.num_leaves}
        if approximate.num_leaves:
            settings["dimensions_per_block"] = DIMENSIONS_PER_BLOCK
        if approximate.exact_items is not None:
            settings["num_exact_items"] = approximate.exact_items.num_items

    efforts = index.approximate.efforts if index.approximate else ()
    effort_facts = tuple(
        EffortFacts(
            effort.k,
            effort.num_leaves_to_search,
            effort.num_reordering_candidates,
            float(_found(index, exact, effort.k).mean()),
        )
        for effort in efforts
    )
    found = _found(index, exact, k)
    recall = float(found.mean())
    by_slice = recall_by_slice(found, exact.rows, slices or {})
    logger.info(
        "index kind=%s items=%d settings=%s efforts=%s recall_at_%d=%.4f recall_by_slice=%s",
        *(config.kind, len(vectors), settings, effort_facts, k, recall, by_slice),
    )
    worst = min([recall, *(effort.recall for effort in effort_facts)])
    if not worst >= config.min_recall:
        raise IndexBuildError(
            f"the index finds {worst:.4f} of the exact results among {len(vectors):,} items with {settings} "
            f"and {effort_facts}, less than min_recall {config.min_recall}; check the item vectors, or lower "
            "index.min_recall."
        )
    facts = IndexFacts(
        num_items=len(vectors),
        vector_width=vectors.shape[1],
        settings=settings,
        efforts=effort_facts,
        k=k,
        recall=recall,
        recall_by_slice=by_slice,
        num_sample_queries=len(sample_queries),
        build_s=time.monotonic() - started,
        points=tuple(search_points(index, exact, slices or {})),
    )
    return index, facts


def exact_facts(index: CandidateIndex, max_k: int) -> IndexFacts:
    """Facts of an index that scores every item, and so finds all of them."""
    vectors = index.exact.vectors
    return IndexFacts(
        num_items=index.exact.num_items,
        vector_width=int(vectors.shape[1]),
        settings={},
        efforts=(),
        k=min(max_k, index.exact.num_items),
        recall=1.0,
        recall_by_slice={},
        num_sample_queries=0,
        build_s=0.0,
    )


def _found(index: CandidateIndex, exact: ExactResults, k: int) -> np.ndarray:
    """Which of the exact top k the index finds as it will be asked: bool [S, k]."""
    num_queries = len(exact.rows)
    everything = index.allow_lists.allowed_values(index.allow_lists.empty_lists(num_queries))
    nothing = Restriction(tf.zeros([num_queries, 0], tf.int32), everything)
    found = index.search(exact.queries, tf.fill([num_queries], k), nothing)
    return exact.found_by(found.rows.numpy(), found.scores.numpy(), k)


def _allow_lists(names: Sequence[str], attributes: Mapping[str, np.ndarray], num_items: int) -> AllowLists:
    for name in names:
        if name not in attributes or len(attributes[name]) != num_items:
            got = f"{len(attributes[name]):,}" if name in attributes else "none"
            raise IndexBuildError(
                f"index.allow_list names {name!r}: expected its values for {num_items:,} items, got {got}; "
                "check the features of the items table."
            )
    return AllowLists({name: attributes[name] for name in names})


def _check_catalogue(item_ids: Sequence[str] | np.ndarray, vectors: np.ndarray) -> None:
    if len(item_ids) == 0 or vectors.ndim != 2 or len(item_ids) != len(vectors):
        raise IndexBuildError(
            f"{len(item_ids):,} item ids for item vectors of shape {vectors.shape}; expected at least one id "
            "and one row per id. Check the catalogue."
        )
    values, counts = np.unique(np.asarray(item_ids, dtype=str), return_counts=True)
    if "" in values or counts.max() > 1:
        culprit = "" if "" in values else values[counts.argmax()]
        raise IndexBuildError(
            f"item id {culprit!r} stands in {counts[values == culprit][0]} catalogue rows; ids must be "
            "unique and not empty. Check the items table."
        )
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        raise IndexBuildError(
            f"{np.sum(~finite):,} of {len(vectors):,} item vectors are not finite, the first is that of item "
            f"{item_ids[int(np.argmin(finite))]!r}; the training diverged: lower learning_rate."
        )
