"""The ahead-of-time build: what it writes, that it goes on where it stopped, and what it refuses."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from stepvideo_kernels.adaln_modulate.spec import builds
from stepvideo_kernels.compile.binaries import Binary
from stepvideo_kernels.compile.build import faults, remove_unknown
from stepvideo_kernels.kernel_spec import FullSize, KernelBuild, Work

NAMES = ("adaln_modulate.residual-fp8.sm90.m32w8s3", "qkv_norm_rope.bf16.sm120.m16w4s2headsperprogram16")


def run(root: Path, *command: str) -> "subprocess.CompletedProcess[str]":
    """A Python of its own: in this one, the language interprets."""
    path = os.pathsep.join([str(root / "kernels"), str(root)])
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = path
    return subprocess.run(
        [sys.executable, *command], cwd=root, env=environment, capture_output=True, text=True, check=False, timeout=300
    )


def build(root: Path, out: Path) -> "subprocess.CompletedProcess[str]":
    return run(root, "-m", "stepvideo_kernels.compile", "--out", str(out), "--jobs", "2", "--only", *NAMES)


@pytest.fixture(scope="module")
def built(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("kernels")
    done = build(root, out)
    assert done.returncode == 0, done.stderr
    assert "2 kernels, 2 of them to build" in done.stderr
    assert "[2/2]" in done.stderr
    return out


def test_writes_machine_code_and_its_description(built: Path) -> None:
    for name in NAMES:
        binary = Binary.load(built / f"{name}.json")
        assert binary.read_cubin(built)[:4] == b"\x7fELF"
        assert f".visible .entry {binary.entry}(" in (built / f"{name}.ptx").read_text()
        assert binary.report["registers"] > 16
        assert binary.report["spill_instructions"] == binary.report["stack_bytes"] == 0
        assert binary.scratch_bytes == 0
    assert ".target sm_90a" in (built / f"{NAMES[0]}.ptx").read_text()


@pytest.mark.slow
def test_the_compiler_needs_nothing_but_the_language(root: Path) -> None:
    """In its own environment there is no torch: `make kernels` installs none. Each kernel is imported for its key."""
    code = """
import sys
sys.modules.update(dict.fromkeys(("torch", "numpy", "transformers")))
from stepvideo_kernels.choice import OPS, builds_of
from stepvideo_kernels.compile.build import content_key
from stepvideo_kernels.kernel_spec import FullSize
print(len({content_key(build) for op in OPS for build in builds_of(op, FullSize())}))
"""
    done = run(root, "-c", code)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 100


def test_table_has_a_row_for_each(built: Path) -> None:
    rows = {row["name"]: row for row in json.loads((built / "table.json").read_text())}
    assert sorted(rows) == sorted(NAMES)
    row = rows[NAMES[0]]
    values = 2 * 37_944 * 6144
    assert row["full_work"]["bytes"] == pytest.approx(values * (3 * 2 + 1), rel=1e-3)
    h100 = next(one for one in row["roofline"] if one["gpu"] == "H100")
    assert h100["milliseconds"] == pytest.approx(values * 7 / 3.35e12 * 1e3, rel=1e-3)
    assert h100["limit"] == "memory"
    assert 1 <= row["blocks_per_sm"] <= 2
    lines = (built / "table.md").read_text().splitlines()
    assert sum(line.startswith("| **") for line in lines) == 2
    assert "predictions, not measurements" in (built / "table.md").read_text()


@pytest.mark.slow
def test_only_what_is_missing_or_damaged_is_built_again(root: Path, built: Path) -> None:
    untouched, damaged = (built / f"{name}.cubin" for name in NAMES)
    before, intact = untouched.stat().st_mtime_ns, damaged.read_bytes()
    damaged.write_bytes(intact[:1000])
    done = build(root, built)
    assert done.returncode == 0, done.stderr
    assert "2 kernels, 1 of them to build" in done.stderr
    assert untouched.stat().st_mtime_ns == before
    assert damaged.read_bytes() == intact, "two builds of the same source differ"
    assert "0 of them to build" in build(root, built).stderr


BROKEN = """
import os
import sys
from dataclasses import replace
from stepvideo_kernels.adaln_modulate.spec import builds
from stepvideo_kernels.compile import build as tool
from stepvideo_kernels.compile.__main__ import main

