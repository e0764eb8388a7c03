"""What a run is: dataset, models, gates, folders. No TFX and no cloud call at import."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml

from schema.contract import DatasetSpec, TaskSpec, load_dataset_spec, parse_model, read_yaml
from schema.errors import ConfigError
from serving.slo import Slo
from trainer import features, ranking_comparison, retrieval_comparison
from trainer.allow_list_inputs import check_attributes
from trainer.baselines import RETRIEVAL_BASELINES, ranking_baselines
from trainer.config import RankingConfig, RetrievalConfig
from trainer.log_requirements import check_log
from trainer.metrics import has_interval
from trainer.slices import dimensions

BUILT_IN_CONFIGS = Path(__file__).parent / "configs"
DEFAULT_OUTPUT_DIR = Path("runs/default")
RETRIEVAL = "retrieval"
RANKING = "ranking"
# What is trained, judged and blessed.
MODELS = (RETRIEVAL, RANKING)
RETRIEVAL_EXACT, FUNNEL, FUNNEL_EXACT = "retrieval_exact", "funnel", "funnel_exact"
# What is pushed and served; the last three are built of the two models.
BUNDLES = (*MODELS, RETRIEVAL_EXACT, FUNNEL, FUNNEL_EXACT)
# Cut-offs of the retrieval metrics; the largest is the length of the lists that the Evaluator sees.
CUTOFFS = (10, 50, 100)


class _Config(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")


class Gate(_Config):
    """A condition on the whole test split that a model must meet to be blessed. NaN meets none.

    Attributes:
      metric: metric key, for instance `retrieval/recall_at_100` or `ranking/click/auc`.
      min: smallest value allowed.
      max: largest value allowed.
      max_drop: by how much the metric may be worse than that of the last blessed model (lower, or higher for
        log_loss, ece and mae), absolute. The bad end of the interval of the difference must be within it, see
        `ValidationConfig.confidence`; ignored when no model was ever blessed. Retraining the same data
        with another seed moves recall by about 0.01: a smaller value rejects at random.
      beats: baselines that the metric must be better than.
      by: how: `interval`, the whole interval of the difference is on the good side; or `value`, the metric
        itself is.
    """

    metric: str
    min: float | None = None
    max: float | None = None
    max_drop: float | None = pydantic.Field(default=None, ge=0)
    beats: tuple[str, ...] = ()
    by: Literal["interval", "value"] = "interval"

    @pydantic.model_validator(mode="after")
    def _some_condition(self) -> Gate:
        if self.min is None and self.max is None and self.max_drop is None and not self.beats:
            raise ValueError(f"gate on {self.metric!r} sets no condition; give min, max, max_drop or beats")
        return self


class DriftConfig(_Config):
    """How far the data of train may be from those of eval, and from those of the last run.

    Attributes:
      max_share_change: for categorical features, the largest change of the share of one value, 0 to 1.
      max_divergence: for numbers and labels, the Jensen-Shannon divergence of TFDV's histograms, 0 to 1.
      ignored: features that are not compared.
    """

    max_share_change: float = pydantic.Field(default=0.15, gt=0, le=1)
    max_divergence: float = pydantic.Field(default=0.2, gt=0, le=1)
    ignored: tuple[str, ...] = ()


class LeakageConfig(_Config):
    """What the leakage linter looks at in every run; `funnel lint-leakage` looks at more.

    Attributes:
      examples: examples per split, user states and items that are recomputed from the tables.
      max_auc: a feature that alone orders a label better than this is taken for a leak.
    """

    examples: int = pydantic.Field(default=50, ge=1)
    max_auc: float = pydantic.Field(default=0.9, ge=0.5, le=1)


class ValidationConfig(_Config):
    """What a model must meet besides `gates`; null switches a condition off.

    Attributes:
      confidence: of all two-sided intervals; max_drop and beats hold at (1 + confidence) / 2, one-sided, and
        so does what max_relative_ece leaves to chance.
      num_resamples: draws of the bootstrap over users.
      min_index_recall: share of the exact results that the index finds.
      min_index_slice_recall: the same among head, torso, tail and cold items, each by itself; it does not
        apply where fewer than 30 exact results of a slice are known.
      max_relative_ece: largest calibration error of a binary task as a share of the mean of its label, or
        what true probabilities would have by chance if that is more; and largest error of the sum of its
        predictions as a share of the positives, besides what chance makes of a count.
      drift: null does not compare the data.
      leakage: null does not look for leaks.
      accept_incomparable_blessed: let a model pass `max_drop` when the last blessed one exists but cannot be
        compared with it, for instance after a change of features or tasks. For that one run; else such a
        model fails.
    """

    confidence: float = pydantic.Field(default=0.95, gt=0, lt=1)
    num_resamples: int = pydantic.Field(default=1_000, ge=100)
    min_index_recall: float | None = pydantic.Field(default=0.95, ge=0, le=1)
    min_index_slice_recall: float | None = pydantic.Field(default=0.9, ge=0, le=1)
    max_relative_ece: float | None = pydantic.Field(default=0.5, gt=0)
    drift: DriftConfig | None = DriftConfig()
    leakage: LeakageConfig | None = LeakageConfig()
    accept_incomparable_blessed: bool = False


def _slice(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Slice = Annotated[
    tuple[str, ...], pydantic.BeforeValidator(_slice), pydantic.Field(min_length=1, max_length=2)
]


class ExamplesConfig(_Config):
    """How examples are made; see tfx_pipeline.examples.ExampleSettings."""

    max_positives_per_user: int = pydantic.Field(default=200, ge=1)


class SimulatedData(_Config):
    """Size and seed of the simulated dataset."""

    size: Literal["default", "tiny"] = "default"
    seed: int | None = None


def _dataset(value: Any) -> Any:
    return load_dataset_spec(value) if isinstance(value, str) else value


class RunConfig(_Config):
    """One run of the pipeline.

    Attributes:
      dataset: a built-in name, the path of a dataset YAML, or the declaration itself.
      data_dir: folder of the source files; built-in datasets need none.
      simulated: settings of the simulator, for dataset `simulated` only.
      gates: what the models must reach to be blessed; a model without gates is never blessed.
      validation: what they must meet besides; see docs/evaluation.md.
      slices: what models are also judged by, besides what always is (`trainer.slices.dimensions`): a name, or
        the cross of two, of declared features of one value, `surface`, and built-in dimensions.
      slo: load that the candidate models must hold on the machine of the run, or they are not pushed; off by
        default.
    """

    dataset: Annotated[DatasetSpec, pydantic.BeforeValidator(_dataset)]
    data_dir: Path | None = None
    simulated: SimulatedData = SimulatedData()
    examples: ExamplesConfig = ExamplesConfig()
    retrieval: RetrievalConfig = RetrievalConfig()
    ranking: RankingConfig = RankingConfig()
    gates: tuple[Gate, ...] = ()
    validation: ValidationConfig = ValidationConfig()
    slices: tuple[Slice, ...] = ()
    slo: Slo | None = None

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        for gate in self.gates:
            _check_gate(gate, self.dataset.tasks)
        for model in MODELS:
            if not any(gate.metric.startswith(f"{model}/") for gate in self.gates):
                raise ValueError(
                    f"gates: none is on a {model}/ metric, so that no {model} model would ever be blessed"
                )
        if self.retrieval.max_k < max(CUTOFFS):
            raise ValueError(
                f"retrieval.max_k is {self.retrieval.max_k}, but the model is judged on lists of "
                f"{max(CUTOFFS)}: give {max(CUTOFFS)} or more"
            )
        try:
            dimensions(self.dataset, self.slices)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        space = features.feature_space(self.dataset)
        read = {f.name for f in (*space.query, *space.candidate)} - {features.USER_ID, features.ITEM_ID}
        for name in self.retrieval.ignored_features:
            if name not in read:
                raise ValueError(
                    f"retrieval.ignored_features: {name!r} is no feature that the towers can do without; "
                    f"those are: {', '.join(sorted(read))}"
                )
        _check_ranking(self.ranking, space)
        try:
            check_log(self.ranking, self.dataset)
            check_attributes(self.retrieval.index.allow_list, self.dataset)
        except ConfigError as error:
            # pydantic takes only a ValueError as a finding of its own, to be told with the others.
            raise ValueError(str(error)) from error
        return self


def _check_gate(gate: Gate, tasks: Sequence[TaskSpec]) -> None:
    """Checks what a gate names against the metrics and the baselines of its model."""
    model = gate.metric.partition("/")[0]
    keys = {
        RETRIEVAL: retrieval_comparison.metric_keys(CUTOFFS),
        RANKING: ranking_comparison.metric_keys(tasks),
    }
    if model not in keys:
        raise ValueError(
            f"gates: {gate.metric!r} is of neither model; keys start with retrieval/ or ranking/"
        )
    if gate.metric not in keys[model]:
        nearest = difflib.get_close_matches(gate.metric, keys[model], n=1, cutoff=0)[0]
        raise ValueError(f"gates: unknown metric {gate.metric!r}; the nearest one is {nearest!r}")
    baselines: tuple[str, ...] = RETRIEVAL_BASELINES
    if model == RANKING:
        kind = next(task.kind for task in tasks if task.name == gate.metric.split("/")[1])
        baselines = ranking_baselines(kind)
    for baseline in gate.beats:
        if baseline not in baselines:
            raise ValueError(
                f"gates: {gate.metric!r} is to beat {baseline!r}; baselines are: {', '.join(baselines)}"
            )
    if gate.beats and gate.by == "interval" and not has_interval(gate.metric):
        raise ValueError(
            f"gates: {gate.metric!r} is one number for all users, without an interval; to beat a baseline "
            "give by: value"
        )


def _check_ranking(config: RankingConfig, space: features.FeatureSpace) -> None:
    """Checks the features that the ranker's settings name."""
    single = {f.name for f in space.query if not f.is_list}
    categorical = {f.name for f in space.query if f.is_categorical and not f.is_list}
    candidate = {f.name for f in space.candidate}
    named = [
        ("ignored_features", config.ignored_features, {f.name for f in space.all}),
        ("crosses", [left for left, _ in config.crosses], single),
        ("crosses", [right for _, right in config.crosses], candidate),
        ("calibration.slice_feature", [config.calibration.slice_feature or ""], categorical | {""}),
    ]
    for field, names, known in named:
        for name in names:
            if name not in known:
                raise ValueError(
                    f"ranking.{field}: {name!r} is no feature for this place; "
                    f"those are: {', '.join(sorted(known - {''}))}"
                )


