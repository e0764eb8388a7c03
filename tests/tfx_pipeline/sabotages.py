"""Twenty-odd ways to spoil data or models, each put before the checks that guard a release.

A sabotage changes one thing of a sound run and says which checks failed: those of the linter, of the gates,
of infra validation. Models are spoilt in what they hold or in what goes in and comes out of them, so that
nothing is trained again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import tensorflow as tf
import tensorflow_data_validation as tfdv
import tensorflow_transform as tft
from tensorflow_data_validation.statistics import stats_impl
from tensorflow_metadata.proto.v0 import statistics_pb2

from schema.errors import ServingError
from tfx_pipeline import evaluation
from tfx_pipeline.config import CUTOFFS, RANKING, RETRIEVAL, RunConfig
from tfx_pipeline.drift import drift
from tfx_pipeline.drift_facts import LAST_RUN, TRAIN_TO_EVAL, DriftFacts
from tfx_pipeline.evaluation import EvaluationSettings, read_judged_users, read_tables, read_test_rows
from tfx_pipeline.examples import example_batch
from tfx_pipeline.gates import Evidence, Validation, Verdict, judge
from tfx_pipeline.leakage import recorded
from tfx_pipeline.leakage.associations import MAX_AUC, check_associations
from tfx_pipeline.leakage.findings import Check, LeakageReport
from tfx_pipeline.leakage.known_past import KnownPast
from tfx_pipeline.leakage.lint import train_rows
from tfx_pipeline.leakage.past_checks import (
    check_recomputed,
    check_splits,
    check_states,
    check_strictly_before,
)
from tfx_pipeline.leakage.transform_checks import check_quantiles, check_vocabularies
from trainer import features as ft
from trainer.comparison import BootstrapSettings
from trainer.golden import Arrays, GoldenRequest, check_answer, read_golden_requests

Lists = np.ndarray
Predictions = dict[str, np.ndarray]
Serialized = list[bytes]
K = max(CUTOFFS)
# Examples per split that the linter recomputes.
SAMPLE = 60
SETTINGS = EvaluationSettings(CUTOFFS, (), BootstrapSettings(num_resamples=200))


@dataclasses.dataclass(frozen=True)
class Soundness:
    """A sound run, and what its models answer; everything is read once.

    Attributes:
      config: of the run.
      tables_dir: contract tables.
      artifacts: folders of the artifacts by (component, output).
      models: SavedModel folder by model.
      fitted: see `once`.
    """

    config: RunConfig
    tables_dir: Path
    artifacts: Mapping[tuple[str, str], Path]
    models: Mapping[str, Path]
    fitted: dict[str, Any] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def tables(self) -> evaluation.RankingTables:
        return read_tables(self.tables_dir, self.config.dataset)

    @functools.cached_property
    def samples(self) -> dict[str, recorded.SplitExamples]:
        """Interaction examples by split."""
        folder = self.artifacts["InteractionGen", "examples"]
        dtypes = recorded.interaction_dtypes(self.config.dataset)
        return {
            split: recorded.read_split(f"{folder}/Split-{split}/*.gz", dtypes, 4_000, seed=1)
            for split in ft.SPLITS
        }

    @functools.cached_property
    def user_states(self) -> pl.DataFrame:
        dtypes = recorded.user_state_dtypes(self.config.dataset)
        return recorded.read_sample(self.state_files, dtypes, SAMPLE, seed=1)

    @functools.cached_property
    def catalogue(self) -> pl.DataFrame:
        pattern = f"{self.artifacts['CatalogueGen', 'examples']}/Split-catalogue/*.gz"
        return recorded.read_sample(pattern, recorded.catalogue_dtypes(self.config.dataset), SAMPLE, seed=1)

    @functools.cached_property
    def past(self) -> KnownPast:
        tables = self.tables
        return KnownPast(
            tables.interactions,
            tables.users,
            tables.items,
            tables.spec,
            train_end_unix_s=tables.train_end_unix_s,
            max_positives_per_user=self.config.examples.max_positives_per_user,
            user_ids=tables.users[ft.USER_ID],
            item_ids=tables.items[ft.ITEM_ID],
        )

    @functools.cached_property
    def graph(self) -> tft.TFTransformOutput:
        return tft.TFTransformOutput(str(self.artifacts["Transform", "transform_graph"]))

    @property
    def state_files(self) -> str:
        return f"{self.artifacts['UserStateGen', 'examples']}/Split-user_states/*.gz"

    @functools.cached_property
    def judged_users(self) -> pl.DataFrame:
        """The users with a positive in the test split."""
        states = read_judged_users([self.state_files], self.config.dataset)
        return states.filter(pl.col(ft.TEST_ITEMS).list.len() > 0)

    @property
    def asked_users(self) -> Serialized:
        return self.judged_users["serialized"].to_list()

    @property
    def test_files(self) -> str:
        return f"{self.artifacts['InteractionGen', 'examples']}/Split-test/*.gz"

    @functools.cached_property
    def asked_rows(self) -> Serialized:
        return read_test_rows([self.test_files], self.tables)[0]["serialized"].to_list()

    @functools.cached_property
    def lists(self) -> Lists:
        """What the sound model recommends, str [U, K]."""
        return evaluation.retrieved(self.models[RETRIEVAL], self.asked_users, K)

    @functools.cached_property
    def item_vectors(self) -> np.ndarray:
        """What the sound model holds of the items, float32 [I, D]."""
        return evaluation.item_vectors(self.models[RETRIEVAL], self.tables.items[ft.ITEM_ID].to_list())

    @functools.cached_property
    def predictions(self) -> Predictions:
        """What the sound ranker predicts for the test rows."""
        return evaluation.predicted(self.models[RANKING], self.asked_rows, self.config.dataset)

    @functools.cached_property
    def loaded(self) -> dict[str, Any]:
        """The models in memory."""
        return {model: tf.saved_model.load(str(folder)) for model, folder in self.models.items()}

    def once(self, fit: Callable[..., Any]) -> Callable[..., Any]:
        """Baselines are the same for every sabotage: they are fitted once."""

        def fitted(*args: Any) -> Any:
            if fit.__name__ not in self.fitted:
                self.fitted[fit.__name__] = fit(*args)
            return self.fitted[fit.__name__]

        fitted.__name__ = fit.__name__
        return fitted

    def answer(self, model: str) -> Callable[[GoldenRequest], Arrays]:
        """What the model answers to a golden request."""
        return lambda request: _asked(self.loaded[model], request.signature, request.inputs)

    def statistics(self, split: str) -> statistics_pb2.DatasetFeatureStatisticsList:
        folder = self.artifacts["StatisticsGen", "statistics"]
        return tfdv.load_stats_binary(f"{folder}/Split-{split}/FeatureStats.pb")


def failed_checks(*checks: Check) -> list[str]:
    """The linter's checks that found something."""
    return [f"linter: {check.name}" for check in checks if not check.passed]


