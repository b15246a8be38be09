"""How long a rank waits for the others, told by its collectives."""

import pytest

from stepvideo_serve.parallel.group import RankGroup
from stepvideo_serve.parallel.job import ResultEvent

LATE_S = 1.0


@pytest.mark.parametrize("layout", ["cfg2", "tp2", "sp2"])
def test_a_rank_waits_for_one_that_is_late(layout: str, rank_env: dict[str, str]) -> None:
    settings = {"layout": layout}
    with RankGroup(
        "waiting_ranks:waiting",
        settings,
        size=2,
        start_timeout_s=120.0,
        arena_bytes=1 << 16,
        threads_per_rank=1,
        env=rank_env,
    ) as group:
        for late in (0, 1):
            with group.run({"late": late, "late_s": LATE_S}, {}) as run:
                [result] = list(run)
            assert isinstance(result, ResultEvent)
            ranks = result.params["ranks"]
            assert [rank for rank, _, _ in ranks] == [0.0, 1.0], "by rank"
            waited = [seconds for _, seconds, _ in ranks]
            assert waited[1 - late] > 0.5 * LATE_S > waited[late], waited
            assert [again for _, _, again in ranks] == [0.0, 0.0], "what was taken is gone"
