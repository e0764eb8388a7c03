"""The local model server: TensorFlow Serving's gRPC and REST API with the ScaNN ops, in Python.

    python -m serving.model_server --model_config_file models.config
    python -m serving.model_server --model_name ranking --model_base_path runs/demo/serving_models/ranking

Heavy imports wait until models and ports have been checked, so that a mistake shows at once.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import logging
import multiprocessing
import os
import signal
import socket
import sys
import warnings
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import TYPE_CHECKING, Any, Final, NoReturn

import grpc
import uvloop
from aiohttp import web

from schema.errors import ConfigError, FunnelError, ServingError
from serving.batching_config import BatchingParameters, read_batching_parameters
from serving.config import ModelConfig, parse_model_config, read_model_config
from serving.cores import deal_out_cpus, usable_cpus
from serving.flags import OFF, parse_flags
from serving.metrics import read_metrics_path
from serving.status import RequestError
from serving.thread_pool import ThreadPool
from serving.tls import read_server_credentials
from serving.versions import check_has_version
from serving.workers import Supervisor, WorkerLink, reserve_port, shared_metrics

if TYPE_CHECKING:
    from serving.batching import Batcher
    from serving.manager import ModelManager

logger = logging.getLogger(__name__)

_DRAIN_S: Final = 25.0  # below the 30 s after which process managers kill
_REFUSE_S: Final = 0.5  # in which calls that come are told that the server is stopping
# Requests that are read, wait for a thread or run, per API and worker. More would only wait longer, and hold
# memory meanwhile.
_MAX_CONCURRENT_REQUESTS: Final = 1000
_UNREAD_TIMEOUT_MS: Final = 60_000
_MAX_MESSAGE_BYTES: Final = 2**31 - 1  # what a proto can be
_GRPC_OPTIONS: Final = (
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the server until SIGTERM or SIGINT.

    Returns:
      Exit code: 0 after a clean stop, 1 when it cannot start. Wrong flags exit with 2.
    """
    flags = parse_flags(argv)
    _quiet_libraries()
    _log("%(asctime)s %(levelname)s %(name)s: %(message)s")
    return _exit_code(_serve(flags) if flags.num_workers == 1 else _supervise(flags))


def _run_worker(
    flags: argparse.Namespace,
    cpus: Sequence[int],
    connection: Connection,
    config: bytes | None,
    check_labels: bool,
) -> None:
    """What a process of a server with several workers runs, on some CPUs; it never returns."""
    _quiet_libraries()
    _log("%(asctime)s %(levelname)s worker=%(process)d %(name)s: %(message)s")
    if cpus:
        # Before there are threads: they inherit it, and how many there will be follows from it.
        os.sched_setaffinity(0, cpus)
        logger.info("runs on CPUs %s", ",".join(map(str, cpus)))
    _exit(_exit_code(_serve(flags, WorkerLink(connection, config, check_labels))))


def _log(line: str) -> None:
    logging.basicConfig(level=logging.INFO, format=line, stream=sys.stderr)


def _quiet_libraries() -> None:
    os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
    # What TensorFlow prints at import is noise; errors of its ops come back as exceptions.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # It warns of the loader into a session, which TensorFlow Serving itself uses.
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"google\.api_core")


def _exit_code(server: Coroutine[Any, Any, int]) -> int:
    try:
        return uvloop.run(server)
    except FunnelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _exit(exit_code: int) -> NoReturn:
    logging.shutdown()
    sys.stdout.flush()
    # Without this the exit waits for TensorFlow's teardown, seconds in which nothing is left to release.
    os._exit(exit_code)


