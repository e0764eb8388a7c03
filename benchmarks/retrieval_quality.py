"""Retrieval quality of the exported model against simple baselines, on the same users of a temporal split.

Baselines are fitted on the train split and tuned on the validation window. The model is judged by the
signature that serves requests (`serving_default`, ScaNN index), one run folder per seed. Needs the extra
`benchmarks`.

Example, from the root of the repository:
  python -m benchmarks.retrieval_quality --dataset movielens-1m --run-dir runs/seed0 --out out/
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import polars as pl
from rich.console import Console
from rich.progress import Progress

from benchmarks.baselines import BASELINES, Baseline, ScoreHistories, same_for_all
from benchmarks.comparison import (
    LIST_LENGTH,
    USER_METRICS,
    Judged,
    judge,
    judge_all,
    paired_difference,
    recommend,
)
from benchmarks.protocols import (
    EvaluationUsers,
    Tables,
    TemporalProtocol,
    global_temporal,
    load_tables,
    read_run_on,
)
from benchmarks.retraining import lists_of, retrained
from schema.contract import FeatureKind
from schema.errors import DataError, FunnelError
from tfx_pipeline.config import RunPaths
from tfx_pipeline.recommend import batch_recommend
from trainer.metrics import FloatArray, IntArray

OURS = "Funnel"
TUNED_FOR = "ndcg_at_100"
# What "newest" means for a cold item: when it was published, as far as the dataset knows.
PUBLISHED = {"movielens-1m": "year", "kuairand-pure": "upload_time_unix_s"}
# Baselines that do not need a history.
_FOR_COLD_USERS = ("popularity", "recent popularity")
_SHORT_NAMES = {
    "recall_at_10": "R@10",
    "recall_at_100": "R@100",
    "ndcg_at_10": "NDCG@10",
    "ndcg_at_100": "NDCG@100",
    "next_item_hit_rate_at_10": "next-item HR@10",
    "coverage_at_10": "coverage@10",
}


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A baseline with its parameters chosen.

    Attributes:
      parameters: what did best on the validation window.
      models: one fit per seed; one alone when the fit does not depend on the seed.
    """

    parameters: Mapping[str, Any]
    models: Sequence[ScoreHistories]


def tune(baseline: Baseline, protocol: TemporalProtocol, seeds: int, on_fit: Callable[[], None]) -> Fitted:
    """Chooses the parameters with the best `TUNED_FOR` on the validation window, then fits every seed.

    Args:
      baseline: the family.
      protocol: fitted on its train split.
      seeds: how many seeds a seeded baseline is fitted with.
      on_fit: called after each fit of the grid.
    """
    best: tuple[float, Mapping[str, Any], ScoreHistories] | None = None
    for parameters in baseline.choices():
        model = baseline.fit(protocol, 0, parameters)
        ranked = recommend(model, protocol.validation)
        value = float(judge(ranked, protocol.validation.positives)[TUNED_FOR].mean())
        if best is None or value > best[0]:
            best = value, parameters, model
        on_fit()
    assert best is not None  # a grid has at least one choice, the empty one
    _, parameters, model = best
    others = [baseline.fit(protocol, seed, parameters) for seed in range(1, seeds)] if baseline.seeded else []
    return Fitted(parameters, [model, *others])


def cold_item_baselines(
    tables: Tables, protocol: TemporalProtocol, seeds: int
) -> dict[str, list[ScoreHistories]]:
    """Rankings that can find an item without interactions: newest first, kin of popular ones, random."""
    published = tables.items[PUBLISHED[tables.spec.name]].cast(pl.Float64).fill_null(0.0).to_numpy()
    return {
        "newest first": [same_for_all(published)],
        "content popularity": [same_for_all(content_popularity(tables, protocol))],
        "random": [_random_order(seed) for seed in range(seeds)],
    }


def _random_order(seed: int) -> ScoreHistories:
    """Another order for every user."""
    generator = np.random.default_rng(seed)
    return lambda history: generator.random(history.shape)


