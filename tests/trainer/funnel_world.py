"""Both models of the ranking world with random weights, their users, and all that is exported of them."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tensorflow as tf

from tests.trainer import ranking_world as world
from tests.trainer.ranking_requests import NOW, SPEC, catalogue, example, raw_query
from trainer import features as ft
from trainer.bundle import ServedModel
from trainer.catalogue import Catalogue
from trainer.config import IndexConfig, RankingConfig, RetrievalConfig
from trainer.funnel_export import ServedFunnel
from trainer.impressions import ItemAttributes
from trainer.index import CandidateIndex
from trainer.index_build import build_index
from trainer.label_statistics import label_statistics
from trainer.ranking import RankingModel
from trainer.ranking_export import ServedRanker
from trainer.retrieval import RetrievalModel
from trainer.retrieval_export import ServedRetrieval
from trainer.user_lookup import UserLookup

MAX_K = 12
NAN = float("nan")
# In the training vocabulary, in the order of the file: with history and impressions, with neither, and with a
# history that holds an item outside the catalogue.
USERS = {
    "u3": raw_query(
        "u3",
        ["i1", "i5"],
        ("i4", 20 * world.DAY_S, "", 0.0, NAN, 3.0),
        ("i1", 9_000, "home", 1.0, 5.0, 40.0),
        ("nowhere", 60, "feed", 1.0, NAN, NAN),
    ),
    "u8": {**raw_query("u8", []), "surface": "home"},
    "u9": raw_query("u9", ["i2", "nowhere"], ("i2", 0, "feed", 1.0, 2.0, 9.0)),
}


@dataclasses.dataclass
class Funnel:
    """The trained models and what is served of them."""

    retrieval_model: RetrievalModel
    ranking_model: RankingModel
    catalogue: Catalogue
    layer: world.TransformStub
    index: CandidateIndex
    retrieval: ServedRetrieval
    ranker: ServedRanker
    funnel: ServedFunnel
    retrieval_exact: ServedRetrieval
    funnel_exact: ServedFunnel
    user_states: Path

    def bundles(self) -> dict[str, ServedModel]:
        """All five by name."""
        return {
            "retrieval": self.retrieval,
            "retrieval_exact": self.retrieval_exact,
            "ranking": self.ranker,
            "funnel": self.funnel,
            "funnel_exact": self.funnel_exact,
        }


def write_user_states(path: Path) -> Path:
    """Writes the user states, with what only the evaluation reads."""
    with tf.io.TFRecordWriter(str(path), "GZIP") as writer:
        for state in USERS.values():
            writer.write(example({**state, "seen_item_ids": ["i0", "i7"], "test_item_ids": ["i9"]}))
    return path


def random_weights(variables: list[tf.Variable]) -> None:
    """Moves weights, so that every feature moves every output."""
    for weight in variables:
        weight.assign_add(tf.random.normal(weight.shape, stddev=0.1))


def make(folder: Path) -> Funnel:
    """Makes the models and everything that is served of them."""
    rows, layer = world.rows(64, seed=1), world.TransformStub()
    items = catalogue(layer)
    tf.keras.utils.set_random_seed(1)
    config = RetrievalConfig(embedding_dim=8, hidden_layers=(16,), index=IndexConfig(allow_list=("tag",)))
    log_q = np.linspace(-1, -2, world.VOCABULARY_SIZES["item_id"]).astype(np.float32)
    retrieval = RetrievalModel(config, ft.feature_space(SPEC), world.VOCABULARY_SIZES, log_q)
    queries = retrieval.query_tower({name: tf.constant(column) for name, column in rows.items()})
    retrieval.encode_catalogue(items)
    random_weights(retrieval.trainable_weights)
    tags = np.array([[["t0", ""], ["t0", "t1"], ["", ""]][int(item_id[1:]) % 3] for item_id in world.ITEMS])
    index, _ = build_index(
        items.item_ids,
        retrieval.encode_catalogue(items),
        queries.numpy(),
        config.index,
        MAX_K,
        attributes={"tag": tags},
    )
    attributes = ItemAttributes(items, world.VOCABULARY_SIZES["item_id"], SPEC)
    statistics = label_statistics([rows], SPEC.tasks)
    ranking = RankingModel(SPEC, world.VOCABULARY_SIZES, statistics, attributes, RankingConfig())
    ranking(rows)
    random_weights(ranking.trainable_weights)

    user_states = write_user_states(folder / "user_states.gz")
    users = UserLookup([str(user_states)], SPEC)
    exact = CandidateIndex(index.exact, None, index.allow_lists)

    def retrieval_over(searched: CandidateIndex) -> ServedRetrieval:
        return ServedRetrieval(retrieval, searched, layer, items, SPEC, MAX_K)

    def funnel_over(searched: CandidateIndex) -> ServedFunnel:
        return ServedFunnel(retrieval, searched, ranking, layer, items, users, SPEC, MAX_K)

    return Funnel(
        retrieval,
        ranking,
        items,
        layer,
        index,
        retrieval_over(index),
        ServedRanker(ranking, layer, items, SPEC),
        funnel_over(index),
        retrieval_over(exact),
        funnel_over(exact),
        user_states,
    )


Function = Callable[..., dict[str, tf.Tensor]]
__all__ = ["MAX_K", "NOW", "USERS", "Function", "Funnel", "make"]
