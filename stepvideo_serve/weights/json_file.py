"""Reading the JSON files of a checkpoint."""

import json
from pathlib import Path
from typing import Any

from stepvideo_serve.errors import CheckpointError
from stepvideo_serve.weights.whole_file import check_whole


def require_model_dir(folder: Path) -> None:
    """Raises CheckpointError unless the folder of a checkpoint is there."""
    if not folder.is_dir():
        raise CheckpointError(f"The model directory {folder} must exist, found no such folder.")


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint. Raises CheckpointError naming the file."""
    check_whole(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} must be a JSON file of the checkpoint, could not be read: {error}.") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold a JSON object, found {type(values).__name__}: use the official file.")
    return values


def integer(values: dict[str, Any], name: str, source: str) -> int:
    """values[name] as a positive integer. Raises CheckpointError."""
    value = values.get(name)
    if type(value) is not int or value < 1:
        raise CheckpointError(
            f"{source} must give {name} as a positive integer, found {value!r}: use the official file."
        )
    return value
