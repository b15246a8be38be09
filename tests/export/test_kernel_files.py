"""Kernels on their way to the engines: copied whole, and recorded by hash."""

import json
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from export.engines.engines import Options, _Folder, build_engines
from export.engines.kernel_files import copy_kernels
from stepvideo_serve.engine.manifest import (
    KEY,
    EngineTarget,
    GraphEntry,
    GraphFile,
    Manifest,
    require_kernels_named,
)
from stepvideo_serve.engine.spec import EngineSpec
from stepvideo_serve.errors import EngineError, ExportError

CODE = b"\x7fELF"
OPTIONS = Options("tensorrt_rtx", 89)
VERSION = "1.0"  # of a toolkit that a run needs to know, and not to have, when nothing is stale


def build(folder: Path, name: str, chosen: bool = True, code: bytes = CODE) -> str:
    """As `make kernels` leaves it; the hash of the description."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.cubin").write_bytes(code)
    (folder / f"{name}.ptx").write_text("ptx")
    text = json.dumps({"name": name, "chosen": chosen, "cubin_sha256": sha256(code).hexdigest()})
    (folder / f"{name}.json").write_text(text)
    return sha256(text.encode()).hexdigest()


def test_what_production_uses_is_copied_and_recorded(tmp_path: Path) -> None:
    source, out = tmp_path / "kernels", tmp_path / "out"
    hashes = {f"{name}.json": build(source, name) for name in ("attention.bf16.sm89.m64", "adaln.bf16.sm89.b4")}
    build(source, "attention.bf16.sm89.m128", chosen=False)
    build(source, "attention.bf16.sm90.m64")
    (source / "table.json").write_text("[]")
    build(out, "attention.bf16.sm89.old")
    assert copy_kernels(source, out, 89) == hashes
    expected = {name.replace(".json", kind) for name in hashes for kind in (".json", ".cubin")}
    assert {path.name for path in out.iterdir()} == expected
    assert copy_kernels(out, out, 89) == hashes, "recorded where they are"


def test_a_folder_without_kernels_for_the_architecture(tmp_path: Path) -> None:
    build(tmp_path / "kernels", "attention.bf16.sm90.m64")
    with pytest.raises(ExportError, match="--kernels must be a folder of `make kernels` with kernels for SM 89"):
        copy_kernels(tmp_path / "kernels", tmp_path / "out", 89)


def test_machine_code_that_is_not_the_described_one(tmp_path: Path) -> None:
    build(tmp_path / "kernels", "attention.bf16.sm89.m64")
    cubin = tmp_path / "kernels" / "attention.bf16.sm89.m64.cubin"
    cubin.write_bytes(b"exchanged")
    with pytest.raises(ExportError, match=r"m64\.cubin must be the file that .*\.json describes, it is another"):
        copy_kernels(tmp_path / "kernels", tmp_path / "out", 89)
    cubin.unlink()
    with pytest.raises(ExportError, match="with its machine code beside it, could not be read"):
        copy_kernels(tmp_path / "kernels", tmp_path / "out", 89)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A graph with a plugin, and its engine, which is up to date."""
    monkeypatch.setattr("export.engines.engines.toolkit_version", lambda _: VERSION)
    onnx, out, spec = tmp_path / "onnx", tmp_path / "engines", EngineSpec("one", (), (), {})
    for folder, name in ((onnx, "one.onnx"), (out, "one.engine")):
        folder.mkdir()
        (folder / name).write_bytes(b"content")
    Manifest("", "bf16", {}, {"one": GraphEntry((GraphFile.of(onnx, "one.onnx"),), "", spec)}).save(onnx)
    target = EngineTarget(OPTIONS.backend, VERSION, OPTIONS.sm, "single")
    key = _Folder(onnx, out, target, OPTIONS)._key("one", spec)
    figures = {"seconds": 1.0, "peak_bytes": 1, "plan": {"plugins": 1}, "weight_streaming": False}
    entry = GraphEntry((GraphFile.of(out, "one.engine"),), key, spec, figures)
    Manifest("", "bf16", {}, {"one": entry}, {KEY: target.to_json()}).save(out)
    return onnx, out


def test_engines_that_are_there_get_their_kernels_without_another_build(
    engines: tuple[Path, Path], tmp_path: Path
) -> None:
    onnx, out = engines
    source = tmp_path / "kernels"
    described = {"attention.bf16.sm89.m64.json": build(source, "attention.bf16.sm89.m64")}
    with pytest.raises(EngineError, match="must name their kernels by hash, found none"):
        require_kernels_named(Manifest.load(out), out, "one")
    report = build_engines(onnx, out, replace(OPTIONS, kernels=source), show_progress=False)
    assert (report.built, report.current) == ([], ["one"])
    assert require_kernels_named(Manifest.load(out), out, "one") == described
    assert (out / "kernels" / "attention.bf16.sm89.m64.cubin").read_bytes() == CODE
    build_engines(onnx, out, OPTIONS, show_progress=False)
    assert require_kernels_named(Manifest.load(out), out, "one") == described, "a later run keeps them"


def test_a_build_without_fitting_kernels_ends_before_the_work(engines: tuple[Path, Path], tmp_path: Path) -> None:
    onnx, out = engines
    with pytest.raises(ExportError, match="with kernels for SM 89"):
        build_engines(onnx, out, replace(OPTIONS, kernels=tmp_path), show_progress=False)
