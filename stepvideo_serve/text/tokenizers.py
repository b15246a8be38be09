"""The two tokenizers: Step-1's sentencepiece model and Hunyuan-CLIP's BERT vocabulary."""

from pathlib import Path

import sentencepiece
import torch
from torch import Tensor
from transformers import BertTokenizer

from stepvideo_serve.errors import CheckpointError, InvalidRequest
from stepvideo_serve.text.states import CLIP_TOKENS, LLM_MAX_TOKENS

BOS, EOS = 1, 2


class StepTokenizer:
    """Sentencepiece model of Step-1: [BOS] + text + [EOS]. Control tokens written in a prompt stay plain text."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError when the file is missing or not a sentencepiece model."""
        if not path.is_file():
            raise CheckpointError(f"{path} must be the Step-LLM's sentencepiece model, found no such file.")
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise CheckpointError(f"{path} must be a sentencepiece model, could not be read: {error}.") from None

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
    """BERT word pieces, padded or cut to 77 ids: the CLIP part of the context always has 77 tokens."""

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError when the vocabulary is missing."""
        if not (folder / "vocab.txt").is_file():
            raise CheckpointError(f"{folder} must hold the CLIP's vocab.txt, found none.")
        self._tokenizer = BertTokenizer.from_pretrained(str(folder), local_files_only=True)

    def encode(self, text: str) -> tuple[Tensor, Tensor]:
        """Ids and attention mask, both [1, 77] int64."""
        out = self._tokenizer(
            [text], padding="max_length", max_length=CLIP_TOKENS, truncation=True, return_tensors="pt"
        )
        return out.input_ids, out.attention_mask