def content_popularity(tables: Tables, protocol: TemporalProtocol) -> FloatArray:
    """How popular the items are that share a genre, tag or other declared category with an item.

    Returns:
      float64 [I]: mean over the item's categories of the mean number of training positives of the category's
      items that were met in training; 0 without such a category.
    """
    items = pl.DataFrame(
        {
            "item": np.arange(len(protocol.item_ids)),
            "count": np.bincount(protocol.train_items, minlength=len(protocol.item_ids)),
            "is_cold": protocol.cold_items,
        }
    )
    kinds = (FeatureKind.CATEGORICAL, FeatureKind.MULTI_CATEGORICAL)
    values = []
    for feature in tables.spec.items.features:
        if feature.kind in kinds:
            table = pl.DataFrame({"item": items["item"], "value": tables.items[feature.name]})
            if feature.kind is FeatureKind.MULTI_CATEGORICAL:
                table = table.explode("value")
            values.append(table.drop_nulls().with_columns(pl.lit(feature.name).alias("feature")))
    category = ["feature", "value"]
    of_item = pl.concat(values).join(items, on="item")
    popularity_of = (
        of_item.filter(~pl.col("is_cold")).group_by(category).agg(pl.col("count").mean().alias("kin"))
    )
    kin = of_item.join(popularity_of, on=category).group_by("item").agg(pl.col("kin").mean())
    return items.join(kin, on="item", how="left", maintain_order="left")["kin"].fill_null(0.0).to_numpy()


def exported_lists(
    run_dir: Path, tables: Tables, user_ids: Sequence[str], on_progress: Callable[[int], None]
) -> IntArray:
    """What the pushed retrieval model of a run answers, as of the end of training, less what a user has seen.

    Args:
      run_dir: output directory of a finished `funnel run` on the same data.
      tables: of the benchmark.
      user_ids: U users, known to the model or not.
      on_progress: called with the number of users done.

    Returns:
      int64 [U, LIST_LENGTH] item codes, best first, -1 where a list is short.

    Raises:
      DataError: the run is of another dataset or split, or recommends an item outside the catalogue.
      ServingError: the run pushed no retrieval model.
    """
    run = read_run_on(tables.spec, run_dir)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "recommendations.parquet"
        batch_recommend(run, RunPaths(run_dir), user_ids, LIST_LENGTH, False, out, on_progress)
        answers = pl.read_parquet(out)
    code_of = {item_id: code for code, item_id in enumerate(tables.item_ids)}
    strangers = answers.filter(~pl.col("item_id").is_in(list(code_of)))
    if len(strangers):
        raise DataError(
            f"{run_dir} recommends {strangers['item_id'].n_unique():,} items that are not in the catalogue "
            f"(for instance {strangers['item_id'][0]!r}); give run folders of this dataset"
        )
    row_of = {user_id: row for row, user_id in enumerate(user_ids)}
    ranked = np.full((len(user_ids), LIST_LENGTH), -1, np.int64)
    rows = answers["user_id"].replace_strict(row_of, return_dtype=pl.Int64).to_numpy()
    codes = answers["item_id"].replace_strict(code_of, return_dtype=pl.Int64).to_numpy()
    ranked[rows, answers["rank"].to_numpy() - 1] = codes
    return ranked


def compare(judged: Mapping[str, Judged]) -> dict[str, Any]:
    """Figures of all models on one set of users, and ours against each of the others."""
    figures: dict[str, Any] = {"models": {name: model.summary() for name, model in judged.items()}}
    if OURS in judged:
        ours = judged[OURS].by_user
        figures["ours_minus"] = {
            name: {
                metric: dataclasses.asdict(paired_difference(ours[metric], model.by_user[metric]))
                for metric in USER_METRICS
            }
            for name, model in judged.items()
            if name != OURS
        }
    return figures


