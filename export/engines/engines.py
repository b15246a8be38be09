"""An engine directory from a directory of ONNX graphs: what is stale is built, checked, and recorded.

    <out>/manifest.json            what the engines are, and for what (engine/manifest.py: EngineTarget)
    <out>/<graph>.engine           and <graph>.plan.json, its layers
    <out>/logs/<graph>.log         all that TensorRT said
    <out>/kernels/                 machine code that engines with plugins run, named by hash in the manifest
    <out>/timing/                  how long tactics took, by version of TensorRT and kind of GPU (timing.py)
    <out>/tp0of2/...               the same for a tensor-parallel rank's own graphs

An engine is there whole or not at all: it is built in a folder beside, moved in, and then recorded. It is built again
when its graph, its profile, the architecture or the version of TensorRT changed.
"""

import fcntl
import fnmatch
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from export.engines.child import Job
from export.engines.engine_plan import Plan, parse_plan
from export.engines.expectations import Expected, expected_of, summary, violations
from export.engines.gpus import Slot, build_slots
from export.engines.inspection import read_inspection
from export.engines.kernel_files import chosen_kernels, copy_kernels
from export.engines.process import Built, Children, run_child
from export.engines.profiles import profile_spec
from export.engines.timing import timing_cache
from export.engines.toolkit import check_target, child_environment, toolkit_version
from export.engines.workers import build_all
from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.assembly.engines import KERNELS_FOLDER
from stepvideo_serve.engine.manifest import (
    FILE_NAME,
    GRAPH,
    KERNELS,
    KEY,
    LAYERS,
    EngineTarget,
    GraphEntry,
    GraphFile,
    Manifest,
    content_key,
)
from stepvideo_serve.engine.spec import EngineSpec
from stepvideo_serve.errors import EngineError, ExportError
from stepvideo_serve.fused.kernels_package import LOOKED_UP
from stepvideo_serve.geometry import VideoGeometry
from stepvideo_serve.parallel.layout import SINGLE, Layout, part_folder

TIMES_TACTICS = "tensorrt"  # on a GPU, where it loads the engine too; TensorRT-RTX does neither
WARNINGS = "plan_warnings"
UNEXPECTED = "the plan is not as expected: "


@dataclass(frozen=True)
class Options:
    """What to build.

    videos   sizes to build for (export/engines/profiles.py); none: the ranges of the graphs
    fixed    engines of one size
    only     globs of names; all by default
    kernels  folder of `make kernels`, for engines with plugins; none: those that are there stay
    jobs     builds at a time; of `tensorrt` each on a GPU of its own
    plan     what follows where a plan is not as expected: "error", or "warn", which records it and keeps the engine
    """

    backend: str
    sm: int
    layout: Layout = SINGLE
    videos: tuple[VideoGeometry, ...] = ()
    fixed: bool = False
    only: tuple[str, ...] = ("*",)
    kernels: Path | None = None
    jobs: int = 1
    plan: str = "error"


@dataclass
class Report:
    """What a run did, by name of the graph, with its folder before it where it is a rank's own."""

    built: list[str] = field(default_factory=list)
    current: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    warned: dict[str, list[str]] = field(default_factory=dict)


def build_engines(onnx_dir: Path, out: Path, options: Options, show_progress: bool = True) -> Report:
    """Brings the engines in `out` up to date. One that fails is reported, and the others are still built.

    Raises ExportError, ConfigError or EngineError when nothing can be built at all.
    """
    folders = _folders(onnx_dir, options)
    source = Manifest.load(onnx_dir)
    check_target(options.backend, options.sm, source.precision)
    slots = build_slots(options.backend, options.sm, options.jobs)
    version = toolkit_version(options.backend)
    if options.kernels is not None:
        chosen_kernels(options.kernels, options.sm)  # before the hours of a build
    report = Report()
    out.mkdir(parents=True, exist_ok=True)
    with _lock(out):
        timing = timing_cache(out, version, slots[0].gpu) if options.backend == TIMES_TACTICS else None
        for part in folders:
            target = EngineTarget(options.backend, version, options.sm, str(options.layout.of_branch), part)
            folder = _Folder(onnx_dir / part, out / part, target, options, timing)
            folder.build(slots, report, show_progress)
    if not (report.built or report.current or report.failed):
        raise ExportError(
            f"--only must match at least one graph, {list(options.only)} matches none of {sorted(source.graphs)}."
        )
    return report


