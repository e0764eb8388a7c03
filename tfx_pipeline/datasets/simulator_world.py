"""The simulated platform's population, and the laws by which people react to videos.

The policy that fills the screen lives in `simulator.py`; nothing here knows about it. Letters: U = users,
I = items, C = creators, T = topics, S = hidden style dimensions, D = days, N = impressions.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import expit, ndtr

from schema.errors import ConfigError

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

DAY_S = 86_400
UTC_OFFSET_HOURS = 1
LOG_END_UNIX_S = int(datetime.datetime.fromisoformat("2024-01-24T00:00:00+01:00").timestamp())

# The share of shown videos that people really look at, at positions 1, 2, ...; it depends on nothing else.
EXAMINATION: dict[str, Floats] = {
    "home": 1 / (1 + 0.08 * np.arange(10)),
    "search": 1 / (1 + 0.2 * np.arange(6)),
}
MAX_REQUESTS_PER_DAY = 6

TOPIC_WORDS = {
    "cooking": "recipe kitchen pasta soup knife oven spicy dough",
    "travel": "island train backpack harbour passport sunrise hostel border",
    "football": "goal penalty striker derby keeper stadium dribble league",
    "fitness": "workout squat stretch cardio plank dumbbell sprint posture",
    "music": "guitar chorus melody drums concert remix vocal piano",
    "dance": "choreography ballet salsa spin rhythm stage footwork tango",
    "comedy": "prank sketch parody standup joke impression roast blooper",
    "gaming": "speedrun boss quest controller arcade strategy loot pixel",
    "fashion": "outfit denim runway vintage sneakers tailor wardrobe silk",
    "makeup": "lipstick eyeliner palette contour skincare blush serum brush",
    "pets": "puppy kitten parrot hamster rescue leash aquarium groom",
    "nature": "forest waterfall eagle glacier meadow coral volcano river",
    "science": "experiment magnet physics telescope chemistry orbit lab atom",
    "history": "empire castle medieval archive treaty ruins dynasty legend",
    "cars": "engine turbo garage rally convertible gearbox drift exhaust",
    "gadgets": "phone headphones battery charger drone camera keyboard unboxing",
    "diy": "hammer paint shelf plywood drill wallpaper solder workbench",
    "gardening": "tomato compost seedling greenhouse prune orchid balcony soil",
    "money": "budget salary invest mortgage savings startup inflation tax",
    "family": "toddler birthday parenting nursery cradle playground twins grandma",
    "news": "election summit headline debate protest minister report briefing",
    "art": "sketchbook watercolour sculpture gallery portrait ink canvas mural",
    "film": "trailer director scene sequel actor premiere stunt script",
    "language": "grammar accent vocabulary fluent idiom pronunciation dialogue exam",
}
TITLE_OPENERS = [
    "best",
    "easy",
    "secret",
    "honest",
    "first",
    "perfect",
    "tiny",
    "wild",
    "slow",
    "real",
    "daily",
    "late",
]

AGE_BUCKETS = ("13-17", "18-24", "25-34", "35-44", "45-54", "55+")
GENDERS = ("female", "male", "other")
COUNTRIES = ("DE", "FR", "ES", "IT", "NL")
LANGUAGES = ("en", "de", "fr", "es", "it")
DEVICES = ("phone", "tablet", "desktop", "tv")

_COUNTRY_SHARE = (0.32, 0.26, 0.18, 0.14, 0.10)
_LANGUAGE_BY_COUNTRY = np.array(  # rows: countries, columns: languages
    [
        [0.15, 0.80, 0.02, 0.01, 0.02],
        [0.10, 0.02, 0.84, 0.02, 0.02],
        [0.10, 0.01, 0.02, 0.85, 0.02],
        [0.10, 0.02, 0.02, 0.02, 0.84],
        [0.75, 0.20, 0.02, 0.02, 0.01],
    ]
)
_ITEM_LANGUAGE_SHARE = (0.40, 0.22, 0.18, 0.11, 0.09)
_DEVICE_SHARE = (0.74, 0.08, 0.12, 0.06)
_DEVICE_PATIENCE = np.array([0.0, 0.15, 0.1, 0.5])  # shift of the log of the watch time
# A day's traffic: a wide hump around noon, a high one late in the evening, and those who do not sleep yet.
_HOUR_WEIGHT = (
    0.1
    + np.exp(-0.5 * ((np.arange(24) - 13) / 3.5) ** 2)
    + 1.5 * np.exp(-0.5 * ((np.arange(24) - 22) / 3) ** 2)
    + 0.4 * np.exp(-np.arange(24) / 1.5)
)
_WEEKDAY_FACTOR = (0.95, 0.92, 0.95, 0.97, 1.05, 1.2, 1.15)  # Monday to Sunday

_NEW_USER_SHARE = 0.15  # register during the log
_NEW_ITEM_SHARE = 0.25  # uploaded during the log
_STYLE_DIMS = 4
_NUM_TASTES = 4
_INTEREST_DRIFT_VARIANCE = 0.25  # share of an interest's variance that moves
_INTEREST_DAY_TO_DAY = 0.8  # correlation of the moving part between consecutive days

# Log-odds of a click once a video is examined.
_CLICK_BASE = -0.9
_CLICK_INTEREST = 1.8
_CLICK_STYLE = 0.45
_CLICK_SUBSCRIBED = 0.9
_CLICK_QUERY = 1.2
_USER_BIAS_SD = 1.5
_QUALITY_SD = 1.2

# Watch time.
_PATIENCE_MEDIAN_S = 21.0
_PATIENCE_SD = 1.05
_PATIENCE_RELEVANCE = 0.25
_PATIENCE_DURATION = 0.2
# How often a video may play, in durations: once for half of the viewers, else 1 + an exponential with mean
# 0.5, taken at the middles of 16 equally likely slices so that the expected watch time is an exact sum.
_PLAYS = np.concatenate([np.ones(16), 1 - 0.5 * np.log(1 - (np.arange(16) + 0.5) / 16)])
WATCH_JITTER = 0.02
MAX_PLAYS = float(_PLAYS.max()) * (1 + WATCH_JITTER)
_AUTOPLAY_SHARE = 0.83
_AUTOPLAY_MEDIAN_S = 2.1
_AUTOPLAY_SD = 0.7
_AUTOPLAY_CAP_S = 7.0


@dataclass(frozen=True)
class SimulatorConfig:
    """The size and the seed of a simulated platform.

    Attributes:
      num_users: user accounts at the end of the log.
      num_items: videos uploaded by the end of the log, at least 100.
      num_creators: channels; each makes videos mostly about one topic, in one language.
      num_topics: 2 to 24; every video has one or two.
      num_days: length of the log, at least 2; it always ends at 2024-01-24T00:00+01:00.
      requests_per_user_day: mean number of filled screens per user and day; heavy-tailed over users.
      exploration_fraction: 0 to 1, the share of requests answered at random.
      seed: the same config gives the same bytes, on one machine and one set of library versions.
    """

    num_users: int = 3_000
    num_items: int = 2_000
    num_creators: int = 300
    num_topics: int = 24
    num_days: int = 14
    requests_per_user_day: float = 0.6
    exploration_fraction: float = 0.05
    seed: int = 17

    def __post_init__(self) -> None:
        """Checks every field. Raises ConfigError with the field, its range and its value."""
        ranges: dict[str, tuple[float, float]] = {
            "num_users": (1, np.inf),
            "num_items": (100, np.inf),  # so that the busiest user's day never runs out of videos
            "num_creators": (1, np.inf),
            "num_topics": (2, len(TOPIC_WORDS)),
            "num_days": (2, np.inf),
            "requests_per_user_day": (1e-3, MAX_REQUESTS_PER_DAY),
            "exploration_fraction": (0, 1),
            "seed": (0, np.inf),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ConfigError(f"SimulatorConfig.{name} must be between {low:g} and {high:g}, got {value}")

    @property
    def log_start_unix_s(self) -> int:
        """The first second of the log: local midnight."""
        return LOG_END_UNIX_S - self.num_days * DAY_S


DEFAULT = SimulatorConfig()
TINY = SimulatorConfig(
    num_users=200, num_items=150, num_creators=40, num_topics=8, requests_per_user_day=0.37
)


@dataclass(frozen=True)
class Items:
    """The catalogue. Shapes: [I] unless said."""

    creator: Ints
    topics: Floats
    """[I, T], a video's weight per topic; rows sum to 1."""
    language: Ints
    duration_s: Floats
    upload_time: Ints
    quality: Floats
    style: Floats
    """[I, S], hidden: no source column tells it."""
    prior_views: Floats
    """Views gathered before the log starts."""
    title: list[str]


