"""The chart rendered by Helm and checked against Kubernetes' schemas; compose and monitoring wired to files that exist;
the Dockerfile by hadolint."""

import argparse
import copy
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from release.version import version_of
from stepvideo_serve.__main__ import COMMANDS
from stepvideo_serve.config import DenoiserConfig, IdempotencyConfig, ServeConfig
from stepvideo_serve.launch.health import PUBLIC_MODELS
from stepvideo_serve.launch.options import READY_TIMEOUT_S, add_server_arguments
from stepvideo_serve.launch.server import EXIT_MARGIN_S, TRITON_EXIT_S
from stepvideo_serve.launch.supervise import Rules
from stepvideo_serve.parallel.layout import Layout
from stepvideo_serve.serving.observe.metric_families import FAMILIES
from tests.docker.chart import VERSION, Helm, Manifest, Values, of_part, only

KUBERNETES = "1.37"
CUSTOM = ("PodMonitor",)  # kinds that Kubernetes itself does not know

CHART = Path(__file__).parents[2] / "docker" / "chart"
SETTINGS: dict[str, Values] = {
    "defaults": {},
    "everything": {
        "replicas": 3,
        "image": {
            "repository": "registry.example.org/stepvideo",
            "tag": "1.2",
            "digest": f"sha256:{'0a' * 32}",
            "pullSecrets": ["pull"],
        },
        "tls": {"secret": "stepvideo-tls", "mutual": True},
        "operatorKey": {"secret": "stepvideo-operator"},
        "service": {"type": "LoadBalancer", "annotations": {"example.org/internal": "true"}},
        "autoscaling": {"enabled": True, "maxReplicas": 8},
        "podMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "networkPolicy": {"egress": [{"to": [{"podSelector": {}}], "ports": [{"protocol": "TCP", "port": 4318}]}]},
        "nodeSelector": {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"},
        "affinity": {"nodeAffinity": {}},
        "runtimeClassName": "nvidia",
        "podAnnotations": {"example.org/team": "video"},
        "gateway": {
            "enabled": True,
            "image": {"repository": "registry.example.org/gateway", "tag": "1.3", "digest": f"sha256:{'0b' * 32}"},
            "replicas": 2,
            "servers": ["first-stepvideo-serve:8001", "second-stepvideo-serve.other:8001"],
            "database": {"secret": "stepvideo-database", "key": "address"},
            "webhooks": {"secret": "stepvideo-webhooks"},
            "volume": {"claim": "shared-videos"},
            "service": {"type": "LoadBalancer", "annotations": {"example.org/internal": "true"}},
            "clients": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "ingress"}}}],
            "egress": [{"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}], "ports": [{"protocol": "TCP", "port": 5432}]}],
        },
    },
    "gateway": {"gateway": {"enabled": True}},
    "one GPU": {"gpus": 1, "config": '[model]\ndir = "/model"\nengines_dir = "/engines"\n'},
    "host paths": {"volumes": {"model": {"hostPath": "/data/a"}, "engines": {"hostPath": "/data/b"}}},
    "two groups": yaml.safe_load((CHART / "values-2x4.yaml").read_text(encoding="utf-8")),
    "eight groups": yaml.safe_load((CHART / "values-8x1.yaml").read_text(encoding="utf-8")),
    "least": {"networkPolicy": {"enabled": False}, "podDisruptionBudget": {"enabled": False}, "tolerations": []},
}


@pytest.fixture(scope="module")
def rendered(helm: Helm, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Manifest]]:
    """The chart with each of SETTINGS."""
    folder = tmp_path_factory.mktemp("values")
    return {name: helm.render(values, folder) for name, values in SETTINGS.items()}


@pytest.fixture(params=SETTINGS)
def manifests(request: pytest.FixtureRequest, rendered: dict[str, list[Manifest]]) -> list[Manifest]:
    return copy.deepcopy(rendered[request.param])


@pytest.fixture
def everything(rendered: dict[str, list[Manifest]]) -> list[Manifest]:
    return rendered["everything"]


@pytest.fixture
def defaults(rendered: dict[str, list[Manifest]]) -> list[Manifest]:
    return rendered["defaults"]


def server_arguments(given: list[str]) -> argparse.Namespace:
    """What the server makes of a container's arguments."""
    parser = argparse.ArgumentParser()
    add_server_arguments(parser, (8001, 8000, 8002))
    return parser.parse_args(given)


def container(manifests: list[Manifest]) -> dict[str, Any]:
    [found] = only(manifests, "Deployment")["spec"]["template"]["spec"]["containers"]
    assert isinstance(found, dict)
    return found


def test_it_is_the_pinned_helm(helm: Helm) -> None:
    assert f'Version:"v{VERSION}"' in helm.run("version").stdout


def test_helm_lint(helm: Helm) -> None:
    done = helm.run("lint", "--strict", str(helm.chart))
    assert done.returncode == 0, done.stdout
    assert "1 chart(s) linted, 0 chart(s) failed" in done.stdout + done.stderr


def test_kubernetes_takes_every_manifest(manifests: list[Manifest]) -> None:
    for manifest in manifests:
        if manifest["kind"] not in CUSTOM:
            kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


