"""The `models.config` of a server."""

from pathlib import Path

import pytest

from schema.errors import ConfigError
from serving.config import ModelConfig, VersionPolicy, format_model_config, read_model_config


def test_model_config_survives_writing_and_reading(tmp_path):
    base_paths = {"retrieval": tmp_path / "a b", "ranking": tmp_path / "quote'\""}
    (tmp_path / "models.config").write_text(format_model_config(base_paths))
    configs = {name: ModelConfig(name, path) for name, path in base_paths.items()}
    assert read_model_config(tmp_path / "models.config") == configs


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "names no model"),
        ("model_config_list { config { nmae: 'x' } }", "not a ModelServerConfig"),
        ("model_config_list { config { name: 'x' } }", "needs a name and a base_path"),
        (
            "model_config_list { config { name: 'x' base_path: '/a' } config { name: 'x' base_path: '/b' } }",
            "twice",
        ),
        (
            "model_config_list { config { name: 'x' base_path: '/a' logging_config {} } }",
            "does not have logging_config",
        ),
        (
            "model_config_list { config { name: 'x' base_path: '/a' model_version_policy { specific {} } } }",
            "names no version",
        ),
    ],
)
def test_a_wrong_model_config_is_refused(tmp_path, text, complaint):
    (tmp_path / "models.config").write_text(text)
    with pytest.raises(ConfigError, match=complaint):
        read_model_config(tmp_path / "models.config")


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("", VersionPolicy(limit=1)),
        ("model_version_policy { latest {} }", VersionPolicy(limit=1)),
        ("model_version_policy { latest { num_versions: 3 } }", VersionPolicy(limit=3)),
        ("model_version_policy { all {} }", VersionPolicy(limit=None)),
        (
            "model_version_policy { specific { versions: 1 versions: 5 } }",
            VersionPolicy(limit=None, only=frozenset({1, 5})),
        ),
    ],
)
def test_version_policies_and_labels_are_read(tmp_path, policy, expected):
    labels = 'version_labels { key: "stable" value: 1 } version_labels { key: "canary" value: 5 }'
    text = f"model_config_list {{ config {{ name: 'm' base_path: '/m' {policy} {labels} }} }}"
    (tmp_path / "models.config").write_text(text)
    models = read_model_config(tmp_path / "models.config")
    assert models == {"m": ModelConfig("m", Path("/m"), expected, {"stable": 1, "canary": 5})}
