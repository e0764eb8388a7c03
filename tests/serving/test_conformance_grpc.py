"""PredictionService and ModelService over gRPC, by the comments of their protos."""

import grpc
import numpy as np
import pytest
import tensorflow as tf
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    inference_pb2,
    model_management_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
    regression_pb2,
)

from serving.inference import CLASSIFY_METHOD, REGRESS_METHOD


@pytest.fixture(scope="module")
def stub(server):
    with grpc.insecure_channel(server.grpc_target.removeprefix("grpc://")) as channel:
        yield prediction_service_pb2_grpc.PredictionServiceStub(channel)


def example(**features):
    result = tf.train.Example()
    for name, value in features.items():
        result.features.feature[name].float_list.value.append(value)
    return result


def examples_request(kind, signature, xs, model="examples"):
    request = kind()
    request.model_spec.name = model
    request.model_spec.signature_name = signature
    request.input.example_list.examples.extend(example(x=x) for x in xs)
    return request


def multi_inference_request(tasks, xs=(0.25,)):
    request = inference_pb2.MultiInferenceRequest()
    for model, signature, method in tasks:
        task = request.tasks.add(method_name=method)
        task.model_spec.name = model
        task.model_spec.signature_name = signature
    request.input.example_list.examples.extend(example(x=x) for x in xs)
    return request


def fails(call, request, code, complaint):
    with pytest.raises(grpc.RpcError, match=complaint) as caught:
        call(request, timeout=30)
    assert caught.value.code().name == code


# Classify and Regress


def test_classify_gives_labels_and_scores_of_each_example(stub):
    request = examples_request(classification_pb2.ClassificationRequest, "classify", [0.25, 1.0])
    response = stub.Classify(request, timeout=30)
    assert [
        [(entry.label, entry.score) for entry in classifications.classes]
        for classifications in response.result.classifications
    ] == [[("low", 0.75), ("high", 0.25)], [("low", 0.0), ("high", 1.0)]]
    spec = response.model_spec
    assert (spec.name, spec.version.value, spec.signature_name) == ("examples", 1, "classify")


def test_classify_without_classes_has_empty_labels(stub):
    request = examples_request(classification_pb2.ClassificationRequest, "scores", [0.25])
    (classifications,) = stub.Classify(request, timeout=30).result.classifications
    assert [(entry.label, entry.score) for entry in classifications.classes] == [("", 0.75), ("", 0.25)]


def test_regress_gives_one_value_for_each_example(stub):
    request = examples_request(regression_pb2.RegressionRequest, "regress", [0.25, 1.0])
    response = stub.Regress(request, timeout=30)
    assert [regression.value for regression in response.result.regressions] == [0.5, 2.0]
    assert response.model_spec.version.value == 1


def test_a_context_is_shared_by_all_examples_and_an_example_may_override_it(stub):
    request = examples_request(regression_pb2.RegressionRequest, "regress", [])
    request.input.example_list_with_context.context.CopyFrom(example(x=3.0))
    request.input.example_list_with_context.examples.extend([example(), example(x=0.5)])
    response = stub.Regress(request, timeout=30)
    assert [regression.value for regression in response.result.regressions] == [6.0, 1.0]


def test_a_signature_of_tf_2_serves_regress_unless_method_names_are_checked(stub):
    request = examples_request(regression_pb2.RegressionRequest, "native", [0.25])
    assert stub.Regress(request, timeout=30).result.regressions[0].value == 0.5


@pytest.mark.parametrize(
    ("kind", "model", "signature", "xs", "code", "complaint"),
    [
        ("Classify", "examples", "nothing", [1.0], "INVALID_ARGUMENT", "No signature.*nothing"),
        ("Regress", "examples", "nothing", [1.0], "INVALID_ARGUMENT", "No signature.*nothing"),
        ("Classify", "examples", "", [1.0], "INVALID_ARGUMENT", "serving_default"),
        ("Classify", "examples", "classify", [], "INVALID_ARGUMENT", "Input is empty"),
        ("Regress", "examples", "regress", [], "INVALID_ARGUMENT", "Input is empty"),
        ("Classify", "examples", "regress", [1.0], "FAILED_PRECONDITION", "'classes' or 'scores'"),
        ("Regress", "examples", "classify", [1.0], "INVALID_ARGUMENT", "one output"),
        ("Regress", "examples", "scores", [1.0], "FAILED_PRECONDITION", "'outputs'"),
        ("Classify", "examples", "labels", [1.0], "INVALID_ARGUMENT", "not UTF-8"),
        ("Regress", "echo", "half", [1.0], "FAILED_PRECONDITION", "the input 'inputs', found 'x'"),
        ("Regress", "echo", "", [1.0], "INVALID_ARGUMENT", "one input"),
        ("Regress", "nothing", "", [1.0], "NOT_FOUND", "no model nothing"),
        ("Classify", "", "", [1.0], "INVALID_ARGUMENT", "no model name"),
    ],
)
def test_a_wrong_examples_request_gets_its_code(stub, kind, model, signature, xs, code, complaint):
    request_class = {
        "Classify": classification_pb2.ClassificationRequest,
        "Regress": regression_pb2.RegressionRequest,
    }[kind]
    fails(getattr(stub, kind), examples_request(request_class, signature, xs, model), code, complaint)


