"""The metrics of `trainer.metrics` as TFMA metrics, and the evaluation configs built from them.

The Evaluator computes what `trainer.metrics` defines, by calling it: figures of models and baselines
are comparable. Metrics are called `<metric>_at_<k>` (retrieval) or `<metric>`, under an output named
as the task (ranking); counts, called `num_...`, say how much was judged.
"""

import array
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import scann  # noqa: F401  Registers the ops of the retrieval model in every Beam worker that loads this module.
import tensorflow_model_analysis as tfma

from schema.contract import TaskKind, TaskSpec
from schema.errors import ConfigError, DataError
from trainer import features, metrics

SIGNATURE = "serving_examples"
ITEM_IDS_OUTPUT = "item_ids"
NUM_QUERIES = "num_queries"
NUM_COLD_ITEM_QUERIES = "num_cold_item_queries"
NUM_POSITIVE_ITEMS = "num_positive_items"
NUM_EXAMPLES = "num_examples"

# Features that metrics read besides labels.
_READ_BY_METRICS = (features.USER_ID, features.COLD_TEST_ITEMS)
# No item, in lists of ids.
_PADDING = {"", b""}

# What one example leaves for a ranking combiner: label, prediction, hash of the user id, and whether it was
# clicked, NaN where that is not known.
_Row = tuple[float, float, int, float]
_Columns = tuple["array.array[Any]", "array.array[Any]", "array.array[Any]", "array.array[Any]"]


@dataclasses.dataclass(frozen=True)
class MetricValue:
    """One figure of an evaluation.

    Attributes:
      slice: (feature, value) pairs, empty for the whole split.
      metric: name without stage and task, for instance `recall_at_100`.
      output: the task, empty for retrieval.
      value: NaN where the data cannot define it.
    """

    slice: tuple[tuple[str, str | int | float], ...]
    metric: str
    output: str
    value: float


class RetrievalMetrics(tfma.metrics.Metric):
    """Recall, NDCG, hit rate and MRR at each k, macro over the examples with at least one positive.

    Label: the list of held-out item ids. Prediction: the ranked list `item_ids`. Further figures:

    * `cold_item_recall_at_<k>`: recall of the positives in `cold_items_key` alone, macro over the
      `num_cold_item_queries` examples with at least one;
    * `distinct_items_at_<k>`, smallest k only: items in anybody's first k, against `num_positive_items`, the
      items in anybody's positives. k of them means that everybody is recommended the same.
    """

    def __init__(
        self,
        ks: Sequence[int],
        cold_items_key: str = features.COLD_TEST_ITEMS,
        name: str = "retrieval",
    ) -> None:
        super().__init__(_retrieval_computations, ks=list(ks), cold_items_key=cold_items_key, name=name)


class RankingMetrics(tfma.metrics.Metric):
    """All metrics of one task kind, exact: over every labelled example, without buckets or samples.

    Labels, predictions, 64-bit hashes of user ids and clicks are gathered: 32 bytes per example and slice.
    An example was clicked if the feature `click_key` is above 0; without it that is not known.
    """

    def __init__(
        self, kind: str, click_key: str, user_key: str = features.USER_ID, name: str = "ranking"
    ) -> None:
        super().__init__(_ranking_computations, kind=kind, click_key=click_key, user_key=user_key, name=name)


def retrieval_eval_config(
    label_key: str,
    ks: Sequence[int],
    slices: Sequence[Sequence[str]] = (),
) -> tfma.EvalConfig:
    """Evaluation of the retrieval model's `serving_examples` on user-state examples.

    It has no thresholds, so that the Evaluator blesses nothing: that is for `tfx_pipeline.gates`. The one
    model spec has no name: `tfma.utils.update_eval_config_with_defaults` makes `candidate` and `baseline` of
    it when there are two models.

    Args:
      label_key: feature with the held-out positives; examples without any are left out.
      ks: cut-offs, each at most the length of the exported lists.
      slices: combinations of features to split by; the whole split always comes first.

    Returns:
      The config, to be given to an Evaluator.

    Raises:
      ConfigError: no k, or one below 1; no task.
    """
    if not ks or min(ks) < 1:
        raise ConfigError(f"cut-offs are {list(ks)}; expected at least one, each 1 or more.")
    spec = tfma.MetricsSpec(metrics=[_metric_config(RetrievalMetrics, ks=list(ks))])
    model = tfma.ModelSpec(label_key=label_key, prediction_key=ITEM_IDS_OUTPUT)
    return _eval_config(model, [spec], slices)


