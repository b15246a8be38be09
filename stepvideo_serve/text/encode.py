"""Prompt -> text states through the two encoder graphs, each distinct prompt once."""

from collections import OrderedDict
from collections.abc import Callable

from torch import Tensor

from stepvideo_serve.text.states import TextStates
from stepvideo_serve.text.tokenizers import ClipTokenizer, StepTokenizer

Graph = Callable[..., dict[str, Tensor]]


class TextEncoder:
    """Keeps the states of the `cache_entries` prompts used last: the negative prompt is the same in most requests."""

    def __init__(
        self,
        step_llm: Graph,
        hunyuan_clip: Graph,
        step_tokenizer: StepTokenizer,
        clip_tokenizer: ClipTokenizer,
        cache_entries: int,
    ) -> None:
        self._step_llm, self._hunyuan_clip = step_llm, hunyuan_clip
        self._step_tokenizer, self._clip_tokenizer = step_tokenizer, clip_tokenizer
        self._cache_entries = cache_entries
        self._cache: OrderedDict[str, TextStates] = OrderedDict()

    def encode(self, prompt: str) -> tuple[TextStates, bool]:
        """The states, and whether they came from the cache. Raises InvalidRequest for an overlong prompt.

        CLIP sees the first 77 word pieces only: that is the model's definition; the LLM sees everything.
        """
        if prompt in self._cache:
            self._cache.move_to_end(prompt)
            return self._cache[prompt], True
        llm_ids = self._step_tokenizer.encode(prompt)
        clip_ids, clip_mask = self._clip_tokenizer.encode(prompt)
        states = TextStates(
            llm=self._step_llm(input_ids=llm_ids)["llm_states"][0].float().cpu(),
            clip=self._hunyuan_clip(input_ids=clip_ids, attention_mask=clip_mask)["clip_states"][0].float().cpu(),
        )
        self._cache[prompt] = states
        while len(self._cache) > self._cache_entries:
            self._cache.popitem(last=False)
        return states, False
