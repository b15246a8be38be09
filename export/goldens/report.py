"""The outcome of a verification, for people and as JSON."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from export.goldens.compare import Row

LINE_CHARACTERS = 116


@dataclass
class Report:
    """What was compared, what was an input of it, and what was not compared (entry -> reason)."""

    rows: list[Row] = field(default_factory=list)
    given: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def failed(self) -> list[Row]:
        return [row for row in self.rows if not row.passed]

    @property
    def passed(self) -> bool:
        """Something was compared, and all of it agrees."""
        return bool(self.rows) and not self.failed

    def to_json(self) -> dict[str, Any]:
        """Errors that are not finite numbers become null."""
        return {
            "passed": self.passed,
            "seconds": round(self.seconds, 2),
            "compared": [
                {
                    "entry": row.entry,
                    "error": row.error if math.isfinite(row.error) else None,
                    "allowed": row.allowed,
                    "shown": row.shown,
                    "passed": row.passed,
                }
                for row in self.rows
            ],
            "inputs": self.given,
            "not_compared": [{"entry": entry, "reason": reason} for entry, reason in self.skipped.items()],
        }

    def __str__(self) -> str:
        return "\n".join([*self._table(), *self._not_compared(), self._summary()])

    def _table(self) -> Iterator[str]:
        head = ("entry", "max error", "allowed", "verdict")
        lines = [(row.entry, row.shown, row.shown_allowed, "ok" if row.passed else "FAILED") for row in self.rows]
        widths = [max(len(line[i]) for line in [head, *lines]) for i in range(4)]
        for line in [head, *lines]:
            yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()

    def _not_compared(self) -> Iterator[str]:
        reasons: dict[str, list[str]] = {}
        for entry, reason in self.skipped.items():
            reasons.setdefault(reason, []).append(entry)
        for reason, entries in reasons.items():
            yield f"\nnot compared ({len(entries)}): {reason}"
            yield from _wrapped(entries)
        if self.given:
            yield f"\ninputs ({len(self.given)})"
            yield from _wrapped(self.given)

    def _summary(self) -> str:
        counts = (
            f"{len(self.rows)} entries compared, {len(self.failed)} failed, {len(self.given)} inputs, "
            f"{len(self.skipped)} not compared, {self.seconds:.0f} s"
        )
        if not self.rows:
            return f"\nFAILED: nothing could be compared; {counts}"
        if self.failed:
            return f"\nFAILED: {', '.join(row.entry for row in self.failed)}; {counts}"
        return f"\npassed: {counts}; floats relative to the golden's largest magnitude"


def _wrapped(names: list[str]) -> Iterator[str]:
    line = " "
    for name in names:
        if len(line) + 1 + len(name) > LINE_CHARACTERS:
            yield line
            line = " "
        line += f" {name}"
    yield line