def failed_gates(validation: Validation) -> list[str]:
    """The kinds of the gates that stop the model."""
    return list(dict.fromkeys(f"gate: {g.kind}" for g in validation.gates if g.verdict is Verdict.FAILED))


class Checks:
    """The checks that guard a release, asked about one change of a sound run."""

    def __init__(self, sound: Soundness, monkeypatch: pytest.MonkeyPatch) -> None:
        """Asks about changes of a sound run."""
        self.sound = sound
        self._patch = monkeypatch

    def interactions(self, split: str, change: Callable[[pl.DataFrame], pl.DataFrame]) -> list[str]:
        """Lints changed interaction examples."""
        sound, spec = self.sound, self.sound.config.dataset
        changed = {name: found.sample for name, found in sound.samples.items()}
        changed[split] = change(changed[split])
        few = {name: sample.head(SAMPLE) for name, sample in changed.items()}
        return failed_checks(
            check_recomputed(few, sound.past),
            check_strictly_before(few, sound.past, spec),
            check_associations(changed["train"], changed["eval"], spec)[0],
        )

    def states(self, user_states: pl.DataFrame, catalogue: pl.DataFrame) -> list[str]:
        """Lints user states and catalogue."""
        return failed_checks(check_states(user_states, catalogue, self.sound.past))

    def splits(self, keys: Mapping[str, pl.DataFrame]) -> list[str]:
        """Lints the splits."""
        return failed_checks(check_splits(keys, self.sound.tables.interactions, self.sound.config.dataset))

    def transform(self, interactions: pl.DataFrame, users: pl.DataFrame) -> list[str]:
        """Lints the graph of the run against other tables."""
        sound, spec = self.sound, self.sound.config.dataset
        rows = train_rows(interactions, users, sound.tables.items, sound.tables.train_end_unix_s)
        return failed_checks(
            check_vocabularies(sound.graph, rows, spec), check_quantiles(sound.graph, rows, spec)
        )

    def retrieval(self, lists: Lists, item_vectors: np.ndarray | None = None) -> list[str]:
        """The gates of a retrieval model that recommends these lists, by default with sound item vectors."""
        sound = self.sound
        vectors = sound.item_vectors if item_vectors is None else item_vectors
        self._patch.setattr(evaluation, "item_vectors", lambda *_: vectors)
        answers = {"candidate": lists, "blessed": sound.lists}
        self._patch.setattr(evaluation, "retrieved", lambda folder, *_: answers[folder.name])
        self._patch.setattr(evaluation, "_baseline_lists", sound.once(evaluation._baseline_lists))
        judgement = evaluation.judge_retrieval(
            sound.tables, [sound.state_files], Path("candidate"), Path("blessed"), SETTINGS
        )
        return self._gates(judgement.comparison)

    def ranking(self, predictions: Predictions, **evidence: Any) -> list[str]:
        """The gates of a ranker that predicts this for the test rows."""
        sound = self.sound
        answers = {"candidate": predictions, "blessed": sound.predictions}
        self._patch.setattr(evaluation, "predicted", lambda folder, *_: answers[folder.name])
        self._patch.setattr(evaluation, "baseline_predictions", sound.once(evaluation.baseline_predictions))
        judgement = evaluation.judge_ranking(
            sound.tables, [sound.test_files], Path("candidate"), Path("blessed"), SETTINGS
        )
        return self._gates(judgement.comparison, **evidence)

    def data(
        self,
        train: statistics_pb2.DatasetFeatureStatisticsList,
        other: statistics_pb2.DatasetFeatureStatisticsList,
    ) -> list[str]:
        """The gates on the data, with a sound ranker."""
        sound = self.sound
        schema = tfdv.load_schema_text(f"{sound.artifacts['ImportSchemaGen', 'schema']}/schema.pbtxt")
        drift_config = sound.config.validation.drift
        assert drift_config is not None
        facts, _ = drift(
            train, {TRAIN_TO_EVAL: other}, schema, sound.config.dataset, drift_config, {LAST_RUN: "first"}
        )
        found = tfdv.validate_statistics(other, schema)
        return self.ranking(
            sound.predictions,
            drift=facts,
            anomalies={"eval": [info.short_description for info in found.anomaly_info.values()]},
        )

    def golden(self, model: str, answer: Callable[[GoldenRequest], Arrays]) -> list[str]:
        """What the golden requests of the export tell of a model that answers so."""
        for request in read_golden_requests(self.sound.models[model]):
            try:
                check_answer(request, answer(request), model)
            except ServingError:
                return ["golden requests"]
        return []

    def _gates(self, comparison: Any, **evidence: Any) -> list[str]:
        known = {
            "comparison": comparison,
            # The Evaluator's own computation is not what is spoilt: it says the same.
            "evaluated": [m.key for m in comparison.whole.metrics],
            "evaluator": {m.key: m.value for m in comparison.whole.metrics},
            "index_recall": {"": 1.0},
            "serving_reason": "",
            "slo": None,
            "load": None,
            "anomalies": {"test": []},
            "drift": DriftFacts({}, {}),
            "leakage": LeakageReport("sound", (), (), MAX_AUC, ()),
        }
        config = self.sound.config
        gates = judge(
            Evidence(**{**known, **evidence}), config.gates, config.validation, config.dataset.tasks
        )
        return failed_gates(gates)


