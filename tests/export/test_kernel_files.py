"""Kernels on their way to the engines: copied whole, and recorded by hash."""

import json
from hashlib import sha256
from pathlib import Path

import pytest

from export.engines.kernel_files import copy_kernels
from stepvideo_serve.errors import ExportError

CODE = b"\x7fELF"


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
