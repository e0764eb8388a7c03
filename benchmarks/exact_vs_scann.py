"""When exact search beats ScaNN: time per query by items, width and batch, on the CPU and on any GPU.

    python -m benchmarks.exact_vs_scann --items 10000 100000 1000000 --width 64 128 --batch 1 32 256

Both searches are those of the exported bundles, as graphs: exact search scores all items, in chunks where a
batch has too many scores to keep; ScaNN is tuned to --min-recall for --k. An operation has one thread, as in
the model server. Vectors are made up, see benchmarks/vectors.py. Prints a Markdown table; times are the least
of several runs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import trainer  # noqa: F401  # isort: skip  selects Keras 2, before TensorFlow is imported
import tensorflow as tf

from benchmarks.vectors import clustered_vectors
from trainer.index import ExactIndex
from trainer.index_tuning import ExactResults, RequiredRecall, tuned_index

_SAMPLE_QUERIES = 256


def main(argv: Sequence[str] | None = None) -> None:
    """Measures every combination and prints a row for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--width", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--min-recall", type=float, default=0.95)
    parser.add_argument("--seconds", type=float, default=2.0, help="Time for each measurement.")
    args = parser.parse_args(argv)
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    gpus = [
        device.name.removeprefix("/physical_device:") for device in tf.config.list_physical_devices("GPU")
    ]

    print(f"µs per query, best {args.k}; recall of ScaNN against exact search\n")
    print("| items | width | batch | exact, CPU | exact, GPU | ScaNN, CPU | recall |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for num_items in args.items:
        for width in args.width:
            vectors, queries = clustered_vectors(num_items, width, 2 * _SAMPLE_QUERIES, seed=0)
            sample, asked = queries[:_SAMPLE_QUERIES], queries[_SAMPLE_QUERIES:]
            with tf.device("CPU:0"):
                exact = ExactIndex(vectors)
                truth = ExactResults.of(exact, asked, args.k)
                sampled = ExactResults.of(exact, sample, args.k)
                scann = tuned_index(vectors, sampled, RequiredRecall(args.min_recall))
            rows, scores = scann.search(tf.constant(asked), tf.constant(args.k))
            recall = truth.found_by(rows.numpy(), scores.numpy(), args.k).mean()
            on_gpu = None
            if gpus:
                with tf.device(gpus[0]):
                    on_gpu = ExactIndex(vectors)
            for batch in args.batch:
                times = [
                    _microseconds(index.search, asked[:batch], args.k, device, args.seconds)
                    if index is not None
                    else None
                    for index, device in (
                        (exact, "CPU:0"),
                        (on_gpu, gpus[0] if gpus else ""),
                        (scann, "CPU:0"),
                    )
                ]
                cells = ["" if value is None else f"{value:,.0f}" for value in times]
                print(
                    f"| {num_items:,} | {width} | {batch} | {' | '.join(cells)} | {recall:.3f} |", flush=True
                )


def _microseconds(search: Callable[..., Any], queries: Any, k: int, device: str, seconds: float) -> float:
    """Least time of a search by query."""
    with tf.device(device):
        graph = tf.function(search, autograph=False)
        inputs = tf.constant(queries), tf.constant(k)
        graph(*inputs)[1].numpy()
        least, until = float("inf"), time.perf_counter() + seconds
        while time.perf_counter() < until:
            started = time.perf_counter()
            graph(*inputs)[1].numpy()
            least = min(least, time.perf_counter() - started)
    return 1e6 * least / len(queries)


if __name__ == "__main__":
    main()
