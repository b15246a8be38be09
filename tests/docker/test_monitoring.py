"""The dashboard, the alerts and the guide to them, against what the models declare;
tests/serving/observe/test_metrics.py holds
the same names against a live server."""

import re
from itertools import combinations
from pathlib import Path

import pytest
import yaml

from stepvideo_serve.serving.observe.metric_families import FAMILIES, codes
from tests.docker import promql

OF_PROMETHEUS = {"up": {"job", "instance"}}
OF_EVERY_SAMPLE = {"job", "instance"}


def samples() -> dict[str, set[str]]:
    """The series that the server exports, and their labels."""
    found: dict[str, set[str]] = {}
    for name, family in FAMILIES.items():
        labels = {*family.labels, *OF_EVERY_SAMPLE}
        if family.kind == "histogram":
            found |= {f"{name}_bucket": {*labels, "le"}, f"{name}_sum": labels, f"{name}_count": labels}
        else:
            found[name] = labels
    return found | OF_PROMETHEUS


def test_the_promql_selects_what_is_exported(root: Path) -> None:
    known = samples()
    texts = promql.expressions(root)
    assert len(texts) > 30
    for text in texts:
        selections = list(promql.selected(text))
        assert selections, text
        for name, labels in selections:
            assert labels <= known[name], text
        assert promql.grouped_by(text) <= set.intersection(*(known[name] for name, _ in selections)), text


def test_codes_and_stages_in_matchers_exist(root: Path) -> None:
    named = {code for text in promql.expressions(root) for code in re.findall(r'code=~?"([A-Z_|]+)"', text)}
    assert named
    assert {code for alternatives in named for code in alternatives.split("|")} <= set(codes())


def test_every_metric_is_shown_or_watched(root: Path) -> None:
    used = {name for text in promql.expressions(root) for name, _ in promql.selected(text)}
    stripped = {re.sub("_(bucket|sum|count)$", "", name) for name in used}
    assert set(FAMILIES) <= stripped


def test_panels_do_not_overlap_and_say_their_unit(root: Path) -> None:
    panels = promql.dashboard(root)["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [panel["gridPos"] for panel in panels]
    assert all(place["x"] >= 0 and place["x"] + place["w"] <= 24 for place in places)
    for one, other in combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or above, (one, other)
    for panel in panels:
        if panel["type"] != "row":
            assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
            assert panel["datasource"]["uid"] == "${datasource}", panel["title"]


def test_every_alert_is_explained(root: Path) -> None:
    guide = (root / "docs/observability.md").read_text(encoding="utf-8")
    names = [rule["alert"] for rule in promql.rules(root)]
    assert len(set(names)) == len(names) > 8
    assert re.findall(r"^### (Stepvideo\w+)$", guide, re.MULTILINE) == names
    for rule in promql.rules(root):
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"]
        assert rule["annotations"]["runbook"] == f"docs/observability.md#{rule['alert'].lower()}"


def test_every_metric_is_explained(root: Path) -> None:
    guide = (root / "docs/observability.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(stepvideo_\w+)` \| (\w+) \| ([^|]*) \|", guide, re.MULTILINE)
    told = {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}
    assert told == {name: (family.kind, set(family.labels)) for name, family in FAMILIES.items()}


@pytest.mark.parametrize("name", ["prometheus.yml", "otel-collector.yml", "alerts.yml"])
def test_the_configurations_are_yaml(root: Path, name: str) -> None:
    assert isinstance(yaml.safe_load((root / "docker/monitoring" / name).read_text(encoding="utf-8")), dict)


def test_prometheus_reads_the_alerts_and_scrapes_the_job_that_they_name(root: Path) -> None:
    folder = root / "docker/monitoring"
    config = yaml.safe_load((folder / "prometheus.yml").read_text(encoding="utf-8"))
    assert all((folder / name).is_file() for name in config["rule_files"])
    jobs = {job["job_name"] for job in config["scrape_configs"]}
    texts = " ".join(promql.expressions(root))
    assert set(re.findall(r'job="(\w+)"', texts)) == jobs


def test_a_collector_pipeline_uses_what_is_configured(root: Path) -> None:
    config = yaml.safe_load((root / "docker/monitoring/otel-collector.yml").read_text(encoding="utf-8"))
    for pipeline in config["service"]["pipelines"].values():
        for kind in ("receivers", "processors", "exporters"):
            assert set(pipeline[kind]) <= set(config[kind])
