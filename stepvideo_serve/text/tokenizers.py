"""The two tokenizers: Step-1's sentencepiece model and Hunyuan-CLIP's BERT vocabulary."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import sentencepiece
import torch
from torch import Tensor
from transformers import BertTokenizer

from stepvideo_serve.errors import CheckpointError, InvalidRequest
from stepvideo_serve.text.states import CLIP_TOKENS, LLM_MAX_TOKENS
from stepvideo_serve.weights.json_file import read_json_object
from stepvideo_serve.weights.whole_file import check_whole

BOS, EOS = 1, 2
# Pieces of Step-1's model -> their ids: no other sentencepiece model has them there.
STEP_PIECES: Mapping[str, int] = MappingProxyType({"<unk>": 0, "<s>": BOS, "</s>": EOS, "<|EOT|>": 3, "<|BOT|>": 4})
BYTE_PIECES = 256  # what the vocabulary lacks becomes bytes
CLIP_PIECES = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class StepTokenizer:
    """Sentencepiece model of Step-1: [BOS] + text + [EOS]. Control tokens written in a prompt stay plain text."""

    def __init__(self, path: Path, vocabulary: int) -> None:
        """`vocabulary`: how many pieces the model must have, by the configuration of Step-LLM. Raises CheckpointError
        when the file is missing, a pointer, not a sentencepiece model, or another one than Step-1's."""
        if not path.is_file():
            raise CheckpointError(f"{path} must be the Step-LLM's sentencepiece model, found no such file.")
        check_whole(path)
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise CheckpointError(f"{path} must be a sentencepiece model, could not be read: {error}.") from None
        self._check(path, vocabulary)

    def _check(self, path: Path, vocabulary: int) -> None:
        model = self._model
        if (found := model.get_piece_size()) != vocabulary:
            raise CheckpointError(
                f"{path} must have {vocabulary} pieces, as Step-LLM's configuration says, found {found}: "
                "use the tokenizer of this checkpoint."
            )
        for piece, number in STEP_PIECES.items():
            if number >= found or model.id_to_piece(number) != piece:
                raise CheckpointError(
                    f"{path} must have {piece} as piece {number}, found {model.id_to_piece(min(number, found - 1))}: "
                    "use Step-1's tokenizer."
                )
        if (found := sum(model.is_byte(number) for number in range(vocabulary))) != BYTE_PIECES:
            raise CheckpointError(f"{path} must have {BYTE_PIECES} pieces of bytes, found {found}: use Step-1's.")

    def pieces(self, text: str) -> list[int]:
        """Token ids of the text alone."""
        return list(self._model.encode_as_ids(text))

    def encode(self, text: str, truncate: bool = False) -> Tensor:
        """[1, L] int64, L at most 320.

        A longer text raises InvalidRequest with the count, or is cut to 318 pieces with `truncate`, as in the official
        code.
        """
        pieces = self.pieces(text)
        if truncate:
            pieces = pieces[: LLM_MAX_TOKENS - 2]
        ids = [BOS, *pieces, EOS]
        if len(ids) > LLM_MAX_TOKENS:
            raise InvalidRequest(
                f"The prompt with its suffix must have at most {LLM_MAX_TOKENS} tokens, got {len(ids)}: shorten it."
            )
        return torch.tensor([ids])


class ClipTokenizer:
    """BERT word pieces, padded or cut to 77 ids: the CLIP part of the context always has 77 tokens.

    `[SEP]`, `[CLS]`, `[PAD]`, `[UNK]` and `[MASK]` written in a prompt act as these tokens, as in the official code,
    which uses this class of transformers. For Step-LLM the same prompt is plain text.
    """

    def __init__(self, folder: Path, vocabulary: int, padding: int) -> None:
        """`vocabulary`: how many pieces vocab.txt must have, `padding`: the id of [PAD], by the configuration of the
        encoder. Raises CheckpointError when the files are missing, pointers, or of another encoder."""
        path = folder / "vocab.txt"
        if not path.is_file():
            raise CheckpointError(f"{folder} must hold the CLIP's vocab.txt, found none.")
        expected = _vocabulary(path, vocabulary, padding)
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            if (folder / name).is_file():
                read_json_object(folder / name)
        self._tokenizer = BertTokenizer.from_pretrained(str(folder), local_files_only=True)
        used = self._tokenizer.get_vocab()
        if wrong := sorted(piece for piece in used.keys() | expected.keys() if used.get(piece) != expected.get(piece)):
            raise CheckpointError(
                f"{folder} must give {wrong[0]!r} the id {expected.get(wrong[0])} of vocab.txt, the tokenizer gives it "
                f"{used.get(wrong[0])} ({len(wrong)} pieces differ): remove the files that are not of this checkpoint."
            )

    def encode(self, text: str) -> tuple[Tensor, Tensor]:
        """Ids and attention mask, both [1, 77] int64."""
        out = self._tokenizer(
            [text], padding="max_length", max_length=CLIP_TOKENS, truncation=True, return_tensors="pt"
        )
        return out.input_ids, out.attention_mask


def _vocabulary(path: Path, count: int, padding: int) -> dict[str, int]:
    """Piece -> id, which is its line in the file; of a piece on several lines the last."""
    check_whole(path)
    try:
        with path.open(encoding="utf-8") as file:
            pieces = [line.rstrip("\n") for line in file]
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} must be a vocabulary in UTF-8, could not be read: {error}.") from None
    if len(pieces) != count:
        raise CheckpointError(
            f"{path} must have {count} lines, as the configuration of the CLIP text encoder says, found "
            f"{len(pieces)}: use the vocabulary of this checkpoint."
        )
    for piece in CLIP_PIECES:
        if pieces.count(piece) != 1:
            raise CheckpointError(f"{path} must have {piece} once, found it {pieces.count(piece)} times.")
    if (found := pieces.index("[PAD]")) != padding:
        raise CheckpointError(
            f"{path} must have [PAD] at id {padding}, as the configuration of the CLIP text encoder says, found it at "
            f"{found}: its lines are shifted, or it is of another checkpoint."
        )
    return {piece: number for number, piece in enumerate(pieces)}
