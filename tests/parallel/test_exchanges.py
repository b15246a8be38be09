"""What the ranks of the sequence axis exchange comes where it belongs, bit for bit, also where tokens do not divide."""

from stepvideo_serve.parallel.group import RankGroup
from stepvideo_serve.parallel.job import ResultEvent

SIZE = 3


def test_tokens_become_heads_and_heads_tokens(rank_env: dict[str, str]) -> None:
    with RankGroup(
        "exchanging_ranks:exchanging",
        {},
        size=SIZE,
        start_timeout_s=120.0,
        arena_bytes=1 << 16,
        threads_per_rank=1,
        env=rank_env,
    ) as group:
        for counts, heads in (([3, 3, 2], 6), ([4, 4, 4], 3), ([1, 1, 1], 9)):
            with group.run({"counts": counts, "heads": heads}, {}) as run:
                [result] = list(run)
            assert isinstance(result, ResultEvent)
            assert result.params["right"] == [[1.0] * 5] * SIZE, (counts, heads)
