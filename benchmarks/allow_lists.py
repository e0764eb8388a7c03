"""What an allow-list costs the exported index, by the share of the items that pass it: recall and speed.

Takes the index that `python -m benchmarks.index build` has built and gives it an attribute of the items. Each
value is that of a share of the items, drawn at random: nothing in the vectors tells who has it. What should
be found are the best of the items that pass, by the exact twin. Needs the same extras.

Example:
  python -m benchmarks.index build --items 200000 --width 128 --dir runs/index-200k
  python -m benchmarks.allow_lists --dir runs/index-200k
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import trainer  # noqa: F401  # isort: skip  selects Keras 2, before TensorFlow is imported
import click
import numpy as np
import tensorflow as tf

from benchmarks.index import (
    BATCH,
    FUNNEL,
    NEIGHBOURS,
    Built,
    Contender,
    ExportedIndex,
    Search,
    measure_in_turns,
    read_built,
    read_world,
    served_search,
    table,
)
from serving.servable import Servable
from trainer.allow_list_inputs import input_name
from trainer.allow_lists import AllowLists
from trainer.index import CandidateIndex, Effort, ExactIndex, ScannIndex
from trainer.served_index import EXCLUDED, ServedIndex

SHARES = (0.5, 0.1, 0.01)
_ATTRIBUTE = "shelf"
_EVERYTHING = ""


def restricted(folder: Path, built: Built, seed: int) -> ServedIndex:
    """The built index with an attribute whose values, the texts of SHARES, have such shares of the items."""
    saved = tf.saved_model.load(str(folder / FUNNEL)).index.index.approximate
    settings = built.settings
    effort = Effort(settings["k"], settings["num_leaves_to_search"], settings["num_reordering_candidates"])
    approximate = ScannIndex.restore(saved.state, settings["num_leaves"], [effort])
    rng = np.random.default_rng(seed)
    shelves = np.stack(
        [np.where(rng.random(approximate.num_items) < share, str(share), "") for share in SHARES], axis=1
    )
    index = CandidateIndex(ExactIndex(approximate.vectors), approximate, AllowLists({_ATTRIBUTE: shelves}))
    return ServedIndex(index, [f"i{row}" for row in range(approximate.num_items)], NEIGHBOURS)


def contenders(servable: Servable, built: Built) -> list[Contender]:
    """Requests without a list, and with a list that each of SHARES passes."""

    def search_by(signature: str, allowed: str) -> Search:
        inputs = {EXCLUDED: b"", input_name(_ATTRIBUTE): allowed.encode()}
        return served_search(
            servable, signature, {name: np.full((BATCH, 1), value, object) for name, value in inputs.items()}
        )

    return [
        Contender(
            f"{allowed or 'all'} allowed",
            search_by("serving_default", allowed),
            built,
            search_by("serving_exact", allowed),
        )
        for allowed in (_EVERYTHING, *map(str, SHARES))
    ]


@click.command(help=__doc__)
@click.option("--dir", "folder", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--seed", default=0, show_default=True, help="of the attribute")
def main(folder: Path, seed: int) -> None:
    """See the docstring of the module."""
    # As the model server does.
    tf.config.threading.set_intra_op_parallelism_threads(1)
    world, built = read_world(folder), read_built(folder)[FUNNEL]
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / FUNNEL
        ExportedIndex(restricted(folder, built, seed)).save(model, world.items.shape[1])
        measured = contenders(Servable(FUNNEL, 1, model), built)
        measure_in_turns(measured, world)
    items, width = world.items.shape
    click.echo(f"\n{items:,} items of width {width}, top {NEIGHBOURS}; load {os.getloadavg()[0]:.1f}")
    click.echo(table({contender.name: contender.figures() for contender in measured}))


if __name__ == "__main__":
    main()
