"""Names and groups of features: from the declaration to raw examples to transformed examples.

Imports nothing heavy: the client, the pipeline definition and the tests read names from here.
"""

from __future__ import annotations

import dataclasses

from schema import point_in_time
from schema.contract import DatasetSpec, FeatureKind

USER_ID = "user_id"
ITEM_ID = "item_id"
CREATOR_ID = "creator_id"
UPLOAD_TIME = "upload_time_unix_s"
EVENT_TIME = "event_time_unix_s"
SURFACE = "surface"
POSITION = "position"
EXPLORATION = "exploration"
PROPENSITY = "propensity"
SEARCH_TOKENS = "search_tokens"
HISTORY = "history_item_ids"
# The user's latest impressions, oldest first; the lists go together.
IMPRESSION_ITEMS = "impression_item_ids"
IMPRESSION_TIMES = "impression_event_time_unix_s"
IMPRESSION_SURFACES = "impression_surfaces"
RETRIEVAL_WEIGHT = "retrieval_weight"
# The history as of the start of the session; only in training positives of datasets with session_gap_hours.
PRIOR_SESSIONS = "prior_sessions_item_ids"
PRIOR_SESSIONS_IDS = "prior_sessions_item_ids_ids"
# Days from the example to the end of training, rounded up; 0 after it.
DAYS_TO_END = "days_to_train_end"

# Only in user-state examples.
EVAL_ITEMS = "eval_item_ids"
TEST_ITEMS = "test_item_ids"
SEEN_ITEMS = "seen_item_ids"
# Those of TEST_ITEMS without any interaction in the train split; whether the user has a history by its end.
COLD_TEST_ITEMS = "cold_test_item_ids"
USER_TYPE = "user_type"
COLD = "cold"
WARM = "warm"

# Made from event_time_unix_s (and upload_time_unix_s) inside the Transform graph.
HOUR_OF_DAY = "hour_of_day"
DAY_OF_WEEK = "day_of_week"
EXAMPLE_AGE = "example_age_days"
ITEM_AGE = "item_age_days"

# Counts of the log before the example's event; of the catalogue, before the end of training.
ITEM_COUNTS = point_in_time.ITEM_COUNTS
# float32 [C] in [0, 1]: impressions and smoothed rates of ITEM_COUNTS, as shares of training values below.
COUNTERS = "item_counters"
# float32 [L]: mean of each task label over the log before the example's event.
LABEL_MEANS = "label_means_so_far"
COUNTER_NAMES = (COUNTERS, LABEL_MEANS)
# Transformed impressions, [L] each, 0 where padded.
IMPRESSION_IDS = "impression_item_ids_ids"
IMPRESSION_SURFACE_IDS = "impression_surfaces_ids"
IMPRESSION_AGES = "impression_ages_s"

SPLITS = ("train", "eval", "test")
# Searches are short: more of their words say little that the latest do not.
MAX_SEARCH_TOKENS = 50

# Transformed ids: 0 is padding or missing, 1 is any value outside the vocabulary, the vocabulary starts at 2.
PADDING_ID = 0
OOV_ID = 1
FIRST_VOCABULARY_ID = 2

# A vocabulary shared by the candidate and the history side, so that both read one embedding table.
ITEM_SPACE = "item_id"


@dataclasses.dataclass(frozen=True)
class Feature:
    """One raw model input and how it is transformed.

    Attributes:
      name: raw feature name, unique over the dataset.
      kind: decides dtype and transformation; ids and lists of ids count as (multi-)categorical.
      space: vocabulary that its values share; two features of one space share one embedding table.
    """

    name: str
    kind: FeatureKind
    space: str

    @property
    def is_list(self) -> bool:
        """Whether an example holds any number of values."""
        return self.kind in (FeatureKind.MULTI_CATEGORICAL, FeatureKind.TEXT)

    @property
    def is_categorical(self) -> bool:
        """Whether its transformed form is one id, or a list of ids, of a vocabulary."""
        return self.kind is not FeatureKind.CONTINUOUS

    @property
    def id_name(self) -> str:
        """Transformed int64 id, or ids, of a categorical feature."""
        return f"{self.name}_ids" if self.is_list else f"{self.name}_id"

    @property
    def cdf_name(self) -> str:
        """Transformed float32 in [0, 1]: the share of training values at or below (continuous features)."""
        return f"{self.name}_cdf"

    @property
    def bucket_name(self) -> str:
        """Transformed int64 quantile bucket in [0, NUM_BUCKETS]; 0 is missing (continuous features)."""
        return f"{self.name}_bucket"

    @property
    def transformed_names(self) -> tuple[str, ...]:
        """Every name that this feature has after Transform."""
        return (self.id_name,) if self.is_categorical else (self.cdf_name, self.bucket_name)


# Quantile buckets of a continuous feature; bucket ids run from 1 to NUM_BUCKETS.
NUM_BUCKETS = 32


@dataclasses.dataclass(frozen=True)
class FeatureSpace:
    """The features of a dataset by role.

    Attributes:
      query: features of user and context known at request time, transformed from inputs of the same name,
        except for the clock features, which come from event_time_unix_s.
      candidate: features of the item alone, the same for every request.
      cross: continuous features of the item and the request time together (item age); ranking only.
      labels: label names that some task or the positive definition uses.
    """

    query: tuple[Feature, ...]
    candidate: tuple[Feature, ...]
    cross: tuple[Feature, ...]
    labels: tuple[str, ...]

    @property
    def all(self) -> tuple[Feature, ...]:
        """Query, candidate and cross features."""
        return self.query + self.candidate + self.cross

    def find(self, name: str) -> Feature:
        """The feature with this raw name. Raises KeyError when there is none."""
        for feature in self.all:
            if feature.name == name:
                return feature
        raise KeyError(name)


