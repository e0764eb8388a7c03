"""The Transform graph of exported models: what the whole graph says, from no more of it than is needed."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_transform as tft
import tensorflow_transform.beam as tft_beam
from tensorflow_transform.tf_metadata import dataset_metadata, schema_utils

from trainer.transform_graph import TransformGraph

WORDS = tf.sparse.from_dense(tf.constant([["b", ""], ["a", "b"], ["new", "a"]]))
SIZES = tf.sparse.from_dense(tf.constant([[2.5], [7.0], [0.5]]))
RAW = {"words": WORDS, "size": SIZES}


def preprocessing(inputs: Mapping[str, tf.SparseTensor]) -> dict[str, tf.Tensor | tf.SparseTensor]:
    """Ids of words, the share of smaller sizes, behind checks, and one output of both."""
    ids = tft.compute_and_apply_vocabulary(inputs["words"], vocab_filename="words")
    size = tf.squeeze(tf.sparse.to_dense(inputs["size"]), axis=1)
    boundaries = tft.quantiles(size, 4, epsilon=0.01)
    return {
        "word_ids": ids,
        "size_cdf": tft.apply_buckets_with_interpolation(size, boundaries),
        "size_if_known": tf.where(tf.reduce_max(tf.sparse.to_dense(ids), axis=1) > 0, size, 0.0),
    }


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> tft.TFTransformOutput:
    folder = tmp_path_factory.mktemp("transform")
    specs = {"words": tf.io.VarLenFeature(tf.string), "size": tf.io.VarLenFeature(tf.float32)}
    metadata = dataset_metadata.DatasetMetadata(schema_utils.schema_from_feature_spec(specs))
    rows = [{"words": [word], "size": [float(size)]} for size in range(9) for word in "aab"]
    with tft_beam.Context(temp_dir=str(folder / "tmp")):
        transform_fn = (rows, metadata) | tft_beam.AnalyzeDataset(preprocessing)
        _ = transform_fn | tft_beam.WriteTransformFn(str(folder / "out"))
    return tft.TFTransformOutput(str(folder / "out"))


def dense(value: tf.Tensor | tf.SparseTensor) -> np.ndarray:
    return np.asarray(tf.sparse.to_dense(value) if isinstance(value, tf.SparseTensor) else value)


def test_all_inputs_give_what_the_whole_graph_gives(output: tft.TFTransformOutput) -> None:
    expected, got = output.transform_features_layer()(RAW), TransformGraph(output)(RAW)
    assert got.keys() == expected.keys() == {"word_ids", "size_cdf", "size_if_known"}
    for name, value in expected.items():
        np.testing.assert_allclose(dense(got[name]), dense(value), rtol=1e-6)


@pytest.mark.parametrize(("given", "made"), [("words", "word_ids"), ("size", "size_cdf")])
def test_an_input_gives_what_depends_on_it_alone(
    output: tft.TFTransformOutput, given: str, made: str
) -> None:
    graph = TransformGraph(output)
    got = graph({given: RAW[given]})
    assert got.keys() == {made}
    np.testing.assert_allclose(dense(got[made]), dense(graph(RAW)[made]))


def test_nothing_is_run_that_the_inputs_do_not_need(output: tft.TFTransformOutput) -> None:
    graph = TransformGraph(output)

    def operations(*names: str) -> list[str]:
        specs = {name: tf.SparseTensorSpec([None, None], RAW[name].dtype) for name in names}
        traced = tf.function(graph, input_signature=[specs]).get_concrete_function()
        return [operation.type for operation in traced.graph.get_operations()]

    assert "LookupTableFindV2" in operations("words")
    assert "LookupTableFindV2" not in operations("size")
    # Checks and shared parts of both, too.
    assert len(operations("words")) + len(operations("size")) < len(operations("words", "size"))


def test_graph_is_exported_with_its_vocabulary(output: tft.TFTransformOutput, tmp_path: Path) -> None:
    module = tf.Module()
    module.graph = TransformGraph(output)

    def ids(words: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"ids": tf.sparse.to_dense(module.graph({"words": tf.sparse.from_dense(words)})["word_ids"])}

    signature = tf.function(ids, input_signature=[tf.TensorSpec([None, None], tf.string, name="words")])
    tf.saved_model.save(module, str(tmp_path / "1"), signatures=signature)
    (tmp_path / "1").rename(tmp_path / "2")
    loaded = tf.saved_model.load(str(tmp_path / "2"))
    got = loaded.signatures["serving_default"](words=tf.constant([["b", "a"]]))["ids"]
    np.testing.assert_array_equal(got, [[1, 0]])
    (vocabulary,) = (tmp_path / "2" / "assets").iterdir()
    assert vocabulary.read_text(encoding="utf-8").split() == ["a", "b"]
