"""Graphs that somebody changed: the real server does not start with them, and says who could."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from stepvideo_serve.assembly.runners import load_runners, open_manifest
from stepvideo_serve.config import ServeConfig
from stepvideo_serve.engine.manifest import FILE_NAME, hash_file
from stepvideo_serve.errors import EngineError, SetupError
from tests.serving.launch import CONFIG, Engines, serving

GRAPH = "vae_decoder"


@pytest.fixture(scope="module")
def exchanged(engines: Engines, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the graphs in a folder that everybody may write, where somebody changed one number of one weight."""
    folder = tmp_path_factory.mktemp("graphs") / "onnx"
    shutil.copytree(engines.graphs_dir, folder)
    folder.chmod(0o777)
    with (folder / f"{GRAPH}.onnx.data").open("r+b") as weights:
        first = weights.read(1)
        weights.seek(0)
        weights.write(bytes([first[0] ^ 1]))
    return folder


@pytest.fixture(scope="module")
def text(engines: Engines, exchanged: Path) -> str:
    """A configuration of that folder, which names its manifest."""
    accepted = f'manifests = ["{hash_file(exchanged / FILE_NAME)}"]\n'
    found = CONFIG.format(model=engines.model_dir, engines=exchanged, max_queued=1)
    return found.replace("[limits]", f"{accepted}\n[limits]", 1)


@pytest.fixture(scope="module")
def config(text: str, tmp_path_factory: pytest.TempPathFactory) -> ServeConfig:
    path = tmp_path_factory.mktemp("config") / "serve.toml"
    path.write_text(text, encoding="utf-8")
    return ServeConfig.load(path)


def test_a_server_does_not_start_with_an_exchanged_weight(
    root: Path, text: str, exchanged: Path, tmp_path: Path
) -> None:
    refusal = pytest.raises(SetupError, match=rf"Graph {GRAPH}: .*{GRAPH}\.onnx\.data must have SHA-256")
    with refusal, serving(root, tmp_path, text):
        pass
    log = (tmp_path / "server.log").read_text(encoding="utf-8")
    told = f"ti2v: files: {exchanged} must be writable for the server's user alone, everybody may write {exchanged}, "
    assert sum(told in line for line in log.splitlines()) == 1, log


def test_other_graphs_of_the_folder_are_loaded(config: ServeConfig) -> None:
    for runner in load_runners(config, ["dit_embed"], threads=1).values():
        runner.close()
    with pytest.raises(EngineError, match=f"Graph {GRAPH}: "):
        load_runners(config, [GRAPH], threads=1)


def test_a_manifest_that_was_exchanged_too_needs_the_configuration(config: ServeConfig, exchanged: Path) -> None:
    """Whoever can write the graphs can write their hashes, but not those that serve.toml has."""
    open_manifest(config)
    manifest = exchanged / FILE_NAME
    before = manifest.read_bytes()
    try:
        manifest.write_bytes(before.replace(b"\n", b"\n ", 1))
        with pytest.raises(EngineError, match=r"must be a manifest that \[model\] manifests names, found one"):
            open_manifest(config)
        open_manifest(replace(config, model=replace(config.model, manifests=())))
    finally:
        manifest.write_bytes(before)