# ----------------------------------------------------------------------------------------------- sabotages

Sabotage = Callable[[Checks], list[str]]
SABOTAGES: dict[str, Sabotage] = {}


def sabotage(name: str) -> Callable[[Sabotage], Sabotage]:
    """Adds a sabotage to the list."""

    def add(function: Sabotage) -> Sabotage:
        SABOTAGES[name] = function
        return function

    return add


@sabotage("a label among the features")
def _label_leak(checks: Checks) -> list[str]:
    label = pl.col("click").list.first()
    noisy = pl.when(pl.int_range(pl.len()) % 25 == 0).then(1 - label).otherwise(label)
    changed = {
        split: found.sample.with_columns(
            pl.concat_list(noisy * 10 + 20).cast(pl.List(pl.Float32)).alias("age")
        )
        for split, found in checks.sound.samples.items()
    }
    return failed_checks(
        check_associations(changed["train"], changed["eval"], checks.sound.config.dataset)[0]
    )


@sabotage("the event in its own history")
def _future_history(checks: Checks) -> list[str]:
    with_own = pl.concat_list(ft.HISTORY, ft.ITEM_ID)
    clicked = pl.col("click").list.first() > 0
    return checks.interactions(
        "train",
        lambda rows: rows.with_columns(
            pl.when(clicked).then(with_own).otherwise(ft.HISTORY).alias(ft.HISTORY)
        ),
    )


