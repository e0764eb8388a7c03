"""The JSON of the REST API, without a server. Expected values are written by hand from api_rest.md."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from serving.json_codec import decode_predict_request, encode_predict_response
from serving.status import RequestError

TWO_INPUTS = {"text": np.dtype(object), "number": np.dtype(np.int64)}
TEXT = {"text": np.dtype(object)}


def decode(body, dtypes):
    return decode_predict_request(
        body if isinstance(body, bytes) else json.dumps(body).encode(), lambda _: dtypes
    )


def decode_one(value, dtype):
    return decode({"inputs": {"x": value}}, {"x": np.dtype(dtype)}).inputs["x"]


def test_rows_and_columns_give_the_same_arrays():
    rows = decode({"instances": [{"text": "a", "number": 1}, {"text": "b", "number": 2}]}, TWO_INPUTS)
    columns = decode({"inputs": {"text": ["a", "b"], "number": [1, 2]}}, TWO_INPUTS)
    assert (rows.format, columns.format) == ("row", "column")
    for request in (rows, columns):
        assert request.inputs["text"].tolist() == [b"a", b"b"]
        assert request.inputs["number"].tolist() == [1, 2]
        assert request.inputs["number"].dtype == np.int64


def test_a_single_input_needs_no_name():
    assert decode({"instances": ["a", "b"]}, TEXT).inputs["text"].tolist() == [b"a", b"b"]
    assert decode({"inputs": [["a"]]}, TEXT).inputs["text"].tolist() == [[b"a"]]
    assert decode({"inputs": "a"}, TEXT).inputs["text"].shape == ()
    assert decode({"instances": [{"b64": "AAE="}]}, TEXT).inputs["text"].tolist() == [b"\x00\x01"]


def test_columns_may_differ_in_their_first_dimension():
    inputs = decode({"inputs": {"text": ["a", "b", "c"], "number": [[1]]}}, TWO_INPUTS).inputs
    assert inputs["text"].shape == (3,)
    assert inputs["number"].shape == (1, 1)


def test_signature_name_is_read_and_asked_for():
    asked = []
    body = b'{"signature_name": "half", "instances": ["a"]}'
    request = decode_predict_request(body, lambda name: asked.append(name) or TEXT)
    assert (request.signature_name, asked) == ("half", ["half"])


@pytest.mark.parametrize("value", [2**63 - 1, -(2**63), 2**53 + 1])
def test_int64_is_exact_both_ways(value):
    assert decode_one([value], np.int64).tolist() == [value]
    assert encode_predict_response({"x": np.array([value])}, "row") == b'{"predictions":[%d]}' % value


def test_uint64_is_exact():
    assert decode_one([1, 2**64 - 1], np.uint64).tolist() == [1, 2**64 - 1]


def test_nan_and_infinities_are_bare_tokens_both_ways():
    array = decode(b'{"inputs": {"x": [NaN, Infinity, -Infinity]}}', {"x": np.dtype(np.float32)}).inputs["x"]
    assert np.isnan(array[0])
    assert array[1:].tolist() == [np.inf, -np.inf]
    assert encode_predict_response({"x": array}, "column") == b'{"outputs":[NaN,Infinity,-Infinity]}'


def test_float32_is_written_with_the_digits_that_float32_needs():
    array = np.array([0.2, 1.0, 16777216.0, 1e-7], np.float32)
    assert encode_predict_response({"x": array}, "row") == b'{"predictions":[0.2,1.0,16777216.0,1e-7]}'


@given(st_numpy.arrays(np.float32, st_numpy.array_shapes(max_dims=3, max_side=4)))
def test_float32_survives_the_round_trip(array):
    answer = json.loads(encode_predict_response({"x": array}, "column"))["outputs"]
    np.testing.assert_array_equal(np.array(answer, np.float64).astype(np.float32), array)


@given(st.lists(st.binary(max_size=8), min_size=1, max_size=4))
def test_binary_strings_survive_the_round_trip(values):
    array = np.empty(len(values), object)
    array[:] = values
    answer = json.loads(encode_predict_response({"blob_bytes": array}, "row"))["predictions"]
    assert decode({"instances": answer}, TEXT).inputs["text"].tolist() == values


def test_base64_without_padding_is_read():
    assert decode_one([{"b64": "AAE"}], object).tolist() == [b"\x00\x01"]


def test_binary_strings_may_stand_in_nested_lists_beside_text():
    array = decode_one([[["a", {"b64": "/wA="}]], [[{"b64": ""}, "b"]]], object)
    assert array.tolist() == [[[b"a", b"\xff\x00"]], [[b"", b"b"]]]
    answer = json.loads(encode_predict_response({"x_bytes": array}, "column"))
    assert answer == {"outputs": [[[{"b64": "YQ=="}, {"b64": "/wA="}]], [[{"b64": ""}, {"b64": "Yg=="}]]]}


def test_one_output_is_written_without_its_name_and_several_with_it():
    x, y = np.array([1, 2]), np.array([[0.5], [1.5]], np.float32)
    assert json.loads(encode_predict_response({"x": x}, "row")) == {"predictions": [1, 2]}
    assert json.loads(encode_predict_response({"x": x}, "column")) == {"outputs": [1, 2]}
    assert json.loads(encode_predict_response({"x": x, "y": y}, "row")) == {
        "predictions": [{"x": 1, "y": [0.5]}, {"x": 2, "y": [1.5]}]
    }
    assert json.loads(encode_predict_response({"x": x, "y": y}, "column")) == {
        "outputs": {"x": [1, 2], "y": [[0.5], [1.5]]}
    }


def test_text_is_written_as_utf8():
    array = np.array(["日本".encode()], object)
    assert encode_predict_response({"x": array}, "row") == '{"predictions":["日本"]}'.encode()


def test_empty_lists_keep_their_shape():
    assert decode_one([[], []], object).shape == (2, 0)
    assert decode_one([], np.float32).shape == (0,)


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        (b"", "JSON Parse error"),
        (b'{"instances": [1', "JSON Parse error"),
        (b'{"instances": ["\xff"]}', "JSON Parse error"),
        (b"[" * 100_000, "JSON Parse error"),
        (b'{"inputs": {"text": ["a"], "number": [' + b"1" * 5000 + b"]}}", ""),
        (b'["a"]', "must be a JSON object"),
        ({"signature_name": 1, "instances": []}, "'signature_name' must be a string"),
        ({}, "either 'instances'"),
        ({"instances": [], "inputs": {}}, "either 'instances'"),
        ({"instances": []}, "at least one element"),
        ({"instances": {"text": "a", "number": 1}}, "must be a list"),
        ({"instances": ["a"]}, "one input"),
        ({"inputs": ["a"]}, "one input"),
        ({"instances": [{"text": "a", "number": 1}, "b"]}, "element 1 must be an object"),
        ({"instances": [{"text": "a", "number": 1}, {"text": "b"}]}, "element 1.*Missing: number"),
        ({"inputs": {"text": ["a"], "nubmer": [1]}}, "Missing: number.*Not in the signature: nubmer"),
        ({"inputs": {"text": ["a"], "number": [1.0]}}, "'number'.*int64.*got 1.0"),
        ({"inputs": {"text": ["a"], "number": [True]}}, "'number'.*got true"),
        ({"inputs": {"text": ["a"], "number": ["1"]}}, "'number'"),
        ({"inputs": {"text": ["a"], "number": [2**63]}}, "'number'"),
        ({"inputs": {"text": [None], "number": [1]}}, "'text'.*got null"),
        ({"inputs": {"text": [{"b64": "?"}], "number": [1]}}, "not base64"),
        ({"inputs": {"text": ["\ud800"], "number": [1]}}, "not valid Unicode"),
        ({"inputs": {"text": [["a"], ["b", "c"]], "number": [1]}}, "'text': list 1 at level 1.*pad"),
        ({"inputs": {"text": [["a"], "b"], "number": [1]}}, "'text': list 1 at level 1.*got \"b\""),
        ({"inputs": {"text": ["a", ["b"]], "number": [1]}}, "'text'"),
    ],
    ids=str,
)
def test_a_wrong_body_is_an_invalid_argument_that_names_the_place(body, complaint):
    with pytest.raises(RequestError, match=f"(?s){complaint}") as caught:
        decode(body, TWO_INPUTS)
    assert caught.value.http_code == 400


def test_a_number_that_no_double_holds_is_not_taken_for_infinity():
    with pytest.raises(RequestError, match="'x' takes a number in float32's range"):
        decode(b'{"inputs": {"x": [Infinity, 1e999]}}', {"x": np.dtype(np.float32)})


@pytest.mark.parametrize(
    ("value", "dtype", "rounded"),
    [
        (1435774380, np.float32, 1435774336),  # the example of api_rest.md
        (2**24 + 1, np.float32, 2**24),
        (2**53 + 1, np.float64, 2**53),
        (-(2**100), np.float32, -(2.0**100)),
        (2**1023, np.float64, 2.0**1023),
    ],
)
def test_a_whole_number_that_a_float_cannot_hold_exactly_is_rounded(value, dtype, rounded):
    assert decode_one([value], dtype).tolist() == [rounded]


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(1e39, np.float32), (2**128, np.float32), (-(2**128), np.float32), (2**1024, np.float64)],
)
def test_a_number_beyond_the_range_of_the_float_type_is_refused(value, dtype):
    with pytest.raises(RequestError, match="'x'"):
        decode_one([value], dtype)


@pytest.mark.parametrize("second_size", [3, None])
def test_rows_need_outputs_with_one_first_dimension(second_size):
    second = np.zeros(() if second_size is None else second_size)
    with pytest.raises(RequestError, match=r"common first dimension.*column format"):
        encode_predict_response({"x": np.zeros(2), "y": second}, "row")


def test_output_that_is_not_text_is_refused_with_the_way_out():
    with pytest.raises(RequestError, match="_bytes"):
        encode_predict_response({"x": np.array([b"\xff"], object)}, "row")


@pytest.mark.parametrize("request_format", ["row", "column"])
def test_one_value_that_is_not_finite_changes_no_other_value(request_format):
    finite = {
        "floats": np.array([[0.2, 1e-7], [3.4028235e38, -0.0]], np.float32),
        "doubles": np.array([1e22, 5e-324]),
        "halves": np.array([0.1, 65504], np.float16),
        "integers": np.array([2**63 - 1, -(2**63)]),
        "unsigned": np.array([2**64 - 1, 0], np.uint64),
        "flags": np.array([True, False]),
        "texts": np.array([["é".encode()], [b'"']], object),
        "turned": np.arange(4, dtype=np.float32).reshape(2, 2).T,
    }
    fast = json.loads(encode_predict_response(finite, request_format))
    slow = json.loads(
        encode_predict_response({**finite, "infinite": np.array([np.nan, np.inf])}, request_format)
    )
    rows = slow["predictions"] if request_format == "row" else [slow["outputs"]]
    for row in rows:
        del row["infinite"]
    assert fast == slow
    assert np.array_equal(np.array(_column(fast, "floats"), np.float32), finite["floats"])
    assert _column(fast, "integers") == [2**63 - 1, -(2**63)]


def _column(answer, name):
    if "outputs" in answer:
        return answer["outputs"][name]
    return [row[name] for row in answer["predictions"]]
