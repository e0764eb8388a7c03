"""Version directories of a model on disk: `<base path>/<number>/saved_model.pb`."""

from __future__ import annotations

import functools
import logging
from pathlib import Path

from schema.errors import ServingError
from serving.config import ModelConfig

logger = logging.getLogger(__name__)


def find_versions(base_path: Path) -> dict[int, Path]:
    """Returns the version directories of a model that hold a `saved_model.pb`, by version number.

    Of several with one number, such as `1` and `01`, it is the one with the fewest leading zeros.
    """
    if not base_path.is_dir():
        return {}
    versions: dict[int, Path] = {}
    for path in sorted(base_path.iterdir(), key=lambda path: len(path.name)):
        if not _is_version(path.name) or not (path / "saved_model.pb").is_file():
            continue
        chosen = versions.setdefault(int(path.name), path)
        if chosen != path:
            _warn_of_same_number(chosen, path)
    return versions


@functools.lru_cache  # once, not at every look for new versions
def _warn_of_same_number(chosen: Path, other: Path) -> None:
    logger.warning(
        "version=%d is in two folders, path=%s is taken and path=%s ignored; remove or rename one",
        int(other.name), chosen, other,
    )  # fmt: skip


def _is_version(name: str) -> bool:
    # Longer numbers than an int64 has digits are not even converted: nobody could ask for them.
    return name.isascii() and name.isdecimal() and len(name) < 20 and int(name) < 2**63


def check_has_version(config: ModelConfig) -> None:
    """Raises ServingError when a model has no version directory to serve, with what to do about it."""
    name, base_path = config.name, config.base_path
    found = find_versions(base_path)
    if config.policy.candidates(found):
        return
    if found:
        raise ServingError(
            f"model {name!r}: {base_path} holds the versions {sorted(found)}, none of those that its "
            f"model_version_policy names"
        )
    if not base_path.is_dir():
        raise ServingError(f"model {name!r}: base path {base_path} is not a folder; check the path")
    if (base_path / "saved_model.pb").is_file():
        raise ServingError(
            f"model {name!r}: base path {base_path} is itself a SavedModel; "
            f"put it into a folder with a number as its name and give the folder above"
        )
    raise ServingError(
        f"model {name!r}: no version under {base_path}; expected a folder with a number as its name "
        f"that holds saved_model.pb, such as {base_path / '1'}"
    )
