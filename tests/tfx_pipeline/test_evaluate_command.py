"""`funnel evaluate` on the screen: every number and every word whole, in the width of a pipe."""

import io
import re

from rich.console import Console

from tests.tfx_pipeline.report_world import retrieval_comparison
from tfx_pipeline.commands import evaluate
from trainer.comparison import Against, Comparison, MetricResult, Rival, SliceResult

RIVALS = ("last_blessed", "popularity", "recent_popularity", "item_knn", "ials", "newest", "random")
TASKS = ("last_blessed", "global_mean", "global_median", "item_mean", "logistic_regression", "lightgbm")


def comparison(model: str, rivals: tuple[str, ...], values: dict[str, float]) -> Comparison:
    metrics = tuple(
        MetricResult(
            f"{model}/{name}", 900, value, 0.98 * value, 1.02 * value, "",
            {rival: Against(value, -value, -value, -value, 0.001) for rival in rivals},
        )
        for name, value in values.items()
    )  # fmt: skip
    whole = SliceResult((), 900, 900, "", metrics)
    named = tuple(Rival(name, "") for name in rivals)
    return Comparison(model, metrics[0].key, 0.95, 1_000, named, {}, (whole,))


def printed(found: Comparison) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(evaluate._metrics_table(found))
    return console.export_text()


def test_no_word_is_broken_and_no_number_cut_within_120_columns() -> None:
    values = {
        "recall_at_100": 0.53172,
        "intra_list_diversity_at_10": 0.93991,
        "distinct_items_at_10": 7_583.0,
    }
    retrieval = printed(comparison("retrieval", RIVALS, values))
    ranking = printed(
        comparison("ranking", TASKS, {"long_view/normalised_entropy": 0.86223, "watch_time/mae": 25.4512})
    )
    for text, rivals in ((retrieval, RIVALS), (ranking, TASKS)):
        assert max(map(len, text.splitlines())) <= 120 and "…" not in text
        words = set(text.split())
        assert {word for rival in rivals for word in rival.split("_")} <= words
    assert re.search(r"recall_at_100 +0\.5317 +0\.5211–0\.5424( +-0\.5317\*){7}", retrieval)
    assert re.search(r"distinct_items_at_10 +7583\.0 +7431\.3–7734\.7( +-7583\*){7}", retrieval)
    assert re.search(r"long_view normalised_entropy +0\.8622 +0\.8450–0\.8795( +-0\.8622\*){6}", ranking)


def test_a_metric_without_an_interval_leaves_it_out() -> None:
    text = printed(retrieval_comparison())
    assert re.search(r"distinct_items_at_10 +321\.0 +\+276", text)
