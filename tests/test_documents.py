"""What documents say is so: tests that they cite, codes, alerts, predicted figures, the table of support, links."""

import argparse
import ast
import configparser
import json
import os
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from export.engines.toolkit import SMS, check_target
from stepvideo_serve.errors import ExportError, RequestError
from stepvideo_serve.geometry import VideoGeometry
from stepvideo_serve.launch.install import ADVISORIES, MINIMUM_NAME
from stepvideo_serve.launch.options import GRPC_OPERATOR_HEADER, OPERATOR_HEADER, add_server_arguments
from stepvideo_serve.launch.server import EXIT_MARGIN_S, TRITON_EXIT_S
from stepvideo_serve.memory.predicted import predicted
from stepvideo_serve.memory.sizes import ModelSize, Workload
from stepvideo_serve.parallel.layout import Layout
from stepvideo_serve.planning.cost import placements_of
from stepvideo_serve.planning.layouts import main as plan_layout
from stepvideo_serve.planning.model_size import PUBLISHED, model_size, workload


@pytest.fixture
def security(root: Path) -> str:
    return (root / "SECURITY.md").read_text(encoding="utf-8")


@pytest.fixture
def operations(root: Path) -> str:
    return (root / "docs" / "operations.md").read_text(encoding="utf-8")


def section(text: str, title: str) -> str:
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found is not None, title
    return found[1]


