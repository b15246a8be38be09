"""What `kernels/bench.py` measures: for each kernel its inputs, what it is compared with, and how it is checked.

A case works on any device and at any size, so that the tests can run each at a tiny one in the interpreter. A
kernel's source is imported where that runs: its machine code needs no compiler.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from stepvideo_kernels.kernel_spec import FullSize, TileConfig
from stepvideo_serve.dit.rope import apply_rope, rope_tables
from stepvideo_serve.text.step_llm import alibi_slopes, sqrt_alibi_bias

Tensors = dict[str, Tensor]
CHECKED_ROWS = 64  # at either end of the sequence


@dataclass(frozen=True)
class Case:
    """One kernel at one size.

    inputs     makes fresh random operands
    kernel     (inputs, tile) -> outputs, by name: the source, which compiles or runs in the interpreter
    operator   what the machine code is called as: the operator's name, `operands` of the inputs, `attributes`
    baselines  what torch offers: inputs -> anything
    own        the same outputs by torch's operations in the working precision, for the rows that are checked
    exact      the same in fp32 or fp64
    rows       cuts the rows that are checked out of the kernel's outputs
    goal       what is expected on an H100, for the report
    """

    op: str
    variant: str
    inputs: Callable[[torch.Generator], Tensors]
    kernel: Callable[[Tensors, TileConfig], Tensors]
    operator: str
    operands: Callable[[Tensors], list[Tensor]]
    baselines: Mapping[str, Callable[[Tensors], object]]
    own: Callable[[Tensors], Tensors]
    exact: Callable[[Tensors], Tensors]
    rows: Callable[[Tensors], Tensors]
    goal: str
    attributes: Mapping[str, float] = field(default_factory=dict)


def cases(full: FullSize, device: torch.device) -> Iterator[Case]:
    """Every kernel of the DiT step, Step-LLM and the VAE in bf16, and the FP8 ones."""
    yield _adaln(full, device, fp8=False)
    yield _adaln(full, device, fp8=True)
    yield _qkv(full, device, fp8=False)
    yield _qkv(full, device, fp8=True)
    yield _attention(full, device, fp8=False)
    yield _attention(full, device, fp8=True)
    yield _alibi(full, device)
    yield _vae(full, device)


def _random(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, device=generator.device, dtype=torch.bfloat16)


def _ends(x: Tensor, dim: int = 1) -> Tensor:
    """The first and the last rows along the tokens."""
    count = min(CHECKED_ROWS, x.shape[dim])
    return torch.cat([x.narrow(dim, 0, count), x.narrow(dim, x.shape[dim] - count, count)], dim)


def _adaln(full: FullSize, device: torch.device, *, fp8: bool) -> Case:
    from stepvideo_kernels.adaln_modulate import reference

    shape = (full.batch, full.video_tokens, full.width)
    names = ("x", "branch", "gate", "weight", "bias", "scale", "shift")

    def inputs(generator: torch.Generator) -> Tensors:
        sizes = [shape, shape, shape[::2], shape[2:], shape[2:], shape[::2], shape[::2]]
        made = {name: _random(generator, *size) for name, size in zip(names, sizes, strict=True)}
        return made | {"out_scale": torch.full((1,), 0.02, device=device)}

    def run(given: Tensors, tile: TileConfig) -> Tensors:
        from stepvideo_kernels.adaln_modulate import kernel

        total = torch.empty_like(given["x"])
        y = torch.empty_like(total, dtype=torch.float8_e4m3fn if fp8 else total.dtype)
        residual, affine = (given["branch"], given["gate"]), (given["weight"], given["bias"])
        modulation, scale = (given["scale"], given["shift"]), given["out_scale"] if fp8 else None
        kernel.launch(given["x"], residual, affine, modulation, scale, (total, y), 1e-5, tile)
        return {"total": total, "y": y}

    def unfused(given: Tensors) -> Tensors:
        x, branch, gate, weight, bias, scale, shift = (given[name] for name in names)
        total = x + gate[:, None] * branch
        y = F.layer_norm(total, total.shape[-1:], weight, bias, 1e-5) * (1 + scale[:, None]) + shift[:, None]
        return {"total": total, "y": reference.to_fp8(y, given["out_scale"]) if fp8 else y}

    def cut(given: Tensors) -> Tensors:
        return given | {name: _ends(given[name]) for name in ("x", "branch")}

    def exact(given: Tensors) -> Tensors:
        total, y = reference.adaln_residual(*(cut(given)[name].double() for name in names), eps=1e-5)
        return {"total": total, "y": (y / 0.02).clamp(-448, 448) if fp8 else y}

    variant = "residual-fp8" if fp8 else "residual-bf16"
    own = lambda given: unfused(cut(given))  # noqa: E731
    goal = "85 % of memory bandwidth"
    operator = "adaln_residual_fp8" if fp8 else "adaln_residual"
    operands = _named(*names, *(["out_scale"] if fp8 else []))
    baselines = {"unfused torch": unfused}
    return Case(
        "adaln_modulate",
        variant,
        inputs,
        run,
        operator,
        operands,
        baselines,
        own,
        exact,
        _all_ends,
        goal,
        {"eps": 1e-5},
    )


def _qkv(full: FullSize, device: torch.device, *, fp8: bool) -> Case:
    from stepvideo_kernels.qkv_norm_rope import reference, spec

    tokens, heads = full.video_tokens, full.heads

    def inputs(generator: torch.Generator) -> Tensors:
        cos, sin = (table[:tokens].to(device) for table in rope_tables(18, 34, -(-tokens // (18 * 34))))
        gains = {name: 1.5 + 0.2 * _random(generator, spec.HEAD_DIM) for name in ("q_gain", "k_gain")}
        scales = {f"{name}_scale": torch.full((heads,), 0.05, device=device) for name in "qkv"}
        qkv = _random(generator, full.batch, tokens, 3 * full.width)
        return {"qkv": qkv, **gains, "cos": cos, "sin": sin, **scales}

    def run(given: Tensors, tile: TileConfig) -> Tensors:
        from stepvideo_kernels.qkv_norm_rope import kernel

        dtype = torch.float8_e4m3fn if fp8 else torch.bfloat16
        rows = (full.batch, heads, tokens, spec.HEAD_DIM)
        columns = (*rows[:2], spec.HEAD_DIM, spec.padded_tokens(tokens))
        q, k, v = (torch.empty(s, dtype=dtype, device=device) for s in (rows, rows, columns if fp8 else rows))
        scales = (given["q_scale"], given["k_scale"], given["v_scale"]) if fp8 else None
        gains, tables = (given["q_gain"], given["k_gain"]), (given["cos"], given["sin"])
        kernel.launch(given["qkv"], gains, tables, scales, (q, k, v), 1e-6, tile)
        return {"q": q, "k": k, "v": v}

    def unfused(given: Tensors) -> Tensors:
        q, k, v = given["qkv"].unflatten(-1, (-1, 3 * spec.HEAD_DIM)).split(spec.HEAD_DIM, dim=-1)
        normed = (
            F.rms_norm(x.float(), (spec.HEAD_DIM,), given[gain].float(), 1e-6).to(x.dtype)
            for x, gain in ((q, "q_gain"), (k, "k_gain"))
        )
        q, k = (apply_rope(x, given["cos"], given["sin"]) for x in normed)
        split = {name: x.transpose(1, 2).contiguous() for name, x in zip("qkv", (q, k, v), strict=True)}
        return {name: reference.to_fp8(x, given[f"{name}_scale"]) for name, x in split.items()} if fp8 else split

    def cut(given: Tensors) -> Tensors:
        tables = {name: _ends(given[name], 0) for name in ("cos", "sin")}
        return given | tables | {"qkv": _ends(given["qkv"])}

    def exact(given: Tensors) -> Tensors:
        names = ("qkv", "q_gain", "k_gain", "cos", "sin")
        outputs = reference.qkv_norm_rope(*(cut(given)[name].double() for name in names), eps=1e-6)
        return {name: (x / 0.05).clamp(-448, 448) if fp8 else x for name, x in zip("qkv", outputs, strict=True)}

    def rows(outputs: Tensors) -> Tensors:
        by_token = outputs | ({"v": outputs["v"][..., :tokens].transpose(2, 3)} if fp8 else {})
        return {name: _ends(x, 2) for name, x in by_token.items()}

    own = lambda given: unfused(cut(given))  # noqa: E731
    goal = "85 % of memory bandwidth"
    variant = "fp8" if fp8 else "bf16"
    operator = "qkv_norm_rope_fp8" if fp8 else "qkv_norm_rope"
    operands = _named("qkv", "q_gain", "k_gain", "cos", "sin", *([f"{name}_scale" for name in "qkv"] if fp8 else []))
    baselines = {"unfused torch": unfused}
    return Case(
        "qkv_norm_rope", variant, inputs, run, operator, operands, baselines, own, exact, rows, goal, {"eps": 1e-6}
    )


def _attention(full: FullSize, device: torch.device, *, fp8: bool) -> Case:
    from stepvideo_kernels.attention import spec
    from stepvideo_kernels.qkv_norm_rope import reference

    shape = (full.batch, full.heads, full.video_tokens, spec.HEAD_DIM)
    padding = spec.padded_keys(full.video_tokens) - full.video_tokens

    def inputs(generator: torch.Generator) -> Tensors:
        made = {name: _random(generator, *shape) for name in "qkv"}
        made["v"] += 0.5  # sums that grow over all keys are where narrow accumulators lose
        scale = torch.full((full.heads,), 0.02, device=device)
        eight = {f"{name}8": reference.to_fp8(made[name], scale) for name in "qk"} if fp8 else {}
        turned = {"v8": reference.to_fp8(F.pad(made["v"].transpose(2, 3), (0, padding)), scale)} if fp8 else {}
        return made | eight | turned | {"scale": scale}

    def run(given: Tensors, tile: TileConfig) -> Tensors:
        from stepvideo_kernels.attention import kernel

        out = torch.empty(shape[0], shape[2], full.width, dtype=torch.bfloat16, device=device)
        operands = (given["q8"], given["k8"], given["v8"]) if fp8 else (given["q"], given["k"], given["v"])
        kernel.launch(*operands, out, tile, scales=(given["scale"],) * 3 if fp8 else None)
        return {"out": out}

    def own(given: Tensors) -> Tensors:
        """In FP8, torch's own is SDPA in bf16 on the rounded operands, its weights rounded to FP8."""
        return {"out": _attended(_rounded(given, fp8=fp8), torch.bfloat16, weights_fp8=fp8)}

    def exact(given: Tensors) -> Tensors:
        return {"out": _attended(_rounded(given, fp8=fp8), torch.float64, weights_fp8=False)}

    goal = "1.6 times the best bf16 SDPA" if fp8 else "as fast as the best bf16 SDPA"
    variant = "fp8" if fp8 else "bf16"
    operator = "attention_fp8" if fp8 else "attention"
    operands = _named("q8", "k8", "v8", "scale", "scale", "scale") if fp8 else _named("q", "k", "v")
    return Case("attention", variant, inputs, run, operator, operands, _sdpa_baselines(), own, exact, _all_ends, goal)