@sabotage("counters of the whole log")
def _full_counters(checks: Checks) -> list[str]:
    tables = checks.sound.tables
    last = (
        tables.interactions.sort(ft.EVENT_TIME)
        .unique(ft.ITEM_ID, keep="last")
        .select(ft.ITEM_ID, ft.ITEM_COUNTS)
    )
    final = dict(last.iter_rows())
    return checks.interactions(
        "train",
        lambda rows: rows.with_columns(
            pl.Series(ft.ITEM_COUNTS, [final[i] for i in rows[ft.ITEM_ID].list.first()], pl.List(pl.Float32))
        ),
    )


@sabotage("history in reverse order")
def _reversed_history(checks: Checks) -> list[str]:
    return checks.interactions("test", lambda rows: rows.with_columns(pl.col(ft.HISTORY).list.reverse()))


@sabotage("held-out choices in the user states")
def _held_out_states(checks: Checks) -> list[str]:
    states = checks.sound.user_states
    peeked = pl.concat_list(ft.HISTORY, ft.TEST_ITEMS).list.tail(checks.sound.config.dataset.max_history)
    return checks.states(states.with_columns(peeked.alias(ft.HISTORY)), checks.sound.catalogue)


@sabotage("test rows among the train examples")
def _overlap(checks: Checks) -> list[str]:
    keys = {split: found.keys for split, found in checks.sound.samples.items()}
    return checks.splits({**keys, "train": pl.concat([keys["train"], keys["test"].head(5)])})


@sabotage("the same, and nobody calls the linter by hand")
def _leak_at_the_gates(checks: Checks) -> list[str]:
    sound = checks.sound
    keys = {split: found.keys for split, found in sound.samples.items()}
    keys["train"] = pl.concat([keys["train"], keys["test"].head(5)])
    found = check_splits(keys, sound.tables.interactions, sound.config.dataset)
    return checks.ranking(sound.predictions, leakage=LeakageReport("spoilt", (found,), (), MAX_AUC, ()))


@sabotage("vocabularies of all splits")
def _vocabulary_of_all(checks: Checks) -> list[str]:
    """The graph is that of the run; train has lost a user whom only test still has."""
    log = checks.sound.tables.interactions
    user = log.filter(pl.col("split") == "test")[ft.USER_ID][0]
    is_late = (pl.col(ft.USER_ID) == user) & (pl.col("split") == "train")
    return checks.transform(log.filter(~is_late), checks.sound.tables.users)


@sabotage("quantiles of another dataset")
def _other_quantiles(checks: Checks) -> list[str]:
    tables = checks.sound.tables
    return checks.transform(tables.interactions, tables.users.with_columns(pl.col("age") * 0.9))


@sabotage("features of another item in the catalogue")
def _other_features(checks: Checks) -> list[str]:
    catalogue = checks.sound.catalogue
    return checks.states(
        checks.sound.user_states, catalogue.with_columns(pl.col("tags").shift(1).fill_null([]))
    )


@sabotage("labels out of range")
def _anomaly(checks: Checks) -> list[str]:
    changed = checks.sound.samples["eval"].sample.with_columns(pl.col("click").list.eval(pl.element() * 3))
    return checks.data(
        checks.sound.statistics("train"),
        _statistics(changed, recorded.interaction_dtypes(checks.sound.config.dataset)),
    )


@sabotage("drifted users")
def _drift(checks: Checks) -> list[str]:
    changed = checks.sound.samples["eval"].sample.with_columns(pl.lit(["xx"]).alias("country"))
    return checks.data(
        checks.sound.statistics("train"),
        _statistics(changed, recorded.interaction_dtypes(checks.sound.config.dataset)),
    )


