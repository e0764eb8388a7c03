"""A tiny world with a plain truth: each user likes the videos of one taste, which popularity cannot tell."""

from pathlib import Path

import numpy as np
import polars as pl

NUM_USERS = 240
NUM_ITEMS = 160
NUM_TASTES = 4
NEWCOMER = "u-late"  # first seen in the test split
_EVENTS_PER_USER = 50
_FIRST_DAY_UNIX_S = 1_700_006_400  # a local midnight
_NUM_DAYS = 20
_DAY_S = 86_400

CONFIG = """\
data_dir: data
dataset:
  name: taste-world
  utc_offset_hours: 0
  interactions:
    files: [events.csv]
    columns:
      user_id: uid
      item_id: video
      event_time_unix_s: {column: time_ms, unit: ms}
      surface: page
      watch_time_s: watched_s
      item_duration_s: duration_s
    labels: {click: clicked, like: liked}
  users:
    files: [users.csv]
    columns: {user_id: uid}
    features:
      - {name: country, kind: categorical}
      - {name: age, kind: continuous}
  items:
    files: [items.parquet]
    columns: {item_id: video}
    features:
      - {name: tags, kind: multi_categorical, separator: "|"}
    title: title
  positive: click
  tasks:
    - {name: click, label: click, kind: binary, score_weight: 1.0}
    - {name: like, label: like, kind: binary, loss_weight: 0.5, score_weight: 2.0}
    - {name: watch_time, label: watch_time_s, kind: watch_time, loss_weight: 0.1, score_weight: 0.02}
  split: {fractions: [0.8, 0.1, 0.1]}
slices: [surface, [surface, country]]
retrieval: {batch_size: 128, learning_rate: 0.05, max_epochs: 8, hidden_layers: [32], embedding_dim: 16}
ranking: {batch_size: 128, learning_rate: 0.005, max_epochs: 4, experts: {hidden_layers: [32]}}
gates:
  - {metric: retrieval/recall_at_50, min: 0.4, max_drop: 0.05, beats: [popularity, recent_popularity]}
  - {metric: ranking/click/auc, min: 0.7, max_drop: 0.02, beats: [item_mean]}
"""


def write(folder: Path) -> Path:
    """Writes the logs and the run's YAML; returns the YAML's path."""
    rng = np.random.default_rng(11)
    data = folder / "data"
    data.mkdir(parents=True)
    users = np.array([f"u{n}" for n in range(NUM_USERS)])
    items = np.array([f"v{n}" for n in range(NUM_ITEMS)])
    item_taste = np.arange(NUM_ITEMS) % NUM_TASTES
    durations = rng.integers(30, 300, NUM_ITEMS)

    user = rng.permutation(np.repeat(np.arange(NUM_USERS), _EVENTS_PER_USER))
    item = rng.integers(0, NUM_ITEMS, len(user))
    matches = item_taste[item] == user % NUM_TASTES
    clicked = rng.random(len(user)) < np.where(matches, 0.8, 0.08)
    time_s = np.sort(rng.integers(0, _NUM_DAYS * _DAY_S, len(user))) + _FIRST_DAY_UNIX_S
    events = pl.DataFrame(
        {
            "uid": users[user],
            "video": items[item],
            "time_ms": time_s * 1_000,
            "page": np.where(rng.random(len(user)) < 0.7, "home", "related"),
            "watched_s": np.where(clicked, durations[item] * rng.uniform(0.2, 1.0, len(user)), 0.0).round(1),
            "duration_s": durations[item],
            "clicked": clicked.astype(int),
            "liked": (clicked & (rng.random(len(user)) < 0.2)).astype(int),
        }
    )
    last = events.tail(1)
    newcomer = last.with_columns(pl.lit(NEWCOMER).alias("uid"), pl.lit(1, pl.Int64).alias("clicked"))
    pl.concat([events, newcomer]).write_csv(data / "events.csv")
    pl.DataFrame(
        {
            "uid": [*users, NEWCOMER],
            "country": rng.choice(["de", "fr", "it"], NUM_USERS + 1),
            "age": rng.integers(14, 80, NUM_USERS + 1),
        }
    ).write_csv(data / "users.csv")
    pl.DataFrame(
        {
            "video": items,
            "tags": [f"all|taste-{taste}" for taste in item_taste],
            # Brackets, because titles hold them and terminals give them a meaning.
            "title": [f"[live] video {n} of taste {taste}" for n, taste in enumerate(item_taste)],
        }
    ).write_parquet(data / "items.parquet")
    config = folder / "my.yaml"
    config.write_text(CONFIG, encoding="utf-8")
    return config
