"""What is shipped fits together: each configuration, the engines that the documented command builds for it, and what
the planner and the ledger of memory say of it."""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from export.engines.profiles import parse_shapes, profile_spec
from export.graphs.placement import export_plan
from export.tiny_checkpoint import write_checkpoint
from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.config import ServeConfig
from stepvideo_serve.doctor.case import Case
from stepvideo_serve.doctor.finding import Level
from stepvideo_serve.doctor.of_engines import engines
from stepvideo_serve.doctor.of_gpus import gpu_memory
from stepvideo_serve.engine.manifest import KEY, EngineTarget, GraphEntry, GraphFile, Manifest
from stepvideo_serve.geometry import VideoGeometry
from stepvideo_serve.launch.options import ServerOptions
from stepvideo_serve.memory.placement import Placement
from stepvideo_serve.memory.predicted import predicted
from stepvideo_serve.parallel.layout import Layout
from stepvideo_serve.planning.cost import layouts_of
from stepvideo_serve.planning.gpus import GPUS
from stepvideo_serve.planning.groups import predictions_of
from stepvideo_serve.planning.layouts import recommend
from stepvideo_serve.planning.model_size import PUBLISHED, model_size, workload
from tests.fakes.engines import SM
from tests.fakes.machine import machine
from tests.fakes.tensorrt import VERSION
from tests.mini import MINI

HEADS = 8  # as many as a layout of four slices needs
ONE, HALVES, SINGLES = "docker/serve.toml", "docker/groups/2x4.toml", "docker/groups/8x1.toml"
CHARTS = {ONE: "values.yaml", HALVES: "values-2x4.yaml", SINGLES: "values-8x1.yaml"}


@dataclass(frozen=True)
class Command:
    """A `make engines`. Variables that it leaves out are those of the Makefile."""

    variables: Mapping[str, str]
    defaults: Mapping[str, str]

    def __getitem__(self, name: str) -> str:
        return self.variables.get(name, self.defaults.get(name, ""))


