"""The two tokenizers of the tiny checkpoint, made from a few sentences like those that users write.

Both are deterministic: the same sentences give the same bytes.
"""

import io
import json
import re
import string
from pathlib import Path

import sentencepiece

from stepvideo_serve.request import DEFAULT_NEGATIVE_PROMPT, DEFAULT_POSITIVE_SUFFIX
from stepvideo_serve.text.tokenizers import BOS, EOS

STEP_PIECES = 760
CONTROL_SYMBOLS = (
    "EOT",
    "BOT",
    "CALL_START",
    "CALL_END",
    "THINK_START",
    "THINK_END",
    "IMG_START",
    "IMG_END",
    "META_START",
)
USER_SYMBOLS = ("MASK_1e69f", "UNMASK_1e69f")

CLIP_MAX_LENGTH = 77
CLIP_SPECIALS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
CLIP_SUFFIXES = ("ing", "ed", "er", "es", "ly", "tion", "ment", "est")

CHINESE = """
一艘小船在平静的湖面上缓缓驶过，镜头慢慢推近。
一只小猫从沙发上跳下来，回头看了看镜头，然后跑出房间。
女孩微笑着转过身来，长发在风中飘动，阳光照在她的脸上。
海浪一次又一次地拍打着黑色的岩石，白色的水花高高溅起。
老人坐在公园的长椅上看书，树叶在他的身边慢慢落下。
镜头跟随一辆红色的汽车穿过城市的街道，两旁是高楼和霓虹灯。
镜头环绕着雪山旋转，云雾在山谷之间流动，远处有一群飞鸟。
夜晚的天空中升起五颜六色的烟花，人们站在桥上欢呼。
厨师把面团抛向空中，面粉像雪花一样散开，背景是明亮的厨房。
宇航员在月球表面行走，身后留下一串清楚的脚印，地球在地平线上升起。
动漫风格，少年拔出长剑，衣服被大风吹起，眼神坚定。
一匹白马在草原上奔跑，镜头从左向右移动，夕阳把草地染成金色。
杯子里的咖啡冒着热气，雨点打在窗户的玻璃上，焦点从窗外转移到杯子。
镜头固定，花朵在春天里开放，蝴蝶停在花瓣上，又轻轻飞走。
镜头上移、镜头下移、镜头左移、镜头右移、镜头上摇、镜头下摇、镜头左摇、镜头右摇。
镜头放大、镜头缩小、镜头推进、镜头拉远、镜头旋转、镜头跟随、镜头环绕、焦点转移、固定镜头。
机器人举起双手，和孩子们一起在广场中央跳舞，周围的人群鼓掌。
火车驶入车站，蒸汽弥漫，旅客提着行李走向车门，广播正在播放。
第1个画面有3只狗，第2个画面有45只羊，时间是2024年6月7日8点09分。
"""

ENGLISH = """
A small boat drifts across a calm lake while the camera slowly pushes in.
The cat jumps down from the sofa, looks back at the camera and runs out of the room.
A young woman turns around and smiles, her long hair moving in the wind, with warm sunlight on her face.
Waves crash against the black rocks again and again, and white water rises high into the air.
An old man is reading a book on a bench in the park; leaves are falling slowly around him.
The camera follows a red car driving through the streets of a city at night, with neon lights on both sides.
The camera orbits around a snowy mountain, clouds are flowing through the valley and birds are flying far away.
Colorful fireworks light up the dark sky, people are standing on the bridge and cheering.
An astronaut walks on the surface of the moon and leaves clear footprints behind; the earth is rising.
Anime style: a boy draws his sword, his clothes are blown by the strong wind.
A white horse runs across the grassland, the camera moves from left to right, golden sunset.
Steam rises from a cup of coffee, rain is hitting the window; the focus moves from the window to the cup.
Fixed camera, pan up, pan down, pan left, pan right, tilt up, tilt down, tilt left, tilt right.
Zoom in, zoom out, dolly in, dolly out, rotation, tracking shot, orbit, rack focus, motion score 5.0, 25 fps.
A robot raises both hands and is dancing with the children in the middle of the square.
The train is entering the station, travelers are carrying their bags, 1 of 3, 2 of 45, 6 of 7, 8 or 9 or 10.
High quality, realistic details, smooth motion, stable picture, soft light, no blur, no text, no watermark.
"""


def sentences() -> list[str]:
    """What the vocabularies are made from; the default prompts are in it, so that they stay far below 320 tokens."""
    lines = [*CHINESE.split("\n"), *ENGLISH.split("\n"), DEFAULT_POSITIVE_SUFFIX, DEFAULT_NEGATIVE_PROMPT]
    return [line for line in lines if line]


def train_step_model() -> bytes:
    """A sentencepiece model with the settings of Step-1's: unigram with bytes for what it does not know, digits apart,
    text left as it is, control symbols from id 3 on. Vocabulary: STEP_PIECES."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences()),
        model_writer=model,
        model_type="unigram",
        vocab_size=STEP_PIECES,
        character_coverage=1.0,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        split_digits=True,
        unk_id=0,
        bos_id=BOS,
        eos_id=EOS,
        pad_id=-1,
        control_symbols=[f"<|{name}|>" for name in CONTROL_SYMBOLS],
        user_defined_symbols=[f"<|{name}|>" for name in USER_SYMBOLS],
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def clip_vocabulary() -> list[str]:
    """Word pieces: specials, printable ASCII (lower case, alone and inside words), the words and characters of the
    sentences, and some endings. The tokenizer lowers case and splits at punctuation and at Chinese characters."""
    text = "\n".join(sentences()).lower()
    ascii_characters = string.digits + string.ascii_lowercase + string.punctuation
    words = sorted(set(re.findall(r"[a-z]{2,}", text)))
    others = sorted({character for character in text if not character.isascii()})
    inside = [f"##{piece}" for piece in (*string.ascii_lowercase, *string.digits, *CLIP_SUFFIXES)]
    return [*CLIP_SPECIALS.values(), *ascii_characters, *inside, *words, *others]


def write_clip_tokenizer(folder: Path) -> None:
    """Writes vocab.txt, tokenizer_config.json and special_tokens_map.json."""
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in clip_vocabulary()), encoding="utf-8")
    settings = {
        **CLIP_SPECIALS,
        "do_basic_tokenize": True,
        "do_lower_case": True,
        "model_max_length": CLIP_MAX_LENGTH,
        "strip_accents": None,
        "tokenize_chinese_chars": True,
        "tokenizer_class": "BertTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(CLIP_SPECIALS, indent=2) + "\n", encoding="utf-8")
