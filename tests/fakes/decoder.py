"""A small ONNX graph with the signature of the Video-VAE's decoder, whose own takes long to export."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.engine.manifest import GraphEntry, GraphFile, Manifest
from stepvideo_serve.vae.graphs import vae_decoder_spec

NAME = "vae_decoder"
IR_VERSION = 10  # the ONNX library writes a newer one than ONNX Runtime reads


def add_decoder(folder: Path, checkpoint: Checkpoint) -> None:
    """Adds it to a folder of graphs: 17 frames of three of the channels, each value a square of 16 x 16 pixels."""
    spec = vae_decoder_spec(checkpoint.vae_config, "float32")
    constants = {
        "channels": np.arange(3),
        "frames_of": np.array([0] * 6 + [1] * 6 + [2] * 5),
        "batch": np.array([0]),
        "scales": np.array([1, 1, 16, 16], np.float32),
    }
    nodes = [
        helper.make_node("Gather", ["latents", "channels"], ["coloured"], axis=2),
        helper.make_node("Gather", ["coloured", "frames_of"], ["small"], axis=1),
        helper.make_node("Squeeze", ["small", "batch"], ["pictures"]),
        helper.make_node("Resize", ["pictures", "", "scales"], ["large"], mode="nearest"),
        helper.make_node("Unsqueeze", ["large", "batch"], ["video"]),
        helper.make_node("Tanh", ["video"], ["frames"]),
    ]
    ends = [
        [
            helper.make_tensor_value_info(
                one.name, TensorProto.FLOAT, [str(dim) if isinstance(dim, str) else dim for dim in one.shape]
            )
        ]
        for one in (*spec.inputs, *spec.outputs)
    ]
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, NAME, ends[0], ends[1], initializers)
    opset = [helper.make_opsetid("", 23)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION)
    onnx.save(model, folder / f"{NAME}.onnx")
    passed = {
        "output": "frames",
        "sizes": {},
        "error": 0.0,
        "rms": 0.0,
        "cosine": 1.0,
        "allowed": 2e-5,
        "backend": "onnxruntime",
    }
    entry = GraphEntry((GraphFile.of(folder, f"{NAME}.onnx"),), "d" * 64, spec, {"parity": [passed]})
    manifest = Manifest.load(folder)
    replace(manifest, graphs={**manifest.graphs, NAME: entry}).save(folder)
