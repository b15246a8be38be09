import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stepvideo_serve.engine.manifest import (
    FILE_NAME,
    KERNELS,
    GraphEntry,
    GraphFile,
    Manifest,
    content_key,
    hash_file,
    require_kernels_named,
)
from stepvideo_serve.errors import EngineError
from tests.engine.toy import SPEC


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    """A manifest, saved in tmp_path, of two graphs that are there; one has external data."""
    for name in ("one.onnx", "two.onnx", "data/two.data"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    graphs = {
        "one": GraphEntry((GraphFile.of(tmp_path, "one.onnx"),), content_key(weights="a"), SPEC),
        "two": GraphEntry(
            tuple(GraphFile.of(tmp_path, name) for name in ("two.onnx", "data/two.data")),
            content_key(weights="b"),
            replace(SPEC, name="two"),
            {"parity": {"max_error": 1e-6}},
        ),
    }
    extra = {"preview": {"weight": [[0.5, -1.0]], "bias": [0.0]}, "名": "x"}
    manifest = Manifest("sha256:0123", "fp32", {"torch": "2.13.0"}, graphs, extra)
    manifest.save(tmp_path)
    return manifest


def test_round_trip(manifest: Manifest, tmp_path: Path) -> None:
    loaded = Manifest.load(tmp_path)
    assert loaded == manifest
    assert loaded.graph("two").file == "two.onnx"
    loaded.verify(tmp_path, hashes=True)
    loaded.require(precision="fp32")
    loaded.require(precision="fp32", checkpoint="sha256:0123")


def test_save_replaces_the_old_manifest_and_leaves_nothing_else(manifest: Manifest, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    with (tmp_path / FILE_NAME).open(encoding="utf-8") as reader:
        replace(manifest, precision="fp16").save(tmp_path)
        assert json.load(reader)["precision"] == "fp32", "who has the file open still reads all of the old one"
    assert Manifest.load(tmp_path).precision == "fp16"
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("value", [float("nan"), Path("x")])
def test_a_manifest_that_cannot_be_saved_leaves_the_old_one(manifest: Manifest, tmp_path: Path, value: object) -> None:
    before = sorted(tmp_path.iterdir())
    with pytest.raises(EngineError, match="finite JSON values only"):
        replace(manifest, extra={"bad": value}).save(tmp_path)
    assert sorted(tmp_path.iterdir()) == before
    assert Manifest.load(tmp_path) == manifest


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=rf"{FILE_NAME}, No such file"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize("text", [b"{", b"\xff{}"])
def test_not_json(tmp_path: Path, text: bytes) -> None:
    (tmp_path / FILE_NAME).write_bytes(text)
    with pytest.raises(EngineError, match="must be JSON in UTF-8"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize("data", [[], {}, {"format_version": 2}])
def test_other_format_version(tmp_path: Path, data: object) -> None:
    (tmp_path / FILE_NAME).write_text(json.dumps(data))
    with pytest.raises(EngineError, match=r"must have format_version 1, found (None|2)"):
        Manifest.load(tmp_path)


def drop(key: str) -> Callable[[dict[str, Any]], object]:
    return lambda data: data.pop(key)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop("checkpoint"), "KeyError: 'checkpoint'"),
        (lambda data: data.update(precision=16), "precision must be str, not int"),
        (lambda data: data.update(graphs=[]), "graphs must be dict, not list"),
        (lambda data: data["graphs"].update(one=None), "TypeError"),
        (lambda data: data["graphs"]["one"].update(files=[]), "needs at least one file"),
        (lambda data: data["graphs"]["one"]["files"][0].update(size_bytes="8"), "size_bytes must be int, not str"),
        (lambda data: data["graphs"]["one"]["files"][0].update(path="../one.onnx"), "inside the engine directory"),
        (lambda data: data["graphs"]["one"]["files"][0].update(path="/one.onnx"), "inside the engine directory"),
        (lambda data: data["graphs"]["one"]["spec"].pop("dims"), "An engine spec in JSON needs"),
    ],
)
@pytest.mark.usefixtures("manifest")
def test_other_form(tmp_path: Path, damage: Callable[[dict[str, Any]], object], message: str) -> None:
    path = tmp_path / FILE_NAME
    data = json.loads(path.read_text(encoding="utf-8"))
    damage(data)
    path.write_text(json.dumps(data))
    with pytest.raises(EngineError, match=f"{FILE_NAME} must have the form of a manifest, found .*{message}"):
        Manifest.load(tmp_path)


