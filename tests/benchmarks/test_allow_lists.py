"""The requests with allow-lists that the benchmark measures."""

from typing import Any

import numpy as np
import pytest

pytest.importorskip("faiss", reason="NOT TESTED: the 'index-benchmark' extra is not installed")
pytest.importorskip("hnswlib", reason="NOT TESTED: the 'index-benchmark' extra is not installed")

from benchmarks.allow_lists import contenders
from benchmarks.index import BATCH, NEIGHBOURS, Built


class Asked:
    """Stands for the servable: keeps what it is asked."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, Any]]] = []

    def predict(self, signature: str, inputs: dict[str, Any]) -> dict[str, Any]:
        self.requests.append((signature, inputs))
        return {"item_ids": np.zeros((len(inputs["queries"]), NEIGHBOURS))}


def test_each_allow_list_is_measured_and_compared_with_exact_search_by_the_same_list() -> None:
    servable: Any = Asked()
    measured = contenders(servable, Built(0.0, 0.0, 0, {}))
    assert [contender.name for contender in measured] == [
        "all allowed",
        "0.5 allowed",
        "0.1 allowed",
        "0.01 allowed",
    ]
    for contender, allowed in zip(measured, (b"", b"0.5", b"0.1", b"0.01"), strict=True):
        for size in (1, BATCH):
            servable.requests.clear()
            assert contender.exact is not None
            for search in (contender.search, contender.exact):
                assert search(np.zeros((size, 4), np.float32)).shape == (size, NEIGHBOURS)
            assert [signature for signature, _ in servable.requests] == ["serving_default", "serving_exact"]
            for _, inputs in servable.requests:
                assert inputs["allow_shelf"].tolist() == [[allowed]] * size
                assert inputs["k"].tolist() == [NEIGHBOURS] * size
                assert inputs["exclude_item_ids"].tolist() == [[b""]] * size
