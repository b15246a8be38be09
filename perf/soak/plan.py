"""What the callers of perf.soak send, and how each such request may end."""

import io
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from perf.soak.attacks import DEADLINE, INVALID, Attack, refused
from perf.soak.wire import CANCELLED, OK, REFUSED_BY_TRITON, Values

KINDS = 6  # of good requests
PICTURE_SIDE = 256

# What callers do, how often (relative), and how such a request may end.
ACTIONS: Mapping[str, tuple[int, frozenset[str]]] = {
    "stream": (40, frozenset({OK})),
    "unary": (10, frozenset({OK})),
    "repeat": (12, frozenset({OK})),
    "cancel": (10, frozenset({OK, CANCELLED})),
    "vanish": (6, frozenset({OK, CANCELLED})),
    "tight deadline": (6, frozenset({OK, DEADLINE})),
    "impossible deadline": (4, frozenset({DEADLINE})),
    "bad input": (12, frozenset({INVALID, REFUSED_BY_TRITON})),
    "attack": (12, frozenset({INVALID, DEADLINE})),
}


@dataclass(frozen=True)
class Planned:
    """One request: `kind` of the good request that it is made of; `leave_after_s` where the caller leaves; `attack` is
    sent in place of the values where there is one."""

    number: int
    action: str
    kind: int
    values: Values
    leave_after_s: float | None = None
    attack: Attack | None = None


def good_requests() -> list[Values]:
    """The kinds: 17 frames of 32x32, 1 to 4 steps, two pictures, with and without guidance, LATENTS as result."""
    requests: list[Values] = []
    for kind in range(KINDS):
        pixels = np.random.default_rng(kind % 2).integers(0, 256, (PICTURE_SIDE, PICTURE_SIDE, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        numbers = {"NUM_FRAMES": 17, "HEIGHT": 32, "WIDTH": 32, "STEPS": 1 + kind % 4}
        requests.append(
            {
                "PROMPT": f"第{kind % 3}只猫 jumps".encode(),
                "IMAGE": file.getvalue(),
                "OUTPUT": b"latents",
                "SEED": np.array([kind], np.int64),
                "CFG_SCALE": np.array([1.0 if kind == 0 else 9.0], np.float32),
                **{name: np.array([value], np.int32) for name, value in numbers.items()},
            }
        )
    return requests


def plan(count: int, seed: int, good: list[Values]) -> list[Planned]:
    """The same requests for the same seed."""
    dice = random.Random(seed)
    actions = dice.choices(list(ACTIONS), [weight for weight, _ in ACTIONS.values()], k=count)
    attacks = refused(good[0])
    return [_planned(number, action, dice, good, attacks) for number, action in enumerate(actions)]


def _planned(number: int, action: str, dice: random.Random, good: list[Values], attacks: list[Attack]) -> Planned:
    kind = dice.randrange(len(good))
    values = {**good[kind], "REQUEST_PRIORITY": np.array([dice.randint(1, 3)], np.int32)}
    leave_after_s, attack = None, None
    match action:
        case "repeat":
            values["REQUEST_ID"] = f"soak-{number // 50}-{kind}".encode()
        case "cancel" | "vanish":
            leave_after_s = dice.uniform(0.001, 2.0)
        case "tight deadline":
            values["TIMEOUT_S"] = np.array([dice.uniform(0.2, 5.0)], np.float32)
        case "impossible deadline":
            values["TIMEOUT_S"] = np.array([1e-4], np.float32)
        case "bad input":
            values |= dice.choice(_bad_inputs(good[kind]))
        case "attack":
            attack = dice.choice(attacks)
    return Planned(number, action, kind, values, leave_after_s, attack)


def _bad_inputs(good: Values) -> list[dict[str, Any]]:
    image = good["IMAGE"]
    assert isinstance(image, bytes)
    return [
        {"IMAGE": image[: len(image) // 2]},
        {"IMAGE": b"GIF89a"},
        {"PROMPT": b"\xff\xfe"},
        {"PROMPT": "猫 跳 ".encode() * 200},
        {"NUM_FRAMES": np.array([18], np.int32)},
        {"HEIGHT": np.array([-32], np.int32)},
        {"STEPS": np.array([4], np.int64)},
        {"STEPS": np.array([1, 2], np.int32)},
        {"CFG_SCALE": np.array([np.nan], np.float32)},
        {"LATENTS": np.zeros((1, 1, 1, 1), np.float32)},
    ]