def ranking_eval_config(
    tasks: Sequence[TaskSpec],
    click_key: str,
    slices: Sequence[Sequence[str]] = (),
) -> tfma.EvalConfig:
    """Evaluation of the ranking model's `serving_examples` on interaction examples, one output per task.

    Args:
      tasks: examples without a task's label are left out for that task.
      click_key: feature that is above 0 where the impression was chosen: the dataset's positive.
      slices: as `retrieval_eval_config`.

    Returns, Raises: as `retrieval_eval_config`.
    """
    if not tasks:
        raise ConfigError("no task to evaluate; declare at least one under `tasks`.")
    specs = [
        tfma.MetricsSpec(
            metrics=[_metric_config(RankingMetrics, kind=task.kind.value, click_key=click_key)],
            output_names=[task.name],
        )
        for task in tasks
    ]
    return _eval_config(tfma.ModelSpec(label_keys={task.name: task.label for task in tasks}), specs, slices)


def custom_extractors(
    eval_shared_model: tfma.types.MaybeMultipleEvalSharedModels,
    eval_config: tfma.EvalConfig,
    tensor_adapter_config: Any,
) -> list[tfma.extractors.Extractor]:
    """TFMA's extractors behind one that drops what is not judged; the Evaluator finds it by its name.

    Examples without a label are not asked about, and features that no metric reads are not taken apart row by
    row, which is what TFMA spends most of its time on. The model still sees whole examples: they are
    serialized.
    """
    rest = tfma.default_extractors(
        eval_shared_model=eval_shared_model,
        eval_config=eval_config,
        tensor_adapter_config=tensor_adapter_config,
    )
    labels = {
        name
        for model in eval_config.model_specs
        for name in (model.label_key, *model.label_keys.values())
        if name
    }
    slices = {name for spec in eval_config.slicing_specs for name in spec.feature_keys}
    clicks = {
        config["click_key"]
        for spec in eval_config.metrics_specs
        for metric in spec.metrics
        if "click_key" in (config := json.loads(metric.config or "{}"))
    }
    judged = beam.FlatMap(_judged, labels=labels, kept={*labels, *slices, *clicks, *_READ_BY_METRICS})
    return [tfma.extractors.Extractor("KeepWhatIsJudged", judged), *rest]


def _judged(extracts: Any, labels: set[str], kept: set[str]) -> Iterator[Any]:
    """The examples of a batch with a label, and of them the features to keep; nothing if there are none."""
    batch: pa.RecordBatch = extracts[tfma.ARROW_RECORD_BATCH_KEY]
    has_label = np.zeros(len(batch), np.bool_)
    for name in labels.intersection(batch.schema.names):
        lengths = pc.fill_null(pc.list_value_length(batch.column(name)), 0)
        has_label |= lengths.to_numpy(zero_copy_only=False) > 0
    if has_label.any():
        columns = [n for n in batch.schema.names if n in kept or n == tfma.constants.ARROW_INPUT_COLUMN]
        smaller = pa.RecordBatch.from_arrays([batch.column(name) for name in columns], columns)
        yield {**extracts, tfma.ARROW_RECORD_BATCH_KEY: smaller.filter(pa.array(has_label))}


def read_metrics(eval_result_dir: str, model_name: str = tfma.CANDIDATE_KEY) -> list[MetricValue]:
    """Reads the figures that an Evaluator wrote.

    Args:
      eval_result_dir: URI of the evaluation artifact.
      model_name: `candidate` or `baseline`; an evaluation of one model has a candidate only.

    Returns:
      All figures of that model, ordered by slice, output and metric; none when it was not evaluated.
    """
    result = []
    for record in tfma.load_metrics(eval_result_dir):
        slice_key = tuple((column, _plain(value)) for column, value in _slice_key(record))
        for pair in record.metric_keys_and_values:
            if (pair.key.model_name or tfma.CANDIDATE_KEY) == model_name and not pair.key.is_diff:
                value = pair.value.double_value.value
                result.append(MetricValue(slice_key, pair.key.name, pair.key.output_name, value))
    return sorted(result, key=lambda value: (len(value.slice), str(value.slice), value.output, value.metric))


def _metric_config(cls: type[tfma.metrics.Metric], **config: Any) -> tfma.MetricConfig:
    return tfma.MetricConfig(class_name=cls.__name__, module=cls.__module__, config=json.dumps(config))


def _eval_config(
    model: tfma.ModelSpec, specs: Sequence[tfma.MetricsSpec], slices: Sequence[Sequence[str]]
) -> tfma.EvalConfig:
    model.signature_name = SIGNATURE
    model.model_type = "tf_generic"  # Otherwise TFMA first tries to load the model with Keras.
    config = tfma.EvalConfig(
        model_specs=[model],
        metrics_specs=specs,
        slicing_specs=[tfma.SlicingSpec(), *(tfma.SlicingSpec(feature_keys=keys) for keys in slices)],
    )
    config.options.include_default_metrics.value = False
    return config