def faulty(op, full):
    good, *_ = (build for build in builds(full) if build.sm == 90 and build.variant == "bf16" and build.chosen)
    wrong_type = replace(good, variant="wrong", signature={{**good.signature, "tokens": "*bf16"}})
    deadly = replace(good, variant="deadly", function="deadly:kernel")
    return (good, wrong_type, deadly) if op == "adaln_modulate" else ()

tool.builds_of = faulty
tool.content_key = lambda build: build.variant
if __name__ == "__main__":
    sys.exit(main(["--out", {out!r}, "--jobs", "1"]))
"""


@pytest.mark.slow
def test_a_kernel_that_does_not_compile_fails_the_build_and_leaves_the_others(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "deadly.py").write_text("import os\nos._exit(3)\n", encoding="utf-8")
    script = tmp_path / "broken.py"
    script.write_text(BROKEN.format(out=str(out)), encoding="utf-8")
    done = run(root, str(script))
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: Every kernel must build and pass its checks: adaln_modulate.")
    assert "(and 1 more, listed above)." in last
    assert "Traceback" not in last
    assert [path.name for path in out.glob("*.json") if path.name != "table.json"] == [
        "adaln_modulate.bf16.sm90.m32w8s3.json"
    ]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--only", "nothing*"], "--only and --sm must leave a kernel to build"),
        (["--heads", "0"], "--heads must be a positive number"),
    ],
)
def test_arguments_that_make_no_sense(root: Path, tmp_path: Path, arguments: list[str], reason: str) -> None:
    done = run(root, "-m", "stepvideo_kernels.compile", "--out", str(tmp_path / "out"), *arguments)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {reason}")
    assert len(done.stderr.strip().splitlines()) == 1


def test_kernels_of_another_version_are_removed(tmp_path: Path) -> None:
    """A folder with two kernels for one use would be refused when it is opened."""
    for name in ("attention.new", "attention.old", "table"):
        for suffix in ("json", "cubin", "ptx"):
            (tmp_path / f"{name}.{suffix}").touch()
    remove_unknown(tmp_path, {"attention.new"})
    assert {path.stem for path in tmp_path.iterdir()} == {"attention.new", "table"}


GOOD = {
    "spill_instructions": 0,
    "stack_bytes": 0,
    "loop_spills": 0,
    "serialized": False,
    "missing": [],
    "uses_16_bit_tensor_cores": False,
    "blocks_per_sm": 1,
}
FP8_BUILD = KernelBuild(
    op="attention",
    variant="fp8",
    sm=90,
    function="m:f",
    signature={},
    constexprs={},
    tile=builds(FullSize())[0].tile,
    chosen=True,
    tile_work=Work(0, 0),
    full_work=Work(0, 0),
    shape="",
    instructions=("QGMMA",),
    fp8_operands=True,
)


@pytest.mark.parametrize(
    ("report", "fault"),
    [
        ({"spill_instructions": 2, "stack_bytes": 8}, "spills (2 instructions, 8 bytes of stack)"),
        ({"loop_spills": 1}, "uses local memory in a loop (1 instructions)"),
        ({"serialized": True}, "waits after every product of a warpgroup, for want of registers"),
        ({"missing": ["QGMMA"]}, "lacks the instructions QGMMA"),
        ({"uses_16_bit_tensor_cores": True}, "multiplies in 16 bits where FP8 is meant"),
        ({"blocks_per_sm": 0}, "does not fit a multiprocessor"),
    ],
)
def test_machine_code_that_is_not_what_it_should_be(report: dict[str, object], fault: str) -> None:
    assert faults(FP8_BUILD, GOOD) == []
    assert faults(FP8_BUILD, GOOD | report) == [fault]


def test_only_a_candidate_may_spill_and_only_where_that_is_said() -> None:
    spilling = GOOD | {"spill_instructions": 2}
    assert faults(replace(FP8_BUILD, no_spills=False), spilling) != []
    assert faults(replace(FP8_BUILD, chosen=False), spilling) != []
    assert faults(replace(FP8_BUILD, chosen=False, no_spills=False), spilling) == []
