"""The files by which servers are deployed: sound by their own schemas, in step with each other and code."""

import ast
import fnmatch
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from google.protobuf import text_format
from tensorflow_serving.config import model_server_config_pb2

from serving.batching_config import read_batching_parameters
from serving.client import LAYOUTS
from serving.flags import build_parser
from serving.metrics import read_metrics_path

ROOT = Path(__file__).parents[2]
SERVING = ROOT / "serving"
SETTINGS = SERVING / "settings"
OVERLAYS = ("cpu", "gpu", "cpu-gcs")
# The oldest and the newest Kubernetes that the manifests are meant for.
KUBERNETES_VERSIONS = ("1.29", "1.37")
# Tools that are installed beside the interpreter, whether or not the environment is active.
TOOLS = Path(sys.executable).parent
# Distributions that are not named as what is imported from them.
DISTRIBUTIONS = {
    "google": "protobuf",
    "grpc": "grpcio",
    "prometheus_client": "prometheus-client",
    "tensorflow_serving": "tensorflow-serving-api",
}
BATCHING_FLAGS = ("--enable_batching=true", "--batching_parameters_file=/settings/batching.config")


def run(tool, *args):
    return subprocess.run([TOOLS / tool, *map(str, args)], capture_output=True, text=True)


@pytest.fixture(scope="module", params=OVERLAYS)
def manifests(request):
    """Manifests of one overlay, by kind."""
    built = run("kubectl", "kustomize", SERVING / "kubernetes" / "overlays" / request.param)
    assert built.returncode == 0, built.stderr
    found = list(yaml.safe_load_all(built.stdout))
    by_kind = {manifest["kind"]: manifest for manifest in found}
    assert len(by_kind) == len(found)
    return by_kind


@pytest.fixture(scope="module")
def compose():
    return yaml.safe_load((SERVING / "docker-compose.yml").read_text())


def container_of(manifests):
    (container,) = manifests["Deployment"]["spec"]["template"]["spec"]["containers"]
    return container


def model_names(config):
    message = model_server_config_pb2.ModelServerConfig()
    text_format.Parse((SETTINGS / config).read_text(), message)
    models = {model.name: model.base_path for model in message.model_config_list.config}
    assert models == {name: f"/models/{name}" for name in models}
    return set(models)


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
def test_manifests_are_valid_for_the_kubernetes_api(manifests, version):
    for manifest in manifests.values():
        kubernetes_validate.validate(manifest, version, strict=True)


