"""The command line of the model server."""

from pathlib import Path

import pytest

from serving.flags import AUTO, OFF, parse_flags


def test_defaults_are_those_of_the_official_image():
    flags = parse_flags([])
    assert (flags.port, flags.rest_api_port, flags.host) == (8500, 8501, "127.0.0.1")
    assert (flags.file_system_poll_wait_seconds, flags.model_config_file_poll_wait_seconds) == (1, 0)
    assert (flags.max_num_load_retries, flags.load_retry_interval_micros) == (5, 60_000_000)
    assert (flags.rest_api_timeout_in_ms, flags.model_name) == (30_000, "default")
    assert flags.enable_model_warmup
    assert not flags.allow_version_labels_for_unavailable_models
    assert not flags.enable_signature_method_name_check


@pytest.mark.parametrize(
    ("argument", "name", "value"),
    [
        ("--port=auto", "port", AUTO),
        ("--rest_api_port=0", "rest_api_port", OFF),
        ("--rest_api_port=auto", "rest_api_port", AUTO),
        ("--enable_model_warmup=false", "enable_model_warmup", False),
        (
            "--allow_version_labels_for_unavailable_models",
            "allow_version_labels_for_unavailable_models",
            True,
        ),
        ("--rest_api_enable_cors_support=1", "rest_api_enable_cors_support", True),
        ("--model_config_file=/a/b", "model_config_file", Path("/a/b")),
        (
            "--grpc_channel_arguments=grpc.max_connection_age_ms=2000,grpc.x=y",
            "grpc_channel_arguments",
            (("grpc.max_connection_age_ms", 2000), ("grpc.x", "y")),
        ),
    ],
)
def test_a_flag_is_read_as_the_official_binary_reads_it(argument, name, value):
    assert getattr(parse_flags([argument]), name) == value


@pytest.mark.parametrize(
    ("argument", "complaint"),
    [
        ("--port=0", "1 to 65535 or auto"),
        ("--rest_api_port=70000", "1 to 65535 or auto"),
        ("--enable_model_warmup=maybe", "true or false"),
        ("--max_num_load_retries=-1", "at least 0"),
        ("--grpc_max_threads=0", "at least 1"),
        ("--grpc_channel_arguments=x", "key=value"),
        ("--nothing", "unrecognized arguments"),
        ("--model_nam=x", "unrecognized arguments"),
    ],
)
def test_a_wrong_flag_is_refused_with_what_was_expected(argument, complaint, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_flags([argument])
    assert caught.value.code == 2
    assert complaint in capsys.readouterr().err


def test_both_apis_on_one_port_are_refused_by_name_and_two_free_ports_are_not(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_flags(["--port=8501"])
    assert caught.value.code == 2
    assert "--rest_api_port must be another than --port, both are 8501" in capsys.readouterr().err
    parse_flags(["--port=auto", "--rest_api_port=auto"])


def test_one_worker_alone_cannot_be_pinned(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_flags(["--pin_workers"])
    assert caught.value.code == 2
    assert "--pin_workers needs several workers" in capsys.readouterr().err
    assert parse_flags(["--pin_workers", "--num_workers=2"]).pin_workers
    assert not parse_flags(["--num_workers=2"]).pin_workers


@pytest.mark.parametrize("name", ["ranking", "default"])
def test_a_model_name_besides_a_config_file_is_refused_not_ignored(name, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_flags(["--model_config_file=models.config", f"--model_name={name}"])
    assert caught.value.code == 2
    assert "--model_name goes with --model_base_path" in capsys.readouterr().err
    assert parse_flags(["--model_config_file=models.config"]).model_name == "default"
    assert parse_flags([f"--model_name={name}", "--model_base_path=m"]).model_name == name


def test_a_monitoring_config_without_rest_is_refused_not_ignored(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_flags(["--monitoring_config_file=monitoring.config", "--rest_api_port=0"])
    assert caught.value.code == 2
    assert "--monitoring_config_file needs REST" in capsys.readouterr().err
    parse_flags(["--monitoring_config_file=monitoring.config", "--rest_api_port=auto"])


@pytest.mark.parametrize(
    "argument",
    [
        "--use_alts_credentials",
        "--saved_model_tags=serve,gpu",
        "--flush_filesystem_caches=true",
        "--prefer_tflite_model",
        "--enable_profiler",
        "--num_tflite_pools=1",
        "--enable_grpc_healthcheck_service",
    ],
)
def test_an_official_flag_that_this_server_does_not_have_is_refused_not_ignored(argument, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_flags([argument])
    assert caught.value.code == 2
    assert "is a flag of TensorFlow Serving that this server does not have" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argument",
    [
        "--flush_filesystem_caches=false",
        "--enable_profiler=0",
        "--enable_grpc_healthcheck_service=false",
        "--saved_model_tags=serve",
        "--num_load_threads=0",
    ],
)
def test_an_official_flag_may_ask_for_what_the_server_does_anyway(argument):
    parse_flags([argument])


def test_version_prints_what_is_installed(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_flags(["--version"])
    assert caught.value.code == 0
    assert "tensorflow 2.16" in capsys.readouterr().out
