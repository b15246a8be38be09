"""Compose and monitoring wired to files that exist, the entry point, and the Dockerfile by hadolint."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from stepvideo_serve.config import ServeConfig
from stepvideo_serve.launch.server import EXIT_MARGIN_S, TRITON_EXIT_S
from stepvideo_serve.parallel.layout import Layout
from tests.docker.test_deployment import server_arguments


def mounts(compose: dict[str, Any]) -> list[tuple[str, str]]:
    """Host side and container side of what is bound from this repository."""
    named = [volume for service in compose["services"].values() for volume in service["volumes"]]
    every = [re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", volume) for volume in named]  # by their defaults
    split = [volume.split(":") for volume in every if volume.startswith(".")]
    return [(source, inside) for source, inside, *_ in split]


def groups(compose: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The servers that share a node, each with a part of its GPUs."""
    return {name: one for name, one in compose["services"].items() if one.get("profiles") in (["2x4"], ["8x1"])}


def test_compose_mounts_files_that_exist_read_only(compose: dict[str, Any], docker: Path) -> None:
    assert len(mounts(compose)) >= 6
    for source, _ in mounts(compose):
        assert (docker / source).is_file(), source
    bound = [v for s in compose["services"].values() for v in s["volumes"] if v.startswith((".", "$"))]
    assert all(volume.endswith(":ro") for volume in bound)


def test_compose_publishes_on_loopback_only(compose: dict[str, Any]) -> None:
    published = [port for service in compose["services"].values() for port in service["ports"]]
    assert len(published) >= 4
    assert all(port.startswith("127.0.0.1:") for port in published)


