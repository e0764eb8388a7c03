"""A world where the future says everything: leaking protocols must look better than the honest one."""

import numpy as np
import polars as pl
import pytest

from schema.contract import DatasetSpec
from schema.point_in_time import EVENT_TIME
from tfx_pipeline.leakage.findings import Protocol
from tfx_pipeline.leakage.inflation import NUM_PROTOCOLS, measure_inflation

NUM_ITEMS = 300
SPEC = DatasetSpec.model_validate(
    {
        "name": "fashion",
        "interactions": {
            "files": ["log.csv"],
            "columns": {n: n for n in ("user_id", "item_id", "event_time_unix_s")},
            "labels": {"click": "click"},
        },
        "users": {"files": ["users.csv"], "columns": {"user_id": "user_id"}},
        "items": {"files": ["items.csv"], "columns": {"item_id": "item_id"}},
        "positive": "click",
        "tasks": [{"name": "click", "label": "click", "kind": "binary"}],
        "split": {"fractions": [0.8, 0.1, 0.1]},
    }
)


def fashion_log() -> pl.DataFrame:
    """Every day other items are in fashion: of those, and no others, most are clicked."""
    rng = np.random.default_rng(4)
    rows = 8_000
    day = np.sort(rng.integers(0, 30, rows))
    item = np.where(
        rng.random(rows) < 0.7, day * 10 + rng.integers(10, size=rows), rng.integers(NUM_ITEMS, size=rows)
    )
    click = rng.random(rows) < np.where(item // 10 == day, 0.8, 0.1)
    return pl.DataFrame(
        {
            "user_id": [f"u{n}" for n in rng.integers(400, size=rows)],
            "item_id": [f"i{n}" for n in item],
            EVENT_TIME: 1_700_000_000 + day * 86_400 + np.arange(rows),
            "row_number": np.arange(rows),
            "split": ["train" if d < 24 else "eval" if d < 27 else "test" for d in day],
            "click": click.astype(np.float32),
        }
    )


CATALOGUE = pl.DataFrame({"item_id": [f"i{n}" for n in range(NUM_ITEMS)]})


@pytest.fixture(scope="module")
def protocols() -> tuple[Protocol, ...]:
    return measure_inflation(fashion_log(), CATALOGUE, SPEC)


def test_a_log_of_choices_alone_is_ranked_by_the_first_task_that_tells_its_rows_apart() -> None:
    log = fashion_log().rename({"click": "like"}).with_columns(watched=pl.lit(1.0), shared=pl.lit(0.0))
    tasks = [{"name": name, "label": name, "kind": "binary"} for name in ("shared", "like")]
    declared = SPEC.model_dump() | {"positive": "watched"}
    declared["interactions"]["labels"] = {name: name for name in ("watched", "shared", "like")}
    by_like = measure_inflation(log, CATALOGUE, DatasetSpec.model_validate({**declared, "tasks": tasks}))
    assert by_like[2].metrics["lightgbm/auc"] > by_like[0].metrics["lightgbm/auc"] + 0.1
    unranked = measure_inflation(log, CATALOGUE, DatasetSpec.model_validate({**declared, "tasks": tasks[:1]}))
    assert "lightgbm/auc" not in unranked[0].metrics
    assert all(np.isfinite(value) for protocol in unranked for value in protocol.metrics.values())


def test_the_honest_protocol_comes_first_and_alone(protocols: tuple[Protocol, ...]) -> None:
    assert [p.is_honest for p in protocols] == [True] + [False] * (NUM_PROTOCOLS - 1)


def test_features_of_the_full_log_inflate_the_ranker(protocols: tuple[Protocol, ...]) -> None:
    honest, _, full, _ = (p.metrics["lightgbm/auc"] for p in protocols)
    assert full > honest + 0.1


def test_a_random_split_inflates_retrieval(protocols: tuple[Protocol, ...]) -> None:
    """Items of the last days have no train positive in time order; drawn at random, they have."""
    honest, random, full, _ = (p.metrics["popularity/recall_at_100"] for p in protocols)
    assert random > honest + 0.1
    assert full > honest + 0.1
