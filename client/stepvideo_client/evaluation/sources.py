"""Evaluation sets as they are published: prompts with their first images.

folder of pairs         NAME.png (.jpg, .jpeg, .webp) and NAME.txt side by side
Step-Video-TI2V-Eval    NNN.png and NNN.txt in folders H, S and V, in ti2v_eval_real and ti2v_eval_ani or alone
CSV                     columns image and prompt, perhaps id and motion_score; images relative to the file
VBench-I2V              vbench2_i2v_full_info.json, and the folder data/crop with a folder per ratio
"""

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final, Literal

from stepvideo_client.errors import InvalidInput

Orientation = Literal["H", "S", "V"]

PICTURES: Final = (".png", ".jpg", ".jpeg", ".webp")
SHAPES: Final[tuple[Orientation, ...]] = ("H", "S", "V")
RATIOS: Final = {"1-1": 1.0, "8-5": 8 / 5, "7-4": 7 / 4, "16-9": 16 / 9}
CSV_COLUMNS: Final = ("id", "image", "prompt", "motion_score")
MOST_ID_BYTES: Final = 200  # a file's name may have 255, and the clip's number and suffix follow


@dataclass(frozen=True)
class Entry:
    """A prompt with its first image. id: unique in its set, and fit for a file's name. image: as it was given.
    orientation: of the folder that it is in, None where the picture decides. motion: its own MOTION_SCORE, if it has
    one. dimensions: those of VBench that it is for."""

    id: str
    prompt: str
    image: Path
    orientation: Orientation | None = None
    motion: float | None = None
    dimensions: tuple[str, ...] = ()


@dataclass(frozen=True)
class EvaluationSet:
    """All entries in their order, and the kind: "pairs", "eval", "csv" or "vbench"."""

    kind: str
    entries: tuple[Entry, ...]

    @property
    def digest(self) -> str:
        """Of ids, prompts, motion scores and the names and sizes of the images, wherever the set lies."""
        about = [
            [entry.id, entry.prompt, entry.image.name, entry.image.stat().st_size, entry.orientation, entry.motion]
            for entry in self.entries
        ]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()

    def select(self, only: Sequence[str], dimensions: Sequence[str], limit: int | None) -> tuple[Entry, ...]:
        """The first `limit` entries whose id fits one of the patterns `only` and which are for one of `dimensions`; an
        empty choice leaves all. Raises InvalidInput where nothing is left."""
        chosen = [
            entry
            for entry in self.entries
            if (not only or any(fnmatchcase(entry.id, pattern) for pattern in only))
            and (not dimensions or set(dimensions) & set(entry.dimensions))
        ][:limit]
        if not chosen:
            there = f"ids such as {self.entries[0].id!r}"
            if dimensions:
                there += f" and the dimensions {', '.join(sorted({d for e in self.entries for d in e.dimensions}))}"
            raise InvalidInput(f"No entry is left by --only, --dimension and --limit: the set has {there}.")
        return tuple(chosen)


def read_set(path: Path, crops: Path | None, ratio: str) -> EvaluationSet:
    """The set at `path`, by what is there. crops: VBench's folder of crops (data/crop beside the list, if None), and
    ratio: the one of them to take, of RATIOS. Raises InvalidInput."""
    if path.is_file() and path.suffix.lower() == ".csv":
        found = EvaluationSet("csv", tuple(_csv_entries(path)))
    elif path.is_file() and path.suffix.lower() == ".json":
        found = EvaluationSet("vbench", tuple(_vbench_entries(path, crops or path.parent / "data" / "crop", ratio)))
    elif path.is_dir():
        tree = _tree_folders(path)
        entries = _tree_entries(path, tree) if tree else _pairs(path, "", None)
        found = EvaluationSet("eval" if tree else "pairs", tuple(entries))
    else:
        raise InvalidInput(
            f"The set must be a folder, a .csv or a .json file that is there, got {str(path)!r}: correct the path."
        )
    if not found.entries:
        raise InvalidInput(
            f"{str(path)!r} has no pair: pictures {', '.join(PICTURES)} with a .txt beside each, or rows."
        )
    _check(found.entries)
    return found


def nearest_ratio(height: int, width: int) -> str:
    """The crop folder of VBench whose pictures lose least when they are fitted to this size."""
    wanted = width / height
    return min(RATIOS, key=lambda name: max(RATIOS[name] / wanted, wanted / RATIOS[name]))


def _check(entries: Sequence[Entry]) -> None:
    """Raises InvalidInput for ids that are no names, or twice there, for empty prompts and pictures that are absent."""
    for entry in entries:
        if not entry.id or entry.id[0] in ".-" or set(entry.id) & set("/\\\0\n"):
            raise InvalidInput(f"An id must be fit for a file's name and not begin with . or -, got {entry.id!r}.")
        if len(entry.id.encode()) > MOST_ID_BYTES:
            raise InvalidInput(
                f"An id must have at most {MOST_ID_BYTES} bytes, got {len(entry.id.encode())}: {entry.id!r}."
            )
        if not entry.prompt or not _is_unicode(entry.prompt):
            wrong = "has a lone surrogate in it" if entry.prompt else "is empty"
            raise InvalidInput(f"Every prompt must be text that says something, and that of {entry.id!r} {wrong}.")
    twice = [name for name, count in Counter(entry.id for entry in entries).items() if count > 1]
    if twice:
        raise InvalidInput(f"Ids must be unique, and {', '.join(map(repr, twice[:3]))} is there more than once.")
    absent = [entry for entry in entries if not entry.image.is_file()]
    if absent:
        raise InvalidInput(
            f"{len(absent)} of {len(entries)} pictures are absent, the first is {str(absent[0].image)!r}: "
            "bring them there, or correct the path."
        )


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _tree_folders(root: Path) -> list[Path]:
    """The folders H, S and V of an evaluation tree, directly below or one level deeper."""
    return sorted(path for shape in SHAPES for path in (*root.glob(shape), *root.glob(f"*/{shape}")) if path.is_dir())


