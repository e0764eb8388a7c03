"""Queries become inputs of a signature: what is missing is filled, lists are padded."""

import math

from serving.queries import batch_of_one
from serving.transport import InputSpec

SPECS = {
    "history": InputSpec("string", "DT_STRING", 2),
    "weights": InputSpec("float", "DT_FLOAT", 2, width=3),
    "user_id": InputSpec("string", "DT_STRING", 1),
    "times": InputSpec("integer", "DT_INT64", 2),
}


def test_lists_are_padded_to_a_multiple_and_never_cut():
    inputs = batch_of_one(SPECS, {"history": ["a", "b", "c"], "times": [7]}, {}, pad_to_multiple=2)
    assert inputs["history"] == [["a", "b", "c", ""]]
    assert inputs["times"] == [[7, -1]]
    assert batch_of_one(SPECS, {"history": ["a", "b"]}, {}, 2)["history"] == [["a", "b"]]


def test_what_is_missing_is_filled_to_the_width_that_an_input_has():
    inputs = batch_of_one(SPECS, {}, {}, pad_to_multiple=1)
    assert (inputs["history"], inputs["user_id"], inputs["times"]) == ([[""]], [""], [[-1]])
    assert [math.isnan(weight) for weight in inputs["weights"][0]] == [True] * 3
    assert batch_of_one(SPECS, {}, {"weights": [1, 2, 3]}, 4)["weights"] == [[1.0, 2.0, 3.0]]
