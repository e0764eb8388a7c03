"""A warm start keeps what was learnt about every value that both vocabularies hold, wherever it stands."""

import numpy as np
import pytest
import tensorflow as tf

from schema.errors import CheckpointError, ConfigError
from tests.trainer import retrieval_world as world
from trainer.config import FactorsConfig, LossConfig, RetrievalConfig
from trainer.encoder import EmbeddingTables
from trainer.retrieval import RetrievalModel
from trainer.warm_start import check_no_future, towers, warm_start

CONFIG = RetrievalConfig(embedding_dim=8, hidden_layers=(16,))
NUM_NEW_ITEMS = 1_000  # a vocabulary of this size would have wider embeddings
BASE_VALUES = {
    "user_id": [b"u%d" % n for n in range(world.NUM_USERS)],
    "item_id": [b"i%d" % n for n in range(world.NUM_ITEMS)],
    "segment": [b"s%d" % n for n in range(world.NUM_SEGMENTS)],
    "genres": [b"g%d" % n for n in range(world.NUM_SEGMENTS)],
}
# Only small ids, which vocabularies of any size have.
ROWS = {
    name: tf.minimum(column, 7) if column.dtype.is_integer else column
    for name, column in world.training_window(num_examples=8).items()
}


def build(
    seed: int,
    config: RetrievalConfig = CONFIG,
    num_items: int = world.NUM_ITEMS,
    log_q: np.ndarray | None = None,
    widths: dict[str, int] | None = None,
) -> RetrievalModel:
    """A model with variables; those of another seed are all different."""
    tf.keras.utils.set_random_seed(seed)
    log_q = np.linspace(-6, -8, num_items + 2).astype(np.float32) if log_q is None else log_q
    sizes = world.VOCABULARY_SIZES | {"item_id": num_items + 2}
    model = RetrievalModel(config, world.SPACE, sizes, log_q, embedding_widths=widths)
    towers(model).answer(ROWS)
    return model


@pytest.fixture
def base() -> RetrievalModel:
    """A model that stands for a trained one: every weight was moved."""
    model = build(seed=1)
    for variable in towers(model).variables().values():
        variable.assign_add(tf.random.normal(variable.shape, stddev=0.1))
    return model


def tables(model: RetrievalModel) -> dict[str, np.ndarray]:
    (layer,) = {id(m): m for m in model.submodules if isinstance(m, EmbeddingTables)}.values()
    return {space: table.embeddings.numpy() for space, table in layer.tables.items()}


def test_the_same_vocabularies_and_popularity_give_the_same_model(base: RetrievalModel) -> None:
    model = build(seed=2)
    kept = warm_start(model, base, BASE_VALUES, BASE_VALUES)
    assert kept == {"item_id": world.NUM_ITEMS, "segment": world.NUM_SEGMENTS, "genres": world.NUM_SEGMENTS}
    for name, vectors in towers(base).answer(ROWS).items():
        np.testing.assert_allclose(towers(model).answer(ROWS)[name], vectors, atol=1e-6)


def test_known_values_keep_their_rows_in_a_permuted_and_grown_vocabulary(base: RetrievalModel) -> None:
    items = [*BASE_VALUES["item_id"], *(b"new%d" % n for n in range(NUM_NEW_ITEMS))]
    items = [items[n] for n in np.random.default_rng(3).permutation(len(items))]
    values = BASE_VALUES | {"item_id": items, "genres": BASE_VALUES["genres"][::-1]}
    model = build(seed=2, num_items=len(items), widths=dict(base.embedding_widths))
    fresh = tables(model)["item_id"].copy()
    kept = warm_start(model, base, values, BASE_VALUES)

    assert kept["item_id"] == world.NUM_ITEMS
    before, after = tables(base), tables(model)
    for new_row, value in enumerate(items, start=2):
        if value.startswith(b"new"):
            np.testing.assert_array_equal(after["item_id"][new_row], fresh[new_row])
        else:
            old_row = BASE_VALUES["item_id"].index(value) + 2
            np.testing.assert_array_equal(after["item_id"][new_row], before["item_id"][old_row])
    np.testing.assert_array_equal(after["genres"][2:], before["genres"][:1:-1])
    for space, table in after.items():
        # Missing and unknown mean the same in every vocabulary, and so do all hours and days.
        rows = slice(None) if space in ("hour_of_day", "day_of_week", "segment") else slice(2)
        np.testing.assert_array_equal(table[rows], before[space][rows])


def test_streaming_sampling_probabilities_go_on_by_value() -> None:
    streaming = CONFIG.model_copy(update={"loss": LossConfig(sampling_probability="streaming")})
    base = build(seed=1, config=streaming)
    for item_id in (2, 3, 2, 3):
        base.sampling_probability.observe(tf.constant([item_id]))
    values = BASE_VALUES | {"item_id": [b"new", *BASE_VALUES["item_id"]]}
    model = build(seed=2, config=streaming, num_items=len(values["item_id"]))
    warm_start(model, base, values, BASE_VALUES)
    old, new = (m.sampling_probability.log_absence(tf.range(6)).numpy() for m in (base, model))
    assert (old[2:4] < 0).all() and (old[4:] == 0).all()
    np.testing.assert_allclose(new, [*old[:2], 0, *old[2:5]], rtol=1e-5)


