"""The work of the ahead-of-time build: which kernels are stale, their compilation, the checks of the machine code.

Compilers are processes of their own, which import this module by its name: a `__main__` they could not.
"""

import fnmatch
import importlib
import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path
from queue import Queue
from typing import Any

from stepvideo_kernels.choice import OPS, builds_of
from stepvideo_kernels.compile.binaries import Binary, check_parameters, slots_of_ptx
from stepvideo_kernels.compile.machine_code import MachineCode, inspect_cubin
from stepvideo_kernels.compile.table import TABLE, write_table
from stepvideo_kernels.hardware import residency
from stepvideo_kernels.kernel_spec import SMS, FullSize, KernelBuild
from stepvideo_serve.errors import EngineError, ExportError

FORMAT = 2  # of what is written: raise it to have everything built again
WARP = 32


def compile_all(
    out: Path, only: Sequence[str] = ("*",), sms: Sequence[int] = SMS, full: FullSize | None = None, jobs: int = 1
) -> list[Binary]:
    """Brings the builds whose names match up to date in `out` and writes the table of them.

    Raises ExportError when one does not compile or fails its checks, after all have been tried.
    """
    _refuse_interpreter()
    sizes = full or FullSize()
    if sizes.heads < 1:
        raise ExportError(f"--heads must be a positive number, got {sizes.heads}.")
    every = [build for op in OPS for build in builds_of(op, sizes) if build.sm in sms]
    builds = [build for build in every if any(fnmatch.fnmatch(build.name, glob) for glob in only)]
    if not builds:
        raise ExportError(f"--only and --sm must leave a kernel to build, {list(only)} leaves none of {len(every)}.")
    _check_set(every)
    out.mkdir(parents=True, exist_ok=True)
    keys = {build.name: content_key(build) for build in builds}
    stale = [build for build in builds if not is_current(out, build.name, keys[build.name])]
    remove_unknown(out, {build.name for op in OPS for build in builds_of(op, sizes)})
    print(f"{len(builds)} kernels, {len(stale)} of them to build", file=sys.stderr, flush=True)
    problems = _build_all(stale, keys, out, jobs)
    done = [build for build in builds if is_current(out, build.name, keys[build.name])]
    binaries = [Binary.load(out / f"{build.name}.json") for build in done]
    for build, binary in zip(done, binaries, strict=True):
        problems += [f"{build.name}: {fault}" for fault in faults(build, binary.report)]
    write_table(out, list(zip(done, binaries, strict=True)))
    if problems:
        print("\n".join(problems), file=sys.stderr)
        rest = f" (and {len(problems) - 1} more, listed above)" if len(problems) > 1 else ""
        raise ExportError(f"Every kernel must build and pass its checks: {problems[0]}{rest}.")
    return binaries


def remove_unknown(out: Path, known: set[str]) -> None:
    """Deletes kernels that this version does not have: for each use a folder must hold one, not an older one too."""
    for path in out.glob("*.json"):
        if path.name != TABLE and path.stem not in known:
            for suffix in (".json", ".cubin", ".ptx"):
                path.with_name(f"{path.stem}{suffix}").unlink(missing_ok=True)


def faults(build: KernelBuild, report: Any) -> list[str]:
    """What is wrong with the machine code, in words; nothing for most candidates that were not chosen."""
    found = []
    if (build.chosen or build.no_spills) and (report["spill_instructions"] or report["stack_bytes"]):
        found.append(f"spills ({report['spill_instructions']} instructions, {report['stack_bytes']} bytes of stack)")
    if report["loop_spills"]:
        found.append(f"uses local memory in a loop ({report['loop_spills']} instructions)")
    if report["serialized"]:
        found.append("waits after every product of a warpgroup, for want of registers")
    if report["missing"]:
        found.append(f"lacks the instructions {', '.join(report['missing'])}")
    if build.fp8_operands and report["uses_16_bit_tensor_cores"]:
        found.append("multiplies in 16 bits where FP8 is meant")
    if report["blocks_per_sm"] < 1:
        found.append("does not fit a multiprocessor")
    return found if build.chosen or build.no_spills else []


def content_key(build: KernelBuild) -> str:
    """Hash of all that determines a binary: the kernel's source and what it calls, the build, the compiler."""
    import triton

    parts = [_kernel(build).cache_key, json.dumps(asdict(build), sort_keys=True), triton.__version__, str(FORMAT)]
    return sha256("\n".join(parts).encode()).hexdigest()


def is_current(out: Path, name: str, key: str) -> bool:
    """Whether the binary is there, whole, and made from this key."""
    try:
        binary = Binary.load(out / f"{name}.json")
        binary.read_cubin(out)
    except EngineError:
        return False
    return binary.key == key and (out / f"{name}.ptx").is_file()


class Compiler:
    """A process that compiles one kernel after the other; where it dies over one, the next gets a new process."""

    def __init__(self) -> None:
        self._process = ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn"))

    def compile(self, build: KernelBuild, key: str, out: Path) -> None:
        """Writes the kernel's files; raises whatever the compiler raised, or that it died."""
        try:
            self._process.submit(build_one, build, key, out).result()
        except BrokenProcessPool:
            self._process = ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn"))
            raise ExportError("the compiler's process died") from None

    def close(self) -> None:
        self._process.shutdown()


