"""The JSON of :classify and :regress, without a server. Expected values: by hand from api_rest.md."""

import json

import pytest
from tensorflow_serving.apis import classification_pb2, regression_pb2

from serving.json_examples import decode_examples_request, encode_classifications, encode_regressions
from serving.status import RequestError


def decode(body):
    return decode_examples_request(body if isinstance(body, bytes) else json.dumps(body).encode())


def features_of(example):
    return {
        name: (feature.WhichOneof("kind"), list(getattr(feature, feature.WhichOneof("kind")).value))
        for name, feature in example.features.feature.items()
        if feature.WhichOneof("kind")
    }


def feature_of(value):
    (example,) = decode({"examples": [{"f": value}]})[1].example_list.examples
    return features_of(example)["f"]


@pytest.mark.parametrize(
    ("value", "kind", "values"),
    [
        (1, "int64_list", [1]),
        ([1, 2], "int64_list", [1, 2]),
        (2**63 - 1, "int64_list", [2**63 - 1]),
        (True, "int64_list", [1]),
        (1.0, "float_list", [1.0]),
        ([0.5, float("inf")], "float_list", [0.5, float("inf")]),
        ("é", "bytes_list", ["é".encode()]),
        ({"b64": "AP8="}, "bytes_list", [b"\x00\xff"]),
        (["a", {"b64": "AA"}], "bytes_list", [b"a", b"\x00"]),
    ],
)
def test_a_json_value_becomes_the_feature_of_its_kind(value, kind, values):
    assert feature_of(value) == (kind, values)


def test_an_empty_list_is_a_feature_without_values():
    (example,) = decode({"examples": [{"f": []}]})[1].example_list.examples
    assert list(example.features.feature) == ["f"]
    assert features_of(example) == {}


def test_context_and_signature_name_are_read():
    name, examples = decode({"signature_name": "s", "context": {"c": 1}, "examples": [{"x": "a"}, {}]})
    assert name == "s"
    assert features_of(examples.example_list_with_context.context) == {"c": ("int64_list", [1])}
    assert [features_of(e) for e in examples.example_list_with_context.examples] == [
        {"x": ("bytes_list", [b"a"])},
        {},
    ]


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        (b"", "JSON Parse error"),
        ({}, "expected 'examples'"),
        ({"examples": {}}, "expected 'examples'"),
        ({"examples": []}, "at least one"),
        ({"examples": [{}, 1]}, "element 1: expected an object.*got 1"),
        ({"examples": [{}], "context": 1}, "'context': expected an object"),
        ({"examples": [{"f": None}]}, "'f'.*got null"),
        ({"examples": [{"f": [[1]]}]}, "'f'"),
        ({"examples": [{"f": {"x": 1}}]}, "'f'"),
        ({"examples": [{"f": {"b64": "?"}}]}, "not base64"),
        ({"examples": [{"f": [1, 2.5]}]}, "one kind"),
        ({"examples": [{"f": [1, "a"]}]}, "one kind"),
        ({"examples": [{"f": 2**63}]}, "int64"),
        ({"examples": [{"f": 1e39}]}, "float32"),
        (b'{"examples": [{"f": 1e999}]}', "float32"),
        ({"examples": [{"f": "\ud800"}]}, "not valid Unicode"),
        ({"examples": [{}], "signature_name": 1}, "'signature_name' must be a string"),
    ],
    ids=str,
)
def test_a_wrong_body_is_an_invalid_argument_that_names_the_place(body, complaint):
    with pytest.raises(RequestError, match=complaint) as caught:
        decode(body)
    assert caught.value.http_code == 400


def test_results_are_written_with_the_digits_that_float32_needs():
    regressions = regression_pb2.RegressionResult()
    for value in (0.1, 2.0, float("nan")):
        regressions.regressions.add(value=value)
    assert encode_regressions(regressions) == b'{"results":[0.1,2.0,NaN]}'
    classifications = classification_pb2.ClassificationResult()
    classifications.classifications.add().classes.add(label="日", score=0.1)
    assert encode_classifications(classifications) == '{"results":[[["日",0.1]]]}'.encode()