def test_compose_pins_images_and_takes_rights_away(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        image = re.fullmatch(r"\$\{([A-Z]+)_IMAGE:-(.+)\}", service["image"])
        assert image is not None, "a variable names one by its digest"
        assert image[1] == ("STEPVIDEO" if name in groups(compose) else name.upper())
        assert "build" in service or re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+", image[2]), name
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
    assert compose["services"]["stepvideo"]["read_only"] is True
    assert compose["services"]["stepvideo"]["tmpfs"] == ["/tmp:size=8g"]
    assert compose["services"]["gateway"]["read_only"] is True
    assert compose["services"]["gateway"]["tmpfs"] == ["/tmp:size=1g"]
    named = {
        volume.split(":")[0] for s in compose["services"].values() for volume in s["volumes"] if volume[0] not in ".$"
    }
    assert named == set(compose["volumes"])


def test_compose_builds_this_image(compose: dict[str, Any], docker: Path) -> None:
    build = compose["services"]["stepvideo"]["build"]
    context = (docker / build["context"]).resolve()
    assert (context / build["dockerfile"]) == docker / "Dockerfile"
    assert server_arguments(compose["services"]["stepvideo"]["command"]).exit_timeout == 600
    grace_s = int(compose["services"]["stepvideo"]["stop_grace_period"].removesuffix("s"))
    assert grace_s >= 600 + TRITON_EXIT_S + EXIT_MARGIN_S


@pytest.mark.parametrize(
    ("choice", "started"),
    [
        ({}, "-m stepvideo_serve serve --config {config} --address 127.0.0.1 --exit-timeout=5"),
        (
            {"STEPVIDEO_SUPERVISE": "1", "STEPVIDEO_ADDRESS": "0.0.0.0"},
            "-m stepvideo_serve supervise --config {config} --address 0.0.0.0 --exit-timeout=5",
        ),
        ({"STEPVIDEO_SUPERVISE": "yes"}, None),
    ],
)
def test_the_entry_point_starts_the_server_or_its_supervisor(
    docker: Path, choice: dict[str, str], started: str | None
) -> None:
    config = str(docker / "serve.toml")
    environment = {"PATH": "/usr/bin:/bin", "STEPVIDEO_PYTHON": "echo", "STEPVIDEO_CONFIG": config, **choice}
    command = [str(docker / "entrypoint.sh"), "--exit-timeout=5"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if started is None:
        assert done.returncode == 1
        assert done.stderr.startswith("error: STEPVIDEO_SUPERVISE must be 0 or 1, got yes")
    else:
        assert done.stdout.strip() == started.format(config=config)


def test_prometheus_scrapes_the_servers_of_compose(compose: dict[str, Any], docker: Path) -> None:
    """Whichever arrangement STEPVIDEO_GROUPS names."""
    prometheus = yaml.safe_load((docker / "monitoring" / "prometheus.yml").read_text(encoding="utf-8"))
    [job] = prometheus["scrape_configs"]
    [[listed]] = [entry["files"] for entry in job["file_sd_configs"]]
    mounted = dict(mounts(compose))
    folder = Path(mounted["./monitoring/prometheus.yml"]).parent
    assert mounted["./monitoring/targets/1x8.yml"] == str(folder / listed)
    profiles = {name: one["profiles"][0] for name, one in groups(compose).items()}
    for arrangement in ("1x8", "2x4", "8x1"):
        path = docker / "monitoring" / "targets" / f"{arrangement}.yml"
        [entry] = yaml.safe_load(path.read_text(encoding="utf-8"))
        servers = [name for name, profile in profiles.items() if profile == arrangement] or ["stepvideo"]
        assert entry["targets"] == [f"{server}:8002" for server in servers]
    assert {str(folder / name) for name in prometheus["rule_files"]} == {mounted["./monitoring/alerts.yml"]}


@pytest.mark.parametrize(("profile", "count", "gpus"), [("2x4", 2, 4), ("8x1", 8, 1)])
def test_groups_share_the_gpus_of_a_node(
    compose: dict[str, Any], docker: Path, profile: str, count: int, gpus: int
) -> None:
    members = [one for one in groups(compose).values() if one["profiles"] == [profile]]
    assert len(members) == count
    devices = [device for one in members for device in one["deploy"]["resources"]["reservations"]["devices"]]
    assert [len(device["device_ids"]) for device in devices] == [gpus] * count
    assert sorted(int(gpu) for device in devices for gpu in device["device_ids"]) == list(range(8))
    assert len({port for one in members for port in one["ports"]}) == count
    [toml] = {source for one in members for source, inside in own_mounts(one) if inside.endswith("serve.toml")}
    assert toml == f"./groups/{profile}.toml"
    assert Layout.parse(ServeConfig.load(docker / toml).denoiser.layout).world_size == gpus
    server = compose["services"]["stepvideo"]
    own = {"profiles", "ports", "volumes", "deploy"}
    assert all({**one, **{key: server.get(key) for key in own}} == {**server, "profiles": None} for one in members)


def own_mounts(service: dict[str, Any]) -> list[tuple[str, str]]:
    return mounts({"services": {"one": service}})


def test_grafana_finds_prometheus_and_the_dashboard(compose: dict[str, Any], docker: Path) -> None:
    [source] = yaml.safe_load((docker / "grafana" / "datasource.yaml").read_text(encoding="utf-8"))["datasources"]
    service = re.fullmatch(r"http://(\w+):9090", source["url"])
    assert service is not None
    assert service[1] in compose["services"]
    assert set(compose["services"]["grafana"]["networks"]) & set(compose["services"][service[1]]["networks"])
    [provider] = yaml.safe_load((docker / "grafana" / "dashboards.yaml").read_text(encoding="utf-8"))["providers"]
    dashboard = dict(mounts(compose))["./monitoring/dashboard.json"]
    assert str(Path(dashboard).parent) == provider["options"]["path"]


@pytest.mark.parametrize("name", ["Dockerfile", "gateway.Dockerfile"])
def test_hadolint_has_nothing_to_say(docker: Path, name: str) -> None:
    program = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([str(program), str(docker / name)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
