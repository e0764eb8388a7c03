"""Facts as JSON beside an artifact: dataclasses of plain values, written and read back."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, TypeVar

import pydantic

from schema.errors import DataError

_Facts = TypeVar("_Facts")


def write_facts(facts: Any, path: Path) -> None:
    """Writes a dataclass as JSON and makes the folder; ValueError for NaN, which JSON does not have."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dataclasses.asdict(facts), indent=1, allow_nan=False), encoding="utf-8")


def read_facts(kind: type[_Facts], path: Path) -> _Facts:
    """The inverse of `write_facts`.

    Args:
      kind: the dataclass.
      path: the file.

    Raises:
      DataError: there is no such file, or it has another form, for instance that of another version.
    """
    try:
        return pydantic.TypeAdapter(kind).validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"there is no {path}; 'funnel run' with the same settings writes it") from error
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "top level"
        raise DataError(
            f"{path} cannot be read by this version of Funnel, {where}: {first['msg']}; "
            "run 'funnel run' again"
        ) from error
