"""A small video platform with known truth: the embedded default dataset.

`simulate` plays a log day by day. People open the app; an old policy fills the screen; they examine, click,
watch and react by the laws of `simulator_world.py`; each night the policy counts the day's clicks. The source
tables are those that `schema/datasets/simulated.yaml` maps; `truth/` beside them holds what no real log has.
docs/simulator.md tells the whole story.
"""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
from scipy.special import expit

from schema.errors import DataError
from tfx_pipeline.datasets import simulator_world as world
from tfx_pipeline.datasets.simulator_world import (
    DAY_S,
    DEFAULT,
    EXAMINATION,
    LANGUAGES,
    LOG_END_UNIX_S,
    MAX_REQUESTS_PER_DAY,
    TINY,
    TOPIC_WORDS,
    Bools,
    Floats,
    Ints,
    Items,
    SimulatorConfig,
    Users,
)

__all__ = [
    "DEFAULT",
    "EXAMINATION",
    "TINY",
    "SimulatorConfig",
    "choose_screen",
    "simulate",
    "true_click_probability",
]

_log = logging.getLogger(__name__)

Column = npt.NDArray[Any]

SURFACES = tuple(EXAMINATION)
_SHORTEST_SCREEN = (4, 3)  # videos per surface; the longest screens are as long as the examination curves
_SCREEN = max(len(curve) for curve in EXAMINATION.values())
_EXAMINATION_BY_SURFACE = np.array(
    [np.pad(curve, (0, _SCREEN - len(curve))) for curve in EXAMINATION.values()]
)
_QUERIES_PER_TOPIC = 23
_SEARCH_SHARE = 0.2
_SAME_SESSION_SHARE = 0.55  # of a user's later requests of a day follow at once on the one before

# The old policy's score, in log-odds of being chosen.
_POLICY_POPULARITY = 1.15
_POLICY_INTEREST = 1.1
_POLICY_FRESHNESS = 5.0
_POLICY_FRESHNESS_DAYS = 1.5
_POLICY_QUERY = 4.0
_POLICY_CLICKED_BEFORE = -6.0

_REQUESTS_AT_ONCE = 1024  # bounds memory: this many requests x all items


def simulate(config: SimulatorConfig, destination: Path) -> None:
    """Writes interactions.parquet, users.parquet, items.parquet and truth/*.parquet under `destination`.

    Everything is written to a temporary folder beside `destination` that takes its name at the end, so a
    simulation that is interrupted leaves nothing behind under that name.

    Raises:
      DataError: `destination` exists and is not an empty folder.
    """
    destination = Path(destination)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise DataError(
            f"{destination} exists and is not an empty folder; remove it, or simulate into another one"
        )
    item_rng, user_rng, log_rng, table_rng = (
        np.random.default_rng(seed) for seed in np.random.SeedSequence(config.seed).spawn(4)
    )
    items = world.make_items(config, item_rng)
    users = world.make_users(config, items, user_rng)
    interactions, impression_truth = _play(config, users, items, log_rng)
    tables = {
        "interactions": interactions,
        "users": _user_table(users, table_rng),
        "items": _item_table(items, table_rng),
        "truth/impressions": impression_truth,
        **_truth_tables(config, users, items),
    }
    destination.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{destination.name}-", dir=destination.parent))
    try:
        (staging / "truth").mkdir()
        for name, table in tables.items():
            table.write_parquet(staging / f"{name}.parquet")
        staging.chmod(0o755)  # mkdtemp makes private folders
        os.replace(staging, destination)
    except BaseException:
        shutil.rmtree(staging)
        raise
    _log.info(
        "simulated impressions=%d users=%d items=%d", len(interactions), config.num_users, config.num_items
    )