def load_run_config(name_or_path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Loads the configuration of a run.

    Args:
      name_or_path: a built-in dataset name, or the path of a run YAML. Relative paths in the file start at
        its folder.
      overrides: `section.key=value` texts, as `--set` takes them; values are YAML.

    Raises:
      ConfigError: an unknown name, file, key or value; the text says which and what is valid.
    """
    path = Path(name_or_path)
    if path.suffix not in {".yaml", ".yml"}:
        path = BUILT_IN_CONFIGS / f"{name_or_path}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(p.stem for p in BUILT_IN_CONFIGS.glob("*.yaml")))
            raise ConfigError(
                f"unknown dataset {str(name_or_path)!r}; built in: {known}; or give --config FILE.yaml"
            )
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a mapping was expected, with at least the key 'dataset'")
    dataset = values.get("dataset")
    if isinstance(dataset, str) and dataset.endswith((".yaml", ".yml")):
        values["dataset"] = str(path.parent / dataset)
    if values.get("data_dir") is not None:
        values["data_dir"] = path.parent / Path(str(values["data_dir"])).expanduser()
    for override in overrides:
        _apply_override(values, override)
    return parse_model(RunConfig, values, source=str(path))


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(
            f"--set {override!r}: 'section.key=value' was expected, for instance ranking.learning_rate=0.01"
        )
    *sections, leaf = key.split(".")
    target = values
    for section in sections:
        child = target.setdefault(section, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {override!r}: {section!r} is not a section that can be overridden")
        target = child
    try:
        target[leaf] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: the value is not valid YAML: {error}") from error


@dataclasses.dataclass(frozen=True)
class RunPaths:
    """Where everything of a run lives below its output directory."""

    output_dir: Path

    @property
    def source(self) -> Path:
        """Source files that Funnel itself made, fetched or unpacked."""
        return self.output_dir / "source"

    @property
    def tables(self) -> Path:
        """Contract tables, one folder per fingerprint."""
        return self.output_dir / "data"

    @property
    def pipeline_root(self) -> Path:
        """TFX artifacts."""
        return self.output_dir / "pipeline_root"

    @property
    def metadata(self) -> Path:
        """ML Metadata database."""
        return self.output_dir / "metadata.sqlite"

    @property
    def serving_models(self) -> Path:
        """What the Pushers released: <model>/<version>/."""
        return self.output_dir / "serving_models"

    @property
    def report(self) -> Path:
        """The report's folder."""
        return self.output_dir / "report"

    @property
    def run_file(self) -> Path:
        """Facts of the last finished run that other commands start from."""
        return self.output_dir / "run.json"

    @property
    def leakage_file(self) -> Path:
        """What `funnel lint-leakage` found last."""
        return self.output_dir / "leakage.json"

    @property
    def dataset_file(self) -> Path:
        """Name of the one dataset that the directory is for."""
        return self.output_dir / "dataset"

    @property
    def lock_file(self) -> Path:
        """Held while a run is going on."""
        return self.output_dir / "run.lock"

    @property
    def log_file(self) -> Path:
        """Everything that the last run logged."""
        return self.output_dir / "run.log"
