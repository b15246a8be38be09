import pytest

from stepvideo_client import MOVEMENTS, InvalidInput, with_camera


@pytest.mark.parametrize(
    ("prompt", "movement", "expected"),
    [
        ("一只猫在跑", "pan-left", "一只猫在跑，镜头左移。"),
        ("一只猫在跑。", "fixed", "一只猫在跑。固定镜头。"),
        ("A cat runs. ", "zoom-out", "A cat runs. 镜头缩小。"),
        ("A cat runs", "rack-focus", "A cat runs，焦点转移。"),
        ("", "orbit", "镜头环绕。"),
    ],
)
def test_the_movement_becomes_the_last_clause(prompt: str, movement: str, expected: str) -> None:
    assert with_camera(prompt, movement) == expected


def test_an_unknown_movement_is_refused_with_the_list() -> None:
    with pytest.raises(InvalidInput, match=r"one of fixed, .*, rack-focus, got 'sideways'"):
        with_camera("", "sideways")


def test_every_movement_has_its_own_phrase() -> None:
    assert len(set(MOVEMENTS.values())) == len(MOVEMENTS) == 17
