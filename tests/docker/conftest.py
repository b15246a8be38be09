"""The tiny random checkpoint and its graphs, as the tests of serving have them."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.docker.chart import Helm
from tests.serving.conftest import engines
from tests.serving.launch import CONFIG, MAX_QUEUED, Engines

__all__ = ["engines"]


@pytest.fixture
def config_file(engines: Engines, tmp_path: Path) -> Path:
    """A configuration that serves it."""
    path = tmp_path / "serve.toml"
    path.write_text(CONFIG.format(model=engines.model_dir, engines=engines.graphs_dir, max_queued=MAX_QUEUED))
    return path


@pytest.fixture(scope="session")
def helm(root: Path) -> Helm:
    return Helm.install(root)


@pytest.fixture
def docker(root: Path) -> Path:
    return root / "docker"


@pytest.fixture
def compose(docker: Path) -> dict[str, Any]:
    loaded = yaml.safe_load((docker / "compose.yaml").read_text(encoding="utf-8"))
    assert isinstance(loaded, dict)
    return loaded
