"""A rank is ready only when each of its graphs has run."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from stepvideo_serve.assembly.engines import largest_sizes
from stepvideo_serve.assembly.warm_up import kind_of, warm_up
from stepvideo_serve.config import ServeConfig
from stepvideo_serve.engine.ort import OrtRunner
from stepvideo_serve.engine.runner import EagerRunner
from stepvideo_serve.engine.spec import Dim, EngineSpec, TensorSpec
from stepvideo_serve.errors import ServiceUnavailable, SetupError
from stepvideo_serve.parallel.group import RankGroup
from stepvideo_serve.parallel.layout import Layout
from tests.assembly.edits import State, linked_copy, rewrite
from tests.serving.launch import EAGER

ROOT = Path(__file__).parents[2]


class Rows(nn.Module):
    """Gives `of(values)`, and notes how many rows it was given."""

    def __init__(self, of: Callable[[Tensor], Tensor] = torch.sin) -> None:
        super().__init__()
        self.of = of
        self.rows: list[int] = []

    def forward(self, values: Tensor, ids: Tensor) -> Tensor:
        assert bool((ids == 1).all())
        self.rows.append(len(values))
        return self.of(values)


def spec_of(name: str) -> EngineSpec:
    return EngineSpec(
        name,
        inputs=(TensorSpec("values", "bfloat16", ("tokens", 4)), TensorSpec("ids", "int64", ("tokens",))),
        outputs=(TensorSpec("out", "bfloat16", ("tokens", 4)),),
        dims={"tokens": Dim(3, 20, 900)},
    )


def runners_of(**modules: Rows) -> dict[str, EagerRunner]:
    return {name: EagerRunner(spec_of(name), module) for name, module in modules.items()}


def test_every_graph_runs_at_its_smallest_size() -> None:
    modules = {"dit_block_00": Rows(), "dit_block_01": Rows(), "dit_final": Rows()}
    warm_up(runners_of(**modules), 0)
    assert [module.rows for module in modules.values()] == [[3], [3], [3]]


def test_one_of_each_kind_runs_at_the_largest_that_requests_may_ask_for() -> None:
    modules = {"dit_block_00": Rows(), "dit_block_01": Rows(), "dit_final": Rows(), "other": Rows()}
    limits = {"dit_block_01": {"tokens": 100}, "dit_final": {"tokens": 5000}, "other": {"height": 7}}
    warm_up(runners_of(**modules), 0, limits.__getitem__)
    assert [module.rows for module in modules.values()] == [[3], [3, 100], [3, 900], [3, 900]]


def test_layers_are_of_one_kind() -> None:
    names = ("dit_block_07", "step_llm_attn_31", "dit_core_2h", "vae_decoder")
    assert [kind_of(name) for name in names] == ["dit_block", "step_llm_attn", "dit_core_2h", "vae_decoder"]


def test_values_that_are_not_finite() -> None:
    wrong = r"Rank 2: dit_final must give finite values before the server is ready, out has not: check the weights"
    with pytest.raises(SetupError, match=wrong):
        warm_up(runners_of(dit_embed=Rows(), dit_final=Rows(lambda values: values / 0.0)), 2)


def test_a_graph_that_cannot_run_at_its_smallest_size(tmp_path: Path) -> None:
    """By ONNX Runtime itself: the graph takes a row that its table does not have."""
    spec = EngineSpec(
        "lookup",
        (TensorSpec("ids", "int64", ("tokens",)),),
        (TensorSpec("out", "float32", ("tokens",)),),
        {"tokens": Dim(2, 2, 8)},
    )
    table = helper.make_tensor("table", TensorProto.FLOAT, [1], [0.5])
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "ids"], ["out"])],
        "lookup",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["tokens"])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["tokens"])],
        [table],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), tmp_path / "lookup.onnx"
    )
    refused = r"^Rank 1: lookup must run with tokens = 2 before the server is ready, and cannot: Engine lookup: .*ONNX"
    with pytest.raises(SetupError, match=refused):
        warm_up({"lookup": OrtRunner(spec, tmp_path / "lookup.onnx", 1)}, 1)


@pytest.mark.parametrize(
    ("raised", "kind", "message"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory"),
            SetupError,
            r"the GPU's memory does not suffice: lower \[limits\]",
        ),
        (
            RuntimeError("CUDA error:\nmisaligned"),
            RuntimeError,
            "tokens = 3 .*, and RuntimeError came: CUDA error: misal",
        ),
    ],
)
def test_what_a_gpu_says(raised: Exception, kind: type[Exception], message: str) -> None:
    """A fault that may pass is no SetupError: the group tries again."""

    def fails(_values: Tensor) -> Tensor:
        raise raised

    with pytest.raises(kind, match=message) as caught:
        warm_up(runners_of(dit_final=Rows(fails)), 0)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, SetupError) == (kind is SetupError)


def test_largest_sizes_of_a_rank(tmp_path: Path) -> None:
    path = tmp_path / "serve.toml"
    path.write_text(EAGER.format(model="none", layout="cfg2.sp2"))
    config = ServeConfig.load(path)
    config = replace(config, limits=replace(config.limits, max_tokens=40_001, max_height=1088, max_width=992))
    assert largest_sizes(config, "dit_block_00") == {"tokens": 20_001, "latent_height": 68, "latent_width": 62}
    assert largest_sizes(config, "dit_core_2h")["tokens"] == 40_001


def start(model: Path, folder: Path, layout: str) -> RankGroup:
    """The ranks of the server, by their own factory."""
    path = folder / "serve.toml"
    path.write_text(EAGER.format(model=model, layout=layout))
    return RankGroup(
        "stepvideo_serve.serving.rank_factory:build_rank",
        {"config": str(path)},
        size=Layout.parse(layout).world_size,
        start_timeout_s=300.0,
        arena_bytes=1 << 20,
        threads_per_rank=1,
        env={"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels")))},
    )


def spoil(state: State) -> None:
    for name in [key for key in state if key.startswith("transformer_blocks.1.") and state[key].ndim == 2]:
        state[name].view(-1)[0] = float("nan")


def test_the_ranks_of_the_server_run_their_graphs_before_they_are_ready(mini_checkpoint: Path, tmp_path: Path) -> None:
    """With a weight that is not a number the start ends with a sentence; with the right ones it does not."""
    with start(mini_checkpoint, tmp_path, "tp2") as group:
        assert group.start()["layout"] == "tp2"
    damaged = linked_copy(mini_checkpoint, tmp_path / "damaged")
    for weights in (damaged / "transformer").glob("*.safetensors"):
        rewrite(weights, spoil)
    wrong = r"^Rank 0: dit_\w+_01 must give finite values before the server is ready, .* has not: check the weights"
    with start(damaged, tmp_path, "single") as group, pytest.raises(ServiceUnavailable, match=wrong):
        group.start()
