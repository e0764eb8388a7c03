"""Offline metrics of retrieval and ranking, exact and vectorised; the same code judges models and baselines.

Metric keys are `retrieval/<metric>_at_<k>` and `ranking/<task>/<metric>`, for instance
`retrieval/recall_at_100` and `ranking/click/auc`. A value that the data cannot define is NaN, never zero.
docs/metrics.md has all of them in one table; `trainer.uncertainty` says how sure they are.
"""

from trainer.metrics.arrays import BoolArray, FloatArray, IntArray
from trainer.metrics.calibration import ReliabilityBin, ece, reliability_table
from trainer.metrics.keys import (
    AGGREGATE_METRICS,
    LIST_METRICS,
    LOWER_IS_BETTER,
    RANKING_METRICS,
    RETRIEVAL_METRICS,
    lower_is_better,
    metric_key,
)
from trainer.metrics.lists import (
    CatalogueFacts,
    aggregate_metrics,
    attribute_diversity_at_k,
    coverage_at_k,
    distinct_items_at_k,
    gini_at_k,
    list_metrics,
    mean_age_days_at_k,
    mean_popularity_at_k,
    novelty_at_k,
)
from trainer.metrics.ranking import (
    auc,
    auc_by_group,
    binary_entropy,
    concordance,
    gauc,
    log_loss,
    mae,
    normalised_entropy,
    ranking_metrics,
    row_absolute_error,
    row_log_loss,
    weighted_pairwise_loss,
    xauc,
)
from trainer.metrics.retrieval import (
    hit_rate_at_k,
    macro_mean,
    map_at_k,
    match_positives,
    mrr_at_k,
    ndcg_at_k,
    precision_at_k,
    recall_at_k,
    retrieval_metrics,
)

__all__ = [
    "AGGREGATE_METRICS",
    "LIST_METRICS",
    "LOWER_IS_BETTER",
    "RANKING_METRICS",
    "RETRIEVAL_METRICS",
    "BoolArray",
    "CatalogueFacts",
    "FloatArray",
    "IntArray",
    "ReliabilityBin",
    "aggregate_metrics",
    "attribute_diversity_at_k",
    "auc",
    "auc_by_group",
    "binary_entropy",
    "concordance",
    "coverage_at_k",
    "distinct_items_at_k",
    "ece",
    "gauc",
    "gini_at_k",
    "hit_rate_at_k",
    "list_metrics",
    "log_loss",
    "lower_is_better",
    "macro_mean",
    "mae",
    "map_at_k",
    "match_positives",
    "mean_age_days_at_k",
    "mean_popularity_at_k",
    "metric_key",
    "mrr_at_k",
    "ndcg_at_k",
    "normalised_entropy",
    "novelty_at_k",
    "precision_at_k",
    "ranking_metrics",
    "recall_at_k",
    "reliability_table",
    "retrieval_metrics",
    "row_absolute_error",
    "row_log_loss",
    "weighted_pairwise_loss",
    "xauc",
]
