"""What the comparison of a graph with torch must let pass, and what it must not."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto
from torch import Tensor, nn

from export.compare.fp16_copy import twin_spec, write_fp16_twin
from export.compare.one_graph import ROUND_OFF, compare_with_eager, error_row, relative_error
from export.graphs.writer import write_graph
from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.assembly.graphs import Component, components
from stepvideo_serve.dit.config import HEAD_DIM
from stepvideo_serve.engine.ort import OrtRunner
from stepvideo_serve.engine.spec import Dim, EngineSpec, TensorSpec
from stepvideo_serve.errors import ExportError
from tests.mini import MINI, normal

QUERIES, KEYS = 231, 138
ATTENTION = EngineSpec(
    "attention",
    inputs=tuple(
        TensorSpec(name, "bfloat16", (1, 1, size, HEAD_DIM))
        for name, size in (("q", "tokens"), ("k", "context_tokens"), ("v", "context_tokens"))
    ),
    outputs=(TensorSpec("out", "bfloat16", (1, 1, "tokens", HEAD_DIM)),),
    dims={"tokens": Dim(1, QUERIES, 1024), "context_tokens": Dim(1, KEYS, 1024)},
)


class Attention(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v)


@dataclass(frozen=True)
class Block:
    """One block as a graph in bf16, and the modules that it is compared with."""

    path: Path
    precisions: dict[str, Component]

    def compare(self, path: Path) -> float:
        """The largest error over what is allowed. Raises ExportError where that is more than 1."""
        spec, wide, half = self.precisions["bf16"].spec, self.precisions["fp32"].load, self.precisions["fp16"].load
        return max(float(row["error"] / row["allowed"]) for row in compare_with_eager(spec, path, wide, half))

    def edited(self, name: str, edit: Callable[[Tensor], object], folder: Path) -> Path:
        """A copy in which `edit` changed the weight `name` [input channels, output channels] in place."""
        model = onnx.load(str(self.path))
        (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
        weight = torch.frombuffer(bytearray(tensor.raw_data), dtype=torch.bfloat16).view(*tensor.dims)
        edit(weight)
        tensor.raw_data = weight.view(torch.int16).numpy().tobytes()
        onnx.save(model, str(folder / "edited.onnx"))
        return folder / "edited.onnx"


@pytest.fixture(scope="module")
def block(mini_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Block:
    checkpoint = Checkpoint(mini_checkpoint)
    precisions = {name: components(checkpoint, name)["dit_block_00"] for name in ("bf16", "fp16", "fp32")}
    path = tmp_path_factory.mktemp("block") / "block.onnx"
    write_graph(precisions["bf16"].load(), precisions["bf16"].spec, path)
    return Block(path, precisions)


@pytest.fixture(scope="module")
def weights(block: Block) -> dict[str, list[int]]:
    """Names and sizes of the weights of the block's products, in their order."""
    graph = onnx.load(str(block.path), load_external_data=False).graph
    sizes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    products = [node for node in graph.node if node.op_type == "MatMul" and node.input[1] in sizes]
    return {node.input[1]: sizes[node.input[1]] for node in products}


def test_the_twin_has_attention_with_scores_and_sums_in_fp32(tmp_path: Path) -> None:
    """As torch and GPUs do it: the result is that of fp32, rounded once. Peaked scores, whose rounding would show."""
    write_graph(Attention(), ATTENTION, tmp_path / "graph.onnx")
    write_fp16_twin(tmp_path / "graph.onnx", tmp_path / "twin.onnx")
    twin = onnx.load(str(tmp_path / "twin.onnx")).graph
    assert [node.op_type for node in twin.node] == ["Cast", "Cast", "Cast", "Attention", "Cast"]
    assert {value.type.tensor_type.elem_type for value in (*twin.input, *twin.output)} == {TensorProto.FLOAT16}
    q, k, v = (normal(1, 1, size, HEAD_DIM, seed=size).half() for size in (QUERIES, KEYS, KEYS + 1))
    q, v = 3 * q, v[:, :, :KEYS]
    exact = Attention()(q.double(), k.double(), v.double())
    with OrtRunner(twin_spec(ATTENTION), tmp_path / "twin.onnx", threads=1) as runner:
        found = runner(q=q, k=k, v=v)["out"]
    rounded = error_row(exact.half(), exact)
    assert error_row(found, exact)["rms"] <= 1.01 * rounded["rms"]
    assert error_row(found, exact)["error"] <= 1.01 * rounded["error"]
    in_halves = ((q @ k.transpose(-1, -2) * HEAD_DIM**-0.5).half().softmax(-1) @ v).half()
    assert relative_error(in_halves, exact) > 2 * max(relative_error(Attention()(q, k, v), exact), ROUND_OFF)


def test_an_attention_of_unknown_type_is_refused(tmp_path: Path) -> None:
    write_graph(Attention(), ATTENTION, tmp_path / "graph.onnx")
    model = onnx.load(str(tmp_path / "graph.onnx"))
    model.graph.node[0].input[0] = "elsewhere"
    onnx.save(model, str(tmp_path / "graph.onnx"))
    with pytest.raises(ExportError, match="must give the type of elsewhere, an input or output of node_scaled_dot"):
        write_fp16_twin(tmp_path / "graph.onnx", tmp_path / "twin.onnx")


def test_the_graph_itself_passes_with_room(block: Block) -> None:
    assert 0 < block.compare(block.path) < 0.75


@pytest.mark.parametrize("product", range(6))
def test_one_bad_column_of_any_weight_is_found(
    block: Block, weights: dict[str, list[int]], product: int, tmp_path: Path
) -> None:
    name = list(weights)[product]
    path = block.edited(name, lambda weight: weight[:, 5].zero_(), tmp_path)
    with pytest.raises(ExportError, match=r"output tokens_out at .* must be within .* of the reference, is off by"):
        block.compare(path)


@pytest.mark.parametrize("product", range(6))
def test_a_wrong_scale_of_one_channel_is_found(
    block: Block, weights: dict[str, list[int]], product: int, tmp_path: Path
) -> None:
    """A quarter too large: what a scale of another channel could be."""
    name = list(weights)[product]
    path = block.edited(name, lambda weight: weight[:, 5].mul_(1.25), tmp_path)
    with pytest.raises(ExportError, match=r"output tokens_out at .* must be within .* of the reference, is off by"):
        block.compare(path)


def test_heads_that_changed_places_are_found(block: Block, weights: dict[str, list[int]], tmp_path: Path) -> None:
    """The output projection of self-attention takes the heads one after the other."""
    assert MINI.dit.num_heads == 2
    name = next(name for name, size in weights.items() if size == [2 * HEAD_DIM, 2 * HEAD_DIM])
    path = block.edited(name, lambda weight: weight.copy_(weight.roll(HEAD_DIM, 0)), tmp_path)
    with pytest.raises(ExportError, match=r"output tokens_out at .* must be within .* of the reference, is off by"):
        block.compare(path)
