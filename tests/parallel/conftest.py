"""A maker of groups whose ranks can import rank_factories, and which are closed after the test."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stepvideo_serve.parallel.group import RankGroup

ROOT = Path(__file__).parents[2]
RANK_PATH = os.pathsep.join((str(ROOT), str(Path(__file__).parent)))


@pytest.fixture
def rank_env() -> dict[str, str]:
    return {"PYTHONPATH": RANK_PATH}


@pytest.fixture
def make_group(rank_env: dict[str, str]) -> Iterator[Callable[..., RankGroup]]:
    """make_group(factory="scripted", **overrides): a group that has not been started."""
    groups: list[RankGroup] = []

    def make(factory: str = "scripted", settings: dict[str, Any] | None = None, **overrides: Any) -> RankGroup:
        arguments: dict[str, Any] = {
            "start_timeout_s": 60.0,
            "arena_bytes": 1 << 24,
            "threads_per_rank": 1,
            "env": rank_env,
            **overrides,
        }
        group = RankGroup(f"rank_factories:{factory}", settings or {}, **arguments)
        groups.append(group)
        return group

    yield make
    for group in groups:
        group.close()