def true_click_probability(
    truth_dir: Path,
    user_ids: Sequence[str] | pl.Series,
    item_ids: Sequence[str] | pl.Series,
    event_time_unix_s: npt.ArrayLike,
) -> Floats:
    """How likely each user, having examined the item on the home surface, is to click it.

    Args:
      truth_dir: the `truth` folder that `simulate` wrote.
      user_ids, item_ids: N ids each; N pairs are answered, not a product.
      event_time_unix_s: [N] or a scalar, unix seconds; interests before and after the log are those of its
        first and last day.

    Returns:
      float64 [N], in (0, 1).

    Raises:
      DataError: an id is not in the simulation.
    """
    users, items = (pl.read_parquet(Path(truth_dir) / f"{name}.parquet") for name in ("users", "items"))
    user = _rows(users["user_id"], user_ids)
    item = _rows(items["item_id"], item_ids)
    topics = _matrix(items["topics"])
    interests = _matrix(users["interests"]).reshape(len(users), -1, topics.shape[1])  # [U, D, T]
    num_days = interests.shape[1]
    day = (np.asarray(event_time_unix_s) - (LOG_END_UNIX_S - num_days * DAY_S)) // DAY_S
    subscriptions = users.select("user_id", creator_id="subscribed_creators").explode("creator_id")
    pairs = pl.DataFrame({"user_id": users["user_id"][user], "creator_id": items["creator_id"][item]})
    subscribed = pairs.join(
        subscriptions.with_columns(subscribed=True),
        on=["user_id", "creator_id"],
        how="left",
        maintain_order="left",
    )["subscribed"]
    return expit(
        world.relevance_logit(
            interests[user, np.clip(day, 0, num_days - 1)],
            topics[item],
            _matrix(users["style"])[user],
            _matrix(items["style"])[item],
            users["bias"].to_numpy()[user],
            items["quality"].to_numpy()[item],
            subscribed.fill_null(False).to_numpy(),
            world.language_penalty(users["language"].to_numpy()[user], items["language"].to_numpy()[item]),
        )
    )


def _matrix(lists: pl.Series) -> Floats:
    """Lists of one length as the rows of a matrix."""
    return lists.explode().to_numpy().reshape(len(lists), -1)


def _rows(known: pl.Series, wanted: Sequence[str] | pl.Series) -> Ints:
    asked = pl.DataFrame({"id": wanted}, schema={"id": pl.String})
    rows = asked.join(
        pl.DataFrame({"id": known}).with_row_index("row"), on="id", how="left", maintain_order="left"
    )
    if rows["row"].null_count():
        missing = rows.filter(pl.col("row").is_null())["id"][0]
        raise DataError(
            f"{known.name} {missing!r} is not in the simulation; ids run from {known[0]} to {known[-1]}"
        )
    return rows["row"].to_numpy().astype(np.int64)


@dataclass
class _Log:
    """What happened so far, as far as it changes what is shown next."""

    views: Floats
    """[I], views before the log and clicks of the days before."""
    clicked: Bools
    """[U, I], ever."""
    shown_today: Bools
    """[U, I]."""
    free_at: Ints
    """[U], when the user's last screen ended, unix seconds."""


