"""Names of layouts, places of ranks, groups, and what is refused."""

import pytest

from stepvideo_serve.errors import ConfigError
from stepvideo_serve.parallel.layout import SIZES, Coordinates, Layout, split_evenly

ALL = [Layout(cfg, tp, sp) for cfg in SIZES["cfg"] for tp in SIZES["tp"] for sp in SIZES["sp"]]


@pytest.mark.parametrize("layout", ALL, ids=str)
def test_a_name_names_its_layout(layout: Layout) -> None:
    assert Layout.parse(str(layout)) == layout


@pytest.mark.parametrize(
    ("text", "layout", "name"),
    [
        ("single", Layout(), "single"),
        ("tp1", Layout(), "single"),
        ("cfg2.tp4", Layout(cfg=2, tp=4), "cfg2.tp4"),
        ("sp2.tp4.cfg2", Layout(cfg=2, tp=4, sp=2), "cfg2.tp4.sp2"),
        ("cfg1.tp8.sp1", Layout(tp=8), "tp8"),
    ],
)
def test_parts_may_be_left_out_and_in_any_order(text: str, layout: Layout, name: str) -> None:
    assert Layout.parse(text) == layout
    assert str(layout) == name


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", ""),
        ("tp3", "tp3"),
        ("cfg4", "cfg4"),
        ("tp16", "tp16"),
        ("tp0", "tp0"),
        ("tp", "tp"),
        ("tp02", "tp02"),
        ("TP2", "TP2"),
        ("pp2", "pp2"),
        ("tp2 ", "tp2 "),
        ("tp٢", "tp٢"),
        ("tp2.", ""),
        ("tp2.tp4", "tp4"),
        ("cfg2,tp2", "cfg2,tp2"),
        ("single.tp2", "single"),
    ],
)
def test_other_names_are_refused(text: str, part: str) -> None:
    with pytest.raises(ConfigError) as error:
        Layout.parse(text)
    assert f"got {text!r}: correct {part!r}." in str(error.value)


@pytest.mark.parametrize("layout", ALL, ids=str)
def test_every_rank_has_a_place_of_its_own(layout: Layout) -> None:
    places = [layout.coordinates(rank) for rank in range(layout.world_size)]
    assert len(set(places)) == layout.world_size
    assert all(p.cfg < layout.cfg and p.tp < layout.tp and p.sp < layout.sp for p in places)


@pytest.mark.parametrize("axis", list(SIZES))
@pytest.mark.parametrize("layout", ALL, ids=str)
def test_groups_along_an_axis_partition_the_ranks(layout: Layout, axis: str) -> None:
    groups = {layout.group(axis, rank) for rank in range(layout.world_size)}
    assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size))
    for group in groups:
        places = [layout.coordinates(rank) for rank in group]
        assert [getattr(place, axis) for place in places] == list(range(getattr(layout, axis)))
        for other in SIZES.keys() - {axis}:
            assert len({getattr(place, other) for place in places}) == 1


def test_ranks_that_exchange_most_are_neighbours() -> None:
    layout = Layout(cfg=2, tp=2, sp=2)
    assert layout.group("tp", 0) == (0, 1)
    assert layout.group("sp", 0) == (0, 2)
    assert layout.group("cfg", 0) == (0, 4)
    assert layout.coordinates(6) == Coordinates(cfg=1, tp=0, sp=1)


@pytest.mark.parametrize(
    ("name", "num_heads"), [("tp8", 12), ("sp8", 12), ("tp4.sp4", 8), ("tp2", 3), ("cfg2.tp8.sp4", 48)]
)
def test_heads_that_do_not_divide_are_refused(name: str, num_heads: int) -> None:
    with pytest.raises(ConfigError, match=rf"layout {name} must divide the DiT's {num_heads} heads by tp x sp = \d+"):
        Layout.parse(name).check(num_heads)


@pytest.mark.parametrize(("name", "num_heads"), [("tp8.sp2", 48), ("cfg2", 3), ("single", 1), ("sp8", 48)])
def test_heads_that_divide_are_accepted(name: str, num_heads: int) -> None:
    layout = Layout.parse(name)
    layout.check(num_heads)
    layout.check_devices(layout.world_size)


def test_groups_of_step_llm_that_do_not_divide_are_refused() -> None:
    Layout(tp=2, sp=4).check(48, llm_groups=2)
    with pytest.raises(ConfigError, match="must divide Step-LLM's 2 key/value groups by tp = 4"):
        Layout(tp=4).check(48, llm_groups=2)


def test_a_missing_device_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"layout cfg2\.tp4 needs 8 GPUs, found 7"):
        Layout(cfg=2, tp=4).check_devices(7)


def test_a_rank_without_a_token_is_refused() -> None:
    Layout(sp=4).check_tokens(4)
    with pytest.raises(ConfigError, match="layout sp4 needs at least 4 tokens, got 3"):
        Layout(sp=4).check_tokens(3)


@pytest.mark.parametrize(
    ("total", "parts", "sizes"),
    [(37_944, 8, [4743] * 8), (45, 4, [12, 11, 11, 11]), (7, 2, [4, 3]), (3, 4, [1, 1, 1, 0]), (5, 1, [5])],
)
def test_tokens_are_split_evenly(total: int, parts: int, sizes: list[int]) -> None:
    assert split_evenly(total, parts) == sizes
