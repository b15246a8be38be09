"""Engines that do not fit are refused with what was expected and found."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stepvideo_serve.engine.manifest import (
    KEY,
    LOOP,
    EngineTarget,
    GraphEntry,
    GraphFile,
    Manifest,
    require_profile,
    require_target,
)
from stepvideo_serve.engine.parity import require_parity
from stepvideo_serve.errors import EngineError
from tests.engine.toy import SPEC

TARGET = EngineTarget("tensorrt_rtx", "1.7.1", 89, "tp2", "tp0of2")
PASSING = {"output": "mixed", "error": 1e-6, "allowed": 2e-5}


def manifest(target: Any = None, parity: Any = None) -> Manifest:
    extras = {} if parity is None else {"parity": parity}
    entry = GraphEntry((GraphFile("toy.engine", 3, "0" * 64),), "key", SPEC, extras)
    extra = {} if target is None else {KEY: target}
    return Manifest("checkpoint", "bf16", {}, {"toy": entry}, extra)


def test_round_trip() -> None:
    assert EngineTarget.of(manifest(TARGET.to_json()), Path()) == TARGET
    require_target(manifest(TARGET.to_json()), Path(), TARGET)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "tensorrt"}, "backend 'tensorrt', found 'tensorrt_rtx'"),
        ({"version": "1.8"}, "version '1.8', found '1.7.1'"),
        ({"sm": 120}, "sm 120, found 89"),
        ({"layout": "single"}, "layout 'single', found 'tp2'"),
        ({"part": "tp1of2"}, "part 'tp1of2', found 'tp0of2'"),
    ],
)
def test_built_for_something_else(change: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=f"The engines in folder must be built for {message}"):
        require_target(manifest(TARGET.to_json()), Path("folder"), replace(TARGET, **change))


@pytest.mark.parametrize("target", [None, {"sm": 89}, TARGET.to_json() | {"gpu": "L4"}])
def test_no_engines(target: Any) -> None:
    with pytest.raises(EngineError, match="must hold TensorRT engines, its manifest names no target"):
        EngineTarget.of(manifest(target), Path("folder"))


def test_parity() -> None:
    require_parity(manifest(parity=[PASSING]), ["toy"])
    nothing: tuple[Any, ...] = (None, [])
    for rows in nothing:
        with pytest.raises(EngineError, match="Engine toy must have a parity report, found none"):
            require_parity(manifest(parity=rows), ["toy"])
    for error in (3e-5, float("nan")):
        with pytest.raises(EngineError, match=r"must be within 2\.0e-05 of the reference, its report has .* for mixed"):
            require_parity(manifest(parity=[PASSING, PASSING | {"error": error}]), ["toy"])


def test_a_loop_that_was_compared_must_have_passed() -> None:
    report = {"rule": "rms error over that of torch in bf16", "allowed": 2.0}
    plain = manifest(parity=[PASSING])
    require_parity(replace(plain, extra={LOOP: {**report, "value": 1.9, "passed": True}}), ["toy"])
    failed = replace(plain, extra={LOOP: {**report, "value": 6.8, "passed": False}})
    with pytest.raises(EngineError, match=r"must have a rms error .* of at most 2, their report has 6\.8: keep more"):
        require_parity(failed, ["toy"])


def test_profile() -> None:
    entries = manifest().graphs
    require_profile(entries, {"rows": 16, "columns": 9, "tokens": 10**6})
    for size in (1, 17):
        with pytest.raises(EngineError, match=rf"toy must take rows up to {size}, .* found a profile of 2\.\.16"):
            require_profile(entries, {"rows": size})
