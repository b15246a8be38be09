"""The gateway deployed: its image's files, its service of compose, its part of the chart; the probes ask a real one."""

import json
import re
import subprocess
import sys
import tomllib
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from stepvideo_gateway.config import DATABASE_VARIABLE, SECRET_VARIABLE, GatewayConfig
from tests.docker.chart import Helm, Manifest, Values, only
from tests.docker.test_deployment import SETTINGS
from tests.gateway.conftest import gateway_process

OWN_SERVER = {"matchLabels": {"app.kubernetes.io/name": "stepvideo-serve", "app.kubernetes.io/instance": "video"}}
GATEWAY = {"matchLabels": {"app.kubernetes.io/name": "stepvideo-gateway", "app.kubernetes.io/instance": "video"}}


@pytest.fixture(scope="module", params=["everything", "gateway"])
def manifests(request: pytest.FixtureRequest, helm: Helm, tmp_path_factory: pytest.TempPathFactory) -> list[Manifest]:
    return helm.render(SETTINGS[request.param], tmp_path_factory.mktemp("values"))


@pytest.fixture
def dockerfile(docker: Path) -> str:
    return (docker / "gateway.Dockerfile").read_text(encoding="utf-8")


def pod(manifests: list[Manifest]) -> dict[str, Any]:
    spec = only(manifests, "Deployment", "gateway")["spec"]["template"]["spec"]
    assert isinstance(spec, dict)
    return spec


def configuration(manifests: list[Manifest], folder: Path) -> GatewayConfig:
    path = folder / "gateway.toml"
    path.write_text(only(manifests, "ConfigMap", "gateway")["data"]["gateway.toml"], encoding="utf-8")
    return GatewayConfig.load(path)


