"""What a bundle was made of, as hashes: tells bundles of one release from those of different ones.

A bundle is an exported SavedModel. It knows the hashes of the parts that it holds; two bundles belong
together when they agree on every part that both hold.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from schema.errors import BundleError

if TYPE_CHECKING:
    import tensorflow as tf

    from trainer.catalogue import Catalogue

FINGERPRINT_FILE = Path("assets.extra") / "fingerprint.json"
# Name of the signature that tells the hashes.
FINGERPRINT = "fingerprint"
# The Transform graph with its vocabularies; items with their features; both towers; item vectors; ranker.
TRANSFORM, CATALOGUE, TOWERS, INDEX, RANKER = "transform", "catalogue", "towers", "index", "ranker"
# Stands for all parts of a bundle together.
ID = "id"
_HASH_LENGTH = 32


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """Hashes of a bundle's parts.

    Attributes:
      parts: hexadecimal hash by part; a bundle without towers, for instance, has none for them.
    """

    parts: Mapping[str, str]

    @property
    def id(self) -> str:
        """One hash of all parts."""
        return _short(hashlib.sha256(json.dumps(dict(self.parts), sort_keys=True).encode()))

    def write(self, model_dir: Path | str) -> None:
        """Adds the fingerprint to an exported model."""
        path = Path(model_dir) / FINGERPRINT_FILE
        path.parent.mkdir(exist_ok=True)
        content = {ID: self.id, "parts": dict(self.parts)}
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, model_dir: Path | str) -> Fingerprint:
        """Reads the fingerprint of an exported or pushed model.

        Raises:
          BundleError: there is none, or it is damaged: no such JSON, or its parts do not give its id.
        """
        path = Path(model_dir) / FINGERPRINT_FILE
        if not path.is_file():
            raise BundleError(
                f"{model_dir} has no fingerprint ({path} is absent): an older version of Funnel exported it; "
                "'funnel run' makes one that has"
            )
        try:
            content = json.loads(path.read_bytes())
            fingerprint, id_ = cls(dict(content["parts"])), content[ID]
        except (ValueError, KeyError, TypeError) as error:
            raise BundleError(f"{path} is damaged: {error!r}; push the bundle anew") from error
        if fingerprint.id != id_:
            raise BundleError(f"{path} is damaged: its parts do not give its id; push the bundle anew")
        return fingerprint

    def signature(self) -> Any:
        """The hashes as a concrete function.

        In: `parts` string [B], names of parts, or "id" for all together. Out: `fingerprints` string [B], ""
        for what the bundle does not hold.
        """
        import tensorflow as tf

        known = {**self.parts, ID: self.id}

        def fingerprints(parts: tf.Tensor) -> dict[str, tf.Tensor]:
            found = tf.fill(tf.shape(parts), "")
            for name, value in known.items():
                found = tf.where(parts == name, value, found)
            return {"fingerprints": found}

        spec = tf.TensorSpec([None], tf.string, name="parts")
        return tf.function(fingerprints, autograph=False).get_concrete_function(spec)


def check_together(fingerprints: Mapping[str, Fingerprint]) -> None:
    """Checks that bundles are of one release.

    Args:
      fingerprints: by name of the bundle.

    Raises:
      BundleError: two of them hold different versions of a part; the text names both.
    """
    holders: dict[str, str] = {}
    for bundle, fingerprint in fingerprints.items():
        for part, value in fingerprint.parts.items():
            other = holders.setdefault(part, bundle)
            if fingerprints[other].parts[part] != value:
                raise BundleError(
                    f"bundles {other!r} and {bundle!r} do not belong together: their {part} differs "
                    f"({fingerprints[other].parts[part]} and {value}), so they come from different runs; "
                    "serve the versions of one run"
                )


def hash_arrays(arrays: Mapping[str, np.ndarray]) -> str:
    """One hash of named arrays: names, dtypes, shapes and values; not of their order."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        values = [str(v) for v in array.ravel()] if array.dtype == object else None
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(
            np.ascontiguousarray(array).tobytes() if values is None else json.dumps(values).encode()
        )
    return _short(digest)


def hash_variables(variables: Mapping[str, tf.Variable]) -> str:
    """One hash of weights by path."""
    return hash_arrays({path: variable.numpy() for path, variable in variables.items()})


def hash_catalogue(catalogue: Catalogue) -> str:
    """One hash of the items, their order and their features."""
    arrays = {
        "item_ids": catalogue.item_ids,
        **{f"transformed/{name}": column for name, column in catalogue.transformed.items()},
        **{f"counters/{name}": column for name, column in catalogue.counters.items()},
    }
    if catalogue.upload_time_unix_s is not None:
        arrays["upload_time_unix_s"] = catalogue.upload_time_unix_s
    return hash_arrays(arrays)


def hash_folder(folder: Path | str) -> str:
    """One hash of the files below a folder, by name and content."""
    digest = hashlib.sha256()
    for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    return _short(digest)


def _short(digest: Any) -> str:
    return str(digest.hexdigest())[:_HASH_LENGTH]