def _rounded(given: Tensors, *, fp8: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Operands of attention as the kernel sees them, as bf16 or wider, queries cut to the rows that are checked."""
    if not fp8:
        return _ends(given["q"], 2), given["k"], given["v"]
    scale = given["scale"].view(-1, 1, 1)
    values = given["v8"][..., : given["k"].shape[2]].transpose(2, 3)
    return _ends(given["q8"], 2).float() * scale, given["k8"].float() * scale, values.float() * scale


def _attended(operands: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype, *, weights_fp8: bool) -> Tensor:
    """Attention head by head, which bounds the memory: [B, H, n, 128] and keys -> [B, n, 128 H]."""
    q, k, v = operands
    entries = []
    for entry in range(q.shape[0]):
        heads = [
            _one_head(*(x[entry, h].to(dtype) for x in (q, k, v)), weights_fp8=weights_fp8) for h in range(q.shape[1])
        ]
        entries.append(torch.cat(heads, dim=-1))
    return torch.stack(entries)


def _one_head(q: Tensor, k: Tensor, v: Tensor, *, weights_fp8: bool) -> Tensor:
    if not weights_fp8:
        return F.scaled_dot_product_attention(q[None], k[None], v[None])[0]
    scores = (q @ k.T).float() * q.shape[-1] ** -0.5
    weights = torch.exp(scores - scores.amax(-1, keepdim=True)) * 256
    return (weights.to(torch.float8_e4m3fn).to(v.dtype) @ v / weights.sum(-1, keepdim=True)).to(v.dtype)


def _sdpa(given: Tensors, backend: SDPBackend) -> Tensor:
    with sdpa_kernel([backend]):
        return F.scaled_dot_product_attention(given["q"], given["k"], given["v"])


def _sdpa_baselines() -> dict[str, Callable[[Tensors], object]]:
    return {
        "SDPA flash": partial(_sdpa, backend=SDPBackend.FLASH_ATTENTION),
        "SDPA cuDNN": partial(_sdpa, backend=SDPBackend.CUDNN_ATTENTION),
    }


def _alibi(full: FullSize, device: torch.device) -> Case:
    from stepvideo_kernels.alibi_attention import reference, spec

    groups = full.llm_groups if full.heads % full.llm_groups == 0 else 1
    width = (full.heads + 2 * groups) * spec.HEAD_DIM

    def inputs(generator: torch.Generator) -> Tensors:
        slopes = torch.tensor(alibi_slopes(full.heads), device=device)
        bias = sqrt_alibi_bias(alibi_slopes(full.heads), full.llm_tokens, device)
        return {"qkv": _random(generator, 1, full.llm_tokens, width), "slopes": slopes, "bias": bias[None].bfloat16()}

    def run(given: Tensors, tile: TileConfig) -> Tensors:
        from stepvideo_kernels.alibi_attention import kernel

        out = torch.empty(1, full.llm_tokens, full.width, dtype=torch.bfloat16, device=device)
        kernel.launch(given["qkv"], given["slopes"], out, tile)
        return {"out": out}

    def unfused(given: Tensors) -> Tensors:
        queries, pairs = given["qkv"].split([full.width, width - full.width], dim=-1)
        q = queries.unflatten(-1, (-1, spec.HEAD_DIM)).transpose(1, 2)
        k, v = pairs.unflatten(-1, (-1, 2 * spec.HEAD_DIM)).transpose(1, 2).split(spec.HEAD_DIM, dim=-1)
        k, v = (x.repeat_interleave(full.heads // groups, dim=1) for x in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=given["bias"])
        return {"out": out.transpose(1, 2).flatten(2)}

    def exact(given: Tensors) -> Tensors:
        return _all_ends({"out": reference.alibi_attention(given["qkv"].double(), given["slopes"].double())})

    own = lambda given: _all_ends(unfused(given))  # noqa: E731
    baselines, goal = {"SDPA with a bias": unfused}, "faster than with a bias"
    operator, operands = "alibi_attention", _named("qkv", "slopes")
    return Case("alibi_attention", "bf16", inputs, run, operator, operands, baselines, own, exact, _all_ends, goal)


def _vae(full: FullSize, device: torch.device) -> Case:

    shape = (1, full.vae_tokens, full.vae_channels)

    def inputs(generator: torch.Generator) -> Tensors:
        return {name: _random(generator, *shape) for name in "qkv"}

    def run(given: Tensors, tile: TileConfig) -> Tensors:
        from stepvideo_kernels.vae_attention import kernel

        out = torch.empty(shape, dtype=torch.bfloat16, device=device)
        kernel.launch(given["q"], given["k"], given["v"], out, tile)
        return {"out": out}

    def causal(given: Tensors, dtype: torch.dtype) -> Tensors:
        """Only the checked queries: the first see the first keys, the last nearly all."""
        positions = torch.arange(shape[1], device=device)
        mask = _ends(positions[:, None], 0) >= positions
        q, k, v = (x.to(dtype) for x in (_ends(given["q"]), given["k"], given["v"]))
        return {"out": F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], attn_mask=mask)[:, 0]}

    def baseline(given: Tensors) -> Tensor:
        q, k, v = (given[name][:, None] for name in "qkv")
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    own, exact = partial(causal, dtype=torch.bfloat16), partial(causal, dtype=torch.float64)
    goal = "faster than SDPA, with no memory that grows with the square of the tokens"
    operator, operands, baselines = "vae_attention", _named("q", "k", "v"), {"SDPA causal": baseline}
    return Case("vae_attention", "bf16", inputs, run, operator, operands, baselines, own, exact, _all_ends, goal)


def _named(*names: str) -> Callable[[Tensors], list[Tensor]]:
    """Picks these operands, in this order."""
    return lambda given: [given[name] for name in names]


def _all_ends(outputs: Tensors) -> Tensors:
    return {name: _ends(x) for name, x in outputs.items()}