def retrained_lists(run_dir: Path, tables: Tables, user_ids: Sequence[str], seed: int) -> IntArray:
    """As `exported_lists`, of the run's model trained again with another seed, through its ScaNN index."""
    with retrained(run_dir, tables, {"seed": seed}) as (model_dir, _):
        return lists_of(model_dir, run_dir, tables, user_ids)


def benchmark(
    tables: Tables, run_dirs: Sequence[Path], retrained_seeds: int, seeds: int, progress: Progress
) -> dict[str, Any]:
    """All figures of one dataset, ready for JSON.

    Args:
      tables: the dataset.
      run_dirs: finished runs, one per seed; none judges the baselines alone.
      retrained_seeds: above 0, each run is trained again with so many seeds, and these are judged.
      seeds: fits of the baselines that depend on a seed.
      progress: shows what is being fitted.
    """
    protocol = global_temporal(tables)
    num_items = len(protocol.item_ids)
    slices: dict[str, EvaluationUsers] = {
        "all": protocol.test,
        "cold_items": protocol.test.restricted_to(protocol.cold_items),
        "cold_users": protocol.cold_test,
    }
    fitted = {}
    for name, baseline in BASELINES.items():
        task = progress.add_task(f"tuning {name}", total=len(list(baseline.choices())))
        fitted[name] = tune(baseline, protocol, seeds, lambda task=task: progress.advance(task))
    models = {name: list(baseline.models) for name, baseline in fitted.items()}
    models_of = {
        "all": models,
        "cold_items": {**models, **cold_item_baselines(tables, protocol, seeds)},
        "cold_users": {name: models[name] for name in _FOR_COLD_USERS},
    }
    ranked: dict[str, dict[str, list[IntArray]]] = {}
    for slice_name, users in slices.items():
        task = progress.add_task(f"judging {slice_name}", total=len(models_of[slice_name]))
        ranked[slice_name] = {}
        for name, fits in models_of[slice_name].items():
            ranked[slice_name][name] = [recommend(model, users) for model in fits]
            progress.advance(task)
    validation = []
    parts = {**slices, "validation": protocol.validation}
    asked = list(dict.fromkeys(user_id for users in parts.values() for user_id in users.user_ids))
    for run_dir, seed in itertools.product(run_dirs, range(max(1, retrained_seeds))):
        task = progress.add_task(f"asking {run_dir.name}, seed {seed}", total=len(asked))
        if retrained_seeds:
            lists = retrained_lists(run_dir, tables, asked, seed)
            progress.update(task, completed=len(asked))
        else:
            lists = exported_lists(
                run_dir, tables, asked, lambda done, task=task: progress.update(task, completed=done)
            )
        row_of = {user_id: row for row, user_id in enumerate(asked)}
        answers = {name: lists[[row_of[u] for u in users.user_ids]] for name, users in parts.items()}
        for slice_name in slices:
            ranked[slice_name].setdefault(OURS, []).append(answers[slice_name])
        validation.append(answers["validation"])
    judged = {
        slice_name: compare(
            {name: judge_all(lists, slices[slice_name], num_items) for name, lists in by_model.items()}
        )
        for slice_name, by_model in ranked.items()
    }
    on_validation = {
        name: judge_all([recommend(m, protocol.validation) for m in fits], protocol.validation, num_items)
        for name, fits in models.items()
    }
    if validation:
        on_validation[OURS] = judge_all(validation, protocol.validation, num_items)
    return {
        "dataset": tables.spec.name,
        "train_positives": len(protocol.train_items),
        "candidates": num_items,
        "users": {"validation": len(protocol.validation), **{name: len(u) for name, u in slices.items()}},
        "seeds": {name: len(lists) for name, lists in ranked["all"].items()},
        "tuned_for": f"{TUNED_FOR} on the validation window",
        "parameters": {name: dict(baseline.parameters) for name, baseline in fitted.items()},
        "validation": compare(on_validation)["models"],
        "test": judged,
    }


