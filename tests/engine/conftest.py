"""The small graph of toy.py, exported to ONNX once."""

import warnings

import pytest
import torch

from tests.engine.toy import SPEC, Graph, Toy, toy_inputs


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    module = Toy().eval()
    with warnings.catch_warnings():
        # torch 2.13 copies its own pytree nodes in a way that it deprecates.
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
        # Two axes of one symbol are meant to be one dimension.
        warnings.filterwarnings("ignore", "# The axis name: .* will not be used, since it shares", UserWarning)
        program = torch.onnx.export(
            module,
            tuple(toy_inputs(4, 3).values()),
            dynamo=True,
            opset_version=23,
            input_names=[tensor.name for tensor in SPEC.inputs],
            output_names=[tensor.name for tensor in SPEC.outputs],
            dynamic_shapes=tuple(SPEC.dynamic_shapes().values()),
            verbose=False,
        )
    assert program is not None
    path = tmp_path_factory.mktemp("toy") / "toy.onnx"
    program.save(path, external_data=True)
    return Graph(SPEC, module, path)
