"""Are the FP8 weights in a graph those of the checkpoint?

Quantised layers lose 3 % of their result, and a graph may lose twice what torch does with the same layers: a channel
with a wrong scale can hide in that. The weights themselves are exact up to their format, so they are judged by it.

    |code * scale - weight| <= max(2^-4 |weight|, 2^-10 scale)

E4M3 has three bits of mantissa: rounding to the nearest is off by at most 2^-4 of a normal number, and by half of the
smallest step, 2^-9 scales, below. A weight beyond 448 scales, since a scale is rounded to bf16, is off by 2^-9.
"""

from pathlib import Path

import onnx
import torch
from onnx import TensorProto, external_data_helper
from torch import Tensor, nn

from stepvideo_serve.engine.spec import TORCH_DTYPES
from stepvideo_serve.errors import ExportError

FP8 = TensorProto.FLOAT8E4M3FN
RELATIVE, OF_SCALE = 2.0**-4, 2.0**-10
_DTYPES: dict[int, str] = {
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
    FP8: "float8_e4m3fn",
}


def check_weights(name: str, path: Path, module: nn.Module) -> int:
    """Compares every FP8 weight of the graph `name` in the ONNX file `path` with that of `module`, the plain one in
    fp32; returns how many there are. One weight at a time is read.

    Raises ExportError for a weight that is further from the checkpoint's than its format, or that `module` lacks.
    """
    graph = onnx.load(str(path), load_external_data=False).graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    layers = {f"{at}.weight": layer for at, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    quantised = [key for key, tensor in stored.items() if tensor.data_type == FP8 and key.endswith(".weight")]
    for key in quantised:
        if key not in layers:
            raise ExportError(f"{name}: the FP8 weight {key} must be one of {sorted(layers)}: export it again.")
        codes, scale = (_read(stored[part], path.parent) for part in (key, f"{key}_scale"))
        _check(name, key, codes.float(), scale.float(), layers[key].weight.detach().t())
    return len(quantised)


def _check(name: str, key: str, codes: Tensor, scale: Tensor, weight: Tensor) -> None:
    """codes and weight [K, M], scale [M], all in fp32."""
    if codes.shape != weight.shape or scale.shape != weight.shape[1:]:
        raise ExportError(
            f"{name}: {key} must have {list(weight.shape)} codes and {weight.shape[1]} scales, has "
            f"{list(codes.shape)} and {list(scale.shape)}: export it again."
        )
    error = (codes * scale - weight).abs_()
    fits = (error <= torch.maximum(RELATIVE * weight.abs(), OF_SCALE * scale)).all(dim=0)  # NaN does not
    if not fits.all():
        wrong = (~fits).nonzero().flatten().tolist()
        raise ExportError(
            f"{name}: {key} must be the checkpoint's up to the rounding of E4M3, output channel {wrong[0]} is off by "
            f"{float(error[:, wrong[0]].max()):.1e} ({len(wrong)} of {len(fits)} channels are wrong): export it again."
        )


def _read(tensor: TensorProto, folder: Path) -> Tensor:
    """An initializer of the graph, from the file beside it where it lies there."""
    if tensor.data_location == TensorProto.EXTERNAL:
        external_data_helper.load_external_data_for_tensor(tensor, str(folder))
    dtype = TORCH_DTYPES[_DTYPES[tensor.data_type]]
    values = torch.frombuffer(bytearray(tensor.raw_data), dtype=dtype).view(*tensor.dims)
    tensor.ClearField("raw_data")
    return values
