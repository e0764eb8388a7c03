"""What a GPU could run of a model, on graphs small enough to count by hand."""

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from click.testing import CliRunner

from serving.placement import PRODUCTS, OpPlacement, Placement, audit
from tfx_pipeline.cli import main
from trainer.golden import GoldenRequest, write_golden_requests


class Small(tf.Module):
    """relu(x W + b), each row's sum times a number that is looked up by a text."""

    def __init__(self):
        super().__init__()
        self.weights = tf.Variable(tf.ones([3, 5]))
        self.bias = tf.Variable(tf.ones([5]))
        keys = tf.lookup.KeyValueTensorInitializer(["a", "b"], [2.0, 3.0])
        self.table = tf.lookup.StaticHashTable(keys, 0.0)

    @tf.function(
        input_signature=[
            tf.TensorSpec([None, 3], tf.float32, name="x"),
            tf.TensorSpec([None], tf.string, name="key"),
        ]
    )
    def serve(self, x, key):
        hidden = tf.nn.relu(tf.nn.bias_add(tf.matmul(x, self.weights), self.bias))
        return {"y": tf.reduce_sum(hidden, axis=1) * self.table.lookup(key)}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small") / "1"
    model = Small()
    tf.saved_model.save(model, str(path), signatures={"serving_default": model.serve})
    inputs = {"x": np.ones((2, 3), np.float32), "key": np.array([b"a", b"b"], object)}
    write_golden_requests(path, [GoldenRequest("serving_default", inputs, {"y": np.zeros(2, np.float32)})])
    return path


@pytest.fixture(scope="module")
def placement(bundle: Path) -> Placement:
    (only,) = audit(bundle)
    return only


def test_arithmetic_is_counted_as_by_hand(placement: Placement) -> None:
    flops = {op.op: op.flops for op in placement.ops if op.flops}
    # Two rows: 2 m n k = 2 * 2 * 5 * 3; then ten hidden values each; then two answers.
    assert flops == {"MatMul": 60, "BiasAdd": 10, "Relu": 10, "Sum": 10, "Mul": 2}


def test_a_gpu_could_do_all_but_the_look_up(placement: Placement) -> None:
    assert placement.gpu_share() == placement.gpu_share(PRODUCTS) == 1.0
    assert {op.op for op in placement.ops if not op.has_gpu_kernel} == {"HashTableV2", "LookupTableFindV2"}


def test_the_command_lists_what_no_gpu_could_run_and_on_demand_the_rest(bundle: Path) -> None:
    def lines(*flags: str) -> list[str]:
        result = CliRunner().invoke(main, ["audit-placement", "--model-dir", str(bundle), *flags])
        assert result.exit_code == 0, result.output
        return [" ".join(line.split()) for line in result.output.splitlines()]

    head, total, *ops = lines()
    assert head.endswith("/ serving_default")
    assert total == "0.00 MFLOP in a golden request, 100.0% of them on a GPU; matrix products 100.0%"
    assert {op.split()[0] for op in ops} == {"HashTableV2", "LookupTableFindV2"}
    assert "MatMul 1 nodes, 1 with a GPU kernel, 0.000 MFLOP" in lines("--all")


def test_the_share_is_that_of_the_arithmetic_whose_every_node_has_a_kernel() -> None:
    ops = (OpPlacement("MatMul", 2, 2, 300), OpPlacement("Einsum", 2, 1, 100), OpPlacement("Mul", 1, 1, 600))
    placement = Placement("bundle", "signature", ops)
    assert placement.gpu_share() == 0.9
    assert placement.gpu_share(PRODUCTS) == 0.75