CLOCK_FEATURES = (
    Feature(HOUR_OF_DAY, FeatureKind.CATEGORICAL, HOUR_OF_DAY),
    Feature(DAY_OF_WEEK, FeatureKind.CATEGORICAL, DAY_OF_WEEK),
    Feature(EXAMPLE_AGE, FeatureKind.CONTINUOUS, EXAMPLE_AGE),
)


def feature_space(spec: DatasetSpec) -> FeatureSpace:
    """Derives the features of a dataset from its declaration."""
    columns = spec.interactions.columns
    query = [Feature(USER_ID, FeatureKind.CATEGORICAL, USER_ID)]
    query += [Feature(f.name, f.kind, f.space or f.name) for f in spec.users.features]
    query += [Feature(HISTORY, FeatureKind.MULTI_CATEGORICAL, ITEM_SPACE)]
    if SURFACE in columns:
        query.append(Feature(SURFACE, FeatureKind.CATEGORICAL, SURFACE))
    if SEARCH_TOKENS in columns:
        query.append(Feature(SEARCH_TOKENS, FeatureKind.MULTI_CATEGORICAL, SEARCH_TOKENS))
    query += CLOCK_FEATURES

    candidate = [Feature(ITEM_ID, FeatureKind.CATEGORICAL, ITEM_SPACE)]
    candidate += [Feature(f.name, f.kind, f.space or f.name) for f in spec.items.features]
    if CREATOR_ID in spec.items.columns:
        candidate.append(Feature(CREATOR_ID, FeatureKind.CATEGORICAL, CREATOR_ID))
    cross = []
    if UPLOAD_TIME in spec.items.columns:
        cross.append(Feature(ITEM_AGE, FeatureKind.CONTINUOUS, ITEM_AGE))
    labels = dict.fromkeys([spec.positive, *(label for task in spec.tasks for label in task.labels)])
    return FeatureSpace(tuple(query), tuple(candidate), tuple(cross), tuple(labels))


def shared_spaces(space: FeatureSpace) -> tuple[tuple[Feature, Feature], ...]:
    """Query and candidate features of one vocabulary, whose values can thus be compared: (query, candidate).

    The creators that somebody has subscribed to and the creator of an item, for instance.
    """
    return tuple(
        (left, right)
        for left in space.query
        for right in space.candidate
        if left.is_categorical and right.is_categorical and left.space == right.space
    )


@dataclasses.dataclass(frozen=True)
class RawInput:
    """One raw feature of an example or of a serving request.

    Attributes:
      name: name in the tf.Example and in the signatures.
      dtype: "string", "int64" or "float32".
      is_list: shape [B, None] in a request when true, else [B].
      max_values: of a list of events, oldest first; the latest count, as in examples. None = all.
    """

    name: str
    dtype: str
    is_list: bool
    max_values: int | None = None


def raw_query_inputs(spec: DatasetSpec) -> tuple[RawInput, ...]:
    """What a request says about user and context, in signature order."""
    clock = {f.name for f in CLOCK_FEATURES}
    max_values = {HISTORY: spec.max_history, SEARCH_TOKENS: MAX_SEARCH_TOKENS}
    inputs = [
        dataclasses.replace(_raw_input(f), max_values=max_values.get(f.name))
        for f in feature_space(spec).query
        if f.name not in clock
    ]
    return (*inputs, RawInput(EVENT_TIME, "int64", False))


def raw_impression_inputs(spec: DatasetSpec) -> tuple[RawInput, ...]:
    """What a request to the ranker says besides about the user's latest impressions, in signature order."""
    inputs = [
        RawInput(IMPRESSION_ITEMS, "string", True, spec.max_impressions),
        RawInput(IMPRESSION_TIMES, "int64", True),
    ]
    if spec.surface_is_mapped:
        inputs.append(RawInput(IMPRESSION_SURFACES, "string", True))
    return (*inputs, *(RawInput(impression_label(label), "float32", True) for label in spec.task_labels))


def raw_logged_inputs(spec: DatasetSpec) -> tuple[RawInput, ...]:
    """How the impression came about, which only the training of the ranker reads: nobody knows it before."""
    dtypes = {POSITION: "int64", EXPLORATION: "float32", PROPENSITY: "float32"}
    columns = spec.interactions.columns
    return tuple(RawInput(name, dtype, False) for name, dtype in dtypes.items() if name in columns)


def impression_label(label: str) -> str:
    """Raw and transformed name of a label of the user's latest impressions."""
    return f"impression_{label}"


def impression_names(spec: DatasetSpec) -> tuple[str, ...]:
    """Transformed names of the user's latest impressions."""
    surfaces = (IMPRESSION_SURFACE_IDS,) if spec.surface_is_mapped else ()
    labels = (impression_label(label) for label in spec.task_labels)
    return (IMPRESSION_IDS, IMPRESSION_AGES, *surfaces, *labels)


def raw_candidate_inputs(spec: DatasetSpec) -> tuple[RawInput, ...]:
    """What the catalogue says about an item."""
    inputs = [_raw_input(f) for f in feature_space(spec).candidate]
    if UPLOAD_TIME in spec.items.columns:
        inputs.append(RawInput(UPLOAD_TIME, "int64", False))
    return tuple(inputs)


def _raw_input(feature: Feature) -> RawInput:
    dtype = "string" if feature.is_categorical else "float32"
    # Text is one string in an example and is split into words by the Transform graph.
    return RawInput(feature.name, dtype, feature.kind is FeatureKind.MULTI_CATEGORICAL)
