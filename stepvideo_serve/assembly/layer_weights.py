"""Weights for graphs that take them as inputs, of one layer and one tensor-parallel rank at a time."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.engine.manifest import Manifest, split_layer
from stepvideo_serve.engine.parity import require_parity
from stepvideo_serve.engine.spec import (
    INPUT_INVERSE,
    INPUT_SCALE,
    OF_ONE_NUMBER,
    PLAIN,
    SLOPES,
    EngineSpec,
    WeightSpec,
)
from stepvideo_serve.errors import CheckpointError, EngineError
from stepvideo_serve.text.step_llm import alibi_slopes
from stepvideo_serve.weights.cuts import WHOLE, Cut, Shape, TensorPart
from stepvideo_serve.weights.weight_set import WeightSet, weights_identity

_PARTS = (("dit_", "dit"), ("step_llm_", "llm"), ("hunyuan_clip", "clip"))


class LayerWeights:
    """From the checkpoint itself: what it stores in the dtype of the graph stays mapped, and lies nowhere twice.
    Quantised weights are from a weight set.

    share  which slice of the tensors that tensor-parallel ranks divide
    """

    def __init__(self, checkpoint: Checkpoint, share: TensorPart = WHOLE, weight_set: WeightSet | None = None) -> None:
        self._checkpoint, self._share, self._set = checkpoint, share, weight_set

    def identity(self, name: str) -> str:
        """What the parity report of a graph calls these weights. Hashes the checkpoint's files of this part of the
        model. Raises CheckpointError where the weight set was made from another checkpoint."""
        part = part_of(name)
        digest = self._checkpoint.digest(part)
        if self._set is None or not self._is_in_set(name):
            return weights_identity(digest, None)
        if digest != self._set.checkpoint[part]:
            raise CheckpointError(
                f"The weight set in {self._set.folder} must be of {self._checkpoint.folder} ({part}: {digest[:12]}), "
                f"found one of {self._set.checkpoint[part][:12]}: make it from this checkpoint."
            )
        return self._set.identity(part)

    def of(self, name: str, spec: EngineSpec) -> dict[str, Tensor]:
        """The weights of the graph `name` ("dit_block_07") with the signature `spec`, by their names in it, on the CPU.

        Raises CheckpointError for a tensor that is missing, EngineError for one of another shape and for graphs of
        another number of ranks.
        """
        self._check_parts(name, spec)
        layer = split_layer(name)[1]
        found: dict[str, Tensor] = {}
        for dtype, share, weights in _groups(spec, self._share):
            keys = {weight.key_of(layer): weight.name for weight in weights}
            tensors = self._checkpoint.tensors(part_of(name), list(keys), dtype, share)
            found |= {keys[key]: tensor for key, tensor in tensors.items()}
        found |= {weight.name: self._slopes() for weight in spec.weights if weight.form == SLOPES}
        quantised = [weight for weight in spec.weights if weight.form not in (PLAIN, SLOPES)]
        found |= {weight.name: self._quantised(name, weight, layer) for weight in quantised}
        for weight in spec.weights:
            weight.check(name, found[weight.name])
        return found

    def check(self, name: str, spec: EngineSpec) -> None:
        """Raises as `of`, by the headers of the files: reads no weights."""
        self._check_parts(name, spec)
        for weight in spec.weights:
            if weight.form != SLOPES:
                shape = self._shape(name, weight)
                weight.check(name, torch.empty(shape, dtype=weight.tensor.torch_dtype, device="meta"))

    @contextmanager
    def checked(self, manifest: Manifest, names: Iterable[str], digest_of: Callable[[Path], str]) -> Iterator[None]:
        """Hashes the weights of the named graphs while the caller loads them, and raises EngineError or CheckpointError
        in the end unless the graphs' parity reports are of just these. Before the caller loads anything the headers of
        the files are compared, and what the weight set says of itself. `digest_of` gives the SHA-256 of a file."""
        taking = [name for name in names if manifest.graph(name).spec.weights]
        for name in taking:
            self.check(name, manifest.graph(name).spec)
        claimed = {name: self._set.identity(part_of(name)) for name in taking if self._set and self._is_in_set(name)}
        require_parity(manifest, claimed, claimed)
        with ThreadPoolExecutor(1, thread_name_prefix="hash-weights") as pool:
            identities = pool.submit(self._identities, taking, digest_of)
            yield
            require_parity(manifest, taking, identities.result())

    def _identities(self, names: Sequence[str], digest_of: Callable[[Path], str]) -> dict[str, str]:
        if self._set is not None and names:
            self._set.verify(digest_of)
        return {name: self.identity(name) for name in names}

    def _check_parts(self, name: str, spec: EngineSpec) -> None:
        for weight in spec.weights:
            if weight.axis is not None and weight.parts != self._share.count:
                raise EngineError(
                    f"Engine {name} must hold a slice for one of {self._share.count} ranks, found one for one of "
                    f"{weight.parts}: export for this layout, or correct [denoiser] layout."
                )

    def _quantised(self, name: str, weight: WeightSpec, layer: int | None) -> Tensor:
        key, found = weight.key_of(layer).removesuffix(".weight"), self._require_set(name, weight)
        if weight.form == INPUT_SCALE:
            tensor = 1 / found.read(f"{key}.{INPUT_INVERSE}")  # a power of two, as all scales there
        else:
            tensor = found.read(f"{key}.{weight.form}", self._cut(name, weight))
        if weight.form in OF_ONE_NUMBER:
            tensor = tensor.expand(weight.tensor.resolve({})).contiguous()
        return tensor.to(weight.tensor.torch_dtype)

    def _shape(self, name: str, weight: WeightSpec) -> Shape:
        """Of what `of` will give."""
        key = weight.key_of(split_layer(name)[1])
        if weight.form == PLAIN:
            whole = self._checkpoint.shape(part_of(name), key)
        elif weight.form in OF_ONE_NUMBER:
            form = INPUT_INVERSE if weight.form == INPUT_SCALE else weight.form
            found = self._require_set(name, weight).shape(f"{key}.{form}")
            return weight.tensor.resolve({}) if found == (1,) else found
        else:
            whole = self._require_set(name, weight).shape(f"{key.removesuffix('.weight')}.{weight.form}")
        cut = self._cut(name, weight)
        return whole if cut is None else cut.shape(whole)

    def _cut(self, name: str, weight: WeightSpec) -> Cut | None:
        if weight.axis is None:
            return None
        key = weight.key_of(split_layer(name)[1])
        if weight.form != PLAIN:
            key = f"{key.removesuffix('.weight')}.weight"
        return self._checkpoint.cut(part_of(name), key, self._share)

    def _require_set(self, name: str, weight: WeightSpec) -> WeightSet:
        if self._set is None:
            raise EngineError(
                f"Engine {name} takes quantised weights ({weight.name}), [model] weight_set names none: make a set "
                "with python -m export.quantize, and name its folder."
            )
        return self._set

    def _is_in_set(self, name: str) -> bool:
        return self._set is not None and part_of(name) in self._set.checkpoint

    def _slopes(self) -> Tensor:
        """Of this rank's heads, fp32."""
        heads = self._checkpoint.llm_config.num_heads
        begin, end = self._share.of(heads)
        return torch.tensor(alibi_slopes(heads)[begin:end])


def weight_bytes(spec: EngineSpec) -> int:
    """Of all weights that one layer's runner holds."""
    return sum(prod(weight.tensor.resolve({})) * weight.tensor.torch_dtype.itemsize for weight in spec.weights)


def part_of(name: str) -> str:
    """The part of the model that a graph belongs to."""
    found = next((part for start, part in _PARTS if name.startswith(start)), None)
    if found is None:
        raise EngineError(f"Engine {name} must be of the DiT or a text encoder to take weights: export it again.")
    return found


def _groups(spec: EngineSpec, share: TensorPart) -> Iterator[tuple[torch.dtype, TensorPart, Sequence[WeightSpec]]]:
    """The plain weights by dtype, and by whether ranks divide them."""
    plain = [weight for weight in spec.weights if weight.form == PLAIN]
    for dtype in {weight.tensor.torch_dtype: None for weight in plain}:
        own = [weight for weight in plain if weight.tensor.torch_dtype == dtype]
        for part, members in (
            (share, [weight for weight in own if weight.axis is not None]),
            (WHOLE, [weight for weight in own if weight.axis is None]),
        ):
            if members:
                yield dtype, part, members
