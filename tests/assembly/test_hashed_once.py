"""Files that graphs are loaded from are hashed once for all processes of a server, and again once they changed."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from export.graphs.recipe import INPUT, Recipe
from export.to_onnx import export_graphs
from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.assembly.runners import load_runners
from stepvideo_serve.config import LINKS_VARIABLE, ServeConfig
from stepvideo_serve.engine.manifest import GraphFile
from stepvideo_serve.engine.nvinfer import checked_file
from stepvideo_serve.errors import EngineError
from stepvideo_serve.weights.known_digests import KnownDigests

WRONG = "0" * 64


@pytest.fixture(scope="module")
def graphs(mini_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("graphs")
    recipe = Recipe("fp32", weights=INPUT)
    export_graphs(Checkpoint(mini_checkpoint), out, only=["dit_embed"], show_progress=False, recipe=recipe)
    return out


@pytest.fixture
def config(graphs: Path, mini_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ServeConfig:
    """Of a process whose launcher has named a folder."""
    monkeypatch.setenv(LINKS_VARIABLE, str(tmp_path / "links"))
    (tmp_path / "links").mkdir()
    (tmp_path / "serve.toml").write_text(f'[model]\ndir = "{mini_checkpoint}"\nengines_dir = "{graphs}"\n')
    return ServeConfig.load(tmp_path / "serve.toml")


def load(config: ServeConfig) -> None:
    for runner in load_runners(config, ["dit_embed"], threads=1).values():
        runner.close()


def records(folder: Path) -> Iterator[Path]:
    return (path for path in folder.iterdir() if not path.suffix)


def test_graphs_are_hashed_again_once_they_changed(config: ServeConfig, graphs: Path, tmp_path: Path) -> None:
    """Shown by a record that is not true: it is believed, so that nobody has hashed the file, until that is edited."""
    load(config)
    load(config)
    recorded = {path: json.loads(path.read_text()) for path in records(tmp_path / "links" / "digests")}
    known = KnownDigests(tmp_path / "links" / "digests")
    [of_graph] = [path for path, record in recorded.items() if record["sha256"] == known(graphs / "dit_embed.onnx")]
    assert len(recorded) > 1, "the checkpoint's files, too"
    of_graph.write_text(json.dumps({**recorded[of_graph], "sha256": WRONG}))
    with pytest.raises(EngineError, match=rf"dit_embed\.onnx must have SHA-256 \w+, found {WRONG}"):
        load(config)
    os.utime(graphs / "dit_embed.onnx")
    load(config)


def test_an_engine_is_hashed_once(tmp_path: Path) -> None:
    (tmp_path / "toy.engine").write_bytes(b"engine")
    file, known = GraphFile.of(tmp_path, "toy.engine"), KnownDigests(tmp_path / "known")
    for _ in range(2):
        with checked_file("toy", tmp_path, file, known.read) as content:
            assert content[:] == b"engine"
    [record] = records(tmp_path / "known")
    record.write_text(json.dumps({**json.loads(record.read_text()), "sha256": WRONG}))
    refused = pytest.raises(EngineError, match=rf"toy\.engine must have SHA-256 \w+, found {WRONG}")
    with refused, checked_file("toy", tmp_path, file, known.read):
        pass
    (tmp_path / "toy.engine").write_bytes(b"others")
    os.utime(tmp_path / "toy.engine", ns=(1, 1))
    refused = pytest.raises(EngineError, match=rf"toy\.engine must have SHA-256 {file.sha256}, found (?!{WRONG})")
    with refused, checked_file("toy", tmp_path, file, known.read):
        pass
