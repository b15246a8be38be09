"""Hunyuan-CLIP: a BERT whose last hidden states describe the prompt in words that go with images.

The network is transformers' BertModel; only its reading from the official folder is ours (assembly/checkpoint.py).
Source: Hunyuan-DiT (arXiv 2405.08748), section 2.1; the official pipeline uses the same class.
"""

from pathlib import Path

from torch import Tensor, nn
from transformers import BertConfig, BertModel

from stepvideo_serve.weights.json_file import integer, read_json_object


class HunyuanClip(nn.Module):
    """Token ids and mask -> last hidden state; the wrapped model's own keys carry no prefix in the file."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.bert = BertModel(config)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """input_ids and attention_mask [B, 77] int64 -> last hidden state [B, 77, width], pooled [B, width]."""
        out = self.bert(input_ids=input_ids, attention_mask=attention_mask)
        return out.last_hidden_state, out.pooler_output


def load_clip_config(path: Path) -> BertConfig:
    """Reads `clip_text_encoder/config.json`. Raises CheckpointError."""
    values = read_json_object(path)
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"):
        integer(values, name, str(path))
    config = BertConfig.from_dict(values)
    config._attn_implementation = "sdpa"
    return config