def test_a_wrong_manifest_would_be_noticed(manifests: list[Manifest]) -> None:
    deployment = only(manifests, "Deployment")
    deployment["spec"]["template"]["spec"]["containers"][0]["probe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, KUBERNETES, strict=True)


def test_every_kind_is_rendered(everything: list[Manifest]) -> None:
    both = ["ConfigMap", "Deployment", "NetworkPolicy", "Service"]
    assert sorted(manifest["kind"] for manifest in of_part(everything, "gateway")) == both
    kinds = [*both, "HorizontalPodAutoscaler", "PodDisruptionBudget", "PodMonitor"]
    assert sorted(manifest["kind"] for manifest in of_part(everything, "serve")) == sorted(kinds)
    assert len(everything) == len(both) + len(kinds)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gpus": 3}, "gpus"),
        ({"gpus": 4}, "gpus must be what the layout in config needs, 8 for .*cfg2.sp4.*, got 4"),
        ({"config": '[model]\n[denoiser]\nlayout = "tp4"\n'}, "needs, 4 for .*tp4.*, got 8"),
        ({"gpus": 8, "config": "[model]\n"}, "needs, 1 for the default layout, got 8"),
        ({"tls": {"mutual": True}}, "tls.mutual needs tls.secret"),
        ({"replica": 2}, "replica"),
        ({"replicas": "2"}, "replicas"),
        ({"probes": {"loadMinutes": 0}}, "loadMinutes"),
        ({"volumes": {"model": {"hostPath": "data"}}}, "hostPath"),
        ({"resources": {"limits": {"memory": "lots"}}}, "memory"),
        ({"config": "nothing"}, "config"),
        ({"image": {"digest": "0a" * 32}}, "digest"),
        ({"image": {"digest": "sha256:0a"}}, "digest"),
        ({"temporary": ""}, "temporary"),
    ],
)
def test_values_that_helm_refuses(helm: Helm, tmp_path: Path, values: Values, message: str) -> None:
    assert re.search(message, helm.refusal(values, tmp_path), re.DOTALL)


def test_the_schema_knows_every_value(root: Path) -> None:
    chart = root / "docker" / "chart"
    schema = json.loads((chart / "values.schema.json").read_text(encoding="utf-8"))
    values = yaml.safe_load((chart / "values.yaml").read_text(encoding="utf-8"))
    jsonschema.Draft7Validator.check_schema(schema)
    assert set(values) == set(schema["properties"]) - {"global"}
    for name, value in values.items():
        known = schema["properties"][name].get("properties")
        if known is not None:
            assert set(value) == set(known), name


def test_the_configuration_fits_the_gpus(defaults: list[Manifest], tmp_path: Path, docker: Path) -> None:
    path = tmp_path / "serve.toml"
    path.write_text(only(defaults, "ConfigMap")["data"]["serve.toml"], encoding="utf-8")
    config = ServeConfig.load(path)
    gpus = container(defaults)["resources"]["limits"]["nvidia.com/gpu"]
    assert gpus == str(Layout.parse(config.denoiser.layout).world_size)
    assert config == ServeConfig.load(docker / "serve.toml"), "the image's own configuration, with its layout"


