"""A run's configuration is strict: what is wrong is named, with the nearest valid thing, before any work."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from schema.errors import ConfigError
from tests.tfx_pipeline import taste_world
from tfx_pipeline.config import BUILT_IN_CONFIGS, RunPaths, load_run_config

BUILT_IN = sorted(path.stem for path in BUILT_IN_CONFIGS.glob("*.yaml"))

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a valid run YAML with some top-level values replaced (None: left out)."""

    def apply(**changes: Any) -> Path:
        values = yaml.safe_load(taste_world.CONFIG) | changes
        path = tmp_path / "conf" / "my.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
        return path

    return apply


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_config_loads_and_judges_both_models(name: str) -> None:
    config = load_run_config(name)
    assert config.dataset.name == name
    assert {gate.metric.split("/")[0] for gate in config.gates} == {"retrieval", "ranking"}


def test_the_three_datasets_of_the_product_are_built_in() -> None:
    assert BUILT_IN == ["kuairand-pure", "movielens-1m", "simulated"]


def test_importing_the_config_loads_neither_tensorflow_nor_tfx() -> None:
    code = (
        "import sys, tfx_pipeline.config; print(*{'tensorflow', 'tfx', 'apache_beam'} & sys.modules.keys())"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.split() == []


@pytest.mark.parametrize(
    ("override", "read", "expected"),
    [
        ("ranking.learning_rate=0.01", lambda c: c.ranking.learning_rate, 0.01),
        # YAML 1.1 reads this as text.
        ("ranking.learning_rate=1e-3", lambda c: c.ranking.learning_rate, 1e-3),
        ("retrieval.index.min_recall=0.5", lambda c: c.retrieval.index.min_recall, 0.5),
        ("retrieval.hidden_layers=[8, 4]", lambda c: c.retrieval.hidden_layers, (8, 4)),
        ("slices=[]", lambda c: c.slices, ()),
        (
            "retrieval.ignored_features=[hour_of_day, country]",
            lambda c: c.retrieval.ignored_features,
            ("hour_of_day", "country"),
        ),
        (
            "validation.accept_incomparable_blessed=true",
            lambda c: c.validation.accept_incomparable_blessed,
            True,
        ),
        ("simulated.size=tiny", lambda c: c.simulated.size, "tiny"),
        ("simulated.seed=null", lambda c: c.simulated.seed, None),
    ],
)
def test_an_override_replaces_one_value(override: str, read: Callable[[Any], Any], expected: Any) -> None:
    changed = load_run_config("simulated", [override])
    assert read(changed) == expected
    rest = changed.model_dump() | {override.split(".")[0].split("=")[0]: None}
    assert rest == load_run_config("simulated").model_dump() | {override.split(".")[0].split("=")[0]: None}


def test_the_last_of_two_overrides_wins() -> None:
    config = load_run_config("simulated", ["ranking.seed=1", "ranking.seed=2"])
    assert config.ranking.seed == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ranking.learning_rat=0.1", "did you mean 'learning_rate'"),
        ("retreival.seed=1", "did you mean 'retrieval'"),
        ("retrieval.index.min_recal=1", "did you mean 'min_recall'"),
        ("ranking.learning_rate=fast", "ranking.learning_rate"),
        ("ranking.learning_rate=-1", "greater than or equal to 0"),
        ("simulated.size=huge", "'default' or 'tiny'"),
        ("gates.min=1", "not a section"),
        ("ranking.seed", "'section.key=value' was expected"),
        ("=3", "'section.key=value' was expected"),
        ("ranking.hidden_layers=[8", "not valid YAML"),
        ("slices=[surfaces]", "'surfaces' is no dimension of simulated; those are: user_type"),
        # Lists shorter than the largest cut-off would turn recall@100 into something else.
        ("retrieval.max_k=99", "judged on lists of 100"),
        ("ranking.ignored_features=[hour]", "ranking.ignored_features: 'hour' is no feature for this place"),
        # A list cannot be crossed on the side of the query, and a query feature not on that of the candidate.
        (
            "ranking.crosses=[[history_item_ids, item_id]]",
            "ranking.crosses: 'history_item_ids' is no feature",
        ),
        (
            "ranking.crosses=[[surface, surface]]",
            "'surface' is no feature for this place; those are: creator",
        ),
        ("ranking.negative_rate=0", "greater than 0"),
        ("ranking.calibration.slice_feature=topics", "ranking.calibration.slice_feature: 'topics' is no"),
        ("ranking.experts.hidden_layer=[8]", "did you mean 'hidden_layers'"),
        ("retrieval.ignored_features=[hour]", "'hour' is no feature that the towers can do without"),
        # The towers never read the user id; history and item bias go by the item id.
        ("retrieval.ignored_features=[surface, user_id]", "'user_id' is no feature"),
        ("retrieval.ignored_features=[item_id]", "those are: account_age_days"),
        ("retrieval.index.allow_list=[genre]", "retrieval.index.allow_list: 'genre' is not a categorical"),
        ("retrieval.history.encoder=lstm", "'mean', 'attention' or 'transformer'"),
        ("retrieval.popularity_half_lives_days=[7, 0]", "greater than 0"),
        ("retrieval={history: {interests: 2}, loss: {hard_negatives: 5}}", "history.interests is 2"),
    ],
)
def test_a_wrong_override_is_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run_config("simulated", [override])
    assert message in str(caught.value)