def test_an_example_without_a_feature_that_the_model_needs_is_the_callers_mistake(stub):
    request = examples_request(regression_pb2.RegressionRequest, "regress", [])
    request.input.example_list.examples.add()
    fails(stub.Regress, request, "INVALID_ARGUMENT", "x")


# MultiInference


def test_multi_inference_answers_each_task_on_the_same_examples(stub):
    request = multi_inference_request(
        [("examples", "regress", REGRESS_METHOD), ("examples", "classify", CLASSIFY_METHOD)], [0.25]
    )
    regression, classification = stub.MultiInference(request, timeout=30).results
    assert regression.regression_result.regressions[0].value == 0.5
    assert classification.classification_result.classifications[0].classes[1].score == 0.25
    assert regression.model_spec.signature_name == "regress"
    assert regression.model_spec.version.value == 1


@pytest.mark.parametrize(
    ("tasks", "code", "complaint"),
    [
        ([], "INVALID_ARGUMENT", "no model name"),
        (
            [("examples", "regress", REGRESS_METHOD), ("echo", "half", REGRESS_METHOD)],
            "INVALID_ARGUMENT",
            "same model name",
        ),
        ([("examples", "regress", REGRESS_METHOD)] * 2, "INVALID_ARGUMENT", "Duplicate.*regress"),
        ([("examples", "nothing", REGRESS_METHOD)], "INVALID_ARGUMENT", "nothing"),
        (
            [("examples", "regress", REGRESS_METHOD), ("examples", "other_input", REGRESS_METHOD)],
            "INVALID_ARGUMENT",
            "Input tensor must be the same",
        ),
        (
            [("examples", "regress", "tensorflow/serving/predict")],
            "UNIMPLEMENTED",
            "tensorflow/serving/predict",
        ),
    ],
)
def test_a_wrong_multi_inference_request_gets_its_code(stub, tasks, code, complaint):
    fails(stub.MultiInference, multi_inference_request(tasks), code, complaint)


# Predict beyond test_model_server.py, metadata, methods that are not there


def test_a_version_and_a_label_that_are_not_there_differ(stub):
    request = predict_pb2.PredictRequest()
    request.model_spec.name = "echo"
    request.model_spec.version.value = 9
    fails(stub.Predict, request, "NOT_FOUND", "version 9")
    request.model_spec.version_label = "stable"
    fails(stub.Predict, request, "INVALID_ARGUMENT", "Unrecognized servable version label: stable")


def test_one_value_stands_for_all_elements_of_a_tensor_but_not_for_millions(stub):
    request = predict_pb2.PredictRequest()
    request.model_spec.name = "echo"
    request.model_spec.signature_name = "half"
    proto = request.inputs["x"]
    proto.dtype = tf.float32.as_datatype_enum
    proto.float_val.append(3.0)
    proto.tensor_shape.dim.add(size=3)
    assert tf.make_ndarray(stub.Predict(request, timeout=30).outputs["y"]).tolist() == [1.5] * 3
    proto.tensor_shape.dim[0].size = 2**21
    fails(stub.Predict, request, "INVALID_ARGUMENT", "must be given")


def test_metadata_needs_the_field_signature_def(stub):
    request = get_model_metadata_pb2.GetModelMetadataRequest()
    request.model_spec.name = "examples"
    fails(stub.GetModelMetadata, request, "INVALID_ARGUMENT", "signature_def")
    request.metadata_field.append("signature_def")
    response = stub.GetModelMetadata(request, timeout=30)
    signatures = get_model_metadata_pb2.SignatureDefMap()
    assert response.metadata["signature_def"].Unpack(signatures)
    assert signatures.signature_def["classify"].method_name == CLASSIFY_METHOD
    assert signatures.signature_def["regress"].outputs["outputs"].dtype == tf.float32.as_datatype_enum


@pytest.mark.parametrize(
    "method",
    ["tensorflow.serving.SessionService/SessionRun", "tensorflow.serving.PredictionService/PredictStreamed"],
)
def test_what_the_official_binary_does_not_serve_is_unimplemented(server, method):
    with grpc.insecure_channel(server.grpc_target.removeprefix("grpc://")) as channel:
        call = channel.unary_unary(f"/{method}", request_serializer=bytes, response_deserializer=bytes)
        with pytest.raises(grpc.RpcError) as caught:
            call(b"", timeout=30)
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_a_reload_request_without_a_config_list_is_refused(server):
    with grpc.insecure_channel(server.grpc_target.removeprefix("grpc://")) as channel:
        models = model_service_pb2_grpc.ModelServiceStub(channel)
        request = model_management_pb2.ReloadConfigRequest()
        fails(models.HandleReloadConfigRequest, request, "INVALID_ARGUMENT", "model_config_list")
        request.config.model_config_list.config.add(name="x")
        fails(models.HandleReloadConfigRequest, request, "INVALID_ARGUMENT", "base_path")


def test_the_deadline_of_a_call_ends_it_and_the_server_goes_on(stub):
    request = predict_pb2.PredictRequest()
    request.model_spec.name = "echo"
    request.model_spec.signature_name = "sleep"
    request.inputs["seconds"].CopyFrom(tf.make_tensor_proto(np.float32(0.5)))
    with pytest.raises(grpc.RpcError) as caught:
        stub.Predict(request, timeout=0.1)
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert stub.Predict(request, timeout=30).outputs["done"].float_val[0] == 0.5