def _build_all(builds: list[KernelBuild], keys: dict[str, str], out: Path, jobs: int) -> list[str]:
    """Compiles with `jobs` processes; returns a sentence for each failure."""
    failures = []
    started = time.monotonic()
    idle: Queue[Compiler] = Queue()
    for _ in range(min(jobs, len(builds))):
        idle.put(Compiler())

    def compile_with_one_of_them(build: KernelBuild) -> None:
        compiler = idle.get()
        try:
            compiler.compile(build, keys[build.name], out)
        finally:
            idle.put(compiler)

    with ThreadPoolExecutor(max_workers=jobs) as threads:
        waiting = {threads.submit(compile_with_one_of_them, build): build for build in builds}
        for count, future in enumerate(as_completed(waiting), start=1):
            build, error = waiting[future], future.exception()
            state = "ok"
            if error is not None:
                state = f"did not compile: {_first_line(error)}"
                failures.append(f"{build.name} {state}")
            elapsed = f"{time.monotonic() - started:.0f} s"
            print(f"[{count}/{len(builds)}] {elapsed:>6}  {build.name}  {state}", file=sys.stderr, flush=True)
    while not idle.empty():
        idle.get().close()
    return failures


def build_one(build: KernelBuild, key: str, out: Path) -> None:
    """Compiles one kernel and writes its three files."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget

    kernel = _kernel(build)
    divisibility = {**dict.fromkeys(build.aligned, 16), **dict.fromkeys(build.narrow, 8)}
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", by]] for name, by in divisibility.items()}
    source = triton.compiler.ASTSource(
        fn=kernel, signature=dict(build.signature), constexprs=dict(build.constexprs), attrs=aligned
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", build.sm, WARP), options=_options(build))
    cubin = out / f"{build.name}.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    (out / f"{build.name}.ptx").write_text(compiled.asm["ptx"], encoding="utf-8")
    code = inspect_cubin(cubin, knobs.nvidia.cuobjdump.path)
    binary = _describe(build, key, compiled, code)
    check_parameters(binary)
    binary.save(out)


def _options(build: KernelBuild) -> dict[str, Any]:
    tile = build.tile
    options: dict[str, Any] = {
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "num_ctas": tile.num_ctas,
        "enable_fp_fusion": True,  # said outright, since the default changes with triton 3.10
    }
    return options | ({"maxnreg": tile.max_registers} if tile.max_registers else {})


def _describe(build: KernelBuild, key: str, compiled: Any, code: MachineCode) -> Binary:
    import triton

    metadata = compiled.metadata
    entry, slots = slots_of_ptx(compiled.asm["ptx"])
    report = {
        "registers": code.registers,
        "stack_bytes": code.stack_bytes,
        "spill_instructions": code.spill_instructions,
        "loop_spills": code.loop_spills,
        "serialized": code.serialized,
        "instructions": code.instructions,
        "tensor_core": code.tensor_core,
        "missing": code.missing(build.instructions),
        "uses_16_bit_tensor_cores": code.uses_16_bit_tensor_cores,
        **residency(build.sm, code.registers, WARP * metadata.num_warps, metadata.shared, metadata.tmem_size or 0),
    }
    return Binary(
        name=build.name,
        op=build.op,
        variant=build.variant,
        sm=build.sm,
        chosen=build.chosen,
        entry=entry,
        tile=asdict(build.tile),
        constexprs=dict(build.constexprs),
        parameters=tuple((name, kind) for name, kind in build.signature.items() if kind != "constexpr"),
        slots=slots,
        threads=WARP * metadata.num_warps,
        num_ctas=metadata.num_ctas,
        shared_bytes=metadata.shared,
        scratch_bytes=metadata.global_scratch_size,
        scratch_alignment=metadata.global_scratch_align,
        profile_scratch_bytes=metadata.profile_scratch_size,
        programmatic_launch=bool(metadata.launch_pdl),
        cooperative=bool(metadata.launch_cooperative_grid),
        tensor_maps=tuple(dict(one) for one in metadata.tensordesc_meta or ()),
        key=key,
        cubin_sha256=sha256(compiled.asm["cubin"]).hexdigest(),
        compiler=f"triton {triton.__version__}",
        report=report,
    )


def _kernel(build: KernelBuild) -> Any:
    module, name = build.function.split(":")
    return getattr(importlib.import_module(module), name)


def _check_set(builds: list[KernelBuild]) -> None:
    """Names must be unique, and each op, variant and architecture must have one chosen configuration."""
    names = [build.name for build in builds]
    twice = {name for name in names if names.count(name) > 1}
    groups: dict[tuple[str, str, int], int] = {}
    for build in builds:
        group = (build.op, build.variant, build.sm)
        groups[group] = groups.get(group, 0) + build.chosen
    undecided = [group for group, chosen in groups.items() if chosen != 1]
    if twice or undecided:
        raise ExportError(f"Builds need unique names and one chosen of each kind, got {twice or undecided}.")


def _refuse_interpreter() -> None:
    from triton import knobs

    if knobs.runtime.interpret:
        raise ExportError("Kernels are compiled without TRITON_INTERPRET, which is set: unset it.")


def _first_line(error: BaseException | None) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