def _statistics(
    sample: pl.DataFrame, dtypes: Mapping[str, str]
) -> statistics_pb2.DatasetFeatureStatisticsList:
    return stats_impl.generate_statistics_in_memory(example_batch(sample, dtypes), tfdv.StatsOptions())


def _spoilt_lists(checks: Checks, change: Callable[[Any], None]) -> Lists:
    """What the retrieval model recommends after a change of its variables."""
    loaded = checks.sound.loaded[RETRIEVAL]
    with _restored([*loaded.weights, loaded.index.item_ids]):
        change(loaded)
        return _lists_of(loaded, checks.sound.asked_users)


@contextlib.contextmanager
def _restored(variables: Sequence[tf.Variable]) -> Iterator[None]:
    before = [variable.numpy() for variable in variables]
    try:
        yield
    finally:
        for variable, value in zip(variables, before, strict=True):
            variable.assign(value)


def _lists_of(loaded: Any, users: Serialized) -> Lists:
    answer = loaded.signatures["serving_examples"](examples=tf.constant(users, tf.string))
    return answer["item_ids"].numpy()[:, :K].astype(str)


def _predictions_of(loaded: Any, rows: Serialized, tasks: Sequence[str]) -> Predictions:
    answer = loaded.signatures["serving_examples"](examples=tf.constant(rows, tf.string))
    return {task: answer[task].numpy().astype(np.float64) for task in tasks}


def _tasks(checks: Checks) -> list[str]:
    return [task.name for task in checks.sound.config.dataset.tasks]


@sabotage("ids shuffled between index and catalogue")
def _shuffled_ids(checks: Checks) -> list[str]:
    def change(loaded: Any) -> None:
        ids = loaded.index.item_ids.numpy()
        loaded.index.item_ids.assign([ids[0], *np.random.default_rng(0).permutation(ids[1:])])

    return checks.retrieval(_spoilt_lists(checks, change))


@sabotage("stale index: the query tower is newer than the vectors")
def _stale_index(checks: Checks) -> list[str]:
    """Another training ends in another basis of the same space: a rotation of the tower's last layer."""

    def change(loaded: Any) -> None:
        rng = np.random.default_rng(1)
        for weights in loaded.weights:
            if weights.shape.rank == 2 and "embedding" not in weights.name:
                weights.assign(rng.permutation(weights.numpy(), axis=1))

    return checks.retrieval(_spoilt_lists(checks, change))


@sabotage("collapsed query tower")
def _collapsed(checks: Checks) -> list[str]:
    def change(loaded: Any) -> None:
        for weights in loaded.weights:
            weights.assign(tf.zeros_like(weights))

    return checks.retrieval(_spoilt_lists(checks, change))


@sabotage("item vectors on a line")
def _collapsed_items(checks: Checks) -> list[str]:
    """Query vectors are as they were: whoever looks the one way gets one list, whoever the other, another."""
    vectors = checks.sound.item_vectors
    centre, line = vectors.mean(axis=0), np.eye(vectors.shape[1], dtype=np.float32)[0]
    flat = centre + (vectors - centre) @ np.outer(line, line)
    loaded = checks.sound.loaded[RETRIEVAL]
    served = loaded.index.index.exact.vectors
    with _restored([served]):
        served.assign(flat)
        return checks.retrieval(_lists_of(loaded, checks.sound.asked_users), flat)


@sabotage("NaN in the query tower")
def _nan_query(checks: Checks) -> list[str]:
    def change(loaded: Any) -> None:
        loaded.weights[-1].assign(tf.fill(tf.shape(loaded.weights[-1]), float("nan")))

    return checks.retrieval(_spoilt_lists(checks, change))


@sabotage("a third of the catalogue is missing")
def _truncated(checks: Checks) -> list[str]:
    lists = checks.sound.lists
    kept = set(np.unique(checks.sound.tables.items[ft.ITEM_ID])[::3])
    rows = [[i for i in row if i and i not in kept] for row in lists.tolist()]
    return checks.retrieval(_padded(rows))


@sabotage("every item twice in the index")
def _duplicated(checks: Checks) -> list[str]:
    rows = [[i for i in row for _ in range(2)][:K] for row in checks.sound.lists.tolist()]
    return checks.retrieval(np.array(rows))


