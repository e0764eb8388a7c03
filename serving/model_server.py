"""The local model server: TensorFlow Serving's gRPC and REST API with the ScaNN ops, in Python.

    python -m serving.model_server --model_config_file models.config
    python -m serving.model_server --model_name ranking --model_base_path runs/demo/serving_models/ranking

Flags have the names of the official binary. Heavy imports wait until models and ports have been checked, so
that a mistake on the command line shows at once.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import socket
import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import grpc
import uvloop
from aiohttp import web

from schema.errors import ConfigError, FunnelError, ServingError
from serving.config import read_model_config
from serving.versions import check_has_version

logger = logging.getLogger(__name__)

_DRAIN_S: Final = 25.0  # below the 30 s after which process managers kill
_NUM_THREADS: Final = max(8, 4 * (os.cpu_count() or 1))  # the official default is 4 per core
_GRPC_OPTIONS: Final = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.so_reuseport", 0),  # otherwise two servers share a port without a word
)


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the server's flags."""
    parser = argparse.ArgumentParser(
        prog="python -m serving.model_server",
        description="Serves SavedModels over TensorFlow Serving's gRPC and REST API, ScaNN ops included.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--port", type=int, default=8500, help="gRPC port; 0 picks a free one")
    parser.add_argument("--rest_api_port", type=int, default=8501, help="REST port; 0 picks a free one")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets other machines in"
    )
    parser.add_argument(
        "--model_config_file", type=Path, help="ModelServerConfig text proto, for several models"
    )
    parser.add_argument("--model_name", default="default", help="name of the model in --model_base_path")
    parser.add_argument("--model_base_path", type=Path, help="folder of version folders, for one model")
    parser.add_argument(
        "--file_system_poll_wait_seconds",
        type=float,
        default=1.0,
        help="pause between looks for new versions; 0: never",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the server until SIGTERM or SIGINT.

    Returns:
      Exit code: 0 after a clean stop, 1 when it cannot start. Wrong flags exit with 2.
    """
    flags = build_parser().parse_args(argv)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
    # What TensorFlow prints at import is noise; errors of its ops come back as exceptions.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"google\.api_core")
    try:
        return uvloop.run(_serve(flags))
    except FunnelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


async def _serve(flags: argparse.Namespace) -> int:
    base_paths = _base_paths(flags)
    for name, base_path in base_paths.items():
        check_has_version(name, base_path)
    # Both ports are taken before the models load: that takes seconds, and a taken port should show at once.
    with _bind_rest(flags.host, flags.rest_api_port) as rest_socket:
        executor = ThreadPoolExecutor(_NUM_THREADS, "predict")
        grpc_server = grpc.aio.server(executor, options=_GRPC_OPTIONS)
        grpc_port = _bind_grpc(grpc_server, flags.host, flags.port)

        from serving.grpc_service import add_services
        from serving.loader import ModelManager
        from serving.rest import create_app

        models = ModelManager(base_paths)
        models.load()
        add_services(grpc_server, models, executor)
        app = create_app(models, executor)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=_DRAIN_S)
        await runner.setup()
        stop = asyncio.Event()
        for signal_number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(signal_number, stop.set)
        await grpc_server.start()
        await web.SockSite(runner, rest_socket).start()
        models.start_polling(flags.file_system_poll_wait_seconds)
        versions = ",".join(f"{name}:{version}" for name, version in models.serving_versions())
        rest_port = rest_socket.getsockname()[1]
        print(
            f"ready grpc={flags.host}:{grpc_port} rest={flags.host}:{rest_port} models={versions}", flush=True
        )

        await stop.wait()
        logger.info("stopping: no new requests, waiting up to %.0f s for those in flight", _DRAIN_S)
        models.close()
        await asyncio.gather(grpc_server.stop(_DRAIN_S), runner.cleanup())
        logger.info("stopped")
        return 0


def _base_paths(flags: argparse.Namespace) -> dict[str, Path]:
    if (flags.model_config_file is None) == (flags.model_base_path is None):
        raise ConfigError("give either --model_config_file, or --model_base_path with --model_name")
    if flags.model_config_file is not None:
        return read_model_config(flags.model_config_file)
    return {flags.model_name: flags.model_base_path}


def _bind_rest(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=128
        )
    except OSError as error:
        raise _port_error("REST", "--rest_api_port", host, port) from error


def _bind_grpc(server: grpc.aio.Server, host: str, port: int) -> int:
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        return server.add_insecure_port(address)
    except RuntimeError as error:
        raise _port_error("gRPC", "--port", host, port) from error


def _port_error(api: str, flag: str, host: str, port: int) -> ServingError:
    return ServingError(
        f"the {api} port {port} on {host} is taken or not allowed; stop what uses it, or choose another with "
        f"{flag} (0 picks a free one)"
    )


if __name__ == "__main__":
    exit_code = main()
    logging.shutdown()
    sys.stdout.flush()
    # Without this the exit waits for TensorFlow's teardown, seconds in which nothing is left to release.
    os._exit(exit_code)
