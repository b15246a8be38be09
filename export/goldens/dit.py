"""The DiT in one step: every prefix with `.latents` and `.cond`, such as `dit.*` and `dit_long.*`.

Rows of a batch may have text of different length, so they run one by one, each with its own tokens and no mask.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from export.goldens.answers import GIVEN, NO_GRAPH, UNKNOWN, Answer, Computed
from export.goldens.folder import Goldens
from export.goldens.networks import Networks
from stepvideo_serve.dit.config import DiTConfig
from stepvideo_serve.dit.model import StepVideoDiT
from stepvideo_serve.dit.velocity import DiTVelocity, Graph
from stepvideo_serve.text.states import CLIP_TOKENS, TextStates

INPUTS = ("latents", "cond", "timestep", "motion_score", "text", "clip", "mask")
Parts = dict[str, Tensor]


@dataclass(frozen=True)
class DiTInputs:
    """One row: latents and condition [F, C, h, w], the time in 0..1, the motion score, text of real tokens only."""

    latents: Tensor
    condition: Tensor
    timestep: float
    motion_score: float
    text: TextStates


class DiTGoldens:
    """Entries of one prefix. `block2.attn1` is a module of a block, `block2` the output of the block."""

    def __init__(self, goldens: Goldens, networks: Networks, prefix: str) -> None:
        self._goldens, self._networks, self._prefix = goldens, networks, prefix

    def recompute(self, name: str) -> Answer:
        part = name.removeprefix(f"{self._prefix}.")
        if part in INPUTS:
            return GIVEN
        if part == "caption_proj":
            return Computed(self._captions(self._goldens.shape(name)[1]))
        if module_path(part, self._networks.checkpoint.dit_config) is None:
            return UNKNOWN
        if part not in self._parts:
            return NO_GRAPH
        whole = self._parts[part]
        if part == "patch":
            whole = self._one_frame(whole, self._goldens.descriptions[name])
        return Computed(self._goldens.described_part(name, whole, axis=1))

    def _given(self, part: str) -> Tensor:
        return self._goldens.tensor(f"{self._prefix}.{part}")

    def _rows(self) -> list[DiTInputs]:
        config = self._networks.checkpoint.dit_config
        for part, size, what in (
            ("latents", config.in_channels, "latent channels"),
            ("text", config.llm_channels, "LLM channels"),
            ("clip", config.clip_channels, "CLIP channels"),
        ):
            self._goldens.require_size(f"{self._prefix}.{part}", 2, size, what)
        return dit_rows({part: self._given(part) for part in INPUTS})

    @cached_property
    def _parts(self) -> Parts:
        """All that entries of this prefix show, of all rows."""
        config = self._networks.checkpoint.dit_config
        names = [name.removeprefix(f"{self._prefix}.") for name in self._goldens.descriptions]
        wanted = {part for part in names if module_path(part, config) is not None}
        if self._networks.has_modules:
            model = self._networks.checkpoint.dit()
            rows = [run_module(model, row, wanted) for row in self._rows()]
        else:
            rows = [run_graphs(self._networks.dit_graphs(), config, row, wanted) for row in self._rows()]
        return {part: torch.cat([row[part] for row in rows]) for part in rows[0]}

    def _captions(self, tokens: int) -> Tensor:
        """The projection of the first LLM states, whether they count as text or not."""
        text, clip = self._given("text"), self._given("clip")
        if self._networks.has_modules:
            outer = self._networks.checkpoint.dit_outer()
            captions: Tensor = outer.caption_projection(outer.caption_norm(text[:, :tokens]))
            return captions
        graph = self._networks.graph("dit_context")
        rows = [graph(llm_states=t[None], clip_states=c[None])["llm_context"] for t, c in zip(text, clip, strict=True)]
        return torch.cat(rows)[:, :tokens]

    def _one_frame(self, tokens: Tensor, description: str) -> Tensor:
        """The tokens [1, h * w, D] of the frame and row that the description names."""
        found = re.search(r"frame (\d+) batch (\d+)", description)
        frame, row = (int(found[1]), int(found[2])) if found else (0, 0)
        per_frame = tokens.shape[1] // self._goldens.shape(f"{self._prefix}.latents")[1]
        return tokens[row : row + 1, frame * per_frame : (frame + 1) * per_frame]


def dit_rows(inputs: Parts) -> list[DiTInputs]:
    """Splits a batch: latents and cond [B, F, C, h, w], timestep [B], motion_score [1] or [B], text [B, 320, .],
    clip [B, 77, .], mask [B, 397] with ones in front."""
    batch = len(inputs["latents"])
    motion_scores = inputs["motion_score"].reshape(-1).expand(batch)
    tokens = (inputs["mask"].sum(dim=1) - CLIP_TOKENS).tolist()
    return [
        DiTInputs(
            latents=inputs["latents"][i],
            condition=inputs["cond"][i],
            timestep=float(inputs["timestep"][i]),
            motion_score=float(motion_scores[i]),
            text=TextStates(inputs["text"][i, : tokens[i]], inputs["clip"][i]),
        )
        for i in range(batch)
    ]


def module_path(part: str, config: DiTConfig) -> str | None:
    """Where in StepVideoDiT an entry is looked up ("" is the model itself), or None for no such thing."""
    outer = {"out": "", "adaln": "adaln_single", "patch": "pos_embed"}
    if part in outer:
        return outer[part]
    if part == "block_last":
        return f"transformer_blocks.{config.num_layers - 1}"
    found = re.fullmatch(r"block(\d+)(\.attn1|\.attn2|\.ff)?", part)
    if found and int(found[1]) < config.num_layers:
        return f"transformer_blocks.{found[1]}{found[2] or ''}"
    return None


def run_module(model: StepVideoDiT, row: DiTInputs, wanted: Collection[str]) -> Parts:
    """The wanted parts, batch 1, as the modules give them."""
    parts: Parts = {}

    def keep_as(part: str) -> Callable[[nn.Module, object, Tensor | tuple[Tensor, ...]], None]:
        def keep(_module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
            parts[part] = output if isinstance(output, Tensor) else output[0].flatten(1)

        return keep

    paths = {part: path for part in wanted if (path := module_path(part, model.config)) is not None}
    hooks = [model.get_submodule(path).register_forward_hook(keep_as(part)) for part, path in paths.items()]
    model(
        row.latents[None],
        row.condition[None],
        torch.tensor([row.timestep]),
        torch.tensor([row.motion_score]),
        row.text.llm[None],
        row.text.clip[None],
    )
    for hook in hooks:
        hook.remove()
    return parts


def run_graphs(graphs: Mapping[str, Graph], config: DiTConfig, row: DiTInputs, wanted: Collection[str]) -> Parts:
    """The wanted parts that are outputs of graphs, batch 1, from the same calls as in serving."""
    outputs: dict[str, Parts] = {}

    def kept(name: str, graph: Graph) -> Graph:
        def run(**inputs: Tensor) -> Parts:
            outputs[name] = graph(**inputs)
            return outputs[name]

        return run

    velocity = DiTVelocity({name: kept(name, graph) for name, graph in graphs.items()}, config, torch.float32)
    shape = tuple(row.latents.shape)
    prepared = velocity.prepare(shape, row.condition[0], row.motion_score, (row.text,))
    (out,) = velocity(row.latents, row.timestep, prepared)
    start = outputs["dit_embed"]
    parts = {"out": out[None], "adaln": start["modulation"].flatten(1), "patch": start["tokens"]}
    for index in range(config.num_layers):
        parts[f"block{index}"] = outputs[f"dit_block_{index:02d}"]["tokens_out"]
    parts["block_last"] = parts[f"block{config.num_layers - 1}"]
    return {part: tensor for part, tensor in parts.items() if part in wanted}
