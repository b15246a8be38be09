"""config.json files that are not what they should be: one CheckpointError that names the file."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.errors import CheckpointError

READERS: dict[str, Callable[[Checkpoint], Any]] = {
    "transformer/config.json": lambda checkpoint: checkpoint.dit_config,
    "step_llm/config.json": lambda checkpoint: checkpoint.llm_config,
    "hunyuan_clip/clip_text_encoder/config.json": lambda checkpoint: checkpoint.clip_config,
}
WIDTH_KEYS = {"transformer": "num_layers", "step_llm": "hidden_size", "hunyuan_clip": "hidden_size"}


@pytest.mark.parametrize("file", READERS)
@pytest.mark.parametrize("text", ["[]", "null", '"text"', "{", ""])
def test_a_config_that_is_no_object_is_refused(mini_checkpoint: Path, tmp_path: Path, file: str, text: str) -> None:
    model = tmp_path / "model"
    shutil.copytree(mini_checkpoint, model)
    (model / file).write_text(text)
    with pytest.raises(CheckpointError, match=file):
        READERS[file](Checkpoint(model))


@pytest.mark.parametrize("file", READERS)
@pytest.mark.parametrize("value", ["many", 0, -3, 1.5, None, True])
def test_a_field_of_another_type_is_refused(mini_checkpoint: Path, tmp_path: Path, file: str, value: object) -> None:
    model = tmp_path / "model"
    shutil.copytree(mini_checkpoint, model)
    key = WIDTH_KEYS[file.split("/")[0]]
    values = json.loads((model / file).read_text())
    (model / file).write_text(json.dumps({**values, key: value}))
    with pytest.raises(CheckpointError, match=key):
        READERS[file](Checkpoint(model))