async def _supervise(flags: argparse.Namespace) -> int:
    """Runs the server as several workers behind the same two ports."""
    _batching_parameters(flags)
    _metrics_path(flags)
    _server_credentials(flags)
    cpus = deal_out_cpus(flags.num_workers) if flags.pin_workers else [[]] * flags.num_workers
    for config in _model_configs(flags).values():
        check_has_version(config)
    if flags.grpc_socket_path:
        raise ConfigError("--grpc_socket_path cannot be shared by several workers; use --num_workers=1")
    with contextlib.ExitStack() as stack:
        # Held until the end: between two workers nobody else gets the ports.
        flags.port = _reserve("gRPC", "--port", flags.host, flags.port, stack)
        if flags.rest_api_port != OFF:
            flags.rest_api_port = _reserve("REST", "--rest_api_port", flags.host, flags.rest_api_port, stack)
        stack.enter_context(shared_metrics())
        processes = multiprocessing.get_context("spawn")

        def start(
            place: int, connection: Connection, config: bytes | None, check_labels: bool
        ) -> SpawnProcess:
            arguments = (flags, cpus[place], connection, config, check_labels)
            return processes.Process(target=_run_worker, args=arguments)

        return await Supervisor(flags.num_workers, start).run(lambda versions: _announce(flags, versions))


def _announce(flags: argparse.Namespace, versions: str) -> None:
    rest = "off" if flags.rest_api_port == OFF else f"{flags.host}:{flags.rest_api_port}"
    print(f"ready grpc={flags.host}:{flags.port} rest={rest} models={versions}", flush=True)


async def _serve(flags: argparse.Namespace, link: WorkerLink | None = None) -> int:
    """Loads and serves until a signal; `link` is that of a worker among several."""
    batching = _batching_parameters(flags)
    metrics_path = _metrics_path(flags)
    credentials = _server_credentials(flags)
    if link is not None and link.initial_config is not None:
        # The other workers hold it, even if a model of it has no version: no reason not to start.
        configs = _parse_reload(link.initial_config)
    else:
        configs = _model_configs(flags)
        for config in configs.values():
            check_has_version(config)
    grpc_server = grpc.aio.server(
        # Without being told not to, two servers would share a port without a word.
        options=(
            *_GRPC_OPTIONS,
            ("grpc.so_reuseport", int(link is not None)),
            *flags.grpc_channel_arguments,
        ),
    )
    with contextlib.ExitStack() as stack:
        if link is None:
            # Both ports are taken before the models load, which takes seconds: a taken port shows at once.
            rest_socket = _bind(grpc_server, flags, credentials, stack)
            models = _load_models(flags, configs)
        else:
            # Once a worker listens the kernel gives it connections, so it listens only when it can answer.
            models = _load_models(flags, configs, link)
            rest_socket = _bind(grpc_server, flags, credentials, stack, reuse_port=True)
        batcher = _create_batcher(batching)
        stop = asyncio.Event()
        for signal_number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(signal_number, stop.set)
        _add_services(grpc_server, models, batcher, flags, link, stop)
        await grpc_server.start()
        rest = None
        if rest_socket is not None:
            rest = await _start_rest(flags, models, batcher, rest_socket, metrics_path)
        models.start_polling(flags.file_system_poll_wait_seconds)
        if flags.model_config_file is not None:
            models.start_polling_config(flags.model_config_file, flags.model_config_file_poll_wait_seconds)
        versions = ",".join(f"{name}:{version}" for name, version in models.serving_versions())
        if link is None:
            _announce(flags, versions)
        else:
            link.ready(versions)

        await stop.wait()
        logger.info("stopping: no new requests, waiting up to %.0f s for those in flight", _DRAIN_S)
        models.close()
        # gRPC cancels a call that comes while it closes, which clients do not retry, as they do UNAVAILABLE.
        await asyncio.sleep(_REFUSE_S)
        drained = [grpc_server.stop(_DRAIN_S)]
        if rest is not None:
            drained.append(rest.cleanup())
        await asyncio.gather(*drained)
        logger.info("stopped")
        return 0