def _play(
    config: SimulatorConfig, users: Users, items: Items, rng: np.random.Generator
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The log and its truth, one row per impression in both, ordered by time."""
    pairs = (config.num_users, config.num_items)
    log = _Log(
        items.prior_views, np.zeros(pairs, bool), np.zeros(pairs, bool), np.zeros(config.num_users, np.int64)
    )
    session = np.zeros(config.num_users, np.int64)
    num_sessions = num_requests = 0
    batches: list[dict[str, Column]] = []
    for day in range(config.num_days):
        log.shown_today[:] = False
        clicks_today = np.zeros(config.num_items)
        for number in range(MAX_REQUESTS_PER_DAY):
            active = np.flatnonzero(users.request_times[day, :, number] < LOG_END_UNIX_S)
            for user in np.array_split(active, max(1, -(-len(active) // _REQUESTS_AT_ONCE))):
                continues = (rng.random(len(user)) < _SAME_SESSION_SHARE) & (number > 0)
                session[user] = np.where(continues, session[user], num_sessions + np.arange(len(user)))
                planned = np.where(continues, 0, users.request_times[day, user, number])
                time = np.maximum(planned, log.free_at[user] + rng.integers(2, 15, len(user)))
                batch = _serve(config, users, items, log, day, user, time, rng)
                batch["session"] = session[user][:, None]
                batch["request"] = num_requests + np.arange(len(user))[:, None]
                shown = batch.pop("shown")
                batches.append({name: np.broadcast_to(a, shown.shape)[shown] for name, a in batch.items()})
                clicks_today += np.bincount(batches[-1]["item"], batches[-1]["clicked"], config.num_items)
                num_sessions += len(user)
                num_requests += len(user)
        log.views = log.views + clicks_today
    columns = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    order = np.lexsort((columns["user"], columns["event_time"]))
    return _log_tables({name: column[order] for name, column in columns.items()}, items)


def _serve(
    config: SimulatorConfig,
    users: Users,
    items: Items,
    log: _Log,
    day: int,
    user: Ints,
    time: Ints,
    rng: np.random.Generator,
) -> dict[str, Column]:
    """Answers one request of each user [n] at `time` [n], lets them react, and updates `log` (not its views).

    Returns:
      Columns of shape [n, 1] (of the request) or [n, K] (of the impression); `shown` says which were.
    """
    surface = (rng.random(len(user)) < _SEARCH_SHARE).astype(np.int64)
    explores = rng.random(len(user)) < config.exploration_fraction
    query_topic = (users.interests[day, user] + rng.gumbel(size=(len(user), config.num_topics))).argmax(
        axis=1
    )
    query_share = 1 / np.arange(1, _QUERIES_PER_TOPIC + 1)
    query = rng.choice(_QUERIES_PER_TOPIC, len(user), p=query_share / query_share.sum())
    query += query_topic * _QUERIES_PER_TOPIC
    score = _policy_score(users, items, log, user, time, np.where(surface, query_topic, -1))
    score[explores] = 0
    eligible = (items.upload_time <= time[:, None]) & ~log.shown_today[user]
    item, propensity = choose_screen(score, eligible, _SCREEN, rng)

    who, search = user[:, None], surface[:, None] == 1
    duration_s = items.duration_s[item]
    logit = world.relevance_logit(
        users.interests[day, who],
        items.topics[item],
        users.style[who],
        items.style[item],
        users.bias[who],
        items.quality[item],
        users.subscribed[who, items.creator[item]],
        world.language_penalty(users.language[who], items.language[item]),
    ) + np.where(search, world.query_match(items.topics[item, query_topic[:, None]]), 0)
    examination = _EXAMINATION_BY_SURFACE[surface]
    examined = rng.random(item.shape) < examination
    relevant = rng.random(item.shape) < expit(logit)
    clicked = examined & relevant
    patience = world.patience_log_s(logit, users.device[who], duration_s)
    watch_time_s = world.draw_watch_time_s(clicked, patience, duration_s, rng)

    pause_s = rng.integers(1, 4, item.shape)
    end_time = time[:, None] + (np.ceil(watch_time_s).astype(np.int64) + pause_s).cumsum(axis=1)
    event_time = np.column_stack([time, end_time[:, :-1]])
    longest = np.array([len(EXAMINATION[name]) for name in SURFACES])
    length = rng.integers(np.array(_SHORTEST_SCREEN)[surface], longest[surface] + 1)
    log.free_at[user] = end_time[np.arange(len(user)), length - 1]
    shown = (np.arange(_SCREEN) < length[:, None]) & (event_time < LOG_END_UNIX_S)
    log.shown_today[who, item] |= shown
    log.clicked[who, item] |= shown & clicked
    return {
        "shown": shown,
        "user": who,
        "item": item,
        "request_time": time[:, None],
        "event_time": event_time,
        "surface": surface[:, None],
        "position": np.arange(1, _SCREEN + 1)[None],
        "query": np.where(search, query[:, None], -1),
        "clicked": clicked,
        "liked": clicked & (rng.random(item.shape) < world.like_probability(logit)),
        "not_interested": examined
        & ~clicked
        & (rng.random(item.shape) < world.not_interested_probability(logit)),
        "watch_time_s": watch_time_s,
        "exploration": explores[:, None],
        "propensity": propensity,
        "examination": examination,
        "examined": examined,
        "click_probability": expit(logit),
        "relevant": relevant,
        "expected_watch_time_s": world.expected_watch_time_s(
            examination * expit(logit), patience, duration_s
        ),
    }


def _policy_score(users: Users, items: Items, log: _Log, user: Ints, time: Ints, query_topic: Ints) -> Floats:
    """The old policy's log-odds [n, I]: popularity, a stale idea of the interests, freshness, the query."""
    barrier = world.language_penalty(np.arange(len(LANGUAGES))[:, None], items.language)
    score = _POLICY_INTEREST * users.remembered_interests[user] @ items.topics.T
    score += _POLICY_POPULARITY * np.log1p(log.views)
    # exp(-age / scale), as one factor per request and one per item; a video not there yet counts as new.
    now, scale = time.max(initial=0), _POLICY_FRESHNESS_DAYS * DAY_S
    age = np.maximum(now - items.upload_time, 0) / scale
    score += _POLICY_FRESHNESS * np.outer(np.exp((now - time) / scale), np.exp(-age))
    score += barrier[users.language[user]]
    score += _POLICY_CLICKED_BEFORE * log.clicked[user]
    score += _POLICY_QUERY * ((items.topics.T[query_topic] > 0) & (query_topic >= 0)[:, None])
    return score


def choose_screen(score: Floats, eligible: Bools, size: int, rng: np.random.Generator) -> tuple[Ints, Floats]:
    """Fills screens by Plackett-Luce sampling: each position draws from the softmax of the items left.

    Drawn for all positions at once, as a race: every item finishes after an exponential time with rate
    exp(score), and the first `size` to finish fill the positions in that order.

    Args:
      score: float [n, I], log-odds; equal scores make a uniformly random screen.
      eligible: bool [n, I], at least `size` per row; others are never shown.
      size: positions to fill.
      rng: source of randomness.

    Returns:
      items int64 [n, size] from the first position to the last, and propensities float64 [n, size]: the
      probability of the item at its position given the items above it.

    Source: Plackett, J. R. Stat. Soc. C 1975, doi:10.2307/2346567.
    """
    logit = np.where(eligible, score, -np.inf)
    weight = np.exp(logit - logit.max(axis=1, keepdims=True), dtype=np.float64)
    with np.errstate(divide="ignore"):  # who is not eligible never finishes
        finish = rng.standard_exponential(weight.shape) / weight
    rows = np.arange(len(score))[:, None]
    first = np.argpartition(finish, size - 1, axis=1)[:, :size]
    first = first[rows, np.argsort(finish[rows, first], axis=1)]
    chosen = weight[rows, first]
    weight[rows, first] = 0
    # Summed from the last position up: subtracting from the total would cancel when one item dominates.
    left = weight.sum(axis=1, keepdims=True) + chosen[:, ::-1].cumsum(axis=1)[:, ::-1]
    return first, chosen / left


def _queries() -> list[list[str]]:
    """Search tokens, `_QUERIES_PER_TOPIC` for each topic: a word, two words, or the topic and a word."""
    queries = []
    for topic, text in TOPIC_WORDS.items():
        words = text.split()
        queries += [[word] for word in words]
        queries += [[first, second] for first, second in itertools.pairwise(words)]
        queries += [[topic, word] for word in words]
    return queries


def _log_tables(log: dict[str, Column], items: Items) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The interactions and their truth, row by row the same impressions."""
    is_search = log["query"] >= 0
    query = pl.Series(np.where(is_search, log["query"], 0)).cast(pl.UInt32)
    topic = pl.Series(list(TOPIC_WORDS))[query // _QUERIES_PER_TOPIC]
    interactions = pl.DataFrame(
        {
            "request_id": _ids("r", log["request"]),
            "session_id": _ids("s", log["session"]),
            "user_id": _ids("u", log["user"]),
            "item_id": _ids("v", log["item"]),
            "request_time": log["request_time"],
            "event_time": log["event_time"],
            "surface": pl.Series(SURFACES)[log["surface"]],
            "position": log["position"],
            "search_tokens": pl.Series(_queries())[query],
            "is_click": log["clicked"].astype(np.int8),
            "is_like": log["liked"].astype(np.int8),
            "is_not_interested": log["not_interested"].astype(np.int8),
            "watch_time_s": log["watch_time_s"],
            "duration_s": items.duration_s[log["item"]],
            "exploration": log["exploration"].astype(np.int8),
            "propensity": log["propensity"],
        }
    ).with_columns(search_tokens=pl.when(pl.Series(is_search)).then("search_tokens"))
    truth = pl.DataFrame(
        {
            "request_id": interactions["request_id"],
            "position": log["position"],
            "user_id": interactions["user_id"],
            "item_id": interactions["item_id"],
            "query_topic": topic,
            "examination_probability": log["examination"],
            "click_probability": log["click_probability"],
            "expected_watch_time_s": log["expected_watch_time_s"],
            "examined": log["examined"],
            "relevant": log["relevant"],
        }
    ).with_columns(query_topic=pl.when(pl.Series(is_search)).then("query_topic"))
    return interactions, truth


def _user_table(users: Users, rng: np.random.Generator) -> pl.DataFrame:
    n = len(users.age)
    table = pl.DataFrame(
        {
            "user_id": _ids("u", np.arange(n)),
            "register_time": users.register_time,
            "account_age_days": ((LOG_END_UNIX_S - users.register_time) / DAY_S).round(2),
            "age_bucket": pl.Series(world.AGE_BUCKETS)[users.age],
            "gender": pl.Series(world.GENDERS)[users.gender],
            "country": pl.Series(world.COUNTRIES)[users.country],
            "user_language": pl.Series(LANGUAGES)[users.language],
            "device": pl.Series(world.DEVICES)[users.device],
            "subscribed_creators": _subscriptions(users),
        }
    )
    # Some people do not say how old they are, or who they are.
    return table.with_columns(
        age_bucket=pl.when(pl.Series(rng.random(n) >= 0.08)).then("age_bucket"),
        gender=pl.when(pl.Series(rng.random(n) >= 0.1)).then("gender"),
    )


def _item_table(items: Items, rng: np.random.Generator) -> pl.DataFrame:
    n = len(items.creator)
    # Tags are typed by creators: some forget the second topic, some forget all.
    tagged = np.where(rng.random((n, 1)) < 0.8, items.topics, items.topics >= 0.5) > 0
    tagged[rng.random(n) < 0.03] = False
    names = np.array(list(TOPIC_WORDS))
    by_weight = np.argsort(-items.topics, axis=1, kind="stable")
    return pl.DataFrame(
        {
            "item_id": _ids("v", np.arange(n)),
            "creator_id": _ids("c", items.creator),
            "upload_time": items.upload_time,
            "title": items.title,
            "topics": [
                names[order[row[order]]].tolist() for order, row in zip(by_weight, tagged, strict=True)
            ],
            "item_language": pl.Series(LANGUAGES)[items.language],
            "duration_s": items.duration_s,
        }
    )


def _truth_tables(config: SimulatorConfig, users: Users, items: Items) -> dict[str, pl.DataFrame]:
    flat_interests = users.interests.transpose(1, 0, 2).reshape(config.num_users, -1)
    examination = [
        {"surface": surface, "position": position, "examination_probability": probability}
        for surface, curve in EXAMINATION.items()
        for position, probability in enumerate(curve.tolist(), start=1)
    ]
    return {
        "truth/users": pl.DataFrame(
            {
                "user_id": _ids("u", np.arange(config.num_users)),
                "bias": users.bias,
                "language": users.language,
                "style": users.style.tolist(),
                "interests": flat_interests.tolist(),
                "subscribed_creators": _subscriptions(users),
            },
            schema_overrides={"interests": pl.List(pl.Float32)},
        ),
        "truth/items": pl.DataFrame(
            {
                "item_id": _ids("v", np.arange(config.num_items)),
                "creator_id": _ids("c", items.creator),
                "quality": items.quality,
                "language": items.language,
                "style": items.style.tolist(),
                "topics": items.topics.tolist(),
            },
            schema_overrides={"topics": pl.List(pl.Float32)},
        ),
        "truth/examination": pl.DataFrame(examination),
    }


def _subscriptions(users: Users) -> pl.Series:
    creators = _ids("c", np.arange(users.subscribed.shape[1])).to_numpy()
    return pl.Series([creators[row].tolist() for row in users.subscribed], dtype=pl.List(pl.String))


def _ids(prefix: str, numbers: Column) -> pl.Series:
    """Text ids such as u00042."""
    text = pl.Series(numbers).cast(pl.String).str.zfill(5)
    return pl.select(pl.lit(prefix) + text).to_series()
