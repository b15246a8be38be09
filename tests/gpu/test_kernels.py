"""The machine code of the kernels on a GPU, at the lengths where tiles begin and end, against fp64; full size is what
kernels/bench.py checks."""

from pathlib import Path
from types import ModuleType

import pytest
import torch

from kernels.benchmarks import Case, cases
from stepvideo_kernels.choice import builds_of
from stepvideo_kernels.kernel_spec import FullSize
from stepvideo_kernels.launch.on_cuda import BuiltOperators, sm_of

pytestmark = pytest.mark.gpu

NAMES = [f"{case.op}.{case.variant}" for case in cases(FullSize(), torch.device("cpu"))]
LENGTHS = (1, 31, 64, 127, 128, 129, 263)


def case_of(name: str, tokens: int) -> Case:
    full = FullSize(video_tokens=tokens, llm_tokens=tokens, vae_tokens=tokens)
    return next(one for one in cases(full, torch.device("cuda")) if f"{one.op}.{one.variant}" == name)


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("name", NAMES)
def test_errs_at_most_twice_as_much_as_torch(name: str, tokens: int, kernels: Path, bench: ModuleType) -> None:
    case, sm = case_of(name, tokens), sm_of(torch.device("cuda"))
    given = case.inputs(torch.Generator("cuda").manual_seed(5))
    own, exact, found = case.own(given), case.exact(given), []
    for build in builds_of(case.op, FullSize()):
        if (build.variant, build.sm) == (case.variant, sm):
            label = build.tile.label
            made = bench.poisoned_run(case, BuiltOperators(kernels, sm, tiling=label), given)
            found += bench.too_large(label, bench.error_shares(case.rows(made), own, exact))
    assert found == []


def test_operators_of_torch_run_the_machine_code(kernels: Path) -> None:
    """torch.ops.stepvideo.* for CUDA tensors, in a CUDA graph too."""
    operators = BuiltOperators(kernels)
    operators.register()
    from stepvideo_kernels.attention.op import attention

    q, k, v = (torch.randn(1, 2, 65, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    (expected,) = operators("attention", [q, k, v])
    assert torch.equal(attention(q, k, v), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(q, k, v)
    out.fill_(torch.nan)
    graph.replay()
    assert torch.equal(out, expected)
