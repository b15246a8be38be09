"""Tokens, Step-LLM, Hunyuan-CLIP, and what the two make of a prompt: `tok.*`, `llm.*`, `clip.*`, `caption.*`."""

import re
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from export.goldens.answers import NO_GRAPH, UNKNOWN, Answer, Computed
from export.goldens.folder import Goldens
from export.goldens.networks import Networks
from stepvideo_serve.text.states import CLIP_TOKENS, LLM_MAX_TOKENS, TextStates
from stepvideo_serve.text.tokenizers import EOS, ClipTokenizer, StepTokenizer

PREFIXES = ("tok", "llm", "clip", "caption")


class TextGoldens:
    """Row i of an entry belongs to prompt i; an entry may keep the first rows only."""

    def __init__(self, goldens: Goldens, networks: Networks) -> None:
        self._goldens, self._networks = goldens, networks

    def recompute(self, name: str) -> Answer:
        if found := re.fullmatch(r"tok\.llm\.extra(\d+)", name):
            return self._extra_tokens(int(found[1]))
        if found := re.fullmatch(r"llm\.layer(\d+)", name):
            return self._layer(name, int(found[1]))
        match name:
            case "tok.llm.input_ids":
                return self._rows(name, self._llm_tokens[0])
            case "tok.llm.attention_mask" | "llm.y_mask":
                return self._rows(name, self._llm_tokens[1])
            case "tok.clip.input_ids":
                return self._rows(name, self._clip_tokens("prompts")[0])
            case "tok.clip.attention_mask":
                return self._rows(name, self._clip_tokens("prompts")[1])
            case "tok.clip.extra_input_ids":
                return self._rows(name, self._clip_tokens("extra_prompts")[0])
            case "llm.y":
                return self._rows(name, self._llm_states)
            case "clip.last_hidden_state" | "caption.clip_embedding_bf16":
                return self._rows(name, self._clip_states[0])
            case "clip.pooler_output":
                return self._rows(name, self._clip_states[1])
            case "caption.y_mask":
                return self._rows(name, context_mask(self._llm_tokens[1]))
        return UNKNOWN

    def _rows(self, name: str, tensor: Tensor) -> Computed:
        return Computed(tensor[: self._goldens.shape(name)[0]])

    def _extra_tokens(self, index: int) -> Answer:
        prompts = self._goldens.setting("extra_prompts")
        if index >= len(prompts):
            return UNKNOWN
        return Computed(torch.tensor(self._networks.checkpoint.step_tokenizer().pieces(prompts[index])))

    def _layer(self, name: str, index: int) -> Answer:
        if not self._networks.has_modules:
            return NO_GRAPH
        model = self._networks.checkpoint.step_llm()
        if index >= len(model.transformer.layers):
            return UNKNOWN
        ids = self._llm_tokens[0][: self._goldens.shape(name)[0]]
        outputs: list[Tensor] = []

        def keep(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
            outputs.append(output)

        model.transformer.layers[index].register_forward_hook(keep)
        model(ids)
        return Computed(outputs[0])

    @cached_property
    def _llm_tokens(self) -> tuple[Tensor, Tensor]:
        tokenizer = self._networks.checkpoint.step_tokenizer()
        return padded_tokens([tokenizer.encode(text, truncate=True) for text in self._goldens.setting("prompts")])

    def _clip_tokens(self, setting: str) -> tuple[Tensor, Tensor]:
        tokenizer = self._networks.checkpoint.clip_tokenizer()
        pairs = [tokenizer.encode(text) for text in self._goldens.setting(setting)]
        return torch.cat([ids for ids, _ in pairs]), torch.cat([mask for _, mask in pairs])

    @cached_property
    def _llm_states(self) -> Tensor:
        """All 320 positions, as the official code computes them; serving stops at the last real token."""
        ids, _ = self._llm_tokens
        if self._networks.has_modules:
            states: Tensor = self._networks.checkpoint.step_llm()(ids)
            return states
        graph = self._networks.graph("step_llm")
        return torch.cat([graph(input_ids=row[None])["llm_states"] for row in ids])

    @cached_property
    def _clip_states(self) -> tuple[Tensor, Tensor]:
        ids, mask = self._clip_tokens("prompts")
        if self._networks.has_modules:
            states, pooled = self._networks.checkpoint.clip()(ids, mask)
            return states, pooled
        graph = self._networks.graph("hunyuan_clip")
        rows = [graph(input_ids=i[None], attention_mask=m[None]) for i, m in zip(ids, mask, strict=True)]
        return torch.cat([row["clip_states"] for row in rows]), torch.cat([row["pooled"] for row in rows])


def padded_tokens(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Ids [1, L] each -> ids padded with EOS and mask of the real ones, both [n, 320] int64."""
    ids = [F.pad(row, (0, LLM_MAX_TOKENS - row.shape[1]), value=EOS) for row in rows]
    masks = [F.pad(torch.ones_like(row), (0, LLM_MAX_TOKENS - row.shape[1])) for row in rows]
    return torch.cat(ids), torch.cat(masks)


def context_mask(llm_mask: Tensor) -> Tensor:
    """[n, 320] -> [n, 397]: all CLIP tokens count, padding included, then the LLM's real ones."""
    return F.pad(llm_mask, (CLIP_TOKENS, 0), value=1)


def text_states(
    networks: Networks, step_tokenizer: StepTokenizer, clip_tokenizer: ClipTokenizer, prompt: str
) -> TextStates:
    """What the DiT gets for one prompt; an overlong one is cut, as in the official code, where serving refuses it."""
    llm_ids = step_tokenizer.encode(prompt, truncate=True)
    clip_ids, clip_mask = clip_tokenizer.encode(prompt)
    return TextStates(
        llm=networks.graph("step_llm")(input_ids=llm_ids)["llm_states"][0],
        clip=networks.graph("hunyuan_clip")(input_ids=clip_ids, attention_mask=clip_mask)["clip_states"][0],
    )