def check_machine(options: Options) -> None:
    """Raises ExportError when this machine cannot build for what `options` name, whatever the graphs."""
    if options.fixed and len(options.videos) != 1:
        raise ExportError(f"--fixed builds for one size, got {len(options.videos)}: give one with --shapes.")
    check_target(options.backend, options.sm, "bf16")
    build_slots(options.backend, options.sm, options.jobs)
    toolkit_version(options.backend)


def check_checkpoint(onnx_dir: Path, model_dir: Path) -> None:
    """Raises ExportError when the graphs were made from other weights than those in `model_dir`."""
    if Manifest.load(onnx_dir).checkpoint != Checkpoint(model_dir).identity:
        raise ExportError(
            f"The graphs in {onnx_dir} must be made from the checkpoint in {model_dir}, which changed since: "
            "export them again."
        )


def _folders(onnx_dir: Path, options: Options) -> list[str]:
    """Of the graphs that a layout needs, relative to `onnx_dir`; "" is that itself."""
    layout = options.layout
    heads = Manifest.load(onnx_dir).extra.get("dit_config", {}).get("num_heads")
    if heads is not None:
        layout.check(heads)
    if layout.tp == layout.sp == 1:
        return [""]
    if Manifest.load(onnx_dir).takes_weights:  # a graph of a kind serves every rank
        return [""]
    parts = [part_folder(layout, index) for index in range(layout.tp)]
    if missing := [part for part in parts if not (onnx_dir / part / FILE_NAME).is_file()]:
        raise ExportError(
            f"Layout {layout} needs the graphs of each rank, {onnx_dir} has no {', '.join(missing)}: "
            f"export with --layout {layout}."
        )
    return ["", *parts]


@contextmanager
def _lock(out: Path) -> Iterator[None]:
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ExportError(
                f"Only one build at a time may write to {out}, another is at work: wait for it."
            ) from None
        yield


