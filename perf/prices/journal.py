"""What was measured so far, one line a request: a run that was interrupted goes on where it stopped."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from perf.prices.measure import Clip
from stepvideo_serve.errors import ConfigError


class Journal:
    """A file of JSON lines. The first says what is measured: a journal of something else is refused.

    Raises ConfigError when the file is no such journal.
    """

    def __init__(self, path: Path, subject: Mapping[str, Any]) -> None:
        self.path = path
        self.done: dict[str, list[Clip]] = {}
        if path.is_file() and path.stat().st_size > 0:
            self._read(json.loads(json.dumps(subject)))
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(subject) + "\n", encoding="utf-8")

    def add(self, case: str, clips: Sequence[Clip]) -> None:
        """All clips of one request."""
        self.done[case] = list(clips)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"case": case, "clips": [asdict(clip) for clip in clips]}) + "\n")

    def finish(self) -> None:
        """Removes the file: its contents are in the price file now."""
        self.path.unlink()

    def _read(self, subject: Mapping[str, Any]) -> None:
        text = self.path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]  # a last line that was cut off is measured again
        try:
            first, *rest = (json.loads(line) for line in whole.splitlines())
            if first != subject:
                raise ConfigError(
                    f"{self.path} must hold an interrupted run with the same options, it holds another: "
                    "remove it to begin anew."
                )
            names = {field.name for field in fields(Clip)}
            for line in rest:
                self.done[line["case"]] = [Clip(**{name: clip[name] for name in names}) for clip in line["clips"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{self.path} must be the journal of a run, it is damaged: remove it.") from error
        self.path.write_text(whole, encoding="utf-8")
