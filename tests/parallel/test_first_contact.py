"""Ranks are ready only when their collectives have given the right values: on real gloo ranks."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from stepvideo_serve.errors import ServiceUnavailable
from stepvideo_serve.parallel.first_contact import difference
from stepvideo_serve.parallel.group import RankGroup
from stepvideo_serve.parallel.layout import Layout


@contextmanager
def group_of(factory: str, layout: str, rank_env: dict[str, str], **settings: Any) -> Iterator[RankGroup]:
    group = RankGroup(
        f"tests.parallel.meeting_ranks:{factory}",
        {"layout": layout, **settings},
        size=Layout.parse(layout).world_size,
        start_timeout_s=300.0,
        arena_bytes=1 << 16,
        threads_per_rank=1,
        env=rank_env,
    )
    with group:
        yield group


@pytest.mark.parametrize(
    ("layout", "sentences"),
    [
        ("tp2", {"sum_tp": "sum over tp of ranks 0, 1"}),
        (
            "cfg2.sp2",
            {
                "from_all": "gathering of ranks 0, 1, 2, 3",
                "agree": "broadcast of ranks 0, 1, 2, 3",
                "collect": "sending to the leader of ranks 0, 1, 2, 3",
                "to_heads": "exchange of heads over sp of ranks 0, 1",
                "to_tokens": "exchange of tokens over sp of ranks 0, 1",
                "gather_tokens": "gathering of tokens over sp of ranks 0, 1",
                "exchange_branches": "exchange over cfg of ranks 0, 2",
            },
        ),
    ],
)
def test_every_collective_is_compared(layout: str, sentences: dict[str, str], rank_env: dict[str, str]) -> None:
    """Each is wrong by one in one value; before that all are right, and leave nothing in the counters of jobs."""
    with group_of("corrupt", layout, rank_env, names=list(sentences)) as group:
        info = group.start()
    assert info["counted"] == [0, 0.0]
    assert info["sentences"].keys() == sentences.keys()
    for name, sentence in info["sentences"].items():
        assert re.match(rf"Rank 0: the {sentences[name]}, must give (\S+) at .*, it gave (\S+): look at ", sentence)


def test_a_sum_that_is_wrong_on_one_rank_ends_the_start(rank_env: dict[str, str]) -> None:
    wrong = r"^Rank 1: the sum over tp of ranks 0, 1, must give 1 at \[0, 0\], it gave 2: look at the other ranks'"
    with group_of("wrong_on_one_rank", "tp2", rank_env) as group, pytest.raises(ServiceUnavailable, match=wrong):
        group.start()


def test_a_sum_that_never_ends_ends_the_start(rank_env: dict[str, str]) -> None:
    """And not the parent's own limit, which is far away."""
    late = r"^Rank [01]: the sum over tp of ranks 0, 1, must end within 6 s, it has not: look at"
    with (
        group_of("never_sums", "tp2", rank_env, deadline_s=6.0) as group,
        pytest.raises(ServiceUnavailable, match=late),
    ):
        group.start()


def test_values_and_shapes_are_compared() -> None:
    expected = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert difference(expected.clone(), expected) is None
    assert difference(torch.tensor([[1.0, 2.0], [5.0, 4.0]]), expected) == "3 at [1, 0], it gave 5"
    assert difference(torch.tensor([[1.0, float("nan")], [3.0, 4.0]]), expected) == "2 at [0, 1], it gave nan"
    assert difference(expected[:1], expected) == "a shape of [2, 2], it gave [1, 2]"


def test_ranks_talk_over_loopback_only(rank_env: dict[str, str]) -> None:
    """Whatever the server's environment says; what NCCL logs, and how torch allocates, an operator may choose."""
    given = {"NCCL_SOCKET_IFNAME": "eth0", "NCCL_IB_DISABLE": "0", "NCCL_DEBUG": "INFO"}
    with group_of("corrupt", "tp2", {**rank_env, **given}, names=[]) as group:
        environment = group.start()["environment"]
    assert environment["GLOO_SOCKET_IFNAME"] == environment["NCCL_SOCKET_IFNAME"] == "lo"
    assert (environment["NCCL_NET"], environment["NCCL_IB_DISABLE"]) == ("Socket", "1")
    assert environment["NCCL_DEBUG"] == "INFO"
    assert environment["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