def _slice_key(record: Any) -> Iterator[tuple[str, Any]]:
    for key in record.slice_key.single_slice_keys:
        yield key.column, getattr(key, key.WhichOneof("kind"))


def _plain(value: Any) -> str | int | float:
    return value.decode() if isinstance(value, bytes) else value


def _keys(names: Iterable[str], model_name: str, output_name: str = "") -> list[tfma.metrics.MetricKey]:
    return [
        tfma.metrics.MetricKey(name, model_name=model_name, output_name=output_name, example_weighted=None)
        for name in names
    ]


def _picked(extracts: Any, key: str, model_name: str, output_name: str) -> npt.NDArray[Any]:
    """Labels or predictions of one example; an absent label is an empty array.

    TFMA nests them by model where there are two, and by output where there are several. Its own
    `to_label_prediction_example_weight` finds its way through every other form, too, in ten times the time.
    """
    found = extracts[key]
    for name in (model_name, output_name):
        if isinstance(found, Mapping) and name in found:
            found = found[name]
    return np.empty(0) if found is None else np.asarray(found)


def _retrieval_computations(
    ks: Sequence[int],
    cold_items_key: str,
    name: str,
    model_names: Sequence[str],
) -> list[tfma.metrics.MetricComputation]:
    names = [*metrics.retrieval_metric_names(ks), NUM_QUERIES, NUM_COLD_ITEM_QUERIES, NUM_POSITIVE_ITEMS]
    computations = []
    for model_name in model_names:
        keys = _keys(names, model_name)
        preprocessor = _JudgeQuery(f"{name}:{model_name}", model_name, ks, cold_items_key)
        computations.append(tfma.metrics.MetricComputation(keys, [preprocessor], _SumUpQueries(keys)))
    return computations


class _JudgedQuery(NamedTuple):
    """What one example leaves: its metric values (NaN where undefined), its first items, its positives."""

    values: metrics.FloatArray
    top_items: set[Any]
    positives: set[Any]


class _JudgeQuery(tfma.metrics.Preprocessor):
    """Turns an example into its metric values; examples without positives yield nothing."""

    def __init__(
        self,
        name: str,
        model_name: str,
        ks: Sequence[int],
        cold_items_key: str,
    ) -> None:
        super().__init__(name=name)
        self._model_name = model_name
        self._ks = ks
        self._cold_items_key = cold_items_key

    def process(self, extracts: Any) -> Iterator[_JudgedQuery]:
        positives = _picked(extracts, tfma.LABELS_KEY, self._model_name, "")
        ranked = _picked(extracts, tfma.PREDICTIONS_KEY, self._model_name, ITEM_IDS_OUTPUT)
        wanted, table = positives.ravel().tolist(), ranked.reshape(1, -1)
        hits, num_positives = metrics.match_positives(table, [wanted])
        if not num_positives[0]:
            return
        cold = extracts[tfma.FEATURES_KEY].get(self._cold_items_key)
        cold_hits, num_cold = metrics.match_positives(
            table, [[] if cold is None else np.ravel(cold).tolist()]
        )
        values = [
            *metrics.retrieval_metrics(hits, num_positives, self._ks).values(),
            *(metrics.recall_at_k(cold_hits, num_cold, k) for k in self._ks),
        ]
        top_items = set(table[0, : min(self._ks)].tolist())
        yield _JudgedQuery(np.concatenate(values), top_items - _PADDING, set(wanted) - _PADDING)


class _Totals(NamedTuple):
    sums: metrics.FloatArray
    counts: metrics.IntArray
    top_items: set[Any]
    positives: set[Any]


