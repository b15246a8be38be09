"""The numbers and names of kernels/README.md."""

import re
from pathlib import Path

import pytest

from stepvideo_kernels.choice import OPS, builds_of
from stepvideo_kernels.kernel_spec import FullSize
from stepvideo_kernels.plugins.onnx_nodes import OPERATORS
from tests.test_architecture import tree_entries

FULL = FullSize()
VALUES = FULL.batch * FULL.video_tokens * FULL.width
TEXT_TOKENS = FULL.llm_tokens + 77  # of CLIP
BF16, FP32 = 2, 4


def full_bytes(op: str, variant: str) -> float:
    return next(b.full_work.bytes for b in builds_of(op, FULL) if (b.variant, b.sm, b.chosen) == (variant, 90, True))


@pytest.fixture(scope="module")
def rows(root: Path) -> dict[str, list[str]]:
    """Op -> the cells of its row."""
    lines = (root / "kernels" / "README.md").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {row[0]: row for row in cells}


def numbers(cell: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+(?:\.\d+)?", cell)]


def qkv_eager() -> float:
    """q and k: to fp32, norm, to bf16; to fp32, rotations, concatenation, to bf16. All three: a transposing copy."""
    norm = (BF16 + FP32) + 2 * FP32 + (FP32 + BF16)
    rope = (BF16 + FP32) + 2 * FP32 + 2 * FP32 + (FP32 + BF16)
    return VALUES * (2 * (norm + rope) + 3 * 2 * BF16)


def adaln_eager() -> float:
    """gate * branch, the sum, the norm, the product, the sum (vectors are negligible)."""
    return VALUES * BF16 * (2 + 3 + 2 + 2 + 2)


def test_bytes_of_the_streaming_ops(rows: dict[str, list[str]]) -> None:
    qkv, adaln = rows["qkv_norm_rope"], rows["adaln_modulate"]
    assert numbers(qkv[3]) == [round(qkv_eager() / 1e9, 1)]
    assert numbers(adaln[3]) == [round(adaln_eager() / 1e9, 1)]
    assert numbers(qkv[4]) == [round(full_bytes("qkv_norm_rope", form) / 1e9, 1) for form in ("bf16", "fp8")]
    after = [round(full_bytes("adaln_modulate", f"residual-{form}") / 1e9, 1) for form in ("bf16", "fp8")]
    assert numbers(adaln[4]) == after


def test_bytes_of_attention(rows: dict[str, list[str]]) -> None:
    plain, text = rows["attention"], rows["attention to the text"]
    scores = FULL.batch * FULL.heads * FULL.video_tokens**2 * BF16
    assert f"({scores / 1e9:.0f} GB if they did)" in plain[2]
    assert numbers(plain[3]) == [round(full_bytes("attention", "bf16") / 1e9, 1)]
    assert numbers(plain[4]) == [round(full_bytes("attention", form) / 1e9, 1) for form in ("bf16", "fp8")][-2:]
    assert f"on {TEXT_TOKENS} keys" in text[1]
    queries_and_out = 2 * VALUES * BF16
    keys_and_values = 2 * FULL.batch * TEXT_TOKENS * FULL.width * BF16
    assert numbers(text[3]) == numbers(text[4]) == [round((queries_and_out + keys_and_values) / 1e9, 1)]


def test_bytes_of_the_other_stages(rows: dict[str, list[str]]) -> None:
    alibi, vae = rows["alibi_attention"], rows["vae_attention"]
    after = full_bytes("alibi_attention", "bf16")
    bias = FULL.heads * FULL.llm_tokens**2 * BF16
    copies = 2 * FULL.llm_tokens * FULL.width * BF16
    assert f"({copies / 1e6:.1f} MB)" in alibi[2]
    # The bias is read, and so are the copies, which were written before.
    assert numbers(alibi[3]) == [round((after + bias + 2 * copies) / 1e6, 1)]
    assert numbers(alibi[4]) == [round(after / 1e6, 1)]
    scores = FULL.vae_tokens**2 * BF16
    streamed = full_bytes("vae_attention", "bf16")
    assert f"are {scores / 1e9:.1f} GB" in vae[2]
    assert numbers(vae[3]) == [round((streamed + 2 * scores) / 1e9, 1)]
    assert numbers(vae[4]) == [round(streamed / 1e9, 1)]


def test_bytes_of_a_block(rows: dict[str, list[str]], root: Path) -> None:
    """One qkv_norm_rope, two modulated norms, self-attention, cross-attention; the latter two stay bf16 in FP8."""
    before = [numbers(rows[name][3])[0] for name in ("qkv_norm_rope", "attention", "attention to the text")]
    names = ("qkv_norm_rope", "adaln_modulate", "adaln_modulate", "attention")
    cross = numbers(rows["attention to the text"][4])[0]
    bf16, fp8 = (sum(numbers(rows[name][4])[index] for name in names) + cross for index in (0, 1))
    total = sum(before) + 2 * numbers(rows["adaln_modulate"][3])[0]
    text = (root / "kernels" / "README.md").read_text(encoding="utf-8")
    assert f"**{total:.0f} GB before, {bf16:.0f} GB after in bf16, {fp8:.0f} GB in FP8**" in text


def test_numbers_of_kernels_and_operators(root: Path) -> None:
    kernels = sum(len(builds_of(op, FULL)) for op in OPS)
    assert f"`make kernels` ({kernels} kernels," in (root / "docs" / "measured.md").read_text(encoding="utf-8")
    operators = sum(map(len, OPERATORS.values()))
    text = (root / "kernels" / "README.md").read_text(encoding="utf-8")
    assert f"for each of the {operators} operators;" in text


def test_every_file_of_the_tree_exists(root: Path) -> None:
    tree = (root / "kernels" / "README.md").read_text(encoding="utf-8").split("```")[1].removeprefix("text\n")
    names = list(tree_entries(tree.replace("<op>", "attention")))
    assert len(names) > 10
    assert not [name for name in names if not (root / name).exists()]
