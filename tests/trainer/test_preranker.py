"""The pre-ranker's network against its formula; its signature: order, padding, duplicates, unknown items."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tests.trainer import preranker_world as world
from trainer import features as ft
from trainer.preranker import (
    PreRanker,
    PreRanking,
    ServedPreRanker,
    Standardisation,
    catalogue_features,
    describe_items,
    describe_query,
)
from trainer.preranker_config import PrerankerConfig

CONFIG = PrerankerConfig(vector_width=6, tower_width=8, hidden_layers=(10, 7, 5))
QUERY_WIDTH, ITEM_WIDTH = 9, 11


def student(seed: int = 1, config: PrerankerConfig = CONFIG) -> PreRanker:
    """A pre-ranker with random weights, biases included, on inputs of random scale."""
    tf.keras.utils.set_random_seed(seed)
    model = PreRanker(QUERY_WIDTH, ITEM_WIDTH, config)
    for weight in model.trainable_weights:
        weight.assign_add(tf.random.normal(weight.shape, stddev=0.3))
    model.query_inputs.fit(tf.random.normal([50, QUERY_WIDTH], mean=2.0, stddev=3.0))
    model.item_inputs.fit(tf.random.normal([50, ITEM_WIDTH], stddev=0.1))
    return model


def inputs(num_queries: int = 3, num_items: int = 20) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(2)
    queries = rng.normal(2.0, 3.0, (num_queries, QUERY_WIDTH))
    return queries.astype(np.float32), rng.normal(0.0, 0.1, (num_items, ITEM_WIDTH)).astype(np.float32)


def plain_scores(model: PreRanker, queries: np.ndarray, items: np.ndarray) -> np.ndarray:
    """Scores of every query with every item: towers, then a network over [u, v, u ⊙ v], pair by pair."""

    def dense(rows: np.ndarray, network: tf.keras.Sequential) -> np.ndarray:
        *hidden, last = network.layers
        for layer in hidden:
            rows = np.maximum(rows @ layer.kernel.numpy() + layer.bias.numpy(), 0.0)
        return rows @ last.kernel.numpy() + last.bias.numpy()

    def vectors(rows: np.ndarray, scale: Standardisation, tower: tf.keras.Sequential) -> np.ndarray:
        return dense((rows - scale.mean.numpy()) * scale.factor.numpy(), tower)

    users = vectors(queries, model.query_inputs, model.user_tower)
    table = vectors(items, model.item_inputs, model.item_tower)
    scores = np.empty((len(users), len(table)))
    for i, u in enumerate(users):
        for j, v in enumerate(table):
            first = np.concatenate([u, v, u * v]) @ model.kernel.numpy() + model.bias.numpy()
            scores[i, j] = dense(np.maximum(first, 0.0), model.network)[0]
    return scores


@pytest.mark.parametrize("hidden_layers", [(10, 7, 5), (10,)], ids=["three layers", "one layer"])
def test_taking_the_first_layer_apart_changes_no_score(hidden_layers: tuple[int, ...]) -> None:
    model = student(config=CONFIG.model_copy(update={"hidden_layers": hidden_layers}))
    queries, items = inputs()
    rows = np.random.default_rng(3).integers(len(items), size=(3, 12))
    expected = plain_scores(model, queries, items)
    assert expected.std() > 0.1
    found = model.score(model.user_vectors(queries), model.precompute(tf.constant(items)), rows)
    assert found.dtype == tf.float32
    np.testing.assert_allclose(found, np.take_along_axis(expected, rows, axis=1), atol=1e-5, rtol=1e-5)


def test_catalogue_computed_in_pieces_is_the_same() -> None:
    model, items = student(), tf.constant(inputs(num_items=23)[1])
    pieces = model.precompute(items, batch_size=5)
    assert pieces.shape == [23, 6]
    np.testing.assert_allclose(pieces, model.item_vectors(items), rtol=1e-5, atol=1e-6)


def test_another_pre_ranker_with_the_same_weights_says_the_same() -> None:
    first, second = student(seed=1), student(seed=2)
    queries, items = inputs()
    rows = np.arange(6).reshape(3, 2)

    def scores(model: PreRanker) -> np.ndarray:
        return model.score(model.user_vectors(queries), model.precompute(tf.constant(items)), rows).numpy()

    assert not np.allclose(scores(first), scores(second))
    # Means and factors of the inputs are among the weights.
    second.set_weights(first.get_weights())
    np.testing.assert_array_equal(scores(first), scores(second))


def test_standardised_inputs_have_mean_0_and_deviation_1_and_constant_ones_are_left_out() -> None:
    layer = Standardisation(3)
    # The second column varies by rounding only, as float32 sums do.
    rows = np.float32([[1.0, 1000.0, 5.0], [3.0, 1000.0001, 5.0]])
    layer.fit(tf.constant(rows))
    np.testing.assert_allclose(layer(rows), [[-1.0, 0.0, 0.0], [1.0, 0.0, 0.0]], atol=1e-6)
    # (102 - 2) / 1 = 100 is cut; what never varied says nothing, however far off.
    np.testing.assert_allclose(layer(np.float32([[102.0, 0.0, -7.0]])), [[10.0, 0.0, 0.0]])


@pytest.fixture(scope="module")
def made() -> world.World:
    return world.make_world()


def test_description_of_a_request_sums_its_impressions_by_label_and_age(made: world.World) -> None:
    features = world.transformed(world.requests(world.USERS[:3]), made.layer)
    query = made.ranker.encode_query(features)
    described = describe_query(made.ranker, query).numpy()

    widths = [part.shape[1] for part in query.parts]
    np.testing.assert_allclose(described[:, : widths[0]], query.parts[0])
    shown = features[ft.IMPRESSION_IDS] != 0
    labels = np.stack([features["impression_click"], features["impression_rating"]], axis=-1)
    age = query.impressions.log_age.numpy()[..., np.newaxis]
    weights = np.concatenate([np.ones_like(age), labels, age], axis=-1)
    expected = []
    for user in range(3):
        number = shown[user].sum()
        sums = np.zeros((weights.shape[2], query.events.shape[2]))
        means = np.zeros(weights.shape[2])
        for place in np.flatnonzero(shown[user]):
            sums += np.outer(weights[user, place], query.events.numpy()[user, place]) / (number + 2.0)
            means += weights[user, place] / (number + 2.0)
        expected.append([*sums.ravel(), *means[1:], np.log1p(number)])
    np.testing.assert_allclose(described[:, -len(expected[0]) :], expected, rtol=1e-4, atol=1e-5)
    # The last request has no impressions.
    assert expected[0][-1] > 1.0 and not np.any(expected[-1])


def test_description_of_an_item_reads_counters_age_and_creator(made: world.World) -> None:
    def described(**changes: Any) -> np.ndarray:
        items = {
            name: column.numpy()[:1].copy()
            for name, column in catalogue_features(
                made.served.ranker, made.layer, world.SPEC, world.NOW
            ).items()
        }
        for name, value in changes.items():
            items[name][...] = value
        return describe_items(made.ranker, items).numpy()

    same = described()
    np.testing.assert_array_equal(same, described())
    for changes in ({"creator_id_id": 3}, {"item_age_days_cdf": 0.9}, {ft.COUNTERS: 0.99}, {"item_id_id": 9}):
        assert not np.allclose(same, described(**changes)), changes


def test_catalogue_has_ages_as_of_the_moment_and_a_last_row_for_unknown_items(made: world.World) -> None:
    items = catalogue_features(made.served.ranker, made.layer, world.SPEC, world.NOW + 4 * world.DAY_S)
    assert {column.shape[0] for column in items.values()} == {len(world.ITEMS) + 1}
    # Item i1 was uploaded a day before NOW: five days of the stub's forty.
    assert items["item_age_days_cdf"][1].numpy() == pytest.approx(5 / 40)
    assert items["item_id_id"][-1].numpy() == ft.OOV_ID


@pytest.fixture(scope="module")
def served(made: world.World, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The signature of a saved and loaded model, and what it was made of."""
    items = catalogue_features(made.served.ranker, made.layer, world.SPEC, world.NOW)
    described = describe_items(made.ranker, items)
    features = world.transformed(world.requests(world.USERS), made.layer)
    queries = describe_query(made.ranker, made.ranker.encode_query(features))
    tf.keras.utils.set_random_seed(5)
    model = PreRanker(queries.shape[1], described.shape[1], CONFIG)
    model.query_inputs.fit(queries)
    model.item_inputs.fit(described)
    preranking = PreRanking(model, world.NOW, num_kept=7)
    module = ServedPreRanker(preranking, made.served, made.layer, world.SPEC)
    path = tmp_path_factory.mktemp("preranker")
    tf.saved_model.save(module, str(path), signatures={"pre_rank": module.signature().traced()})
    return Served(model, described, path)