class _Folder:
    """The engines of one folder."""

    def __init__(
        self, onnx_dir: Path, out: Path, target: EngineTarget, options: Options, timing: Path | None = None
    ) -> None:
        self._onnx_dir, self._out, self._target, self._options = onnx_dir, out, target, options
        self._timing = timing
        self._source = Manifest.load(onnx_dir)
        (out / "logs").mkdir(parents=True, exist_ok=True)
        self._manifest = self._open()
        self._environment = child_environment(target.backend, out / "logs" / "lib")

    def build(self, slots: Sequence[Slot], report: Report, show_progress: bool) -> None:
        only = self._options.only
        chosen = [name for name in self._source.graphs if any(fnmatch.fnmatch(name, glob) for glob in only)]
        specs = {name: self._spec(name) for name in chosen}
        keys = {name: self._key(name, spec) for name, spec in specs.items()}
        stale = [name for name in chosen if not self._is_current(name, keys[name])]
        report.current += [self._label(name) for name in chosen if name not in stale]
        current = {name: self._with_reports(name) for name in chosen if name not in stale}
        self._manifest = replace(self._manifest, graphs={**self._manifest.graphs, **current})
        self._manifest.save(self._out)

        def build(name: str, slot: Slot, children: Children) -> GraphEntry:
            run = partial(self._run, slot, children, lambda step: bar.set_postfix_str(f"{self._label(name)} {step}"))
            return self._build(name, specs[name], keys[name], run)

        with (
            tqdm(total=len(stale), unit="engine", disable=not show_progress, file=sys.stderr) as bar,
            closing(build_all(stale, slots, build)) as builds,
        ):
            for name, future in builds:
                bar.update()
                try:
                    entry = future.result()
                except (ExportError, EngineError, OSError) as error:
                    report.failed[self._label(name)] = str(error)
                    continue
                self._manifest = replace(self._manifest, graphs={**self._manifest.graphs, name: entry})
                self._manifest.save(self._out)
                report.built.append(self._label(name))
        self._judge(chosen, report)
        self._take_kernels()

    def _judge(self, names: Iterable[str], report: Report) -> None:
        """Engines whose plans were not as expected when they were built: warnings, or failures if they are errors."""
        for name in names:
            entry = self._manifest.graphs.get(name)
            if entry is None or not (wrong := entry.extras.get(WARNINGS)):
                continue
            if self._options.plan == "warn":
                report.warned[self._label(name)] = wrong
            elif self._label(name) in report.current:
                report.current.remove(self._label(name))
                report.failed[self._label(name)] = f"{UNEXPECTED}{'; '.join(wrong)}; it was built with --plan warn"

    def _with_reports(self, name: str) -> GraphEntry:
        """An entry that is there, with what its graph's has since been compared with: an engine that takes its weights
        as inputs is not built again for others."""
        entry, source = self._manifest.graph(name), self._source.graph(name)
        if not source.spec.weights:
            return entry
        own = [
            row for row in entry.extras["parity"] if row not in source.extras["parity"] and row["backend"] == "engine"
        ]
        known = {LAYERS: source.extras[LAYERS], "parity": [*source.extras["parity"], *own]}
        return replace(entry, extras={**entry.extras, **known})

    def _take_kernels(self) -> None:
        """Copies the kernels to the folder that all parts share, and records them, where there are new ones and engines
        that run them."""
        source, plans = self._options.kernels, [entry.extras["plan"] for entry in self._manifest.graphs.values()]
        if source is None or not any(plan.get("plugins") for plan in plans):
            return
        shared = self._out.parent if self._target.part else self._out
        described = copy_kernels(source, shared / KERNELS_FOLDER, self._target.sm)
        self._manifest = replace(self._manifest, extra={**self._manifest.extra, KERNELS: described})
        self._manifest.save(self._out)

    def _label(self, name: str) -> str:
        return f"{self._target.part}/{name}" if self._target.part else name

    def _spec(self, name: str) -> EngineSpec:
        options = self._options
        return profile_spec(self._source.graph(name).spec, options.videos, options.fixed, options.layout.sp)

    def _open(self) -> Manifest:
        """The manifest so far where it is for the same target, else a fresh one."""
        source, target = self._source, self._target
        extra = {**source.extra, KEY: target.to_json()}
        fresh = Manifest(
            source.checkpoint, source.precision, {**source.tools, target.backend: target.version}, {}, extra
        )
        if not (self._out / FILE_NAME).exists():
            return fresh
        found = Manifest.load(self._out)
        before = EngineTarget.of(found, self._out)
        if (found.precision, replace(before, version="")) != (source.precision, replace(target, version="")):
            raise ExportError(
                f"{self._out} must hold engines in {source.precision} for {target}, found {found.precision} for "
                f"{before}: choose another --out, or delete it."
            )
        if before != target:
            return fresh
        kept = {KERNELS: found.extra[KERNELS]} if KERNELS in found.extra else {}
        return replace(fresh, graphs=found.graphs, extra={**extra, **kept})

    def _key(self, name: str, spec: EngineSpec) -> str:
        entry = self._source.graph(name)
        return content_key(
            graph=entry.key,
            files={file.path: file.sha256 for file in entry.files},
            spec=spec.to_json(),
            precision=self._source.precision,
            target=self._target.to_json(),
        )

    def _is_current(self, name: str, key: str) -> bool:
        entry = self._manifest.graphs.get(name)
        if entry is None or entry.key != key:
            return False
        files = [(self._out / file.path, file.size_bytes) for file in entry.files]
        return all(path.is_file() and path.stat().st_size == size for path, size in files)

    def _run(self, slot: Slot, children: Children, tell: Callable[[str], None], job: Job, workshop: Path) -> Built:
        return run_child(job, workshop, {**self._environment, **slot.environment}, tell, children)

    def _build(self, name: str, spec: EngineSpec, key: str, run: Callable[[Job, Path], Built]) -> GraphEntry:
        """Builds in a folder of its own, checks the plan there, and moves the engine in."""
        self._source.verify(self._onnx_dir, [name], hashes=True)
        workshop = self._out / f".{name}.partial"
        shutil.rmtree(workshop, ignore_errors=True)
        workshop.mkdir()
        try:
            expected = expected_of(self._graph_file(name), spec)
            job = replace(self._job(name, spec, workshop), plugins=bool(expected.plugins))
            built = run(job, workshop)
            plan, wrong = self._plan(job, expected)
            plan_file = self._out / "logs" / f"{name}.plan.json"
            plan_file.write_text(json.dumps(plan.to_json()), encoding="utf-8")
            if wrong and self._options.plan != "warn":
                raise ExportError(f"{UNEXPECTED}{'; '.join(wrong)}; see {plan_file}")
            os.replace(plan_file, self._out / f"{name}.plan.json")
            os.replace(job.engine, self._out / f"{name}.engine")
        finally:
            shutil.rmtree(workshop, ignore_errors=True)
        files = tuple(GraphFile.of(self._out, f"{name}.{kind}") for kind in ("engine", "plan.json"))
        warnings = {WARNINGS: wrong} if wrong else {}
        return GraphEntry(files, key, spec, {**self._extras(name, built, plan, expected), **warnings})

    def _plan(self, job: Job, expected: Expected) -> tuple[Plan, list[str]]:
        """The plan, and a sentence for each expectation that it does not meet. With `--plan warn` a plan that cannot be
        read is one without layers, and a sentence."""
        try:
            if job.inspection:
                plan = read_inspection(Path(job.inspection))
            else:
                plan = parse_plan(Path(job.log).read_text(encoding="utf-8", errors="replace"))
        except ExportError as error:
            if self._options.plan != "warn":
                raise
            return Plan((), (), 0, 0), [str(error)]
        return plan, violations(plan, expected)

    def _graph_file(self, name: str) -> Path:
        return self._onnx_dir / self._source.graph(name).file

    def _job(self, name: str, spec: EngineSpec, workshop: Path) -> Job:
        return Job(
            backend=self._target.backend,
            sm=self._target.sm,
            onnx=str(self._graph_file(name).absolute()),
            engine=str((workshop / "engine").absolute()),
            log=str((self._out / "logs" / f"{name}.log").absolute()),
            result=str((workshop / "result.json").absolute()),
            profile={name: shapes for name, shapes in spec.profile().items() if self._is_open(name, spec)},
            timing_cache=str(self._timing.absolute()) if self._timing else "",
            inspection=str((workshop / "inspection.json").absolute()) if self._timing else "",
        )

    def _is_open(self, tensor: str, spec: EngineSpec) -> bool:
        """Whether the graph leaves sizes of this input open, whatever the profile fixes."""
        return any(found.name == tensor and found.symbols for found in spec.inputs)

    def _extras(self, name: str, built: Built, plan: Plan, expected: Expected) -> dict[str, Any]:
        figures = {"activation_bound_bytes": expected.activation_bytes, "plugins": len(expected.plugins)}
        return {
            **self._source.graph(name).extras,
            GRAPH: self._source.graph(name).key,
            "seconds": built.seconds,
            "peak_bytes": built.peak_bytes,
            "plan": {**summary(plan), **figures},
            LOOKED_UP: list(built.kernels),
        }