def test_an_unknown_dataset_names_the_built_in_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown dataset 'movielens'; built in: .*movielens-1m"):
        load_run_config("movielens")


def test_a_setting_that_the_log_cannot_serve_is_refused_before_the_run() -> None:
    with pytest.raises(ConfigError, match="propensity_clip needs the column 'propensity'"):
        load_run_config("kuairand-pure", ["ranking.propensity_clip=10"])


@pytest.mark.parametrize("missing", ["retrieval", "ranking"])
def test_a_model_without_a_gate_is_an_error(write: Write, missing: str) -> None:
    gates = [gate for gate in yaml.safe_load(taste_world.CONFIG)["gates"] if missing not in gate["metric"]]
    with pytest.raises(ConfigError, match=f"no {missing} model would ever be blessed"):
        load_run_config(write(gates=gates))


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        ({"metric": "retrieval/recall_at_10"}, "sets no condition"),
        ({"metric": "retreival/recall_at_10", "min": 0.1}, "'retreival/recall_at_10' is of neither model"),
        ({"metric": "ranking/click/auc", "max_drop": -0.1}, "gates.2.max_drop"),
        ({"metric": "ranking/click/auc", "minimum": 0.1}, "gates.2.minimum: unknown key"),
        ({"metric": "retrieval/recal_at_10", "min": 0.1}, "the nearest one is 'retrieval/recall_at_10'"),
        ({"metric": "ranking/click/mae", "max": 1}, "unknown metric 'ranking/click/mae'"),
        ({"metric": "ranking/click/auc", "beats": ["ials"]}, "to beat 'ials'; baselines are: global_mean"),
        (
            {"metric": "ranking/watch_time/mae", "beats": ["logistic_regression"]},
            "to beat 'logistic_regression'; baselines are: global_mean, global_median",
        ),
        (
            {"metric": "ranking/click/auc", "beats": ["global_median"]},
            "to beat 'global_median'; baselines are",
        ),
        (
            {"metric": "retrieval/coverage_at_10", "beats": ["popularity"]},
            "'retrieval/coverage_at_10' is one number for all users, without an interval; to beat",
        ),
    ],
)
def test_a_gate_that_would_judge_nothing_is_an_error(
    write: Write, gate: dict[str, Any], message: str
) -> None:
    gates = [*yaml.safe_load(taste_world.CONFIG)["gates"], gate]
    with pytest.raises(ConfigError) as caught:
        load_run_config(write(gates=gates))
    assert message in str(caught.value)


def test_slices_take_the_surface_only_where_it_is_mapped(write: Write) -> None:
    dataset = yaml.safe_load(taste_world.CONFIG)["dataset"]
    crossed = load_run_config(write(slices=["surface", ["country", "activity_decile"]]))
    assert crossed.slices == (("surface",), ("country", "activity_decile"))
    with pytest.raises(ConfigError, match="at most 2 items"):
        load_run_config(write(slices=[["surface", "country", "age"]]))
    del dataset["interactions"]["columns"]["surface"]
    with pytest.raises(ConfigError, match="'surface' is no dimension of taste-world; those are: user_type"):
        load_run_config(write(dataset=dataset))


def test_a_user_feature_named_like_an_allow_list_is_an_error(write: Write) -> None:
    dataset = yaml.safe_load(taste_world.CONFIG)["dataset"]
    dataset["users"]["features"].append({"name": "allow_tags", "kind": "categorical"})
    with pytest.raises(ConfigError, match=r"user feature 'allow_tags' .* is named like an allow-list"):
        load_run_config(write(dataset=dataset))


def test_relative_paths_in_a_file_start_at_its_folder(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(dataset="tables.yaml", data_dir="../logs")
    dataset = yaml.safe_load(taste_world.CONFIG)["dataset"]
    (path.parent / "tables.yaml").write_text(yaml.safe_dump(dataset))
    monkeypatch.chdir(tmp_path)
    config = load_run_config(Path("conf/my.yaml"))
    assert config.dataset.name == "taste-world"
    assert config.data_dir is not None
    assert config.data_dir.resolve() == tmp_path / "logs"


def test_absolute_and_home_folders_stay_what_they_are(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_run_config(write(data_dir="/logs")).data_dir == Path("/logs")
    monkeypatch.setenv("HOME", "/home/someone")
    assert load_run_config(write(data_dir="~/logs")).data_dir == Path("/home/someone/logs")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a mapping was expected"),
        ("- dataset", "a mapping was expected"),
        ("dataset: [", "not valid YAML"),
        ("gates: []", "dataset: required, not given"),
        ("dataset: no-such", "unknown dataset 'no-such'"),
        ("dataset: absent.yaml", "no configuration file"),
    ],
)
def test_a_file_that_is_no_configuration_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_run_config(path)
    assert message in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no configuration file .*absent\.yaml"):
        load_run_config(tmp_path / "absent.yaml")


def test_the_resolved_configuration_survives_json() -> None:
    config = load_run_config("kuairand-pure", ["ranking.experts.hidden_layers=[8]"])
    assert type(config).model_validate_json(config.model_dump_json()) == config


def test_everything_of_a_run_lies_below_its_output_dir(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    properties = [name for name, value in vars(RunPaths).items() if isinstance(value, property)]
    assert len(properties) >= 8
    assert all(getattr(paths, name).is_relative_to(tmp_path) for name in properties)
