"""One call of the funnel beside retrieval and then ranking, in this process and over gRPC.

In this process a signature is called as the model server calls it, without the server.

    python -m benchmarks.funnel_call --run-dir runs/default --work-dir /tmp/funnel-call

Gives the pushed models of a finished run a catalogue of --items items, whose features are each drawn from
some item of the run, builds the bundles by the code that `funnel refresh-index` runs, and asks for the best
50 of 500 candidates, one user a request. --work-dir keeps the bundles for the next time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import trainer  # noqa: F401  # isort: skip  selects Keras 2, before TensorFlow is imported
import grpc
import numpy as np
import scann  # noqa: F401  registers the ops of the index
import tensorflow as tf
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

from serving.process import ModelServerProcess
from serving.servable import DEFAULT_SIGNATURE, Servable, read_signature_defs
from tfx_pipeline.config import FUNNEL, RANKING, RETRIEVAL, RunPaths
from tfx_pipeline.recommend import serving_folder
from tfx_pipeline.refresh import read_catalogue, write_catalogue
from tfx_pipeline.run_result import read_run
from tfx_pipeline.warmup import add_warmup_requests
from trainer import features, run_bundles, run_ranking, run_retrieval
from trainer.bundle import input_specs
from trainer.checkpoint import catalogue_files, read_checkpoint
from trainer.sample_requests import Arrays, sample_request, sample_users, take

NUM_CANDIDATES, K = 500, 50
_BUNDLES = (RETRIEVAL, RANKING, "retrieval_exact", FUNNEL, "funnel_exact")
_USERS = 200
_STARTUP_TIMEOUT_S = 600.0


def main(argv: Sequence[str] | None = None) -> None:
    """Builds what is not there yet, measures, prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--bundle", default=FUNNEL, help="funnel or funnel_exact")
    args = parser.parse_args(argv)

    # As the model server does.
    tf.config.threading.set_intra_op_parallelism_threads(1)
    run, paths = read_run(args.run_dir), RunPaths(args.run_dir)
    pushed = {name: serving_folder(run, paths, name) for name in (RETRIEVAL, RANKING)}
    folders = {name: args.work_dir / str(args.items) / name / "1" for name in _BUNDLES}
    if not folders["funnel_exact"].is_dir():
        _build(pushed, folders, [run.user_states], args.items)
    spec = run.config.dataset
    users = sample_users([run.user_states], spec, _USERS)
    print(f"{args.items:,} items, {NUM_CANDIDATES} candidates, {K} items, one user a request, ms\n")
    print("| call | p50 | p90 | least |\n| --- | --- | --- | --- |")
    for measure in (_in_process, _over_grpc):
        for name, values in measure(folders, args.bundle, users, args.requests).items():
            p50, p90 = np.percentile(values, [50, 90])
            print(f"| {name} | {p50:.2f} | {p90:.2f} | {min(values):.2f} |", flush=True)


def _build(pushed: dict[str, Path], folders: dict[str, Path], user_states: list[str], num_items: int) -> None:
    folders[RETRIEVAL].parent.parent.mkdir(parents=True, exist_ok=True)
    catalogue = folders[RETRIEVAL].parent.parent / "catalogue.gz"
    known = read_catalogue(catalogue_files(pushed[RETRIEVAL]))
    write_catalogue(_larger(list(known.values()), num_items), catalogue)
    run_retrieval.refresh(pushed[RETRIEVAL], [str(catalogue)], user_states, folders[RETRIEVAL])
    run_ranking.refresh(pushed[RANKING], [str(catalogue)], user_states, folders[RANKING])
    built = {name: folder for name, folder in folders.items() if name not in pushed}
    run_bundles.build(folders[RETRIEVAL], folders[RANKING], user_states, run_bundles.BundleFolders(**built))
    spec = read_checkpoint(pushed[RETRIEVAL]).spec
    for name, folder in folders.items():
        add_warmup_requests(folder, name, user_states, spec)


def _larger(examples: list[bytes], num_items: int) -> dict[str, bytes]:
    """Items that draw each feature from an item at random; the first ones are those of the run."""
    rng = np.random.default_rng(0)
    parsed = [tf.train.Example.FromString(example) for example in examples]
    names = sorted(parsed[0].features.feature.keys() - {features.ITEM_ID})
    made = {}
    for number in range(num_items):
        example = tf.train.Example()
        for name, row in zip(names, rng.integers(len(parsed), size=len(names)), strict=True):
            source = number if number < len(parsed) else row
            example.features.feature[name].CopyFrom(parsed[source].features.feature[name])
        item_id = f"made-{number}"
        if number < len(parsed):
            item_id = parsed[number].features.feature[features.ITEM_ID].bytes_list.value[0].decode()
        example.features.feature[features.ITEM_ID].bytes_list.value.append(item_id.encode())
        made[item_id] = example.SerializeToString()
    return made