@pytest.fixture(scope="session")
def defaults(root: Path) -> dict[str, str]:
    found = re.findall(r"^(\w+) \?= ?(.*)$", (root / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    return {name: value.strip() for name, value in found}


@pytest.fixture(scope="session")
def commands(root: Path, defaults: dict[str, str]) -> dict[str, Command]:
    """Configuration -> the command that docs/operations.md has for its engines."""
    text = (root / "docs" / "operations.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(docker/[\w/.]+toml)` \|.*\| `make engines (.+)` \|$", text, re.MULTILINE)
    return {path: Command(dict(pair.split("=", 1) for pair in said.split()), defaults) for path, said in rows}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small one; the sizes that its graphs take are those of every checkpoint."""
    folder = tmp_path_factory.mktemp("shipped") / "model"
    dit = replace(MINI.dit, num_layers=1, num_heads=HEADS)
    write_checkpoint(folder, replace(MINI, dit=dit, llm=replace(MINI.llm, num_layers=1)))
    return folder


def built(checkpoint: Path, out: Path, command: Command, **changed: str) -> Path:
    """The manifests that the command leaves behind, with the profiles of its engines, each of which is a byte."""
    command = replace(command, variables={**command.variables, **changed})
    layout, source = Layout.parse(command["LAYOUT"]), Checkpoint(checkpoint)
    plan = export_plan(source, out, "bf16", layout, split_llm=bool(command["SPLIT_LLM"]))
    videos = parse_shapes(command["SHAPES"])
    for folder, parts in plan.items():
        folder.mkdir(parents=True, exist_ok=True)
        graphs = {}
        for name, part in parts.items():
            (folder / f"{name}.engine").write_bytes(b"e")
            extras = {
                "plan": {"activation_bytes": 4000, "weight_bytes": 1 << 20, "plugins": 0},
                "parity": [{"error": 0.0, "allowed": 1.0}],
            }
            spec = profile_spec(part.spec, videos, False, layout.sp)
            graphs[name] = GraphEntry((GraphFile.of(folder, f"{name}.engine"),), "key", spec, extras)
        of_part = "" if folder == out else folder.name
        target = EngineTarget(command["BACKEND"], VERSION, int(command["SM"]), str(layout.of_branch), of_part)
        extra = {"dit_config": _dit(source), "settings": dict(source.settings), KEY: target.to_json()}
        Manifest("checkpoint", command["PRECISION"], {}, graphs, extra).save(folder)
    return out


def _dit(checkpoint: Checkpoint) -> dict[str, Any]:
    return dict(vars(checkpoint.dit_config))


def examined(root: Path, path: str, checkpoint: Path, engines_dir: Path, **limits: Any) -> tuple[Level, str]:
    """What the doctor says of these engines for a configuration."""
    config = ServeConfig.load(root / path)
    served = replace(config.model, dir=checkpoint, engines_dir=engines_dir)
    config = replace(config, model=served, limits=replace(config.limits, **limits))
    with machine(count=8):
        case = Case(root / path, config, ServerOptions(root / "model_repository"), {})
        [found] = engines(case)
        if found.level is Level.OK:
            [room] = gpu_memory(case)
            assert room.level is Level.OK, room.found
    return found.level, found.found


@pytest.mark.parametrize("path", CHARTS)
def test_a_configuration_serves_the_engines_of_its_command(
    path: str, root: Path, commands: dict[str, Command], checkpoint: Path, tmp_path: Path
) -> None:
    assert int(commands[path]["SM"]) == SM
    out = built(checkpoint, tmp_path / "engines", commands[path])
    level, said = examined(root, path, checkpoint, out)
    assert level is Level.OK, said
    larger = {"max_tokens": 37945, "max_height": 1008, "max_width": 1008}
    for limit, value in larger.items():
        level, said = examined(root, path, checkpoint, out, **{limit: value})
        assert (level, "build it for larger shapes, or lower the limits" in said) == (Level.FAULT, True), limit


def test_engines_of_one_orientation_are_too_few_for_both(
    root: Path, commands: dict[str, Command], checkpoint: Path, tmp_path: Path
) -> None:
    """What the Makefile's default used to be."""
    out = built(checkpoint, tmp_path / "engines", commands[ONE], SHAPES="544x992x102")
    level, said = examined(root, ONE, checkpoint, out)
    assert (level, "must take latent_height up to 62" in said) == (Level.FAULT, True), said


@pytest.mark.parametrize(("path", "chart"), CHARTS.items())
def test_the_chart_has_the_same(path: str, chart: str, root: Path) -> None:
    values = yaml.safe_load((root / "docker" / "chart" / chart).read_text(encoding="utf-8"))
    assert tomllib.loads(values["config"]) == tomllib.loads((root / path).read_text(encoding="utf-8"))
    config = ServeConfig.load(root / path)
    assert values["gpus"] == Layout.parse(config.denoiser.layout).world_size
    assert values["replicas"] == (1 if path == ONE else 8 // values["gpus"]), "the GPUs of one node"


@pytest.mark.parametrize("path", CHARTS)
def test_it_is_the_planners_fastest_layout_that_the_ledger_admits(path: str, root: Path) -> None:
    """On H100, in FP8, for all sizes that the configuration's card has."""
    config, size, h100 = ServeConfig.load(root / path), model_size(PUBLISHED), GPUS["H100"]
    placement = Placement.of(config)
    frames, height, width = config.card.sizes[0]
    both = (frames, width, height) in config.card.sizes
    work = workload(PUBLISHED, VideoGeometry(frames, height, width), 50, both)
    layouts = layouts_of(placement.layout.world_size, PUBLISHED.dit.num_heads, work.tokens)
    chosen, _ = recommend(predictions_of(layouts, size, work, h100, config.model.precision), h100)
    assert chosen is not None
    assert chosen.layout == placement.layout
    ledger = predicted(size, placement, work, config.model.precision)
    assert ledger == chosen.chosen_memory, "its stages are where the planner puts them"
    assert max(ledger.by_gpu.values()) <= h100.memory_bytes


@pytest.mark.parametrize("path", CHARTS)
def test_what_the_card_states_is_within_the_limits(path: str, root: Path) -> None:
    config = ServeConfig.load(root / path)
    for frames, height, width in config.card.sizes:
        video = VideoGeometry.checked(frames, height, width)
        limits = config.limits
        assert (frames, video.tokens) == (limits.max_frames, limits.max_tokens)
        assert height <= limits.max_height
        assert width <= limits.max_width