def rows(text: str) -> list[list[str]]:
    """The cells of a table's rows, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def cited_tests(root: Path, text: str) -> int:
    """How many tests the text names; all of them exist."""
    tests = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    for path, name in tests:
        tree = ast.parse((root / path).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{path}::{name}"
    return len(tests)


def test_every_protection_cites_a_test_that_exists(root: Path, security: str) -> None:
    enforced = section(security, "What is enforced, and the test that shows it")
    by_attacker = dict(re.findall(r"^### ([^\n]+)\n(.*?)(?=^### |\Z)", enforced, re.MULTILINE | re.DOTALL))
    assert list(by_attacker) == [
        "A caller over gRPC or HTTP",
        "A caller with shared memory",
        "A local user of the machine",
        "Who can write to a folder",
        "Who holds a log",
    ]
    cited = 0
    for text in by_attacker.values():
        found = rows(text)
        assert found
        for threat, *_, shown_by in found:
            here = cited_tests(root, shown_by)
            assert here, threat
            cited += here
    assert cited > 60


def test_every_promise_cites_a_test_that_exists_or_says_why_none_can(root: Path) -> None:
    text = (root / "docs" / "promises.md").read_text(encoding="utf-8")
    titles = re.findall(r"^## (.+)$", text, re.MULTILINE)
    found = [row for title in titles for row in rows(section(text, title))]
    for promise, asked_by in found:
        by_reference = re.match(r"nothing: \w|rows of \[|\[faults", asked_by)
        assert cited_tests(root, asked_by) or by_reference, promise
    assert len(found) > 40


def test_the_command_that_checks_a_configuration_works(root: Path, operations: str, tmp_path: Path) -> None:
    found = re.search(r"`python (-m stepvideo_serve doctor --config serve\.toml)`", operations)
    assert found is not None
    (tmp_path / "serve.toml").write_text((root / "serve.toml").read_text(encoding="utf-8"), encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": str(root)}
    line = [sys.executable, *found[1].split(), "--json"]

    def configuration() -> dict[str, str]:
        done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        row: dict[str, str] = json.loads(done.stdout)["checks"][0]
        return row

    assert configuration()["level"] == "ok"
    (tmp_path / "serve.toml").write_text("[model]\nspeed = 11\n", encoding="utf-8")
    assert (configuration()["level"], "speed" in configuration()["found"]) == ("fault", True)


def test_the_lowest_release_and_its_advisories(security: str) -> None:
    text = section(security, rf"The lowest release: Triton {re.escape(MINIMUM_NAME)}")
    assert set(re.findall(r"CVE-\d+-\d+", text)) == set(ADVISORIES.split(", "))


def subclasses(kind: type[RequestError]) -> set[type[RequestError]]:
    return {kind}.union(*(subclasses(child) for child in kind.__subclasses__()))


def test_every_error_code_has_a_cause_and_a_remedy(operations: str) -> None:
    table = {row[0]: row[1:] for row in rows(section(operations, "Error codes"))}
    assert set(table) == {kind.code for kind in subclasses(RequestError)}
    assert all(len(row) == 3 and all(row) for row in table.values())


def test_every_alert_is_in_the_runbook(root: Path, operations: str) -> None:
    groups = yaml.safe_load((root / "docker" / "monitoring" / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    alerts = [rule["alert"] for group in groups for rule in group["rules"] if "alert" in rule]
    table = {row[0]: row[1:] for row in rows(section(operations, "Runbook"))}
    assert sorted(table) == sorted(alerts)
    assert all(len(row) == 2 and all(row) for row in table.values())


def sizing() -> list[list[str]]:
    path = Path(__file__).parents[1] / "docs" / "operations.md"
    return rows(section(path.read_text(encoding="utf-8"), "Sizing"))


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `layouts --json` prints, and of it the layout that it recommends."""
    assert plan_layout([*arguments, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    [chosen] = [entry for entry in plan["layouts"] if entry["layout"] == plan["recommended"]]
    return plan, chosen


@pytest.fixture(scope="module")
def both_orientations() -> tuple[ModelSize, Workload]:
    """What engines for 544x992 and 992x544 ask for."""
    return model_size(PUBLISHED), workload(PUBLISHED, VideoGeometry(102, 544, 992), 50, both_orientations=True)


def gib(entry: Mapping[str, Any], step_llm: str) -> str:
    return f"{entry['memory_bytes']['fullest_gpu'][step_llm] / 2**30:.0f} GiB"


@pytest.mark.parametrize("row", sizing(), ids=lambda row: f"{row[0]} {row[1]}")
def test_the_sizing_table_is_the_planners(
    row: list[str], both_orientations: tuple[ModelSize, Workload], capsys: pytest.CaptureFixture[str]
) -> None:
    """And so the ledger's, whose sums are those of the processes on a GPU."""
    gpus, precision, layout, step_llm, memory, both, step, request = row
    count, gpu = gpus.split(" x ")
    arguments = ("--gpu", gpu, "--gpus", count, "--precision", precision)
    plan, chosen = planned(capsys, *arguments)
    assert layout == f"`{plan['recommended']}`"
    assert step_llm == chosen["step_llm"]
    assert memory == gib(chosen, step_llm)
    assert step == f"{chosen['step_s']['total']:.2f} s"
    assert request == f"{chosen['request_s']:.0f} s"
    on_gpu: Counter[int] = Counter()
    for holding in chosen["memory_bytes"]["holdings"]:
        on_gpu[holding["gpu"]] += holding["total"]
    assert max(on_gpu.values()) == chosen["memory_bytes"]["fullest_gpu"][step_llm]
    assert max(on_gpu.values()) <= chosen["memory_bytes"]["available"]
    size, turned = both_orientations
    place = placements_of(Layout.parse(plan["recommended"]), size.llm_groups)[step_llm]
    fullest = max(predicted(size, place, turned, precision).by_gpu.values())
    assert both == (f"{fullest / 2**30:.0f} GiB" if fullest <= chosen["memory_bytes"]["available"] else "no")


def test_the_table_of_groups_is_the_planners(operations: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--gpu", "H100", "--gpus", "8", "--precision", "fp8", "--gpu-hour", "2.5")
    plan, _ = planned(capsys, *arguments)
    found = [row for row in rows(section(operations, "Several groups on a node")) if len(row) == 6]
    assert found == [
        [
            f"{group['groups']} x {group['gpus']}",
            f"`{group['layout']}`",
            f"{group['request_s']:.0f} s",
            f"{group['videos_per_hour']:.1f}",
            f"{group['gpu_s']:.0f} s",
            f"{group['cost']:.2f}",
        ]
        for group in plan["groups"]
    ]


def test_keys_that_are_named_exist(root: Path, operations: str) -> None:
    tables = tomllib.loads((root / "serve.toml").read_text(encoding="utf-8"))
    named = re.findall(r"`\[(\w+)\] (\w+)(?: = [^`]*)?`", operations)
    assert len(named) >= 4
    for table, key in named:
        assert key in tables[table], f"[{table}] {key}"
    for key in ("max_parks", "aging_s", "max_queued", "step_slack_s", "max_resumes"):
        assert f"`{key}`" in operations
        assert key in tables["denoiser"]


def test_the_operator_headers(operations: str) -> None:
    assert f"`{GRPC_OPERATOR_HEADER}`" in operations
    assert f"`{OPERATOR_HEADER}`" in operations


@pytest.mark.parametrize("name", ["SECURITY.md", "docs/operations.md", "docs/promises.md"])
def test_links_and_paths_lead_somewhere(root: Path, name: str) -> None:
    path = root / name
    text = path.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)(?:#[\w-]+)?\)", text) if "://" not in link]
    paths = re.findall(r"`((?:docker|docs|tests|perf|client)/[\w./-]+)", text)
    for target in [path.parent / link for link in links] + [root / found for found in paths]:
        assert target.exists(), target
    assert links or paths


def test_the_systemd_unit_gives_the_requests_their_time(operations: str) -> None:
    """The launcher alone is signalled, and SIGKILL comes after all that it waits for."""
    [text] = re.findall(r"^```ini\n(.*?)^```", operations, re.MULTILINE | re.DOTALL)
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string(text)
    service = unit["Service"]
    program, *words = service["ExecStart"].split()
    assert (Path(program).is_absolute(), words[:3]) == (True, ["-m", "stepvideo_serve", "supervise"])
    parser = argparse.ArgumentParser()
    add_server_arguments(parser, (1, 2, 3))
    exit_timeout_s = parser.parse_args(words[3:]).exit_timeout
    assert service["KillMode"] == "mixed"
    assert int(service["TimeoutStopSec"]) > exit_timeout_s + TRITON_EXIT_S + EXIT_MARGIN_S


def test_the_readme_can_be_read_at_once(root: Path) -> None:
    assert len((root / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


def documents() -> list[Path]:
    root = Path(__file__).parents[1]
    folders = ("", "docs", "client", "gateway", "kernels", "comfyui", "toyworld/checkpoint", "tests/fakes")
    return [path for folder in folders for path in sorted((root / folder).glob("*.md"))]


def anchors(path: Path) -> set[str]:
    """What links to the sections of a document are called, as GitHub does."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(path: Path, text: str) -> list[str]:
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    targets = [(link, *link.partition("#")[::2]) for link in links if "://" not in link]
    return [
        link
        for link, name, anchor in targets
        if not (target := path.parent / name if name else path).exists() or (anchor and anchor not in anchors(target))
    ]


def test_every_link_leads_to_a_section_that_exists(root: Path) -> None:
    found = {path: broken_links(path, path.read_text(encoding="utf-8")) for path in documents()}
    assert {path.name for path in found} >= {"README.md", "CONTRIBUTING.md", "architecture.md"}
    assert not {str(path): links for path, links in found.items() if links}
    wrong = "[a](docs/gone.md) [b](README.md#gone) [c](#gone) [d](README.md#the-tree) [e](docs/gpu.md)"
    assert broken_links(root / "README.md", wrong) == ["docs/gone.md", "README.md#gone", "#gone"]


def test_the_index_has_every_guide(root: Path) -> None:
    index = (root / "docs" / "README.md").read_text(encoding="utf-8")
    guides = {path.name for path in (root / "docs").glob("*.md")} - {"README.md"}
    assert guides == set(re.findall(r"\]\(([\w-]+\.md)(?:#[\w-]+)?\)", index))


def test_the_summary_of_faults_is_that_of_its_cases(root: Path) -> None:
    """Least and most seconds of every case of a fault but those of "preset", which came later."""
    text = (root / "docs" / "faults.md").read_text(encoding="utf-8").replace("|---|", "| --- |")
    head, _, below = text.partition("## Every case")
    cases = [case for case in rows(below) if case[2] != "preset"]
    summary = rows(head)
    assert len(summary) == 6
    for fault, *spans, _ in summary:
        own = [case for case in cases if case[0] == fault]
        assert len(own) == 12
        for column, span in enumerate(spans, start=3):
            seconds = [float(case[column].removesuffix(" s")) for case in own if case[column] != "not lost"]
            assert span == f"{min(seconds)} to {max(seconds)} s", (fault, column)


def test_the_table_of_support_stands_once_and_says_what_can_be_built(root: Path) -> None:
    """Each target of both TensorRTs has one row, and a cell is "impossible" where `check_target` refuses it."""
    head = "| GPU | backend |"
    assert [path.name for path in documents() if head in path.read_text(encoding="utf-8")] == ["gpu.md"]
    assert "docs/gpu.md#built-run-measured" in (root / "README.md").read_text(encoding="utf-8")
    table = rows(section((root / "docs" / "gpu.md").read_text(encoding="utf-8"), "Built, run, measured"))
    seen = []
    for gpu, backends, *cells in table:
        for backend in re.findall(r"`(tensorrt\w*)`", backends):
            for sm in map(int, re.findall(r"\d+", gpu.partition("(SM ")[2])):
                seen.append((backend, sm))
                for precision, cell in zip(("fp32", "bf16", "fp8", "nvfp4"), cells, strict=True):
                    assert (cell == "impossible") == refused(backend, sm, precision), (backend, sm, precision)
    assert sorted(seen) == sorted((backend, sm) for backend, sms in SMS.items() for sm in sms)


def refused(backend: str, sm: int, precision: str) -> bool:
    try:
        check_target(backend, sm, precision)
    except ExportError:
        return True
    return False