class Served:
    """See the fixture."""

    def __init__(self, model: PreRanker, described: tf.Tensor, path: Path) -> None:
        self.model, self.described = model, described
        self._loaded = tf.saved_model.load(str(path))

    def ask(self, raw: dict[str, tf.Tensor], candidates: list[list[str]], k: list[int]) -> dict[str, Any]:
        width = len(candidates[0])
        ids = tf.constant(candidates, tf.string, [len(candidates), width])
        answer = self._loaded.signatures["pre_rank"](
            **raw, candidate_item_ids=ids, k=tf.constant(k, tf.int32, [len(k)])
        )
        return {
            "item_ids": [[i.decode() for i in row] for row in answer["item_ids"].numpy()],
            "scores": answer["scores"].numpy(),
            "item_is_known": answer["item_is_known"].numpy(),
            "num_kept": answer["num_kept"].numpy(),
        }

    def expected(self, made: world.World, raw: dict[str, tf.Tensor]) -> np.ndarray:
        """Scores of every item for every request, the unknown item last, without a signature."""
        query = made.ranker.encode_query(world.transformed(raw, made.layer))
        users = self.model.user_vectors(describe_query(made.ranker, query))
        rows = np.tile(np.arange(len(self.described)), (len(users), 1))
        return self.model.score(users, self.model.precompute(self.described), rows).numpy()