def test_verify_finds_a_missing_and_a_truncated_file(manifest: Manifest, tmp_path: Path) -> None:
    (tmp_path / "data/two.data").write_bytes(b"cut")
    manifest.verify(tmp_path, ["one"])
    with pytest.raises(EngineError, match=r"Graph two: .*two\.data must have 13 bytes, found 3"):
        manifest.verify(tmp_path)
    (tmp_path / "data/two.data").unlink()
    with pytest.raises(EngineError, match=r"two\.data must exist, No such file"):
        manifest.verify(tmp_path, ["two"])


def test_verify_finds_changed_bytes_by_their_hash(manifest: Manifest, tmp_path: Path) -> None:
    (tmp_path / "one.onnx").write_bytes(b"ONE.onnx")
    manifest.verify(tmp_path)
    expected, found = hashlib.sha256(b"one.onnx").hexdigest(), hashlib.sha256(b"ONE.onnx").hexdigest()
    with pytest.raises(EngineError, match=f"Graph one: .* must have SHA-256 {expected}, found {found}"):
        manifest.verify(tmp_path, hashes=True)


def test_a_graph_that_is_not_there(manifest: Manifest, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"needs the graph three, found \['one', 'two'\]"):
        manifest.graph("three")
    with pytest.raises(EngineError, match="needs the graph three"):
        manifest.verify(tmp_path, ["one", "three"])


def test_require(manifest: Manifest) -> None:
    with pytest.raises(EngineError, match="must have precision fp8, found fp32"):
        manifest.require(precision="fp8")
    with pytest.raises(EngineError, match="must have checkpoint sha256:9, found sha256:0123"):
        manifest.require(precision="fp32", checkpoint="sha256:9")


def test_hash_file_reads_all_of_a_large_file(tmp_path: Path) -> None:
    data = bytes(range(256)) * 5000
    (tmp_path / "large").write_bytes(data)
    assert hash_file(tmp_path / "large") == hashlib.sha256(data).hexdigest()


def test_content_key() -> None:
    key = content_key(spec=SPEC.to_json(), opset=23)
    assert key == content_key(opset=23, spec=SPEC.to_json())
    assert key != content_key(spec=SPEC.to_json(), opset=24)


def test_a_graph_is_read_as_the_manifest_has_it(manifest: Manifest, tmp_path: Path) -> None:
    """By the names that the graph has for its files: relative to its own folder."""
    assert manifest.graph("two").read(tmp_path) == {"two.onnx": b"two.onnx", "data/two.data": b"data/two.data"}
    moved = replace(manifest.graph("two"), files=(GraphFile.of(tmp_path, "data/two.data"),))
    assert moved.read(tmp_path) == {"two.data": b"data/two.data"}


@pytest.mark.parametrize("content", [b"DATA/two.data", b"", b"data/two.data and more"])
def test_external_data_that_was_exchanged_is_not_read(manifest: Manifest, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "data/two.data").write_bytes(content)
    expected, found = (hashlib.sha256(data).hexdigest() for data in (b"data/two.data", content))
    with pytest.raises(EngineError, match=rf"Graph two: .*two\.data must have SHA-256 {expected}, found {found}"):
        manifest.graph("two").read(tmp_path)


def test_a_file_that_is_gone_is_not_read(manifest: Manifest, tmp_path: Path) -> None:
    (tmp_path / "two.onnx").unlink()
    with pytest.raises(EngineError, match=r"Graph two: .*two\.onnx must be readable, No such file"):
        manifest.graph("two").read(tmp_path)


def test_only_a_manifest_that_the_configuration_names_is_read(manifest: Manifest, tmp_path: Path) -> None:
    accepted = ("0" * 64, hash_file(tmp_path / FILE_NAME))
    assert Manifest.load(tmp_path, accepted) == manifest
    replace(manifest, checkpoint="sha256:other").save(tmp_path)
    with pytest.raises(
        EngineError, match=r"manifest\.json must be a manifest that \[model\] manifests names, found one"
    ):
        Manifest.load(tmp_path, accepted)


@pytest.mark.parametrize("kernels", [None, {}, [], {"attention.json": 1}])
def test_plugins_need_kernels_that_the_manifest_names(manifest: Manifest, tmp_path: Path, kernels: object) -> None:
    with pytest.raises(
        EngineError, match=r"one has plugins, .* must name their kernels by hash, found none: run export"
    ):
        require_kernels_named(replace(manifest, extra={KERNELS: kernels}), tmp_path, "one")
    named = {"attention.sm89.json": "0" * 64}
    assert require_kernels_named(replace(manifest, extra={KERNELS: named}), tmp_path, "one") == named


def test_a_foreseen_temporary_file_is_not_written_through(manifest: Manifest, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / f".{FILE_NAME}.{os.getpid()}").symlink_to(victim)
    manifest.save(tmp_path)
    assert victim.read_text() == "mine"
