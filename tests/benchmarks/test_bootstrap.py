"""The benchmark of the bootstrap: it measures every metric of a model, and all rivals."""

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import bootstrap
from schema.contract import TaskKind
from tfx_pipeline.config import CUTOFFS
from trainer import metrics


@pytest.mark.parametrize(
    ("work", "num_metrics"),
    [
        ("click", len(metrics.RANKING_METRICS[TaskKind.BINARY])),
        ("watch time", len(metrics.RANKING_METRICS[TaskKind.WATCH_TIME])),
        ("lists", len(metrics.RETRIEVAL_METRICS) * len(CUTOFFS)),
    ],
)
def test_models_differ_and_have_every_metric(work, num_metrics):
    model = bootstrap.WORK[work](50, np.random.default_rng(1))
    first, second = model(), model()
    assert len(first) == num_metrics
    assert all(np.isfinite(metric.value) for metric in first.values())
    assert any(first[name].value != second[name].value for name in first)


def test_the_table_has_a_row_for_each_kind_of_work():
    result = CliRunner().invoke(bootstrap.main, ["--users", "30", "--resamples", "100"])
    assert result.exit_code == 0, result.output
    header, _, *rows = result.output.splitlines()
    assert header.startswith("| 30 users, 100 draws | metrics | sums of one model | intervals |")
    assert [row.split(" | ")[0] for row in rows] == ["| click", "| watch time", "| lists"]
