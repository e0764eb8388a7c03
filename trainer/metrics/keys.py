"""Names of the metrics: the one list that the models, the gates, the baselines and the report read."""

import re
from collections.abc import Sequence

from schema.contract import TaskKind

RETRIEVAL_METRICS = ("recall", "precision", "ndcg", "hit_rate", "mrr", "map")
# Of lists alone, by user; and of all lists together.
LIST_METRICS = ("novelty", "mean_popularity", "intra_list_diversity", "mean_age_days")
# The number of items in anybody's first k.
DISTINCT_ITEMS = "distinct_items"
AGGREGATE_METRICS = ("coverage", "gini")
RANKING_METRICS = {
    TaskKind.BINARY: ("auc", "gauc", "log_loss", "normalised_entropy", "ece"),
    TaskKind.WATCH_TIME: ("mae", "xauc", "weighted_pairwise_loss"),
    TaskKind.REGRESSION: ("mae", "xauc"),
    TaskKind.COMPLETION: ("mae", "xauc"),
}
LOWER_IS_BETTER = frozenset(
    {
        "log_loss",
        "normalised_entropy",
        "ece",
        "mae",
        "weighted_pairwise_loss",
        "gini",
        "mean_popularity",
        "mean_age_days",
    }
)


def metric_key(stage: str, metric: str, *, task: str | None = None, k: int | None = None) -> str:
    """Name of a metric in reports and gates.

    >>> metric_key("retrieval", "recall", k=100), metric_key("ranking", "auc", task="click")
    ('retrieval/recall_at_100', 'ranking/click/auc')
    """
    return "/".join([stage, *([task] if task else []), metric if k is None else f"{metric}_at_{k}"])


def retrieval_metric_names(ks: Sequence[int]) -> list[str]:
    """Metrics of lists against held-out items, which both Evaluator and comparison have.

    Means over users first, then the number of distinct items.
    """
    means = [f"{name}_at_{k}" for k in ks for name in RETRIEVAL_METRICS]
    means += [f"cold_item_recall_at_{k}" for k in ks]
    return [*means, f"{DISTINCT_ITEMS}_at_{min(ks)}"]


def lower_is_better(key: str) -> bool:
    """Whether a smaller value of a metric is the better one; the key may lack its stage and task.

    >>> lower_is_better("ranking/click/log_loss"), lower_is_better("gini_at_10"), lower_is_better("auc")
    (True, True, False)
    """
    return _name(key) in LOWER_IS_BETTER


def has_interval(key: str) -> bool:
    """Whether users have a share in a metric, so that there is an interval over them.

    >>> has_interval("retrieval/recall_at_10"), has_interval("retrieval/distinct_items_at_10")
    (True, False)
    """
    return _name(key) not in (DISTINCT_ITEMS, *AGGREGATE_METRICS)


def _name(key: str) -> str:
    """The metric of a key, without stage, task and cut-off."""
    return re.sub(r"_at_\d+$", "", key.rpartition("/")[2])
