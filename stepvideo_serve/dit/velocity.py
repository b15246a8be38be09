"""The DiT as a function of (latent, time), put together from its graphs, on one rank or on several.

What depends on the request only (text context, cross-attention keys and values, RoPE tables, condition) is computed
once, in `prepare`. Every rank calls the velocity, and every rank gets the result. Guidance branches that share a rank
run interleaved: while the partial results of one are summed over the ranks, the other computes.
Axes: F, h, w the latent's frames, height and width, C channels, N all tokens, n those of this rank, D width, P values
of a patch.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from stepvideo_serve.dit.config import DiTConfig
from stepvideo_serve.dit.model import patchify, unpatchify
from stepvideo_serve.dit.rope import rope_tables
from stepvideo_serve.dit.segments import core_name
from stepvideo_serve.parallel.communicator import Communicator, OneRank
from stepvideo_serve.text.states import TextStates

Graph = Callable[..., dict[str, Tensor]]
KeysValues = list[tuple[Tensor, Tensor]]
Branch = Generator[Tensor, Tensor, Tensor]
"""Yields a partial result, is sent its sum over the ranks, returns velocity tokens [n, P]."""


@dataclass(frozen=True)
class PreparedRequest:
    """All that stays the same over the steps of one request: tables and condition of this rank's tokens, the keys and
    values of this rank's branches, how many tokens each rank of the sequence axis has, and whether the request is
    guided."""

    grid: tuple[int, int, int]
    condition_tokens: Tensor
    motion_score: Tensor
    rope_cos: Tensor
    rope_sin: Tensor
    branches: tuple[KeysValues, ...]
    counts: list[int]
    guided: bool


class DiTVelocity:
    """Runs the graphs `dit_*` on their device, in their dtype; latents and velocities outside are fp32, and stay on the
    device, so that a step waits for nothing.

    `graphs` are this rank's: whole blocks without tensor and sequence parallelism, else the segments of
    dit/segments.py.
    """

    def __init__(
        self,
        graphs: Mapping[str, Graph],
        config: DiTConfig,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        ranks: Communicator | None = None,
    ) -> None:
        self.config = config
        self._graphs, self._dtype, self._device = graphs, dtype, torch.device(device)
        self._ranks = ranks or OneRank()
        self._whole_blocks = self._ranks.tp == self._ranks.sp == 1

    @property
    def device(self) -> torch.device:
        """Where velocities are; latents may be elsewhere."""
        return self._device

    def prepare(
        self, shape: tuple[int, ...], condition: Tensor, motion_score: float, texts: tuple[TextStates, ...]
    ) -> PreparedRequest:
        """shape = [F, C, h, w] of the latents, condition [C, h, w] = latent of the first image, one branch per text.
        With two groups of ranks for guidance each prepares its own text only."""
        patch, ranks = self.config.patch_size, self._ranks
        grid = (shape[0], shape[2] // patch, shape[3] // patch)
        total = grid[0] * grid[1] * grid[2]
        counts = [total // ranks.sp + (i < total % ranks.sp) for i in range(ranks.sp)]
        frames = torch.zeros(1, *shape)
        frames[0, 0] = condition
        cos, sin = (self._slice(table, counts, 0).to(self._device) for table in rope_tables(*grid))
        own_texts = texts if ranks.cfg == 1 else (texts[min(ranks.cfg_index, len(texts) - 1)],)
        return PreparedRequest(
            grid=grid,
            condition_tokens=self._own(self._slice(patchify(frames, patch), counts, 1)),
            motion_score=torch.tensor([motion_score], device=self._device),
            rope_cos=cos,
            rope_sin=sin,
            branches=tuple(self._keys_values(text) for text in own_texts),
            counts=counts,
            guided=len(texts) > 1,
        )

    def conditional(self, request: PreparedRequest) -> PreparedRequest:
        """The same request for steps that need the velocity of the first text only. With two groups of ranks for
        guidance both branches go on: one group would idle."""
        return request if self._ranks.cfg > 1 else replace(request, branches=request.branches[:1])

    def __call__(self, latents: Tensor, time: float, request: PreparedRequest) -> tuple[Tensor, ...]:
        """latents [F, C, h, w] fp32, time in 0..1 -> one velocity [F, C', h, w] fp32 per branch of the request, on
        every rank with the same bits and on `device`."""
        start = self._graphs["dit_embed"](
            latent_tokens=self._own(self._slice(patchify(latents[None], self.config.patch_size), request.counts, 1)),
            condition_tokens=request.condition_tokens,
            timestep=torch.full((1,), time, device=self._device),  # unlike a copy, this waits for no step before
            motion_score=request.motion_score,
        )
        if self._whole_blocks:
            finished = [self._whole_branch(start, request, branch) for branch in request.branches]
        else:
            finished = self._interleave([self._cut_branch(start, request, branch) for branch in request.branches])
        velocities = tuple(self._assemble(tokens, request) for tokens in finished)
        if self._ranks.cfg > 1 and request.guided:
            velocities = self._ranks.exchange_branches(velocities[0])
        return velocities

    def _whole_branch(self, start: dict[str, Tensor], request: PreparedRequest, branch: KeysValues) -> Tensor:
        """Without tensor and sequence parallelism nothing is exchanged within a branch: velocity tokens [N, P]."""
        tokens = start["tokens"]
        for i, (cross_k, cross_v) in enumerate(branch):
            tokens = self._graphs[f"dit_block_{i:02d}"](
                tokens=tokens, modulation=start["modulation"], **_rope(request), cross_k=cross_k, cross_v=cross_v
            )["tokens_out"]
        return self._final(tokens, start)

    def _interleave(self, branches: Sequence[Branch]) -> list[Tensor]:
        """Advances the branches in turn; each waits for its sum only when its turn comes again."""
        results: dict[int, Tensor] = {}
        pending = {i: self._ranks.sum_tp(next(branch)) for i, branch in enumerate(branches)}
        while pending:
            for i in list(pending):
                try:
                    pending[i] = self._ranks.sum_tp(branches[i].send(pending[i].wait()))
                except StopIteration as finished:
                    results[i] = finished.value
                    del pending[i]
        return [results[i] for i in range(len(branches))]

    def _cut_branch(self, start: dict[str, Tensor], request: PreparedRequest, branch: KeysValues) -> Branch:
        tokens, modulation = start["tokens"], start["modulation"]
        for i, (cross_k, cross_v) in enumerate(branch):
            summed = yield self._attention(i, tokens, modulation, request)
            out = self._graphs[f"dit_text_{i:02d}"](tokens=tokens, summed=summed, cross_k=cross_k, cross_v=cross_v)
            summed = yield out["partial"]
            out = self._graphs[f"dit_ff_{i:02d}"](tokens=out["tokens_out"], summed=summed, modulation=modulation)
            summed = yield out["partial"]
            tokens = out["tokens_out"] + summed
        return self._final(tokens, start)

    def _attention(self, index: int, tokens: Tensor, modulation: Tensor, request: PreparedRequest) -> Tensor:
        """The gated partial result of self-attention."""
        if self._ranks.sp == 1:
            attn = self._graphs[f"dit_attn_{index:02d}"]
            return attn(tokens=tokens, modulation=modulation, **_rope(request))["partial"]
        qkv = self._graphs[f"dit_qkv_{index:02d}"](tokens=tokens, modulation=modulation, **_rope(request))["qkv"]
        exchanged = self._ranks.to_heads(qkv, request.counts)
        attended = self._graphs[core_name(exchanged.shape[1])](qkv=exchanged)["attended"]
        own = self._ranks.to_tokens(attended[0], request.counts)
        return self._graphs[f"dit_out_{index:02d}"](attended=own[None], modulation=modulation)["partial"]

    def _final(self, tokens: Tensor, start: dict[str, Tensor]) -> Tensor:
        return self._graphs["dit_final"](tokens=tokens, time_embedding=start["time_embedding"])["velocity"][0]

    def _assemble(self, own: Tensor, request: PreparedRequest) -> Tensor:
        """Velocity patches of this rank's tokens -> velocity [F, C, h, w] fp32."""
        whole = self._ranks.gather_tokens(own, request.counts) if self._ranks.sp > 1 else own
        return unpatchify(whole[None].float(), *request.grid, self.config.patch_size)[0]

    def _keys_values(self, text: TextStates) -> KeysValues:
        parts = self._graphs["dit_context"](
            llm_states=self._own(text.llm[None]), clip_states=self._own(text.clip[None])
        )
        context = torch.cat([parts["clip_context"], parts["llm_context"]], dim=1)
        pairs = (self._graphs[f"dit_cross_{i:02d}"](context=context) for i in range(self.config.num_layers))
        return [(pair["cross_k"], pair["cross_v"]) for pair in pairs]

    def _slice(self, tensor: Tensor, counts: list[int], dim: int) -> Tensor:
        """This rank's tokens."""
        ends = list(accumulate(counts))
        index = self._ranks.sp_index
        return tensor.narrow(dim, ends[index] - counts[index], counts[index])

    def _own(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, self._dtype)


def _rope(request: PreparedRequest) -> dict[str, Tensor]:
    return {"rope_cos": request.rope_cos, "rope_sin": request.rope_sin}