def _add_services(
    server: grpc.aio.Server,
    models: ModelManager,
    batcher: Batcher | None,
    flags: argparse.Namespace,
    link: WorkerLink | None,
    stop: asyncio.Event,
) -> None:
    from tensorflow_serving.apis import model_management_pb2

    from serving.grpc_service import add_services, reload_config

    loader = ThreadPoolExecutor(1, "load")

    def load(config: bytes | None, check_labels: bool) -> None:
        if config is None:
            models.load(_model_configs(flags), check_labels=check_labels)
        else:
            request = model_management_pb2.ReloadConfigRequest.FromString(config)
            reload_config(models, request, check_labels)

    async def reload_here(config: bytes | None, check_labels: bool) -> None:
        await asyncio.get_running_loop().run_in_executor(loader, load, config, check_labels)

    async def reload_everywhere(
        request: model_management_pb2.ReloadConfigRequest,
    ) -> model_management_pb2.ReloadConfigResponse:
        assert link is not None
        await link.reload(request.SerializeToString())
        return model_management_pb2.ReloadConfigResponse()

    if link is not None:
        link.listen(reload_here, supervisor_gone=stop.set)
    add_services(
        server,
        models,
        ThreadPool(flags.grpc_max_threads or _default_num_threads(), "grpc"),
        loader,
        batcher=batcher,
        reload=reload_everywhere if link is not None else None,
        check_method_name=flags.enable_signature_method_name_check,
        stopping=stop,
        max_calls=_MAX_CONCURRENT_REQUESTS,
    )


def _parse_reload(config: bytes) -> dict[str, ModelConfig]:
    from tensorflow_serving.apis import model_management_pb2

    return parse_model_config(model_management_pb2.ReloadConfigRequest.FromString(config).config)


def _model_configs(flags: argparse.Namespace) -> dict[str, ModelConfig]:
    if (flags.model_config_file is None) == (flags.model_base_path is None):
        raise ConfigError("give either --model_config_file, or --model_base_path with --model_name")
    if flags.model_config_file is not None:
        return read_model_config(flags.model_config_file)
    return {flags.model_name: ModelConfig(flags.model_name, flags.model_base_path)}


def _batching_parameters(flags: argparse.Namespace) -> BatchingParameters | None:
    if not flags.enable_batching:
        if flags.batching_parameters_file is not None:
            raise ConfigError("--batching_parameters_file needs --enable_batching")
        return None
    if flags.batching_parameters_file is None:
        return BatchingParameters()
    return read_batching_parameters(flags.batching_parameters_file)


def _metrics_path(flags: argparse.Namespace) -> str | None:
    return None if flags.monitoring_config_file is None else read_metrics_path(flags.monitoring_config_file)


def _default_num_threads() -> int:
    """Threads of each API: the official server's 4 per core, and 8 at least."""
    return max(8, 4 * len(usable_cpus()))


def _server_credentials(flags: argparse.Namespace) -> grpc.ServerCredentials | None:
    return None if flags.ssl_config_file is None else read_server_credentials(flags.ssl_config_file)


def _create_batcher(parameters: BatchingParameters | None) -> Batcher | None:
    if parameters is None:
        return None
    from serving.batching import Batcher

    return Batcher(parameters, ThreadPoolExecutor(parameters.num_batch_threads, "batch"))


def _load_models(
    flags: argparse.Namespace, configs: Mapping[str, ModelConfig], link: WorkerLink | None = None
) -> ModelManager:
    import tensorflow as tf

    from serving.loader import LoadSettings
    from serving.manager import ModelManager

    # What was imported is a million objects that stay: the collector need not walk them again. The models do
    # not stay, so they are loaded after this.
    gc.collect()
    gc.freeze()
    if num_threads := flags.tensorflow_intra_op_parallelism or flags.tensorflow_session_parallelism:
        tf.config.threading.set_intra_op_parallelism_threads(num_threads)
    if num_threads := flags.tensorflow_inter_op_parallelism or flags.tensorflow_session_parallelism:
        tf.config.threading.set_inter_op_parallelism_threads(num_threads)
    num_iterations = max(1, flags.num_request_iterations_for_warmup) if flags.enable_model_warmup else 0
    settings = LoadSettings(
        max_num_retries=flags.max_num_load_retries,
        retry_interval_s=max(0.0, flags.load_retry_interval_micros / 1e6),
        num_warmup_iterations=num_iterations,
    )
    models = ModelManager(
        settings, allow_labels_before_loading=flags.allow_version_labels_for_unavailable_models
    )
    try:
        models.load(configs, check_labels=link is None or link.check_labels)
    except RequestError as error:
        if link is None or link.initial_config is None or error.code != grpc.StatusCode.UNKNOWN:
            raise
        logger.error("starts without all models, as the other workers: %s", error)
    return models


