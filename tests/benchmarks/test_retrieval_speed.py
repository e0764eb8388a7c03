"""What is timed does the work of real training."""

import numpy as np
import pytest

from benchmarks.retrieval_speed import check_histories, timed_config
from schema.errors import DataError
from trainer.config import RetrievalConfig

NO_ITEMS = np.zeros((2, 3), np.int64)
# As the made-up examples come out of Transform: no sessions were written.
WINDOW = {
    "history_item_ids_ids": np.array([[4, 5, 0], [0, 0, 0]]),
    "prior_sessions_item_ids_ids": NO_ITEMS,
}


def test_the_timed_model_reads_the_histories_that_were_made_up() -> None:
    check_histories(WINDOW, timed_config(8))


def test_a_model_that_would_read_empty_histories_is_not_timed() -> None:
    with pytest.raises(DataError, match="empty histories: prior_sessions_item_ids_ids holds no item"):
        check_histories(WINDOW, RetrievalConfig(roll_back_to_session=True))
    with pytest.raises(DataError, match="empty histories: history_item_ids_ids holds no item"):
        check_histories({**WINDOW, "history_item_ids_ids": NO_ITEMS}, timed_config(8))
