"""Names of the metrics: the one list that the models, the gates, the baselines and the report read."""

from schema.contract import TaskKind

RETRIEVAL_METRICS = ("recall", "precision", "ndcg", "hit_rate", "mrr", "map")
RANKING_METRICS = {
    TaskKind.BINARY: ("auc", "gauc", "log_loss", "normalised_entropy", "ece"),
    TaskKind.WATCH_TIME: ("mae", "xauc"),
    TaskKind.REGRESSION: ("mae", "xauc"),
    TaskKind.COMPLETION: ("mae", "xauc"),
}
LOWER_IS_BETTER = frozenset({"log_loss", "normalised_entropy", "ece", "mae"})


def metric_key(stage: str, metric: str, *, task: str | None = None, k: int | None = None) -> str:
    """Name of a metric in reports and gates.

    >>> metric_key("retrieval", "recall", k=100), metric_key("ranking", "auc", task="click")
    ('retrieval/recall_at_100', 'ranking/click/auc')
    """
    return "/".join([stage, *([task] if task else []), metric if k is None else f"{metric}_at_{k}"])