@dataclass(frozen=True)
class Users:
    """The people. Shapes: [U] unless said."""

    age: Ints
    gender: Ints
    country: Ints
    language: Ints
    device: Ints
    bias: Floats
    style: Floats
    """[U, S], hidden."""
    interests: Floats
    """[D, U, T], in log-odds, centred on zero: what somebody likes on a day."""
    remembered_interests: Floats
    """[U, T], what the old policy believes the interests are: stale and noisy."""
    subscribed: Bools
    """[U, C], as of the start of the log (of the registration, for new users)."""
    request_times: Ints
    """[D, U, MAX_REQUESTS_PER_DAY], planned, ascending; LOG_END_UNIX_S where there is none."""
    register_time: Ints


def make_items(config: SimulatorConfig, rng: np.random.Generator) -> Items:
    """Draws creators and their videos."""
    n, num_topics = config.num_items, config.num_topics
    creator_topic = rng.integers(num_topics, size=config.num_creators)
    creator_language = rng.choice(len(LANGUAGES), config.num_creators, p=_ITEM_LANGUAGE_SHARE)
    creator_quality = rng.normal(0, 1, config.num_creators)
    size = 1 / np.arange(1, config.num_creators + 1) ** 0.7
    creator = rng.choice(config.num_creators, n, p=size / size.sum())

    first = np.where(rng.random(n) < 0.85, creator_topic[creator], rng.integers(num_topics, size=n))
    second = (first + rng.integers(1, num_topics, n)) % num_topics
    second_weight = np.where(rng.random(n) < 0.6, 0.35, 0.0)
    topics = np.zeros((n, num_topics), np.float32)
    topics[np.arange(n), first] = 1 - second_weight
    topics[np.arange(n), second] = second_weight

    start = config.log_start_unix_s
    upload_time = start - (1 + rng.exponential(25 * DAY_S, n)).astype(np.int64)
    new = rng.permutation(n)[: int(n * _NEW_ITEM_SHARE)]
    upload_time[new] = rng.integers(start, LOG_END_UNIX_S, len(new))
    quality = _QUALITY_SD * (0.5 * creator_quality[creator] + np.sqrt(0.75) * rng.normal(0, 1, n))
    prior_views = np.exp(2.5 + 0.6 * quality + rng.normal(0, 1.2, n))
    prior_views[new] = 0

    words = [text.split() for text in list(TOPIC_WORDS.values())[:num_topics]]
    picks = rng.integers(8, size=(n, 3))
    openers = rng.integers(len(TITLE_OPENERS), size=n)
    title = [
        " ".join(dict.fromkeys([TITLE_OPENERS[o], words[a][p], words[a][q], words[b if w > 0 else a][r]]))
        for o, a, b, w, (p, q, r) in zip(openers, first, second, second_weight, picks, strict=True)
    ]
    return Items(
        creator=creator,
        topics=topics,
        language=np.where(
            rng.random(n) < 0.9,
            creator_language[creator],
            rng.choice(len(LANGUAGES), n, p=_ITEM_LANGUAGE_SHARE),
        ),
        duration_s=np.clip(np.exp(rng.normal(np.log(70), 1.0, n)), 5, 600).round(1),
        upload_time=upload_time,
        quality=quality,
        style=rng.normal(0, 1, (n, _STYLE_DIMS)),
        prior_views=prior_views,
        title=[text.capitalize() for text in title],
    )