def test_nothing_runs_as_root_or_writes_but_to_scratch(manifests: list[Manifest]) -> None:
    pod, server = only(manifests, "Deployment")["spec"]["template"]["spec"], container(manifests)
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["automountServiceAccountToken"] is False
    assert server["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    written = {mount["name"] for mount in server["volumeMounts"] if not mount.get("readOnly")}
    assert written == {"shared-memory", "tmp"}
    assert {mount["name"] for mount in server["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_what_is_written_is_bounded(manifests: list[Manifest]) -> None:
    """Else one pod fills the disk of its node, and the kubelet evicts its neighbours."""
    volumes = only(manifests, "Deployment")["spec"]["template"]["spec"]["volumes"]
    limits = {volume["name"]: volume["emptyDir"].get("sizeLimit") for volume in volumes if "emptyDir" in volume}
    assert limits == {"shared-memory": "4Gi", "tmp": "8Gi"}
    kept_mib = len(PUBLIC_MODELS) * IdempotencyConfig().max_file_mib
    assert kept_mib <= 8 * 1024 // 2, "what the models keep in files leaves half of it"


def test_a_digest_decides_which_image_runs(everything: list[Manifest], defaults: list[Manifest], root: Path) -> None:
    assert container(everything)["image"] == f"registry.example.org/stepvideo:1.2@sha256:{'0a' * 32}"
    assert container(defaults)["image"] == f"stepvideo-serve:{version_of(root)}"


def test_probes_wait_for_the_engines(manifests: list[Manifest]) -> None:
    server = container(manifests)
    startup = server["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] == 3600
    assert only(manifests, "Deployment")["spec"]["progressDeadlineSeconds"] > 3600
    assert "--ready-timeout=3600" in server["args"]
    grace_s = only(manifests, "Deployment")["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert "--exit-timeout=600" in server["args"]
    _, pause_s = server["lifecycle"]["preStop"]["exec"]["command"]
    assert grace_s >= int(pause_s) + 600 + TRITON_EXIT_S + EXIT_MARGIN_S


def test_every_start_may_take_as_long(
    manifests: list[Manifest], compose: dict[str, Any], docker: Path, root: Path
) -> None:
    """Whichever way a server is started, and the ranks and the probes fit into that."""
    [run] = re.findall(r"^docker run .*\\\n.* stepvideo-serve( .*)?$", (root / "README.md").read_text(), re.MULTILINE)
    given = {
        "by default": [],
        "README": run.split(),
        "compose": compose["services"]["stepvideo"]["command"],
        "chart": container(manifests)["args"],
    }
    times = {where: server_arguments(arguments).ready_timeout for where, arguments in given.items()}
    assert times == dict.fromkeys(given, READY_TIMEOUT_S)
    assert Rules().ready_s == READY_TIMEOUT_S
    assert DenoiserConfig().start_timeout_s <= READY_TIMEOUT_S
    assert re.findall(r"--start-period=(\d+)m", (docker / "Dockerfile").read_text()) == [f"{READY_TIMEOUT_S / 60:g}"]


def test_the_arguments_are_ones_that_the_server_takes(manifests: list[Manifest]) -> None:
    given = server_arguments(container(manifests)["args"])
    assert (given.exit_timeout, given.ready_timeout) == (600, 3600.0)


def probe_commands(manifests: list[Manifest], dockerfile: str) -> Iterator[list[str]]:
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        yield container(manifests)[name]["exec"]["command"]
    [check] = re.findall(r"^HEALTHCHECK .*\\\n +CMD (\[.*\])$", dockerfile, re.MULTILINE)
    yield json.loads(check)


def test_the_probes_can_be_run(defaults: list[Manifest], root: Path) -> None:
    """Against nothing, they say in a sentence that nothing is there."""
    dockerfile = (root / "docker" / "Dockerfile").read_text(encoding="utf-8")
    for python, *arguments in probe_commands(defaults, dockerfile):
        assert python == "python3"
        assert importlib.util.find_spec(arguments[1]) is not None
        assert arguments[2] in COMMANDS
        done = subprocess.run(
            [sys.executable, *arguments, "--url", "127.0.0.1:9"],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 1, done.stderr
        assert "Traceback" not in done.stderr


def test_with_tls_only_tls_is_reachable(defaults: list[Manifest], everything: list[Manifest]) -> None:
    def reachable(manifests: list[Manifest]) -> set[str]:
        ports = {port["name"] for port in container(manifests)["ports"]}
        assert {port["targetPort"] for port in only(manifests, "Service")["spec"]["ports"]} == ports - {"metrics"}
        rules = only(manifests, "NetworkPolicy")["spec"]["ingress"]
        assert {port["port"] for rule in rules for port in rule["ports"]} == ports
        return ports

    assert reachable(everything) == {"grpc", "metrics"}
    assert reachable(defaults) == {"grpc", "http", "metrics"}


def test_nobody_listed_is_nobody_admitted(helm: Helm, tmp_path: Path) -> None:
    policy = only(helm.render({"networkPolicy": {"clients": [], "monitoring": []}}, tmp_path), "NetworkPolicy")
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert not policy["spec"]["ingress"]
    assert not policy["spec"]["egress"]


def test_the_autoscaler_asks_for_metrics_that_exist(everything: list[Manifest], helm: Helm) -> None:
    asked = [
        metric["pods"]["metric"]["name"] for metric in only(everything, "HorizontalPodAutoscaler")["spec"]["metrics"]
    ]
    text = (helm.chart / "files" / "prometheus-adapter.yaml").read_text(encoding="utf-8")
    rules = yaml.safe_load(text)["rules"]["custom"]
    assert (
        asked
        == [rule["name"]["as"] for rule in rules]
        == ["stepvideo_queue_wait_seconds_mean", "stepvideo_queue_length"]
    )
    exported = {name for name, family in FAMILIES.items() if family.kind != "histogram"}
    for name, family in FAMILIES.items():
        if family.kind == "histogram":
            exported |= {f"{name}_{part}" for part in ("sum", "count", "bucket")}
    used = set(re.findall(r"stepvideo_\w+", " ".join(rule["seriesQuery"] + rule["metricsQuery"] for rule in rules)))
    assert used <= exported


def test_the_pod_monitor_finds_the_pods(everything: list[Manifest]) -> None:
    monitor = only(everything, "PodMonitor")
    labels = only(everything, "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= labels.items()
    [endpoint] = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] in {port["name"] for port in container(everything)["ports"]}


def test_the_alerts_know_the_job_of_the_pod_monitor(everything: list[Manifest], docker: Path) -> None:
    jobs = set(re.findall(r'job="(\w+)"', (docker / "monitoring" / "alerts.yml").read_text(encoding="utf-8")))
    [endpoint] = only(everything, "PodMonitor")["spec"]["podMetricsEndpoints"]
    assert jobs == {rule["replacement"] for rule in endpoint["relabelings"] if rule["targetLabel"] == "job"}