def test_the_image_has_one_base_and_what_is_copied_is_sent_to_the_builder(root: Path, dockerfile: str) -> None:
    assert re.findall(r"^ARG PYTHON=(.+)$", dockerfile, re.MULTILINE) == ["python:3.12.13-slim-trixie"]
    assert set(re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE)) == {"${PYTHON}"}
    assert re.findall(r"pip install .* /packages (.+)$", dockerfile, re.MULTILINE) == ["./client ./gateway"]
    sent = [line[1:] for line in (root / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = re.findall(r"^COPY (?!--from)(\S+) \S+$", dockerfile, re.MULTILINE)
    assert copied == ["client", "gateway", "docker/gateway.toml"]
    for source in copied:
        assert (root / source).exists(), source
        assert source.split("/")[0] in sent, source


def test_the_image_is_not_root_and_writes_to_data(dockerfile: str) -> None:
    last_stage = dockerfile.rpartition("\nFROM ")[2]
    user = re.search(r"^USER (\d+)$", last_stage, re.MULTILINE)
    assert user is not None
    assert f"useradd --uid {user[1]} --gid {user[1]} " in last_stage
    assert f"install --directory --owner={user[1]} --group={user[1]} --mode=0700 /data" in last_stage
    [entry] = re.findall(r"^ENTRYPOINT (\[.*\])$", last_stage, re.MULTILINE)
    assert json.loads(entry) == ["python", "-m", "stepvideo_gateway", "--config", "/etc/stepvideo/gateway.toml"]
    assert "COPY docker/gateway.toml /etc/stepvideo/gateway.toml\n" in last_stage


def test_compose_has_it_where_it_is_asked_for(compose: dict[str, Any], docker: Path) -> None:
    service = compose["services"]["gateway"]
    assert [name for name, each in compose["services"].items() if "gateway" in each.get("profiles", ())] == ["gateway"]
    assert (docker / service["build"]["context"] / service["build"]["dockerfile"]).resolve() == (
        docker / "gateway.Dockerfile"
    )
    passed_on_where_set = {DATABASE_VARIABLE: None, SECRET_VARIABLE: None}
    assert service["environment"] == passed_on_where_set
    config = GatewayConfig.load(docker / "gateway.toml")
    assert service["ports"] == [f"127.0.0.1:{config.listen.port}:{config.listen.port}"]
    [address] = config.servers.urls
    host, port = address.split(":")
    assert port == compose["services"][host]["ports"][0].rpartition(":")[2]
    assert set(service["networks"]) & set(compose["services"][host]["networks"])
    assert dict(volume.split(":")[:2] for volume in service["volumes"])["gateway"] == "/data"


def test_files_and_chart_put_everything_under_data(
    manifests: list[Manifest], docker: Path, tmp_path: Path, helm: Helm
) -> None:
    for config in (GatewayConfig.load(docker / "gateway.toml"), configuration(manifests, tmp_path)):
        assert config.listen.address == "0.0.0.0"
        assert config.api.require_key
        assert config.jobs.database == "sqlite+aiosqlite:////data/jobs.sqlite"
        assert config.jobs.folder == Path("/data/videos")
    [container] = pod(manifests)["containers"]
    assert {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")} == {"/data", "/tmp"}
    kept = {volume["name"]: volume for volume in pod(manifests)["volumes"]}
    assert kept["data"]["persistentVolumeClaim"]["claimName"] in ("step-video-gateway", "shared-videos")
    lost = helm.render({"gateway": {"enabled": True, "volume": {"claim": ""}}}, tmp_path)
    assert {volume["name"]: volume for volume in pod(lost)["volumes"]}["data"] == {
        "name": "data",
        "emptyDir": {"sizeLimit": "20Gi"},
    }


def test_it_is_off_unless_it_is_asked_for(helm: Helm, tmp_path: Path) -> None:
    text = helm.template({}, tmp_path).stdout
    assert "kind: Deployment" in text
    assert "gateway" not in text


def test_it_runs_as_nobody_and_writes_nowhere_else(manifests: list[Manifest]) -> None:
    [container] = pod(manifests)["containers"]
    assert pod(manifests)["securityContext"]["runAsNonRoot"] is True
    assert pod(manifests)["automountServiceAccountToken"] is False
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        each["name"] for each in pod(manifests)["volumes"]
    }


def test_it_asks_the_servers_and_the_database_that_are_named(helm: Helm, tmp_path: Path) -> None:
    alone, several = (helm.render(SETTINGS[name], tmp_path) for name in ("gateway", "everything"))
    service = only(alone, "Service")["metadata"]["name"]
    assert configuration(alone, tmp_path).servers.urls == (f"{service}:8001",)
    named = ("first-stepvideo-serve:8001", "second-stepvideo-serve.other:8001")
    assert configuration(several, tmp_path).servers.urls == named
    assert "env" not in pod(alone)["containers"][0]
    database = {"secretKeyRef": {"name": "stepvideo-database", "key": "address"}}
    webhooks = {"secretKeyRef": {"name": "stepvideo-webhooks", "key": "secret"}}
    assert pod(several)["containers"][0]["env"] == [
        {"name": DATABASE_VARIABLE, "valueFrom": database},
        {"name": SECRET_VARIABLE, "valueFrom": webhooks},
    ]
    assert pod(several)["containers"][0]["image"] == f"registry.example.org/gateway:1.3@sha256:{'0b' * 32}"
    strategies = [only(each, "Deployment", "gateway")["spec"]["strategy"]["type"] for each in (alone, several)]
    assert strategies == ["Recreate", "RollingUpdate"]


def test_it_has_certificates_for_servers_with_tls(helm: Helm, tmp_path: Path) -> None:
    security = {"secret": "gateway-tls", "mutual": True}
    values: Values = {"tls": {"secret": "server-tls", "mutual": True}, "gateway": {"enabled": True, "tls": security}}
    manifests = helm.render(values, tmp_path)
    servers = configuration(manifests, tmp_path).servers
    named = (servers.root_certificates, servers.private_key, servers.certificate_chain)
    assert named == ("/tls/ca.crt", "/tls/tls.key", "/tls/tls.crt")
    assert {"name": "tls", "mountPath": "/tls", "readOnly": True} in pod(manifests)["containers"][0]["volumeMounts"]
    volumes = {volume["name"]: volume for volume in pod(manifests)["volumes"]}
    assert volumes["tls"]["secret"] == {"secretName": "gateway-tls", "defaultMode": 0o440}
    one_way: Values = {
        "tls": {"secret": "server-tls"},
        "gateway": {"enabled": True, "tls": {"secret": "gateway-tls"}},
    }
    assert configuration(helm.render(one_way, tmp_path), tmp_path).servers.security == {
        "tls": False,
        "root_certificates": "/tls/ca.crt",
        "private_key": None,
        "certificate_chain": None,
    }


def test_only_the_gateway_and_who_is_listed_reach_the_server(helm: Helm, tmp_path: Path) -> None:
    def rules(manifests: list[Manifest], part: str, way: str, end: str) -> list[tuple[Any, set[Any]]]:
        found = only(manifests, "NetworkPolicy", part)["spec"][way]
        return [(rule[end], {port["port"] for port in rule["ports"]}) for rule in found]

    closed: Values = {
        "networkPolicy": {"clients": [], "monitoring": []},
        "gateway": {"enabled": True, "clients": [], "egress": []},
    }
    manifests = helm.render(closed, tmp_path)
    assert rules(manifests, "serve", "ingress", "from") == [([{"podSelector": GATEWAY}], {"grpc"})]
    assert not only(manifests, "NetworkPolicy", "gateway")["spec"]["ingress"]
    assert rules(manifests, "gateway", "egress", "to") == [([{"podSelector": OWN_SERVER}], {8001})]
    for part, own in (("serve", OWN_SERVER), ("gateway", GATEWAY)):
        assert only(manifests, "NetworkPolicy", part)["spec"]["podSelector"] == own
        labels = only(manifests, "Deployment", part)["spec"]["template"]["metadata"]["labels"]
        assert own["matchLabels"].items() <= labels.items()
        assert only(manifests, "Service", part)["spec"]["selector"] == own["matchLabels"]

    everything = helm.render(SETTINGS["everything"], tmp_path)
    [(peers, ports)] = rules(everything, "gateway", "ingress", "from")
    names = [peer["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"] for peer in peers]
    assert (names, ports) == (["ingress", "monitoring"], {"http"})
    assert [ports for _, ports in rules(everything, "gateway", "egress", "to")] == [{8001}, {5432}]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"replicas": 2}, "gateway.servers must name each server where a release has several pods, got none"),
        ({"autoscaling": {"enabled": True}}, "gateway.servers must name each server"),
        ({"tls": {"secret": "tls"}}, "gateway.tls.secret must be set where tls.secret is"),
        ({"tls": {"secret": "a", "mutual": True}, "gateway": {"tls": {"secret": "b"}}}, "gateway.tls.mutual where"),
        ({"gateway": {"replicas": 2}}, "gateway.database.secret and gateway.volume.claim must be set"),
        ({"gateway": {"replicas": 2, "database": {"secret": "a"}, "volume": {"claim": ""}}}, "gateway.volume.claim"),
        ({"gateway": {"servers": ["http://a:8001"]}}, "servers"),
        ({"gateway": {"config": "nothing"}}, "config"),
        ({"gateway": {"image": {"digest": "0b"}}}, "digest"),
        ({"gateway": {"volume": {"sizeLimit": "lots"}}}, "sizeLimit"),
        ({"gateway": {"listen": "0.0.0.0"}}, "listen"),
    ],
)
def test_values_that_cannot_work_are_refused(helm: Helm, tmp_path: Path, values: dict[str, Any], message: str) -> None:
    asked = {**values, "gateway": {"enabled": True, **values.get("gateway", {})}}
    assert message in helm.refusal(asked, tmp_path)


