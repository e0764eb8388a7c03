"""The gRPC port with TLS, with a certificate that openssl makes."""

import os
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from tensorflow_serving.apis import get_model_status_pb2, model_service_pb2_grpc

from schema.errors import ConfigError
from serving.model_server import main
from serving.process import ModelServerProcess
from serving.tls import read_server_credentials

ASK = """
import sys
from serving.client import RecommenderClient
with RecommenderClient(sys.argv[1]) as client:
    print(*[candidate.item_id for candidate in client.retrieve({"user_id": "u"}, 2).candidates])
"""


@pytest.fixture(scope="module")
def pems(tmp_path_factory):
    """(key, certificate) of 127.0.0.1, as files."""
    folder = tmp_path_factory.mktemp("tls")
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
         "-days", "1", "-subj", "/CN=model server", "-addext", "subjectAltName=IP:127.0.0.1",
         "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    return key, certificate


def config_file(folder, **fields):
    path = folder / "ssl.config"
    lines = (
        f"{name}: {value}" if value == "true" else f"{name}: {value!r}" for name, value in fields.items()
    )
    path.write_text("\n".join(lines))
    return path


def test_a_server_with_tls_answers_those_who_trust_its_certificate_and_nobody_in_plain(
    pems, base_paths, tmp_path
):
    key, certificate = pems
    config = config_file(tmp_path, server_key=key.read_text(), server_cert=certificate.read_text())
    models = {name: base_paths[name] for name in ("retrieval", "ranking")}
    with ModelServerProcess(models, flags=[f"--ssl_config_file={config}"]) as server:
        address = server.grpc_target.removeprefix("grpc://")
        trusting = {**os.environ, "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH": str(certificate)}
        answer = subprocess.run(
            [sys.executable, "-c", ASK, f"grpcs://{address}"], env=trusting, capture_output=True, text=True
        )
        assert answer.stdout.split() == ["item0", "item1"], answer.stderr
        request = get_model_status_pb2.GetModelStatusRequest()
        request.model_spec.name = "retrieval"
        for channel in (
            grpc.insecure_channel(address),
            grpc.secure_channel(
                address, grpc.ssl_channel_credentials(root_certificates=other_root(tmp_path))
            ),
        ):
            with channel, pytest.raises(grpc.RpcError) as caught:
                model_service_pb2_grpc.ModelServiceStub(channel).GetModelStatus(request, timeout=10)
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


def other_root(folder: Path) -> bytes:
    """A certificate authority that has signed nothing."""
    path = folder / "other.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=other",
         "-keyout", folder / "other.key", "-out", path],
        check=True, capture_output=True,
    )  # fmt: skip
    return path.read_bytes()


PEM = "-----BEGIN CERTIFICATE-----"


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"server_key": PEM}, "server_cert must be a PEM text"),
        ({"server_key": "/etc/key.pem", "server_cert": PEM}, "server_key must be a PEM text"),
        ({"server_key": PEM, "server_cert": PEM, "client_verify": "true"}, "custom_ca must be a PEM text"),
        ({"server_kay": PEM}, "not a SSLConfig text proto"),
    ],
    ids=["no certificate", "file name", "no authority", "unknown field"],
)
def test_an_ssl_config_without_what_it_needs_is_refused(tmp_path, fields, complaint):
    with pytest.raises(ConfigError, match=complaint) as caught:
        read_server_credentials(config_file(tmp_path, **fields))
    assert str(tmp_path) in str(caught.value)


def test_a_server_whose_ssl_config_is_not_there_does_not_start(base_paths, capsys):
    flags = ["--port=auto", f"--model_base_path={base_paths['echo']}", "--ssl_config_file=nowhere.config"]
    assert main(flags) == 1
    assert "--ssl_config_file nowhere.config cannot be read" in capsys.readouterr().err


def test_a_damaged_certificate_is_named_as_what_may_be_wrong(base_paths, tmp_path, capsys):
    config = config_file(tmp_path, server_key=PEM, server_cert=PEM)
    ports = ["--port=auto", "--rest_api_port=auto"]
    assert main([*ports, f"--model_base_path={base_paths['echo']}", f"--ssl_config_file={config}"]) == 1
    assert "--ssl_config_file are damaged or do not belong together" in capsys.readouterr().err