async def _start_rest(
    flags: argparse.Namespace,
    models: ModelManager,
    batcher: Batcher | None,
    rest_socket: socket.socket,
    metrics_path: str | None,
) -> web.AppRunner:
    from serving.rest import RestSettings, create_runner

    settings = RestSettings(
        timeout_s=flags.rest_api_timeout_in_ms / 1000 or None,
        check_method_name=flags.enable_signature_method_name_check,
        enable_cors=flags.rest_api_enable_cors_support,
        max_concurrent_requests=_MAX_CONCURRENT_REQUESTS,
        metrics_path=metrics_path,
    )
    threads = ThreadPool(flags.rest_api_num_threads or _default_num_threads(), "rest")
    runner = create_runner(models, threads, settings, shutdown_timeout_s=_DRAIN_S, batcher=batcher)
    await runner.setup()
    await web.SockSite(runner, rest_socket).start()
    return runner


def _bind(
    grpc_server: grpc.aio.Server,
    flags: argparse.Namespace,
    credentials: grpc.ServerCredentials | None,
    stack: contextlib.ExitStack,
    *,
    reuse_port: bool = False,
) -> socket.socket | None:
    """Takes both ports, which `flags` has from then on; returns the socket of REST, None when it is off."""
    rest_socket = None
    if flags.rest_api_port != OFF:
        rest_socket = stack.enter_context(_bind_rest(flags.host, flags.rest_api_port, reuse_port))
        flags.rest_api_port = rest_socket.getsockname()[1]
    flags.port = _bind_grpc(grpc_server, flags, credentials)
    return rest_socket


def _bind_rest(host: str, port: int, reuse_port: bool) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=128, reuse_port=reuse_port)
    except OSError as error:
        raise _port_error("REST", "--rest_api_port", host, port) from error
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; connections inherit it
        # A client that does not read its answer would hold it in memory for ever.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNREAD_TIMEOUT_MS)
    return listener


def _reserve(api: str, flag: str, host: str, port: int, stack: contextlib.ExitStack) -> int:
    try:
        return int(stack.enter_context(reserve_port(host, port)).getsockname()[1])
    except OSError as error:
        raise _port_error(api, flag, host, port) from error


def _bind_grpc(
    server: grpc.aio.Server, flags: argparse.Namespace, credentials: grpc.ServerCredentials | None
) -> int:
    host, port = flags.host, flags.port
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        bound_port = _add_grpc_port(server, address, credentials)
    except RuntimeError as error:
        if credentials is not None:
            raise ServingError(
                f"gRPC cannot listen on {address}: the port is taken, or the key and the certificates of "
                "--ssl_config_file are damaged or do not belong together; try another --port, or check "
                "them with openssl."
            ) from error
        raise _port_error("gRPC", "--port", host, port) from error
    if flags.grpc_socket_path:
        try:
            _add_grpc_port(server, f"unix:{flags.grpc_socket_path}", credentials)
        except RuntimeError as error:
            raise ServingError(
                f"--grpc_socket_path {flags.grpc_socket_path} cannot be listened on: {error}"
            ) from error
    return bound_port


def _add_grpc_port(server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials | None) -> int:
    if credentials is None:
        return int(server.add_insecure_port(address))
    return int(server.add_secure_port(address, credentials))


def _port_error(api: str, flag: str, host: str, port: int) -> ServingError:
    return ServingError(
        f"the {api} port {port} on {host} is taken or not allowed; stop what uses it, or choose another with "
        f"{flag} (auto picks a free one)"
    )


if __name__ == "__main__":
    _exit(main())
