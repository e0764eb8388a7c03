"""Request inputs that hold allow-lists: their names, and which item attributes can have one.

Imports nothing heavy: the configuration of a run is checked here before any work.
"""

from __future__ import annotations

from collections.abc import Iterable

from schema.contract import DatasetSpec, FeatureKind
from schema.errors import ConfigError
from trainer import features

_PREFIX = "allow_"


def input_name(attribute: str) -> str:
    """Name of the request input that holds the allow-list of an attribute."""
    return _PREFIX + attribute


def check_attributes(attributes: Iterable[str], spec: DatasetSpec) -> None:
    """Checks that requests can filter by these attributes.

    Args:
      attributes: `retrieval.index.allow_list` of the configuration.
      spec: the declaration of the dataset.

    Raises:
      ConfigError: an attribute is not a categorical or multi-categorical item feature of the dataset, or a
        query feature has a name like that of an allow-list.
    """
    kinds = (FeatureKind.CATEGORICAL, FeatureKind.MULTI_CATEGORICAL)
    possible = {f.name for f in features.feature_space(spec).candidate if f.kind in kinds}
    for attribute in attributes:
        if attribute not in possible:
            raise ConfigError(
                f"retrieval.index.allow_list: {attribute!r} is not a categorical or multi_categorical item "
                f"feature of dataset {spec.name!r}; valid: {', '.join(sorted(possible)) or 'none'}"
            )
    for raw in features.raw_query_inputs(spec):
        if raw.name.startswith(_PREFIX):
            raise ConfigError(
                f"user feature {raw.name!r} of dataset {spec.name!r} is named like an allow-list; "
                f"give it a name that does not start with {_PREFIX!r}, and 'column: {raw.name}'"
            )
