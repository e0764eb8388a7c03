"""Queries become inputs of a signature: what is missing is filled, lists survive a server that batches."""

import math

from serving.queries import batch_of_one
from serving.transport import InputSpec

SPECS = {
    "history": InputSpec("string", "DT_STRING", 2),
    "weights": InputSpec("float", "DT_FLOAT", 2, width=3),
    "user_id": InputSpec("string", "DT_STRING", 1),
    "times": InputSpec("integer", "DT_INT64", 2),
}


def test_a_list_padded_with_its_first_element_gains_nothing():
    inputs = batch_of_one(SPECS, {"history": ["a", "b"], "times": [7]}, {})
    for name, values in (("history", ["a", "b"]), ("times", [7])):
        (row,) = inputs[name]
        padded_by_the_server = row + [row[0]] * 3
        assert [value for value in padded_by_the_server if value not in ("", -1)] == values


def test_what_is_missing_is_filled_to_the_width_that_an_input_has():
    inputs = batch_of_one(SPECS, {}, {})
    assert (inputs["history"], inputs["user_id"], inputs["times"]) == ([[""]], [""], [[-1]])
    assert [math.isnan(weight) for weight in inputs["weights"][0]] == [True] * 3
    assert batch_of_one(SPECS, {}, {"weights": [1, 2, 3]})["weights"] == [[1.0, 2.0, 3.0]]
