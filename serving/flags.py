"""The command line of the model server: the official binary's flags, by name and meaning.

A flag of the official binary that this server does not have is refused with the reason, never ignored; so is
an unknown one. Imports nothing heavy: a mistake on the command line shows at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

AUTO: Final = 0  # of a port, after parsing: any free one
OFF: Final = -1  # of the REST port, after parsing

# Official flags whose other values need what a Python server over TensorFlow's wheel does not have. The value
# given here says what this server does anyway, so asking for it is fine.
_FIXED: Final = {
    "enable_grpc_healthcheck_service": "false",
    "enable_per_model_batching_parameters": "false",
    "enable_profiler": "false",
    "enable_serialization_as_tensor_content": "false",
    "enforce_session_run_timeout": "false",
    "flush_filesystem_caches": "false",
    "mixed_precision": "",
    "num_load_threads": "0",
    "num_tflite_interpreters_per_pool": "1",
    "num_unload_threads": "0",
    "per_process_gpu_memory_fraction": "0",
    "platform_config_file": "",
    "prefer_tflite_model": "false",
    "saved_model_tags": "serve",
    "tensorflow_session_config_file": "",
    "thread_pool_factory_config_file": "",
    "use_alts_credentials": "false",
    "xla_cpu_compilation_enabled": "false",
    "xla_gpu_compilation_enabled": "false",
}

# Official flags that this server does not have at all, whatever their value.
_ABSENT: Final = (
    "num_tflite_pools",
    "remove_unused_fields_from_bundle_metagraph",
    "skip_initialize_tpu",
)

_DEFAULT_MODEL_NAME: Final = "default"

_TRUE: Final = ("true", "1", "yes")
_FALSE: Final = ("false", "0", "no")


def parse_flags(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line.

    Returns:
      One attribute per flag. `port` and `rest_api_port` are numbers: AUTO for any free port, OFF for no REST.

    Raises:
      SystemExit: 2 for a wrong flag or value, with the text on stderr; 0 after `--help` and `--version`.
    """
    parser = build_parser()
    flags = parser.parse_args(argv)
    if flags.port == flags.rest_api_port != AUTO:
        parser.error(f"--rest_api_port must be another than --port, both are {flags.port}")
    if flags.model_config_file is not None and flags.model_name is not None:
        parser.error("--model_name goes with --model_base_path; --model_config_file names its models itself")
    if flags.model_name is None:
        flags.model_name = _DEFAULT_MODEL_NAME
    if flags.monitoring_config_file is not None and flags.rest_api_port == OFF:
        parser.error("--monitoring_config_file needs REST, which answers with the metrics: --rest_api_port")
    if flags.pin_workers and flags.num_workers == 1:
        parser.error("--pin_workers needs several workers to keep apart: --num_workers=2 or more")
    return flags


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the server's flags."""
    parser = argparse.ArgumentParser(
        prog="python -m serving.model_server",
        usage="%(prog)s (--model_config_file FILE | --model_name NAME --model_base_path DIR) [FLAGS]",
        description="Serves SavedModels over TensorFlow Serving's gRPC and REST API, ScaNN ops included.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    _add_ports(parser)
    _add_models(parser)
    _add_requests(parser)
    for name in _ABSENT:
        parser.add_argument(f"--{name}", action=_Refused, nargs="?", help=argparse.SUPPRESS)
    for name, value in _FIXED.items():
        parser.add_argument(f"--{name}", action=_Refused, nargs="?", const="true", allowed=value,
                            help=argparse.SUPPRESS)  # fmt: skip
    return parser


def _add_ports(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("where it listens")
    group.add_argument("--port", type=_port, default=8500, help="gRPC port, or auto for any free one")
    group.add_argument(
        "--rest_api_port", type=_rest_port, default=8501, help="REST port, auto for any free one, 0 for none"
    )
    group.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets other machines in"
    )
    group.add_argument("--grpc_socket_path", default="", help="UNIX socket to serve gRPC on as well")
    group.add_argument(
        "--ssl_config_file", type=Path, help="SSLConfig text proto; the gRPC port then speaks TLS only"
    )
    group.add_argument("--version", action=_Version, nargs=0, help="print the versions and exit")


def _add_models(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what it serves")
    group.add_argument(
        "--model_config_file", type=Path, help="ModelServerConfig text proto, for several models"
    )
    group.add_argument(
        "--model_config_file_poll_wait_seconds",
        type=float,
        default=0.0,
        help="pause between looks for a changed model_config_file; 0: read once",
    )
    group.add_argument(
        "--model_name", help=f"name of the model in --model_base_path; None: {_DEFAULT_MODEL_NAME!r}"
    )
    group.add_argument("--model_base_path", type=Path, help="folder of version folders, for one model")
    group.add_argument(
        "--file_system_poll_wait_seconds",
        type=float,
        default=1.0,
        help="pause between looks for new versions; 0: look once",
    )
    group.add_argument(
        "--max_num_load_retries",
        type=_not_negative,
        default=5,
        help="how often a version that does not load is tried again",
    )
    group.add_argument(
        "--load_retry_interval_micros",
        type=int,
        default=60_000_000,
        help="pause between such tries; negative: none",
    )
    group.add_argument(
        "--allow_version_labels_for_unavailable_models",
        **_BOOLEAN,
        default=False,
        help="lets a new version label name a version that is not loaded yet, as at the start",
    )
    group.add_argument(
        "--enable_model_warmup",
        **_BOOLEAN,
        default=True,
        help="replay assets.extra/tf_serving_warmup_requests before a version takes requests",
    )
    group.add_argument(
        "--num_request_iterations_for_warmup",
        type=int,
        default=0,
        help="how often each warm-up record is replayed; 0: once",
    )
    group.add_argument(
        "--enable_signature_method_name_check",
        **_BOOLEAN,
        default=False,
        help="Classify and Regress take only signatures with their method_name, which TF 2 does not write",
    )


def _add_requests(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how it answers")
    group.add_argument(
        "--rest_api_timeout_in_ms",
        type=_not_negative,
        default=30_000,
        help="time for one REST call, then 504; 0: none",
    )
    group.add_argument(
        "--rest_api_num_threads",
        type=_positive,
        help="threads that answer REST; None: 4 per core, 8 at least",
    )
    group.add_argument(
        "--rest_api_enable_cors_support", **_BOOLEAN, default=False, help="send CORS headers over REST"
    )
    group.add_argument(
        "--grpc_max_threads", type=_positive, help="threads that answer gRPC; None: 4 per core, 8 at least"
    )
    group.add_argument(
        "--grpc_channel_arguments",
        type=_channel_arguments,
        default=(),
        help="comma-separated gRPC settings, such as grpc.max_connection_age_ms=2000",
    )
    group.add_argument(
        "--num_workers",
        type=_positive,
        default=1,
        help="processes behind the ports, each with models of its own: docs/serving-performance.md",
    )
    group.add_argument(
        "--pin_workers",
        **_BOOLEAN,
        default=False,
        help="keep each worker on cores of its own, for a machine that does little else; Linux only",
    )
    group.add_argument(
        "--enable_batching",
        **_BOOLEAN,
        default=False,
        help="run requests (Predict, Classify, Regress, MultiInference) that arrive together as one",
    )
    group.add_argument(
        "--batching_parameters_file",
        type=Path,
        help="BatchingParameters text proto, with --enable_batching; see serving/settings/batching.config",
    )
    group.add_argument(
        "--monitoring_config_file",
        type=Path,
        help="MonitoringConfig text proto; enables Prometheus metrics over REST",
    )
    for name in ("session", "intra_op", "inter_op"):
        group.add_argument(
            f"--tensorflow_{name}_parallelism",
            type=_not_negative,
            default=0,
            help="threads that a call may take; 0: only its own",
        )


class _Refused(argparse.Action):
    """An official flag that this server does not have, unless asked for what it does anyway."""

    def __init__(self, *args: Any, allowed: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._allowed = allowed

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: Any = None
    ) -> None:
        value = str(values).lower()
        value = "false" if value in _FALSE and self._allowed == "false" else value
        if self._allowed is None or value != self._allowed:
            only = f"; it always works as with {option}={self._allowed}" if self._allowed else ""
            parser.error(
                f"{option} is a flag of TensorFlow Serving that this server does not have{only}. "
                f"Remove the flag, or run the official server (serving/README.md)"
            )


class _Version(argparse.Action):
    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: Any = None
    ) -> None:
        from importlib.metadata import version

        from trainer.version import __version__

        packages = ("tensorflow", "scann", "tensorflow-serving-api")
        print(
            f"Funnel model server {__version__}", *(f"{name} {version(name)}" for name in packages), sep="\n"
        )
        parser.exit()


def _boolean(text: str) -> bool:
    if text.lower() in (*_TRUE, *_FALSE):
        return text.lower() in _TRUE
    raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")


# As the official binary reads them: `--flag`, `--flag=true` and `--flag=false`.
_BOOLEAN: Final[dict[str, Any]] = {"type": _boolean, "nargs": "?", "const": True}


def _port(text: str) -> int:
    if text == "auto":
        return AUTO
    if text.isascii() and text.isdecimal() and 1 <= int(text) <= 65535:
        return int(text)
    raise argparse.ArgumentTypeError(f"expected a port from 1 to 65535 or auto, got {text!r}")


def _rest_port(text: str) -> int:
    return OFF if text == "0" else _port(text)


def _positive(text: str) -> int:
    return _at_least(1, text)


def _not_negative(text: str) -> int:
    return _at_least(0, text)


def _at_least(low: int, text: str) -> int:
    try:
        value = int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from error
    if value < low:
        raise argparse.ArgumentTypeError(f"must be at least {low}, got {value}")
    return value


def _channel_arguments(text: str) -> tuple[tuple[str, int | str], ...]:
    arguments: list[tuple[str, int | str]] = []
    for argument in filter(None, text.split(",")):
        key, separator, value = argument.partition("=")
        if not key or not separator:
            raise argparse.ArgumentTypeError(f"expected key=value pairs with commas between, got {text!r}")
        try:
            arguments.append((key, int(value)))
        except ValueError:  # gRPC takes numbers and texts
            arguments.append((key, value))
    return tuple(arguments)