def test_the_schema_knows_what_the_groups_hold(helm: Helm) -> None:
    schema = json.loads((helm.chart / "values.schema.json").read_text(encoding="utf-8"))
    values = yaml.safe_load((helm.chart / "values.yaml").read_text(encoding="utf-8"))["gateway"]
    known = schema["properties"]["gateway"]["properties"]
    assert {name: set(values[name]) for name in ("image", "database", "volume")} == {
        name: set(known[name]["properties"]) for name in ("image", "database", "volume")
    }
    assert set(values["webhooks"]) == set(values["database"])
    with pytest.raises(jsonschema.ValidationError, match="claims"):
        jsonschema.validate({"claims": "a"}, {**schema, **known["volume"]})


def answer(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=30) as found:
            return int(found.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_probes_ask_what_a_real_gateway_answers(
    root: Path, docker: Path, dockerfile: str, manifests: list[Manifest], tmp_path: Path
) -> None:
    """The image's configuration on a free port, its server away: probes of the pod say yes, the image's check no."""
    text = (docker / "gateway.toml").read_text(encoding="utf-8")
    port = tomllib.loads(text)["listen"]["port"]
    assert port == pod(manifests)["containers"][0]["ports"][0]["containerPort"]
    assert f"\nEXPOSE {port}\n" in dockerfile
    config = tmp_path / "gateway.toml"
    changed = text.replace("/data", f"{tmp_path}").replace(f"port = {port}", "port = 0")
    config.write_text(changed.replace("stepvideo:8001", "127.0.0.1:9"), encoding="utf-8")
    [check] = re.findall(r"^HEALTHCHECK .*\\\n +CMD (\[.*\])$", dockerfile, re.MULTILINE)
    _, *arguments = json.loads(check)
    with gateway_process(root, config, tmp_path / "log") as running:
        url = running.url.replace("0.0.0.0", "127.0.0.1")
        for name in ("startupProbe", "readinessProbe", "livenessProbe"):
            probe = pod(manifests)["containers"][0][name]["httpGet"]
            assert probe["port"] == "http"
            assert answer(url + probe["path"]) == 200
        assert answer(f"{url}/health") == 503
        assert answer(f"{url}/v1/models") == 401
        for path, code in (("/health", 1), ("/openapi.json", 0)):
            there = [word.replace(f"http://127.0.0.1:{port}/health", f"{url}{path}") for word in arguments]
            assert there != arguments
            done = subprocess.run([sys.executable, *there], capture_output=True, text=True, check=False, timeout=60)
            assert done.returncode == code, done.stderr