def test_values_that_left_the_vocabulary_leave_no_trace(base: RetrievalModel) -> None:
    values = BASE_VALUES | {"item_id": BASE_VALUES["item_id"][100:]}
    model = build(seed=2, num_items=world.NUM_ITEMS - 100, widths=dict(base.embedding_widths))
    warm_start(model, base, values, BASE_VALUES)
    np.testing.assert_array_equal(tables(model)["item_id"][2:], tables(base)["item_id"][102:])


def test_the_item_bias_is_todays_popularity_and_what_was_learnt_on_top_of_the_former(
    base: RetrievalModel,
) -> None:
    items = BASE_VALUES["item_id"][::-1]
    log_q = np.linspace(-9, -5, world.NUM_ITEMS + 2).astype(np.float32)
    model = build(seed=2, log_q=log_q)
    warm_start(model, base, BASE_VALUES | {"item_id": items}, BASE_VALUES)
    learnt = base.candidate_tower.bias.embeddings.numpy()[:, 0] - base.initial_bias
    expected = log_q - log_q[1:].mean() + np.concatenate([learnt[:2], learnt[:1:-1]])
    np.testing.assert_allclose(model.candidate_tower.bias.embeddings.numpy()[:, 0], expected, atol=1e-5)


def test_every_table_of_the_model_goes_by_value(base: RetrievalModel) -> None:
    """A weight with a row per id that is copied as it stands would mix up the items."""
    layers = [m for m in base.submodules if isinstance(m, tf.keras.layers.Embedding)]
    by_value = {f"embedding_{space}" for space in tables(base)} | {"item_bias"}
    assert {layer.name for layer in layers if not layer.name.startswith("bucket_")} == by_value


def test_item_factors_are_those_of_the_new_data() -> None:
    factors = FactorsConfig(weight=1.0, alpha=2.0, ridge=1.0, num_factors=3)
    config = CONFIG.model_copy(update={"factors": factors})
    num_items = world.NUM_ITEMS + NUM_NEW_ITEMS
    base = build(seed=1, config=config)
    values = BASE_VALUES | {"item_id": [*BASE_VALUES["item_id"], *(b"n%d" % n for n in range(NUM_NEW_ITEMS))]}
    model = build(seed=2, config=config, num_items=num_items, widths=dict(base.embedding_widths))
    fitted = np.random.default_rng(0).normal(size=(num_items + 2, 3)).astype(np.float32)
    model.item_factors.factors.assign(fitted)
    warm_start(model, base, values, BASE_VALUES)
    np.testing.assert_array_equal(model.item_factors.factors, fitted)


def test_a_checkpoint_holds_the_item_factors_once() -> None:
    factors = FactorsConfig(weight=1.0, alpha=2.0, ridge=1.0, num_factors=3)
    config = CONFIG.model_copy(update={"factors": factors})
    trained, empty = build(seed=1, config=config), build(seed=2, config=config)
    trained.item_factors.factors.assign(tf.random.normal([world.NUM_ITEMS + 2, 3], seed=0))
    variables, restored = towers(trained).variables(), towers(empty).variables()
    assert [path for path in variables if path.endswith(".factors")] == ["item_factors.factors"]
    for path, variable in restored.items():
        variable.assign(variables[path])
    for name, vectors in towers(trained).answer(ROWS).items():
        np.testing.assert_array_equal(towers(empty).answer(ROWS)[name], vectors)


@pytest.mark.parametrize(
    "changes", [{"hidden_layers": (16, 16)}, {"embedding_dim": 4}, {"hidden_layers": (8,)}]
)
def test_a_model_of_another_shape_is_refused_by_name(
    base: RetrievalModel, changes: dict[str, object]
) -> None:
    model = build(seed=2, config=CONFIG.model_copy(update=changes))
    before = {path: v.numpy() for path, v in towers(model).variables().items()}
    with pytest.raises(
        ConfigError, match=r"retrieval.warm_start: .*candidate_tower\.mlp\..*was \(.*\).*=false"
    ):
        warm_start(model, base, BASE_VALUES, BASE_VALUES)
    for path, variable in towers(model).variables().items():
        np.testing.assert_array_equal(variable.numpy(), before[path])


@pytest.mark.parametrize("base_end", [99, 100])
def test_a_base_trained_up_to_the_same_moment_or_earlier_is_taken(base_end: int) -> None:
    check_no_future(base_end, 100)


def test_a_base_trained_on_what_is_the_future_of_this_run_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"ended at 101 .* this run's at 100.*retrieval\.warm_start=false"):
        check_no_future(101, 100)


def test_a_base_of_unknown_age_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"does not tell when.*retrieval\.warm_start=false"):
        check_no_future(None, 100)
