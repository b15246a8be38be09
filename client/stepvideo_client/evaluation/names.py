"""What the clips of a set are called: by their prompt, as VBench looks for them, or by their entry's id."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from stepvideo_client.evaluation.sources import Entry

MOST_NAME_BYTES: Final = 255  # of a file, on every common file system
SUFFIX: Final = ".mp4"


@dataclass(frozen=True)
class Names:
    """stems: the name of an entry's clips without number and suffix, by id. unfit: why VBench cannot find an entry's
    clips by its prompt, by id; those are named by the id."""

    stems: dict[str, str]
    unfit: dict[str, str]

    def of(self, entry_id: str, index: int) -> str:
        """The name of a clip, without suffix."""
        return f"{self.stems[entry_id]}-{index}"


def names_for(entries: Sequence[Entry], clips_each: int) -> Names:
    """Names for `clips_each` clips of every entry. A prompt that stands at several pictures names none of them: VBench
    would set one clip against all of these."""
    longest = MOST_NAME_BYTES - len(f"-{clips_each - 1}{SUFFIX}")
    by_prompt = defaultdict(list)
    for entry in entries:
        by_prompt[entry.prompt].append(entry.id)
    unfit: dict[str, str] = {}
    for entry in entries:
        if "/" in entry.prompt or "\0" in entry.prompt:
            unfit[entry.id] = "its prompt has a / in it"
        elif len(entry.prompt.encode()) > longest:
            unfit[entry.id] = f"its prompt has {len(entry.prompt.encode())} bytes, a name at most {longest}"
        elif len(by_prompt[entry.prompt]) > 1:
            others = [other for other in by_prompt[entry.prompt] if other != entry.id]
            unfit[entry.id] = f"{', '.join(others)} has the same prompt with another picture"
    while taken := [entry.id for entry in entries if entry.id not in unfit and entry.prompt in unfit]:
        unfit.update((entry_id, "its prompt is the id of another entry") for entry_id in taken)
    stems = {entry.id: entry.id if entry.id in unfit else entry.prompt for entry in entries}
    return Names(stems, unfit)