def make_users(config: SimulatorConfig, items: Items, rng: np.random.Generator) -> Users:
    """Draws people, their interests day by day, their subscriptions, and when they open the app."""
    n, num_topics, days = config.num_users, config.num_topics, config.num_days
    age = rng.choice(len(AGE_BUCKETS), n, p=(0.10, 0.26, 0.28, 0.17, 0.11, 0.08))
    gender = rng.choice(len(GENDERS), n, p=(0.48, 0.49, 0.03))
    country = rng.choice(len(COUNTRIES), n, p=_COUNTRY_SHARE)
    language = (rng.random((n, 1)) > _LANGUAGE_BY_COUNTRY.cumsum(axis=1)[country]).sum(axis=1)

    # Interests have unit variance. The steady part is 30 % demographic, 50 % made of a few tastes that
    # explain many topics, and 20 % personal; the rest wanders from day to day.
    group = (
        rng.normal(0, 1, (len(AGE_BUCKETS), num_topics))[age]
        + rng.normal(0, 1, (len(GENDERS), num_topics))[gender]
    )
    tastes = rng.normal(0, 1, (n, _NUM_TASTES)) @ rng.normal(0, 1, (_NUM_TASTES, num_topics))
    personal = rng.normal(0, 1, (n, num_topics))
    steady = np.sqrt(0.3 / 2) * group + np.sqrt(0.5 / _NUM_TASTES) * tastes + np.sqrt(0.2) * personal
    wander = rng.normal(0, 1, (n, num_topics))
    interests = np.empty((days, n, num_topics), np.float32)
    for day in range(days):
        interests[day] = (
            np.sqrt(1 - _INTEREST_DRIFT_VARIANCE) * steady + np.sqrt(_INTEREST_DRIFT_VARIANCE) * wander
        )
        fresh = rng.normal(0, 1, (n, num_topics))
        wander = _INTEREST_DAY_TO_DAY * wander + np.sqrt(1 - _INTEREST_DAY_TO_DAY**2) * fresh

    request_times, register_time = _plan_requests(config, rng)
    return Users(
        age=age,
        gender=gender,
        country=country,
        language=np.minimum(language, len(LANGUAGES) - 1),
        device=rng.choice(len(DEVICES), n, p=_DEVICE_SHARE),
        bias=rng.normal(0, _USER_BIAS_SD, n),
        style=rng.normal(0, 1, (n, _STYLE_DIMS)),
        interests=interests,
        remembered_interests=(interests[0] + rng.normal(0, 0.7, (n, num_topics))).astype(np.float32),
        subscribed=_subscribe(interests[0], items, config.num_creators, rng),
        request_times=request_times,
        register_time=register_time,
    )