def to_markdown(figures: Mapping[str, Any]) -> str:
    """The report of one dataset."""
    lines = [f"# Retrieval quality on {figures['dataset']}", ""]
    lines += [
        f"{figures['train_positives']:,} training positives, {figures['candidates']:,} candidates. Mean over "
        "users; ± is the standard deviation over seeds. Parameters chosen by "
        f"{figures['tuned_for']}.",
        "",
        "| model | seeds | parameters |",
        "| --- | ---: | --- |",
    ]
    for name, seeds in figures["seeds"].items():
        parameters = ", ".join(
            f"{key} {value:g}" for key, value in figures["parameters"].get(name, {}).items()
        )
        lines.append(f"| {name} | {seeds} | {parameters} |")
    sections = {"all": "Test users with a history", "cold_items": "Cold items", "cold_users": "Cold users"}
    for slice_name, title in sections.items():
        part = figures["test"][slice_name]
        lines += ["", f"## {title}: {figures['users'][slice_name]:,} users", ""]
        lines += _figures_table(part["models"])
        if "ours_minus" in part:
            lines += ["", "Ours minus theirs, 95 % interval (paired bootstrap) and p (paired t-test):", ""]
            lines += _differences_table(part["ours_minus"])
    lines += ["", f"## Validation: {figures['users']['validation']:,} users", ""]
    lines += _figures_table(figures["validation"])
    return "\n".join(lines) + "\n"


def _header(columns: Sequence[str]) -> list[str]:
    return [f"| model | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns)]


def _figures_table(models: Mapping[str, Mapping[str, Mapping[str, float | None]]]) -> list[str]:
    lines = _header(list(_SHORT_NAMES.values()))
    for name, values in models.items():
        cells = (values[metric] for metric in _SHORT_NAMES)
        texts = (
            f"{cell['mean']:.4f}" if cell["std"] is None else f"{cell['mean']:.4f} ± {cell['std']:.4f}"
            for cell in cells
        )
        lines.append(f"| {name} | {' | '.join(texts)} |")
    return lines


def _differences_table(rivals: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    lines = _header([_SHORT_NAMES[metric] for metric in USER_METRICS])
    for name, values in rivals.items():
        cells = (values[metric] for metric in USER_METRICS)
        texts = (
            f"{c['difference']:+.4f} [{c['low']:+.4f}, {c['high']:+.4f}] p={c['p_value']:.1g}" for c in cells
        )
        lines.append(f"| {name} | {' | '.join(texts)} |")
    return lines


@click.command(help=__doc__)
@click.option("--dataset", type=click.Choice(sorted(PUBLISHED)), required=True)
@click.option(
    "--data-dir",
    type=click.Path(exists=True, path_type=Path),
    help="The archive, or a folder that holds it; left out, it is downloaded.",
)
@click.option(
    "--run-dir",
    "run_dirs",
    multiple=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Output directory of a finished 'funnel run'; repeat it, one per seed.",
)
@click.option(
    "--retrained-seeds",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Train the model of each run again with so many seeds, on its examples, and judge these.",
)
@click.option(
    "--seeds", type=click.IntRange(1), default=5, show_default=True, help="Fits of seeded baselines."
)
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder of the report."
)
def main(
    dataset: str,
    data_dir: Path | None,
    run_dirs: tuple[Path, ...],
    retrained_seeds: int,
    seeds: int,
    out: Path,
) -> None:
    """Writes <out>/<dataset>.json and <out>/<dataset>.md."""
    try:
        with tempfile.TemporaryDirectory() as folder, Progress(console=Console(stderr=True)) as progress:
            tables = load_tables(dataset, data_dir, Path(folder))
            figures = benchmark(tables, run_dirs, retrained_seeds, seeds, progress)
    except FunnelError as error:
        raise click.ClickException(str(error)) from error
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{dataset}.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    report = to_markdown(figures)
    (out / f"{dataset}.md").write_text(report, encoding="utf-8")
    click.echo(report)


if __name__ == "__main__":
    main()