def test_served_order_and_scores_are_those_of_the_model(made: world.World, served: Served) -> None:
    raw = world.requests(["u3", "u8", "stranger", "u9"])
    answer = served.ask(raw, [world.ITEMS] * 4, [30] * 4)
    expected = served.expected(made, raw)[:, :-1]
    # Users differ, else the order would prove nothing.
    assert len({tuple(row) for row in answer["item_ids"]}) > 1
    for ids, scores, row in zip(answer["item_ids"], answer["scores"], expected, strict=True):
        order = np.argsort(-row)
        assert ids == [world.ITEMS[i] for i in order]
        np.testing.assert_allclose(scores, row[order], rtol=1e-4, atol=1e-5)
    assert np.all(answer["item_is_known"] == 1)


def test_every_answer_tells_how_many_candidates_the_ranker_should_score(served: Served) -> None:
    answer = served.ask(world.requests(["u3", "u8"]), [["i4", "i2"]] * 2, [1, 30])
    assert (answer["num_kept"].tolist(), answer["num_kept"].dtype) == ([7, 7], np.int64)


def test_signature_has_the_inputs_of_the_ranker_and_k(served: Served) -> None:
    specs = served._loaded.signatures["pre_rank"].structured_input_signature[1]
    assert set(specs) == {*world.requests(["u1"]), "candidate_item_ids", "k"}
    assert specs["candidate_item_ids"].shape.as_list() == [None, None]
    assert (specs["k"].dtype, specs["k"].shape.as_list()) == (tf.int32, [None])


def test_each_request_gets_its_own_k_best_and_padding_after_them(made: world.World, served: Served) -> None:
    raw = world.requests(["u3", "u8", "u5"])
    best = [[world.ITEMS[i] for i in np.argsort(-row) if i < 4] for row in served.expected(made, raw)[:, :-1]]
    answer = served.ask(raw, [["i3", "i1", "i0", "i2"], ["", "i2", "", "i0"], [""] * 4], [2, 3, 3])
    second = [item for item in best[1] if item in ("i0", "i2")]
    assert answer["item_ids"] == [[*best[0][:2], ""], [*second, ""], ["", "", ""]]
    padded = np.array([[False, False, True], [False, False, True], [True] * 3])
    assert not answer["scores"][padded].any() and not answer["item_is_known"][padded].any()
    assert answer["scores"][~padded].all() and answer["item_is_known"][~padded].all()


def test_fewer_candidates_than_k_are_all_returned(served: Served) -> None:
    answer = served.ask(world.requests(["u3"]), [["i4", "i2"]], [500])
    assert sorted(answer["item_ids"][0]) == ["i2", "i4"]


def test_candidate_that_stands_there_twice_is_returned_once(served: Served) -> None:
    raw = world.requests(["u3", "u8"])
    doubled = [["i4", "i2", "i4", "nowhere", "nowhere"], ["i2", "i2", "i2", "i2", "i4"]]
    answer = served.ask(raw, doubled, [5, 5])
    assert sorted(answer["item_ids"][0]) == ["", "", "i2", "i4", "nowhere"]
    # What stands in another request is no duplicate.
    assert sorted(answer["item_ids"][1]) == ["", "", "", "i2", "i4"]
    assert answer["item_ids"][0][3:] == ["", ""]


def test_unknown_items_are_judged_alike_and_flagged(made: world.World, served: Served) -> None:
    raw = world.requests(["u3"])
    answer = served.ask(raw, [["nowhere", "i2", "elsewhere"]], [3])
    unknown = [place for place, known in enumerate(answer["item_is_known"][0]) if not known]
    assert {answer["item_ids"][0][place] for place in unknown} == {"nowhere", "elsewhere"}
    np.testing.assert_allclose(answer["scores"][0][unknown], served.expected(made, raw)[0, -1], rtol=1e-4)


def test_request_without_candidates_gets_an_empty_answer(served: Served) -> None:
    answer = served.ask(world.requests(["u3", "u8"]), [[], []], [10, 10])
    assert answer["item_ids"] == [[], []]
    assert answer["scores"].shape == answer["item_is_known"].shape == (2, 0)


def test_k_below_one_is_refused(served: Served) -> None:
    with pytest.raises(tf.errors.InvalidArgumentError, match="must be at least 1"):
        served.ask(world.requests(["u3", "u8"]), [["i1"], ["i2"]], [1, 0])


def test_pre_ranker_without_hidden_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="hidden_layers"):
        PrerankerConfig(hidden_layers=())