class _SumUpQueries(beam.CombineFn):
    """Means of the metric values where they are defined, then numbers of distinct items and of examples."""

    # The figures after the means: distinct items, and the three counts.
    _NUM_OTHERS = 4

    def __init__(self, keys: Sequence[tfma.metrics.MetricKey]) -> None:
        self._keys = keys

    def create_accumulator(self) -> _Totals:
        width = len(self._keys) - self._NUM_OTHERS
        return _Totals(np.zeros(width), np.zeros(width, np.int64), set(), set())

    def add_input(self, accumulator: _Totals, element: _JudgedQuery) -> _Totals:
        return self._add(
            accumulator,
            _Totals(
                np.nan_to_num(element.values),
                (~np.isnan(element.values)).astype(np.int64),
                element.top_items,
                element.positives,
            ),
        )

    def merge_accumulators(self, accumulators: Iterable[_Totals]) -> _Totals:
        total = self.create_accumulator()
        for other in accumulators:
            total = self._add(total, other)
        return total

    @staticmethod
    def _add(total: _Totals, other: _Totals) -> _Totals:
        # In place: the sets can hold the whole catalogue.
        total.top_items.update(other.top_items)
        total.positives.update(other.positives)
        return total._replace(sums=total.sums + other.sums, counts=total.counts + other.counts)

    def extract_output(self, accumulator: _Totals) -> dict[tfma.metrics.MetricKey, float]:
        sums, counts, top_items, positives = accumulator
        means = np.full(len(sums), np.nan)
        np.divide(sums, counts, out=means, where=counts > 0)
        # The first value is defined for every example that is judged, the last for those with a cold item.
        others = (len(top_items), counts[0], counts[-1], len(positives))
        return dict(zip(self._keys, [*means.tolist(), *map(float, others)], strict=True))


def _ranking_computations(
    kind: str,
    click_key: str,
    user_key: str,
    name: str,
    model_names: Sequence[str],
    output_names: Sequence[str],
) -> list[tfma.metrics.MetricComputation]:
    task_kind = TaskKind(kind)
    computations = []
    for model_name in model_names:
        for output_name in output_names:
            keys = _keys([*metrics.RANKING_METRICS[task_kind], NUM_EXAMPLES], model_name, output_name)
            preprocessor = _LabelledRow(
                f"{name}:{model_name}:{output_name}", model_name, output_name, click_key, user_key
            )
            combiner = _GatherAndJudge(keys, task_kind)
            computations.append(tfma.metrics.MetricComputation(keys, [preprocessor], combiner))
    return computations


class _LabelledRow(tfma.metrics.Preprocessor):
    """Turns an example into a `_Row`; examples without the label yield nothing."""

    def __init__(self, name: str, model_name: str, output_name: str, click_key: str, user_key: str) -> None:
        super().__init__(name=name)
        self._model_name = model_name
        self._output_name = output_name
        self._click_key = click_key
        self._user_key = user_key

    def process(self, extracts: Any) -> Iterator[_Row]:
        label = _picked(extracts, tfma.LABELS_KEY, self._model_name, self._output_name)
        if not label.size or np.isnan(label.item()):
            return
        user = extracts[tfma.FEATURES_KEY].get(self._user_key)
        if user is None or not np.size(user):
            raise DataError(
                f"an example has a label for {self._output_name!r} but no {self._user_key!r}; "
                "GAUC needs the user of every row: check the join in ExampleGen."
            )
        prediction = _picked(extracts, tfma.PREDICTIONS_KEY, self._model_name, self._output_name)
        chosen = extracts[tfma.FEATURES_KEY].get(self._click_key)
        is_known = chosen is not None and np.size(chosen) and not np.isnan(chosen.item())
        click = float(chosen.item() > 0) if is_known else np.nan
        yield float(label.item()), float(prediction.item()), _hash_of(user.item()), click


def _hash_of(user_id: bytes | int) -> int:
    """A signed 64-bit hash, the same in all workers; two of ten million users share one with chance 3e-6."""
    data = user_id if isinstance(user_id, bytes) else str(user_id).encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


class _GatherAndJudge(beam.CombineFn):
    """Gathers rows in columns and judges them at the end: AUC and the like are not sums over rows."""

    def __init__(self, keys: Sequence[tfma.metrics.MetricKey], kind: TaskKind) -> None:
        self._keys = keys
        self._kind = kind

    def create_accumulator(self) -> _Columns:
        return array.array("d"), array.array("d"), array.array("q"), array.array("d")

    def add_input(self, accumulator: _Columns, element: _Row) -> _Columns:
        for column, value in zip(accumulator, element, strict=True):
            column.append(value)
        return accumulator

    def merge_accumulators(self, accumulators: Iterable[_Columns]) -> _Columns:
        merged = self.create_accumulator()
        for other in accumulators:
            for column, more in zip(merged, other, strict=True):
                column.extend(more)
        return merged

    def extract_output(self, accumulator: _Columns) -> dict[tfma.metrics.MetricKey, float]:
        labels, predictions, users, clicks = (np.array(column) for column in accumulator)
        if np.isfinite(predictions).all():
            values = metrics.ranking_metrics(self._kind, labels, predictions, users, clicks)
        else:
            # Not defined: to say so is for the gates, which tell the reason in a line.
            values = dict.fromkeys(metrics.RANKING_METRICS[self._kind], float("nan"))
        return dict(zip(self._keys, [*values.values(), float(len(labels))], strict=True))