@sabotage("popularity in place of the model")
def _popularity(checks: Checks) -> list[str]:
    log = checks.sound.tables.interactions.filter((pl.col("split") == "train") & (pl.col("click") > 0))
    order = log[ft.ITEM_ID].value_counts(sort=True)[ft.ITEM_ID].to_list()
    seen = [set(ids) for ids in checks.sound.judged_users[ft.SEEN_ITEMS]]
    return checks.retrieval(_padded([[i for i in order if i not in own][:K] for own in seen]))


def _padded(rows: list[list[str]]) -> Lists:
    return np.array([[*row, *[""] * (K - len(row))] for row in rows])


@sabotage("history dropped on the way to retrieval")
def _dropped_history(checks: Checks) -> list[str]:
    loaded = checks.sound.loaded[RETRIEVAL]
    return checks.retrieval(_lists_of(loaded, _without(checks.sound.asked_users, [ft.HISTORY])))


@sabotage("one task inverted")
def _inverted(checks: Checks) -> list[str]:
    sound = checks.sound.predictions
    return checks.ranking({**sound, "click": 1 - sound["click"]})


@sabotage("one head miscalibrated")
def _miscalibrated(checks: Checks) -> list[str]:
    sound = checks.sound.predictions
    return checks.ranking({**sound, "click": sound["click"] * 0.3})


@sabotage("constant predictions")
def _constant(checks: Checks) -> list[str]:
    sound = checks.sound.predictions
    return checks.ranking({name: np.full_like(values, values.mean()) for name, values in sound.items()})


@sabotage("two task outputs swapped")
def _swapped(checks: Checks) -> list[str]:
    sound = checks.sound.predictions
    return checks.ranking({**sound, "click": sound["like"], "like": sound["click"]})


@sabotage("impressions and counters dropped on the way to the ranker")
def _dropped_features(checks: Checks) -> list[str]:
    dropped = [
        ft.HISTORY,
        ft.USER_ID,
        ft.IMPRESSION_ITEMS,
        ft.IMPRESSION_TIMES,
        ft.IMPRESSION_SURFACES,
        ft.ITEM_COUNTS,
    ]
    dropped += [ft.impression_label(label) for label in checks.sound.config.dataset.task_labels]
    loaded = checks.sound.loaded[RANKING]
    return checks.ranking(_predictions_of(loaded, _without(checks.sound.asked_rows, dropped), _tasks(checks)))


@sabotage("NaN in the ranker")
def _nan_weights(checks: Checks) -> list[str]:
    loaded = checks.sound.loaded[RANKING]
    variables = loaded.signatures["serving_examples"].variables
    floating = [variable for variable in variables if variable.dtype.is_floating]
    with _restored(floating):
        for variable in floating:
            variable.assign(tf.fill(tf.shape(variable), float("nan")))
        predictions = _predictions_of(loaded, checks.sound.asked_rows, _tasks(checks))
    return checks.ranking(predictions)


@sabotage("requests as old as the training data")
def _wrong_age(checks: Checks) -> list[str]:
    """The clock that the served retrieval model reads stands at the beginning of the log."""
    start = int(checks.sound.tables.interactions[ft.EVENT_TIME].min())  # type: ignore[arg-type]

    def answer(request: GoldenRequest) -> Arrays:
        if ft.EVENT_TIME not in request.inputs:
            return request.outputs
        old = {**request.inputs, ft.EVENT_TIME: np.full_like(request.inputs[ft.EVENT_TIME], start)}
        return _asked(checks.sound.loaded[RETRIEVAL], request.signature, old)

    return checks.golden(RETRIEVAL, answer)


@sabotage("the sign of the score flipped")
def _flipped_score(checks: Checks) -> list[str]:
    def answer(request: GoldenRequest) -> Arrays:
        answered = _asked(checks.sound.loaded[RANKING], request.signature, request.inputs)
        return {name: -value if name == "score" else value for name, value in answered.items()}

    return checks.golden(RANKING, answer)


def _asked(loaded: Any, signature: str, inputs: Arrays) -> Arrays:
    answer = loaded.signatures[signature](**{name: tf.constant(value) for name, value in inputs.items()})
    return {name: value.numpy() for name, value in answer.items()}


def _without(serialized: Serialized, names: Sequence[str]) -> Serialized:
    changed = []
    for record in serialized:
        example = tf.train.Example.FromString(record)
        for name in names:
            example.features.feature.pop(name, None)
        changed.append(example.SerializeToString())
    return changed
