"""Which clips a batch makes: every entry of a set with every preset, motion score and seed, at a size that fits."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

import imageio.v3 as iio

from stepvideo_client.errors import InvalidInput
from stepvideo_client.evaluation.names import Names
from stepvideo_client.evaluation.sources import Entry, Orientation
from stepvideo_client.fields import Options

Size = tuple[int, int]

_QUARTER_TURNS = (5, 6, 7, 8)  # values of EXIF's Orientation that swap height and width
_ALIGNMENT = 16  # pixels, of both sides
_SQUARE = 1.1


@dataclass(frozen=True)
class Settings:
    """What the clips are asked for with. landscape, portrait, square: (height, width) in pixels. Texts of None are the
    server's. latents: whether the final latents are asked for besides the video, which is a second run."""

    num_frames: int
    steps: int
    cfg_scale: float
    time_shift: float
    landscape: Size
    portrait: Size
    square: Size
    motions: tuple[float, ...]
    seeds: tuple[int, ...]
    presets: tuple[str, ...]
    latents: bool
    negative_prompt: str | None
    positive_suffix: str | None

    @classmethod
    def resolve(cls, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> "Settings":
        """From what was `given`, else from `defaults`: the server's, and `seeds`. Portrait is landscape turned, and
        square has about its area."""
        height, width = given["landscape"] if "landscape" in given else (defaults["height"], defaults["width"])
        side = max(round((height * width) ** 0.5 / _ALIGNMENT) * _ALIGNMENT, 2 * _ALIGNMENT)
        usual = {
            "landscape": (height, width),
            "portrait": (width, height),
            "square": (side, side),
            "motions": (defaults.get("motion_score"),),
            "presets": ("exact",),
            "latents": False,
            "negative_prompt": None,
            "positive_suffix": None,
        }
        values = {**defaults, **usual, **given}
        return cls(**{field.name: values[field.name] for field in fields(cls)})

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> "Settings":
        """From JSON. Raises KeyError."""
        return cls(**{f.name: _frozen(values[f.name]) for f in fields(cls)})

    def json(self) -> dict[str, Any]:
        """As JSON gives it back."""
        return dict(json.loads(json.dumps(asdict(self))))

    def size(self, orientation: Orientation) -> Size:
        """(height, width) in pixels."""
        return {"H": self.landscape, "S": self.square, "V": self.portrait}[orientation]

    def variants(self, entry: Entry) -> Iterator[tuple[str, float, int]]:
        """(preset, motion score, seed) of each clip of an entry, in the order of their numbers."""
        motions = self.motions if entry.motion is None else (entry.motion,)
        return iter(product(self.presets, motions, self.seeds))

    @property
    def clips_each(self) -> int:
        """The most clips that an entry has."""
        return len(self.presets) * len(self.motions) * len(self.seeds)


@dataclass(frozen=True)
class PlannedClip:
    """A clip to make. name: of its files, without suffix; size: (height, width)."""

    entry: Entry
    index: int
    name: str
    preset: str
    motion: float
    seed: int
    size: Size

    @property
    def key(self) -> tuple[str, int]:
        """As Clip.key."""
        return self.entry.id, self.index

    def options(self, settings: Settings) -> Options:
        """Every option that decides the result, stated, so that no server's defaults do."""
        options = Options(
            num_frames=settings.num_frames,
            height=self.size[0],
            width=self.size[1],
            steps=settings.steps,
            cfg_scale=settings.cfg_scale,
            time_shift=settings.time_shift,
            motion_score=self.motion,
            quality=self.preset,
            seed=self.seed,
        )
        if settings.negative_prompt is not None:
            options["negative_prompt"] = settings.negative_prompt
        if settings.positive_suffix is not None:
            options["positive_suffix"] = settings.positive_suffix
        return options


@dataclass(frozen=True)
class Shard:
    """The `number`-th of `count` parts, 1 the first. Entries go round, each with all of its clips, so that the parts
    take about equally long."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """K/N. Raises ValueError."""
        number, _, count = text.partition("/")
        shard = cls(int(number), int(count))
        if not 1 <= shard.number <= shard.count:
            raise ValueError("K must be 1 to N")
        return shard

    def part(self, entries: Sequence[Entry]) -> Sequence[Entry]:
        return entries[self.number - 1 :: self.count]


def plan(entries: Sequence[Entry], settings: Settings, names: Names) -> list[PlannedClip]:
    """The clips of these entries in their order. Raises InvalidInput for pictures whose size cannot be read."""
    return [
        PlannedClip(entry, index, names.of(entry.id, index), preset, motion, seed, size)
        for entry in entries
        for size in [settings.size(entry.orientation or orientation_of(entry.image))]
        for index, (preset, motion, seed) in enumerate(settings.variants(entry))
    ]


def orientation_of(picture: Path) -> Orientation:
    """Of the picture as it is seen; square: one side is at most a tenth longer. Raises InvalidInput."""
    try:
        with iio.imopen(picture, "r", plugin="pillow") as file:
            height, width = file.properties(index=0).shape[:2]
            turned = file.metadata(index=0, exclude_applied=False).get("Orientation") in _QUARTER_TURNS
    except Exception as error:  # whatever a decoder says about a file that is no picture
        reason = str(error).partition("\n")[0]
        raise InvalidInput(f"The size of the picture {str(picture)!r} cannot be read: {reason}") from error
    if turned:
        height, width = width, height
    if max(height, width) <= _SQUARE * min(height, width):
        return "S"
    return "H" if width > height else "V"


def request_id(clip: PlannedClip, options: Mapping[str, Any], image: bytes) -> str:
    """The REQUEST_ID of one run: the same for the same inputs, so that a server which has the result, or still works on
    it, is not asked twice."""
    about = json.dumps([clip.entry.prompt, dict(options)], sort_keys=True).encode()
    return f"batch-{hashlib.sha256(hashlib.sha256(image).digest() + about).hexdigest()[:40]}"


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
