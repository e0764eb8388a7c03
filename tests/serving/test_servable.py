"""How a SavedModel is loaded and called; requests and answers are tested with the server."""

import numpy as np
import pytest
import tensorflow as tf

from serving.servable import Servable, _is_old, _read_meta_graph, _session_config

_V1 = tf.compat.v1


def save_old_model(path, *, control_flow_v2, use_resource):
    """Doubles `x` as often as `times` says, and adds a variable, 0.5, as a TensorFlow 1 program does."""
    (_V1.enable_control_flow_v2 if control_flow_v2 else _V1.disable_control_flow_v2)()
    try:
        with tf.Graph().as_default(), _V1.Session() as session:
            x, times = _V1.placeholder(tf.float32, [None], "x"), _V1.placeholder(tf.int32, [None], "times")
            start = _V1.get_variable("start", initializer=0.5, use_resource=use_resource)
            _, doubled = _V1.while_loop(
                lambda step, _: step < tf.reduce_max(times),
                lambda step, value: (step + 1, 2.0 * value),
                (0, x),
            )
            session.run(_V1.global_variables_initializer())
            _V1.saved_model.simple_save(session, str(path), {"x": x, "times": times}, {"y": doubled + start})
    finally:
        _V1.enable_control_flow_v2()


@pytest.mark.parametrize(
    ("control_flow_v2", "use_resource", "is_old"),
    [(False, True, True), (True, False, True), (True, True, False)],
    ids=["old control flow", "old variable", "neither"],
)
def test_a_model_of_tensorflow_1_loads_and_answers(tmp_path, control_flow_v2, use_resource, is_old):
    save_old_model(tmp_path / "1", control_flow_v2=control_flow_v2, use_resource=use_resource)
    graph = _read_meta_graph(tmp_path / "1").graph_def
    assert _is_old(graph) == is_old
    assert bool(_session_config(graph).experimental.executor_type) == (not is_old)
    inputs = {"x": np.array([1.0, 3.0], np.float32), "times": np.array([2, 2], np.int32)}
    outputs = Servable("old", 1, tmp_path / "1").predict("", inputs)
    assert outputs["y"].tolist() == [4.5, 12.5]