def _request(specs: dict[str, tf.TensorSpec], users: Arrays, row: int, **given: Any) -> dict[str, Any]:
    """One user's request without exclusions."""
    request = sample_request(specs, take(users, [row]))
    request |= {"exclude_item_ids": np.array([[b""]], object), **given}
    return {name: request[name] for name in specs}


def _timed(calls: Callable[[int], Any], count: int) -> list[float]:
    for number in range(20):
        calls(number)
    times = []
    for number in range(count):
        started = time.perf_counter()
        calls(number)
        times.append(1e3 * (time.perf_counter() - started))
    return times


def _in_process(folders: dict[str, Path], bundle: str, users: Arrays, count: int) -> dict[str, list[float]]:
    models = {name: Servable(name, 1, folders[name]) for name in (RETRIEVAL, RANKING, bundle)}
    specs = {name: input_specs(model.signature(DEFAULT_SIGNATURE)) for name, model in models.items()}
    rows = range(len(users["user_id"]))
    k, candidates = np.array([K], np.int32), np.array([NUM_CANDIDATES], np.int32)
    whole = [_request(specs[bundle], users, row, k=k, num_candidates=candidates) for row in rows]
    first = [_request(specs[RETRIEVAL], users, row, k=candidates) for row in rows]
    empty = np.array([[b""]], object)
    second = [_request(specs[RANKING], users, row, candidate_item_ids=empty) for row in rows]

    # Whoever retrieval finds: the ranker alone, on what it is asked in the second of two calls.
    judged = [
        {**request, "candidate_item_ids": models[RETRIEVAL].predict(DEFAULT_SIGNATURE, found)["item_ids"]}
        for request, found in zip(second, first, strict=True)
    ]

    def one(number: int) -> None:
        models[bundle].predict(DEFAULT_SIGNATURE, whole[number % len(rows)])

    def two(number: int) -> None:
        row = number % len(rows)
        found = models[RETRIEVAL].predict(DEFAULT_SIGNATURE, first[row])["item_ids"]
        models[RANKING].predict(DEFAULT_SIGNATURE, {**second[row], "candidate_item_ids": found})

    return {
        f"{bundle}, in process": _timed(one, count),
        "retrieval, then ranking, in process": _timed(two, count),
        "ranking alone, in process": _timed(
            lambda number: models[RANKING].predict(DEFAULT_SIGNATURE, judged[number % len(rows)]), count
        ),
    }


def _over_grpc(folders: dict[str, Path], bundle: str, users: Arrays, count: int) -> dict[str, list[float]]:
    names = (RETRIEVAL, RANKING, bundle)
    specs = {}
    for name in names:
        specs[name] = input_specs(read_signature_defs(folders[name])["serving_default"])
    number_of_users = len(users["user_id"])
    with ModelServerProcess(
        {name: folders[name].parent for name in names}, startup_timeout_s=_STARTUP_TIMEOUT_S
    ) as server:
        channel = grpc.insecure_channel(server.grpc_target.removeprefix("grpc://"))
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)

        def proto(name: str, row: int, **given: Any) -> predict_pb2.PredictRequest:
            request = predict_pb2.PredictRequest()
            request.model_spec.name = name
            for key, value in _request(specs[name], users, row, **given).items():
                request.inputs[key].CopyFrom(tf.make_tensor_proto(value))
            return request

        k, candidates = np.array([K], np.int32), np.array([NUM_CANDIDATES], np.int32)
        rows = range(number_of_users)
        whole = [proto(bundle, row, k=k, num_candidates=candidates) for row in rows]
        first = [proto(RETRIEVAL, row, k=candidates) for row in rows]
        empty = np.array([[b""]], object)
        second = [proto(RANKING, row, candidate_item_ids=empty) for row in rows]

        def one(number: int) -> None:
            stub.Predict(whole[number % number_of_users])

        def two(number: int) -> None:
            row = number % number_of_users
            found = stub.Predict(first[row]).outputs["item_ids"]
            second[row].inputs["candidate_item_ids"].CopyFrom(found)
            stub.Predict(second[row])

        return {
            f"{bundle}, over gRPC": _timed(one, count),
            "retrieval, then ranking, over gRPC": _timed(two, count),
        }


if __name__ == "__main__":
    main()