def test_the_validation_of_manifests_can_fail(manifests):
    deployment = yaml.safe_load(yaml.safe_dump(manifests["Deployment"]))
    deployment["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="readynessProbe"):
        kubernetes_validate.validate(deployment, KUBERNETES_VERSIONS[0], strict=True)


def test_pods_drain_before_they_stop_and_are_ready_once_a_model_is_loaded(manifests):
    pod, container = manifests["Deployment"]["spec"]["template"]["spec"], container_of(manifests)
    assert container["lifecycle"]["preStop"]["exec"]["command"][0] == "sleep"
    drain_s = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > drain_s
    for probe in ("startupProbe", "readinessProbe"):
        model = re.fullmatch(r"/v1/models/(\w+)/metadata", container[probe]["httpGet"]["path"])[1]
        assert model in model_names("models.config")
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert {f"--port={ports['grpc']}", f"--rest_api_port={ports['http']}"} <= set(container["args"])
    assert {port["targetPort"] for port in manifests["Service"]["spec"]["ports"]} == set(ports)


def test_pods_run_without_rights_and_write_to_scratch_only(manifests):
    pod, container = manifests["Deployment"]["spec"]["template"]["spec"], container_of(manifests)
    assert pod["securityContext"]["runAsNonRoot"] and pod["automountServiceAccountToken"] is False
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    writable = [mount["name"] for mount in container["volumeMounts"] if not mount.get("readOnly")]
    assert writable == ["scratch"]


def test_selectors_find_the_pods_and_the_settings(manifests):
    labels = manifests["Deployment"]["spec"]["template"]["metadata"]["labels"].items()
    for kind, path in (
        ("Service", []),
        ("Deployment", ["matchLabels"]),
        ("PodDisruptionBudget", ["matchLabels"]),
    ):
        selector = manifests[kind]["spec"]["selector"]
        for key in path:
            selector = selector[key]
        assert selector and selector.items() <= labels, kind
    volumes = manifests["Deployment"]["spec"]["template"]["spec"]["volumes"]
    (settings,) = [volume["configMap"]["name"] for volume in volumes if "configMap" in volume]
    assert settings == manifests["ConfigMap"]["metadata"]["name"]
    for name, text in manifests["ConfigMap"]["data"].items():
        assert text == (SETTINGS / name).read_text()


def test_replicas_are_set_by_the_autoscaler_or_by_hand_not_by_both(manifests):
    assert ("HorizontalPodAutoscaler" in manifests) != ("replicas" in manifests["Deployment"]["spec"])


def test_overlays_differ_where_they_should():
    built = {
        overlay: run("kubectl", "kustomize", SERVING / "kubernetes" / "overlays" / overlay).stdout
        for overlay in OVERLAYS
    }
    assert "nvidia.com/gpu" in built["gpu"] and "nvidia.com/gpu" not in built["cpu"]
    assert all(flag in built["gpu"] and flag not in built["cpu"] for flag in BATCHING_FLAGS)
    assert "PersistentVolumeClaim" in built["cpu"] and "PersistentVolumeClaim" not in built["cpu-gcs"]


def test_every_server_is_of_the_tested_version_and_gets_flags_that_exist(manifests, compose):
    (version,) = re.findall(r'"tensorflow-serving-api==([\d.]+)"', (ROOT / "setup.py").read_text())
    images = [container_of(manifests)["image"], compose["services"]["cpu"]["image"]]
    assert {image.removesuffix("-gpu") for image in images} == {f"tensorflow/serving:{version}"}
    assert compose["services"]["gpu"]["image"] == f"tensorflow/serving:{version}-gpu"
    services = [service["command"] for service in compose["services"].values()]
    for args in (container_of(manifests)["args"], *services):
        given = build_parser().parse_args(args)
        assert (given.batching_parameters_file is not None) == given.enable_batching
        paths = (given.model_config_file, given.monitoring_config_file, given.batching_parameters_file)
        for path in filter(None, paths):
            assert path.parent == Path("/settings") and (SETTINGS / path.name).is_file()


def test_settings_are_what_the_servers_read():
    assert model_names("models.config") == {
        model for layout in LAYOUTS for model in layout.models if model == "ranking" or "exact" in model
    }
    assert model_names("models_scann.config") == {
        model for layout in LAYOUTS for model in layout.models if "exact" not in model
    }
    batching = read_batching_parameters(SETTINGS / "batching.config")
    assert batching.allowed_batch_sizes[-1] == batching.max_batch_size
    assert read_metrics_path(SETTINGS / "monitoring.config") == "/monitoring/prometheus/metrics"


def test_the_compose_file_follows_its_schema(tmp_path):
    def checked(path):
        return run("check-jsonschema", "--builtin-schema", "vendor.compose-spec", path)

    done = checked(SERVING / "docker-compose.yml")
    assert done.returncode == 0, done.stdout
    broken = tmp_path / "docker-compose.yml"
    broken.write_text((SERVING / "docker-compose.yml").read_text().replace("read_only:", "readonly:"))
    assert checked(broken).returncode == 1


def test_docker_itself_reads_the_compose_file():
    if shutil.which("docker") is None or subprocess.run(["docker", "compose", "version"]).returncode:
        pytest.skip("COMPOSE FILE NOT READ BY DOCKER: no docker with its compose plugin on PATH")
    command = [
        "docker",
        "compose",
        "-f",
        str(SERVING / "docker-compose.yml"),
        "--profile",
        "*",
        "config",
        "--quiet",
    ]
    done = subprocess.run(
        command, env=os.environ | {"FUNNEL_MODELS": "/models"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_health_check_of_stock_images_tells_loaded_models_from_others(compose, server):
    command = compose["services"]["cpu"]["healthcheck"]["test"]
    assert command[0] == "CMD" and compose["services"]["gpu"]["healthcheck"]["test"] == command
    port = server.rest_target.rpartition(":")[2]

    def exit_code(model, port):
        script = command[3].replace("/8501", f"/{port}").replace("funnel_exact", model)
        return subprocess.run(["bash", "-c", script], capture_output=True).returncode

    assert exit_code("retrieval", port) == 0
    assert exit_code("nothing", port) != 0
    assert exit_code("retrieval", 1) != 0, "nothing listens there"


def test_the_dockerfile_passes_the_linter_which_can_fail(tmp_path):
    done = run("hadolint", SERVING / "Dockerfile")
    assert done.returncode == 0, done.stdout
    broken = tmp_path / "Dockerfile"
    broken.write_text((SERVING / "Dockerfile").read_text().replace("COPY schema", "ADD schema"))
    assert run("hadolint", broken).returncode == 1


def test_the_build_context_holds_what_the_dockerfile_copies():
    patterns = [
        line.strip()
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.strip() and line[0] != "#"
    ]

    def is_sent(path):
        sent = True
        for pattern in patterns:  # the last match decides; a pattern also matches what lies below it
            negated, pattern = pattern.startswith("!"), pattern.removeprefix("!")
            paths = [path, *(parent.as_posix() for parent in Path(path).parents)]
            if any(fnmatch.fnmatch(each, pattern) for each in paths if each != "."):
                sent = negated
        return sent

    copied = re.findall(r"^COPY (?!--from)(\S+)", (SERVING / "Dockerfile").read_text(), flags=re.MULTILINE)
    assert set(copied) == {"schema", "trainer", "serving", "serving/requirements.lock"}
    assert all((ROOT / path).exists() and is_sent(path) for path in copied)
    assert is_sent("serving/model_server.py")
    assert not any(
        map(is_sent, ("README.md", ".venv/bin/python", "serving/settings/models.config", "tests/oracles.py"))
    )


def locked(path):
    return dict(re.findall(r"^([a-z0-9.-]+)==(\S+)", path.read_text(), flags=re.MULTILINE))


def test_the_image_gets_the_locked_versions_and_all_that_the_server_imports():
    image, whole = locked(SERVING / "requirements.lock"), locked(ROOT / "requirements.lock")
    # The lock of the whole project leaves out what pip itself brings.
    assert {name: version for name, version in image.items() if name != "wheel"}.items() <= whole.items()
    wanted = {
        line
        for line in (SERVING / "requirements.in").read_text().splitlines()
        if line and not line.startswith("#")
    }
    tops = {module.split(".")[0] for module in imported_modules("serving.model_server")}
    imported = tops - sys.stdlib_module_names - {"schema", "trainer", "serving"}
    hint = "put the difference into serving/requirements.in and run `make lock`"
    assert {DISTRIBUTIONS.get(top, top) for top in imported} == wanted, hint


def imported_modules(start):
    """Modules that a module of this repository imports, directly or through others of the repository."""
    found, waiting = set(), {start}
    while waiting:
        module = waiting.pop()
        path = ROOT / (module.replace(".", "/") + ".py")
        if module in found or (found.add(module) or not path.is_file()):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                waiting |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                waiting |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {module for module in found if "." not in module or not (ROOT / module.split(".")[0]).is_dir()}
