"""The PromQL in docker/monitoring, and what it selects."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import yaml

VARIABLES = {"$__rate_interval": "5m", "$instance": ".*"}


def dashboard(root: Path) -> Any:
    return json.loads((root / "docker/monitoring/dashboard.json").read_text(encoding="utf-8"))


def rules(root: Path) -> list[Any]:
    """The alerts."""
    groups = yaml.safe_load((root / "docker/monitoring/alerts.yml").read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def dashboard_expressions(root: Path) -> list[str]:
    texts = [target["expr"] for panel in dashboard(root)["panels"] for target in panel.get("targets", [])]
    for name, value in VARIABLES.items():
        texts = [text.replace(name, value) for text in texts]
    return texts


def expressions(root: Path) -> list[str]:
    """Of the dashboard, with its variables filled in, and of the alerts."""
    return dashboard_expressions(root) + [rule["expr"] for rule in rules(root)]


def parts(expression: Any) -> Iterator[Any]:
    """The nodes of a parsed expression."""
    yield expression
    for name in ("lhs", "rhs", "expr", "args", "vector_selector", "param"):
        inner = getattr(expression, name, None)
        for item in inner if isinstance(inner, list) else [inner]:
            if item is not None:
                yield from parts(item)


def selected(text: str) -> Iterator[tuple[str, set[str]]]:
    """The name of each metric in the expression, and the labels that it is matched by. ValueError for bad PromQL."""
    for node in parts(promql_parser.parse(text)):
        if isinstance(node, promql_parser.VectorSelector):
            assert node.name is not None, text
            yield node.name, {matcher.name for matcher in node.matchers.matchers}


def grouped_by(text: str) -> set[str]:
    """The labels that its aggregations keep."""
    nodes = parts(promql_parser.parse(text))
    modifiers = [node.modifier for node in nodes if isinstance(node, promql_parser.AggregateExpr)]
    return {label for modifier in modifiers if modifier is not None for label in modifier.labels}
