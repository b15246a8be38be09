"""What to say about a scene, in Chinese and English; several wordings of each."""

from typing import Final

import torch

from toyworld.world import Scene

CHINESE_WORDS: Final = {
    "circle": "圆形",
    "square": "方块",
    "triangle": "三角形",
    "red": "红色",
    "green": "绿色",
    "blue": "蓝色",
    "yellow": "黄色",
    "left": "左",
    "right": "右",
    "up": "上",
    "down": "下",
}
OPPOSITE: Final = {"left": "right", "right": "left", "up": "down", "down": "up"}

# Wordings for a moving shape and for a moving camera: Chinese first.
CHINESE: Final = {
    False: ("{colour}{shape}向{direction}移动。", "一个{colour}的{shape}向{direction}移动。"),
    True: ("镜头{direction}移，画面中有{colour}{shape}。", "镜头向{direction}移动，一个{colour}的{shape}不动。"),
}
ENGLISH: Final = {
    False: ("A {colour} {shape} moves {direction}.", "The {colour} {shape} is moving {direction}."),
    True: ("The camera moves {direction} over a {colour} {shape}.", "Pan {direction}, a {colour} {shape}."),
}


def wordings(scene: Scene) -> list[str]:
    """All prompts for the scene, the Chinese ones first."""
    words = {"colour": scene.colour, "shape": scene.shape, "direction": scene.direction}
    chinese = {name: CHINESE_WORDS[word] for name, word in words.items()}
    return [text.format(**chinese) for text in CHINESE[scene.camera]] + [
        text.format(**words) for text in ENGLISH[scene.camera]
    ]


def prompt(scene: Scene, generator: torch.Generator) -> str:
    """One of the wordings."""
    texts = wordings(scene)
    return texts[int(torch.randint(len(texts), (), generator=generator))]
