"""How tensors are cut into equal parts for tensor parallelism: plans as data, apart from the modules.

A plan maps patterns of state-dict keys to what happens to the tensors: `Split`, or None for a tensor that every part
holds whole. The plans of the networks stand beside them (dit/sharding.py, text/sharding.py).
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from stepvideo_serve.errors import SetupError

Shape = tuple[int, ...]
Index = tuple[slice, ...]


@dataclass(frozen=True)
class TensorPart:
    """Part `index` of `count` equal ones. Raises SetupError unless 0 <= index < count."""

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise SetupError(f"A tensor part needs 0 <= index < count, got {self.index} of {self.count}: correct it.")

    def of(self, size: int) -> tuple[int, int]:
        """Begin and end of this part of `size` equal things."""
        share = size // self.count
        return self.index * share, (self.index + 1) * share


WHOLE = TensorPart(0, 1)


@dataclass(frozen=True)
class Split:
    """The axis `dim` is made of `sections` one after the other (by default one, all of it); each section consists of
    `pieces` equal pieces that are never torn, such as heads, and every part takes its pieces of every section."""

    dim: int
    pieces: int
    sections: tuple[int, ...] = ()


REPLICATED = None


@dataclass(frozen=True)
class Cut:
    """What one part holds of a tensor: the `ranges` (begin, end) along axis `dim`, joined in their order."""

    dim: int
    ranges: tuple[tuple[int, int], ...]

    def shape(self, whole: Shape) -> Shape:
        size = sum(end - begin for begin, end in self.ranges)
        return (*whole[: self.dim], size, *whole[self.dim + 1 :])

    @property
    def is_contiguous(self) -> bool:
        """Whether it is one run of a tensor in row-major order."""
        return self.dim == 0 and len(self.ranges) == 1

    def blocks(self, whole: Shape, rows: int) -> Iterator[tuple[Index, Index]]:
        """Where to read in the whole tensor and where to write in the part, at most `rows` of the first axis each."""
        written = 0
        for begin, end in self.ranges:
            if self.dim == 0:
                for at in range(begin, end, rows):
                    stop = min(at + rows, end)
                    yield (slice(at, stop),), (slice(written, written + stop - at),)
                    written += stop - at
            else:
                between = (slice(None),) * (self.dim - 1)
                source, target = slice(begin, end), slice(written, written + end - begin)
                for at in range(0, whole[0], rows):
                    yield (slice(at, at + rows), *between, source), (slice(at, at + rows), *between, target)
                written += end - begin


@dataclass(frozen=True)
class ShardPlan:
    """Patterns (as in fnmatch; * matches dots too) of the keys of `model` -> how their tensors are cut."""

    model: str
    patterns: Mapping[str, Split | None]

    def check(self, keys: Iterable[str]) -> None:
        """Raises SetupError naming a pattern without a key, or a key without a pattern or with several."""
        unused = set(self.patterns)
        for key in keys:
            unused.discard(self._pattern(key))
        if unused:
            raise SetupError(
                f'Sharding plan of {self.model}: pattern "{min(unused)}" must match a key of the weights, '
                "it matches none: correct the pattern."
            )

    def cuts(self, shapes: Mapping[str, Shape], part: TensorPart) -> dict[str, Cut]:
        """What `part` holds of the tensors that it does not hold whole. Raises SetupError when one does not divide."""
        found = {key: self._cut(key, shape, part) for key, shape in shapes.items()}
        return {key: cut for key, cut in found.items() if cut is not None}

    def _cut(self, key: str, shape: Shape, part: TensorPart) -> Cut | None:
        split = self.patterns[self._pattern(key)]
        if split is None or part.count == 1:
            return None
        if split.dim >= len(shape):
            raise SetupError(f"{self.model}: {key} is cut along axis {split.dim}, its shape is {list(shape)}.")
        size = shape[split.dim]
        sections = split.sections or (size,)
        if sum(sections) != size or any(section % split.pieces for section in sections):
            raise SetupError(
                f"{self.model}: axis {split.dim} of {key} must be made of sections {list(sections)}, each of "
                f"{split.pieces} equal pieces, found {size}: the plan and the weights belong to different models."
            )
        if split.pieces % part.count:
            raise SetupError(
                f"{self.model}: {key} must divide by tp = {part.count}, axis {split.dim} has {split.pieces} pieces: "
                "choose a smaller tp."
            )
        starts = (sum(sections[:i]) for i in range(len(sections)))
        own = (part.of(section) for section in sections)
        return Cut(split.dim, tuple((start + b, start + e) for start, (b, e) in zip(starts, own, strict=True)))

    def _pattern(self, key: str) -> str:
        """The one pattern that matches."""
        matching = [pattern for pattern in self.patterns if fnmatchcase(key, pattern)]
        if len(matching) != 1:
            raise SetupError(
                f"Sharding plan of {self.model}: {key} must match exactly one pattern, it matches {matching}: "
                "say how to cut it."
            )
        return matching[0]