def _tree_entries(root: Path, folders: Iterable[Path]) -> Iterable[Entry]:
    for folder in folders:
        names = [part.removeprefix("ti2v_eval_") for part in folder.relative_to(root).parts]
        shape = next(shape for shape in SHAPES if shape == folder.name)
        yield from _pairs(folder, "_".join(names) + "_", shape)


def _pairs(folder: Path, prefix: str, orientation: Orientation | None) -> list[Entry]:
    pictures = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES and path.name[0] != ".")
    texts = {path.stem for path in folder.glob("*.txt")}
    alone = [path for path in pictures if path.stem not in texts]
    if alone:
        raise InvalidInput(
            f"Each picture needs its prompt in a .txt beside it, and {len(alone)} in {str(folder)!r} have none, the "
            f"first is {alone[0].name!r}."
        )
    left = texts - {path.stem for path in pictures}
    if left:
        raise InvalidInput(
            f"Each .txt needs its picture beside it, and {len(left)} in {str(folder)!r} have none, the first is "
            f"{min(left) + '.txt'!r}."
        )
    return [
        Entry(f"{prefix}{path.stem}", _text(path.with_suffix(".txt")).strip(), path, orientation) for path in pictures
    ]


def _csv_entries(path: Path) -> Iterable[Entry]:
    reader = csv.DictReader(io.StringIO(_text(path), newline=""))
    columns = reader.fieldnames or ()
    if not {"image", "prompt"} <= set(columns) <= set(CSV_COLUMNS):
        raise InvalidInput(
            f"The columns of {str(path)!r} must be image and prompt, perhaps also id and motion_score, got "
            f"{', '.join(columns) or 'none'}."
        )
    for number, row in enumerate(reader, 1):
        if None in row or None in row.values() or not row["image"].strip():
            raise InvalidInput(f"Line {reader.line_num} of {str(path)!r} must have {len(columns)} cells and an image.")
        motion = (row.get("motion_score") or "").strip()
        try:
            score = float(motion) if motion else None
        except ValueError as error:
            raise InvalidInput(
                f"motion_score must be a number or empty, got {motion!r} in line {reader.line_num} of {str(path)!r}."
            ) from error
        name = (row.get("id") or "").strip() or f"{number:04}"
        yield Entry(name, row["prompt"].strip(), path.parent / row["image"].strip(), motion=score)


def _vbench_entries(path: Path, crops: Path, ratio: str) -> Iterable[Entry]:
    """Entries that say the same of the same picture are one: VBench looks for one file."""
    try:
        listed = json.loads(_text(path))
    except ValueError as error:
        raise InvalidInput(f"{str(path)!r} must be VBench's list as JSON, and is not: {error}.") from error
    if not isinstance(listed, list):
        raise InvalidInput(f"{str(path)!r} must be a list of entries, got {type(listed).__name__}.")
    if not (crops / ratio).is_dir():
        raise InvalidInput(
            f"VBench's pictures of ratio {ratio} must be in {str(crops / ratio)!r}, and that is no folder: name the "
            "folder of the crops with --images."
        )
    merged: dict[tuple[str, str], Entry] = {}
    for number, values in enumerate(listed):
        prompt, image, dimensions = _vbench_values(path, number, values)
        before = merged.get((prompt, image))
        if before is None:
            merged[prompt, image] = Entry(f"{number:04}", prompt, crops / ratio / image, dimensions=dimensions)
        else:
            both = tuple(dict.fromkeys((*before.dimensions, *dimensions)))
            merged[prompt, image] = Entry(before.id, prompt, before.image, dimensions=both)
    return merged.values()


def _vbench_values(path: Path, number: int, values: Any) -> tuple[str, str, tuple[str, ...]]:
    prompt = values.get("prompt_en") if isinstance(values, dict) else None
    dimensions = values.get("dimension") if isinstance(values, dict) else None
    if not isinstance(prompt, str) or not isinstance(dimensions, list):
        raise InvalidInput(f"Entry {number} of {str(path)!r} must have prompt_en (text) and dimension (a list).")
    # Early lists name no image for the entries of camera motion: theirs is that of the prompt without its last clause.
    image = values.get("image_name", f"{prompt.rpartition(', camera ')[0] or prompt}.jpg")
    if not isinstance(image, str) or "\0" in image:
        raise InvalidInput(f"image_name of entry {number} of {str(path)!r} must be a file's name, got {image!r}.")
    return prompt, image, tuple(map(str, dimensions))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InvalidInput(f"{str(path)!r} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{str(path)!r} must be UTF-8, and is not: {error.reason} at byte {error.start}.") from error
