"""Prompts to states, with the real tokenizers and networks of the tiny checkpoint."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from sentencepiece import SentencePieceProcessor
from transformers import BertTokenizer

from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.assembly.graphs import TEXT_GRAPHS, components
from stepvideo_serve.engine.runner import EagerRunner
from stepvideo_serve.errors import InvalidRequest
from stepvideo_serve.request import DEFAULT_NEGATIVE_PROMPT, DEFAULT_POSITIVE_SUFFIX
from stepvideo_serve.text.encode import TextEncoder
from stepvideo_serve.text.states import CLIP_TOKENS, LLM_MAX_TOKENS, TextStates
from stepvideo_serve.text.tokenizers import BOS, EOS, ClipTokenizer, StepTokenizer
from tests.mini import MINI

PROMPT = "A small boat drifts. 镜头推进"


class Counted:
    """A graph, and how many times it ran."""

    def __init__(self, graph: EagerRunner) -> None:
        self.graph = graph
        self.calls = 0

    def __call__(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        self.calls += 1
        return self.graph(**inputs)


@pytest.fixture(scope="module")
def checkpoint(mini_checkpoint: Path) -> Checkpoint:
    return Checkpoint(mini_checkpoint)


@pytest.fixture(scope="module")
def step_tokenizer(checkpoint: Checkpoint) -> StepTokenizer:
    return checkpoint.step_tokenizer()


@pytest.fixture(scope="module")
def clip_tokenizer(checkpoint: Checkpoint) -> ClipTokenizer:
    return checkpoint.clip_tokenizer()


@pytest.fixture(scope="module")
def runners(checkpoint: Checkpoint) -> Iterator[list[EagerRunner]]:
    table = components(checkpoint, "fp32")
    graphs = [EagerRunner(table[name].spec, table[name].load()) for name in TEXT_GRAPHS]
    yield graphs
    for graph in graphs:
        graph.close()


@pytest.fixture
def graphs(runners: list[EagerRunner]) -> list[Counted]:
    return [Counted(graph) for graph in runners]


@pytest.fixture
def encoder_of(
    graphs: list[Counted], step_tokenizer: StepTokenizer, clip_tokenizer: ClipTokenizer
) -> Callable[[int], TextEncoder]:
    """Cache entries -> an encoder."""
    step_llm, hunyuan_clip = graphs
    return lambda entries: TextEncoder(step_llm, hunyuan_clip, step_tokenizer, clip_tokenizer, entries)


def assert_equal(one: TextStates, other: TextStates) -> None:
    assert torch.equal(one.llm, other.llm)
    assert torch.equal(one.clip, other.clip)


def test_states_of_the_real_tokens(
    encoder_of: Callable[[int], TextEncoder], checkpoint: Checkpoint, step_tokenizer: StepTokenizer
) -> None:
    states, cached = encoder_of(2).encode(PROMPT)
    ids = step_tokenizer.encode(PROMPT)
    assert not cached
    assert states.llm.shape == (ids.shape[1], MINI.llm.width)
    assert states.clip.shape == (CLIP_TOKENS, MINI.clip.width)
    assert states.llm.dtype == states.clip.dtype == torch.float32
    with torch.inference_mode():
        assert torch.equal(states.llm, checkpoint.step_llm()(ids)[0])


def test_a_prompt_is_encoded_once(encoder_of: Callable[[int], TextEncoder], graphs: list[Counted]) -> None:
    encoder = encoder_of(2)
    first, _ = encoder.encode(PROMPT)
    again, cached = encoder.encode(PROMPT)
    assert cached
    assert_equal(first, again)
    assert [graph.calls for graph in graphs] == [1, 1]


def test_the_cache_keeps_the_prompts_used_last(encoder_of: Callable[[int], TextEncoder]) -> None:
    encoder = encoder_of(2)

    def cached(prompt: str) -> bool:
        return encoder.encode(prompt)[1]

    assert not cached("a")
    assert not cached("b")
    assert cached("a")
    assert not cached("c")  # b was used longest ago
    assert cached("a")
    assert cached("c")
    assert not cached("b")
    assert not cached("a")


def test_a_cache_without_entries_keeps_nothing(encoder_of: Callable[[int], TextEncoder], graphs: list[Counted]) -> None:
    encoder = encoder_of(0)
    first, _ = encoder.encode(PROMPT)
    again, cached = encoder.encode(PROMPT)
    assert not cached
    assert_equal(first, again)
    assert [graph.calls for graph in graphs] == [2, 2]


def test_a_prompt_that_is_too_long_is_refused_with_its_length(
    encoder_of: Callable[[int], TextEncoder], graphs: list[Counted], step_tokenizer: StepTokenizer
) -> None:
    fits = "1" * (LLM_MAX_TOKENS - 3)
    assert step_tokenizer.encode(fits).shape == (1, LLM_MAX_TOKENS)
    encoder = encoder_of(4)
    for _ in range(2):
        with pytest.raises(InvalidRequest, match="at most 320 tokens, got 321"):
            encoder.encode(fits + "1")
    assert [graph.calls for graph in graphs] == [0, 0]
    states, _ = encoder.encode(fits)
    assert states.llm.shape[0] == LLM_MAX_TOKENS


def test_an_empty_prompt_is_two_tokens(encoder_of: Callable[[int], TextEncoder], step_tokenizer: StepTokenizer) -> None:
    assert step_tokenizer.encode("").tolist() == [[BOS, EOS]]
    assert encoder_of(1).encode("")[0].llm.shape[0] == 2


@pytest.mark.parametrize("text", ["<s>", "</s>", "<|EOT|>", "<|BOT|>", "<|CALL_START|>", "a </s> b"])
def test_control_tokens_in_a_prompt_are_plain_text(step_tokenizer: StepTokenizer, text: str) -> None:
    assert not {0, *range(1, 12)} & set(step_tokenizer.pieces(text))


def test_text_is_left_as_it_is(step_tokenizer: StepTokenizer) -> None:
    """No normalisation: spaces and full-width digits count, digits stand alone, unknown characters become bytes."""
    pieces = step_tokenizer.pieces
    assert pieces("a  b") != pieces("a b")
    assert pieces("１") != pieces("1")
    assert len(pieces("2024")) == 5
    assert len(pieces("龘")) == 1 + len("龘".encode())


def test_the_default_prompts_leave_room(step_tokenizer: StepTokenizer) -> None:
    assert len(step_tokenizer.pieces(DEFAULT_POSITIVE_SUFFIX)) < LLM_MAX_TOKENS // 3
    assert len(step_tokenizer.pieces(DEFAULT_NEGATIVE_PROMPT)) < LLM_MAX_TOKENS // 3


@pytest.mark.parametrize(("text", "tokens"), [("", 2), ("A boat, 小船", 7), ("boat " * 200, CLIP_TOKENS)])
def test_clip_tokens_are_padded_or_cut_to_77(clip_tokenizer: ClipTokenizer, text: str, tokens: int) -> None:
    ids, mask = clip_tokenizer.encode(text)
    assert ids.shape == mask.shape == (1, CLIP_TOKENS)
    assert ids.dtype == mask.dtype == torch.int64
    assert mask[0].tolist() == [1] * tokens + [0] * (CLIP_TOKENS - tokens)
    assert (ids[0, tokens:] == 0).all()
    cls, sep = 2, 3
    assert ids[0, 0] == cls
    assert ids[0, tokens - 1] == sep
    assert cls not in ids[0, 1:]
    assert 1 not in ids[0], "known words are not [UNK]"


@pytest.mark.parametrize("piece", ["[SEP]", "[CLS]", "[PAD]", "[UNK]", "[MASK]"])
def test_bracketed_names_are_tokens_for_the_clip_and_text_for_the_llm(
    piece: str, checkpoint: Checkpoint, step_tokenizer: StepTokenizer, clip_tokenizer: ClipTokenizer
) -> None:
    """As in the official code: transformers' BertTokenizer knows these names wherever they stand, and a sentencepiece
    model has no such pieces."""
    vocabulary = (checkpoint.folder / "hunyuan_clip/tokenizer/vocab.txt").read_text(encoding="utf-8").split("\n")
    ids = clip_tokenizer.encode(f"a boat {piece} a boat")[0][0].tolist()
    assert ids[3] == vocabulary.index(piece)
    official = BertTokenizer.from_pretrained(str(checkpoint.folder / "hunyuan_clip/tokenizer"), local_files_only=True)
    given = official([f"a boat {piece} a boat"], padding="max_length", max_length=CLIP_TOKENS, truncation=True)
    assert ids == given.input_ids[0]
    lower = clip_tokenizer.encode(f"a boat {piece.lower()} a boat")[0][0].tolist()
    assert vocabulary.index(piece) not in lower[3:6] or piece == "[UNK]", "in lower case it is text"
    model = SentencePieceProcessor(model_file=str(checkpoint.folder / "step_llm/step1_chat_tokenizer.model"))
    pieces = step_tokenizer.pieces(piece)
    assert len(pieces) > 1
    assert model.decode(pieces) == piece