def _subscribe(interests: Floats, items: Items, num_creators: int, rng: np.random.Generator) -> Bools:
    """Subscriptions [U, C]: a heavy-tailed number per user, of big channels on topics the user likes."""
    made = np.bincount(items.creator, minlength=num_creators)
    about = np.zeros((num_creators, interests.shape[1]))
    np.add.at(about, items.creator, items.topics)
    about /= np.maximum(made, 1)[:, None]
    score = 2 * interests @ about.T + np.log(made + 0.1) + rng.gumbel(size=(len(interests), num_creators))
    count = np.minimum(np.exp(rng.normal(0.8, 0.9, len(interests))).astype(np.int64), num_creators)
    rank = (-score).argsort(axis=1).argsort(axis=1)
    return rank < count[:, None]


def _plan_requests(config: SimulatorConfig, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """When each user means to open the app, and when each user registered."""
    n, days, start = config.num_users, config.num_days, config.log_start_unix_s
    sd = 0.85
    rate = config.requests_per_user_day * np.exp(rng.normal(-(sd**2) / 2, sd, n))
    first_day = np.where(rng.random(n) < _NEW_USER_SHARE, rng.integers(days, size=n), -1)
    day_start = start + DAY_S * np.arange(days)
    weekday = ((day_start + UTC_OFFSET_HOURS * 3600) // DAY_S + 3) % 7  # 1970-01-01 was a Thursday
    count = rng.poisson(rate * np.array(_WEEKDAY_FACTOR)[weekday][:, None])
    day = np.arange(days)[:, None]
    # People register because they want to watch: the first day has a request.
    count = np.where(day < first_day, 0, np.where(day == first_day, np.maximum(count, 1), count))

    shape = (days, n, MAX_REQUESTS_PER_DAY)
    second = rng.choice(24, shape, p=_HOUR_WEIGHT / _HOUR_WEIGHT.sum()) * 3600 + rng.integers(
        3600, size=shape
    )
    times = day_start[:, None, None] + second
    times[np.arange(MAX_REQUESTS_PER_DAY) >= count[:, :, None]] = LOG_END_UNIX_S
    times.sort(axis=2)
    register_time = np.where(
        first_day >= 0,
        times[first_day, np.arange(n), 0] - 30,
        start - (1 + rng.exponential(300 * DAY_S, n)).astype(np.int64),
    )
    return times, register_time


def language_penalty(user_language: Ints, item_language: Ints) -> Floats:
    """Log-odds lost to the language barrier, at most 0: English costs foreigners little. Broadcasts."""
    foreign = np.where(item_language == LANGUAGES.index("en"), -0.3, -1.2)
    return np.where(user_language == item_language, 0.0, foreign)


def relevance_logit(
    interests: Floats,
    topics: Floats,
    user_style: Floats,
    item_style: Floats,
    user_bias: Floats,
    quality: Floats,
    subscribed: Bools,
    language_barrier: Floats,
) -> Floats:
    """Log-odds [N] that an examined video is clicked, outside search.

    The last axis of the first four is topics (first two) or style dimensions; every other one has shape [N].
    """
    return (
        _CLICK_BASE
        + _CLICK_INTEREST * (interests * topics).sum(axis=-1)
        + _CLICK_STYLE * (user_style * item_style).sum(axis=-1)
        + user_bias
        + quality
        + _CLICK_SUBSCRIBED * subscribed
        + language_barrier
    )


def query_match(topics_of_query: Floats) -> Floats:
    """Log-odds that a search adds to a video, from the video's weight for the query's topic, in [0, 1]."""
    return np.where(topics_of_query > 0, _CLICK_QUERY, -_CLICK_QUERY)


def like_probability(logit: Floats) -> Floats:
    """The chance that a clicked video is liked."""
    return expit(-5.5 + 0.7 * logit)


def not_interested_probability(logit: Floats) -> Floats:
    """The chance that a video that was examined and not clicked gets a "not interested"."""
    return 0.006 * expit(-logit) ** 2


def patience_log_s(logit: Floats, device: Ints, duration_s: Floats) -> Floats:
    """Mean of the log of the seconds that a viewer is ready to spend on a clicked video."""
    return (
        np.log(_PATIENCE_MEDIAN_S)
        + _PATIENCE_RELEVANCE * logit
        + _DEVICE_PATIENCE[device]
        + _PATIENCE_DURATION * np.log(duration_s / 70)
    )


def draw_watch_time_s(
    clicked: Bools, patience_log: Floats, duration_s: Floats, rng: np.random.Generator
) -> Floats:
    """Seconds watched, any shape.

    A clicked video plays until the viewer's patience (log-normal) or the video ends; half of the viewers
    let it play again, for at most `MAX_PLAYS` durations. A video that is not clicked may autoplay for a few
    seconds.
    """
    shape = clicked.shape
    played = np.minimum(
        np.exp(rng.normal(patience_log, _PATIENCE_SD)), rng.choice(_PLAYS, shape) * duration_s
    )
    autoplay = np.minimum(
        _AUTOPLAY_MEDIAN_S * np.exp(rng.normal(0, _AUTOPLAY_SD, shape)),
        np.minimum(_AUTOPLAY_CAP_S, duration_s),
    )
    autoplay[rng.random(shape) >= _AUTOPLAY_SHARE] = 0
    # Mean 1: players count frames, not intentions.
    jitter = rng.uniform(1 - WATCH_JITTER, 1 + WATCH_JITTER, shape)
    return (np.where(clicked, played, autoplay) * jitter).round(3)


def expected_watch_time_s(click_probability: Floats, patience_log: Floats, duration_s: Floats) -> Floats:
    """The mean of `draw_watch_time_s` for a video clicked with `click_probability`, exactly."""
    played = np.mean(
        [_mean_capped(patience_log, _PATIENCE_SD, plays * duration_s) for plays in _PLAYS], axis=0
    )
    cap = np.minimum(_AUTOPLAY_CAP_S, duration_s)
    autoplay = _AUTOPLAY_SHARE * _mean_capped(np.log(_AUTOPLAY_MEDIAN_S), _AUTOPLAY_SD, cap)
    return click_probability * played + (1 - click_probability) * autoplay


def _mean_capped(log_mean: Floats | float, log_sd: float, cap: Floats) -> Floats:
    """E[min(X, cap)] for log-normal X: the part below the cap, plus the cap times the chance to reach it."""
    z = (np.log(cap) - log_mean) / log_sd
    return np.exp(log_mean + log_sd**2 / 2) * ndtr(z - log_sd) + cap * ndtr(-z)
