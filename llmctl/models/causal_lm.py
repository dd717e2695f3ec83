"""A decoder-only language model: one stack between an embedding and a head."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llmctl.models.cache import Cache
from llmctl.models.context import Context, padding_of
from llmctl.models.decode_graph import DecodeGraph
from llmctl.models.decode_step import DecodeStep
from llmctl.models.language_model import LanguageModel
from llmctl.models.memory import Memory
from llmctl.ops.sampling import Settings


class CausalLM(LanguageModel):
    """Token ids to logits over what comes next."""

    draws_ahead = True
    """Whether `next_tokens` may be asked for several steps at once."""
    cache_dtype: torch.dtype | None = None
    """Of the keys and values that `begin` makes room for: int8, or a floating type where that is narrower than the weights'
    own, which None means."""

    def forward(
        self,
        input_ids_BT: torch.Tensor,
        attention_mask_BT: torch.Tensor | None = None,
        *,
        types_BT: torch.Tensor | None = None,
        documents_BT: torch.Tensor | None = None,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """Logits [B, T, V]; the arguments are those of `hidden`."""
        hidden_BTD = self.hidden(
            input_ids_BT, attention_mask_BT, types_BT=types_BT, documents_BT=documents_BT, cache=cache
        )
        return self.logits(hidden_BTD)

    def hidden(
        self,
        input_ids_BT: torch.Tensor,
        attention_mask_BT: torch.Tensor | None = None,
        *,
        types_BT: torch.Tensor | None = None,
        documents_BT: torch.Tensor | None = None,
        cache: Cache | None = None,
        memory: Memory | None = None,
        recorded_weights: list[torch.Tensor] | None = None,
        recorded_hidden: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """The last layer's output after the final norm, [B, T, D].

        `attention_mask_BT` is 1 at real tokens and 0 at padding at the ends. `documents_BT` (int, non-decreasing along T)
        numbers the documents packed into a row: tokens attend within their own only and positions restart with each. With a
        `cache` the T tokens continue what it holds. `types_BT` are the segment numbers of models that have such, `memory` an
        encoder's output for those that attend to one. `recorded_weights`, a list, gets every layer's attention weights
        [B, H, T, S], and `recorded_hidden` what goes into each layer and last what is returned.
        """
        starts_B, ends_B = padding_of(attention_mask_BT)
        n_new = input_ids_BT.shape[1]
        if cache is not None:
            starts_B, input_ids_BT = cache.starts_B, cache.to_read(input_ids_BT)
        context = Context(
            input_ids_BT.shape[1],
            input_ids_BT.device,
            starts_B=starts_B,
            ends_B=ends_B,
            documents_BT=documents_BT,
            cache=cache,
            memory=memory,
        )
        context.recorded_weights, context.recorded_hidden = recorded_weights, recorded_hidden
        return self.run(self.embed(input_ids_BT), context, types_BT)[:, -n_new:]

    def next_logits(self, input_ids_BT: torch.Tensor, cache: Cache) -> torch.Tensor:
        """Logits [B, V] of what follows when these ids have continued what the cache holds."""
        if cache.step is not None and cache.step.takes(input_ids_BT):
            return cache.step.logits(input_ids_BT, cache)
        return self.logits(self.hidden(input_ids_BT, cache=cache)[:, -1])

    def next_tokens(
        self, input_ids_BT: torch.Tensor, cache: Cache, settings: Settings, position: int, n_steps: int = 1
    ) -> list[torch.Tensor] | None:
        """The tokens [B] that follow, and those of further steps (see `DecodeStep.draw`), drawn as the settings say from
        this position of the text on; None, and nothing is read, where that takes the logits."""
        if cache.step is None or not cache.step.takes(input_ids_BT) or self.config.head.softcap is not None:
            return None
        return cache.step.draw(input_ids_BT, cache, settings, position, n_steps)

    def continued(self, prompt_ids: Sequence[int], start_id: int | None) -> Sequence[int]:
        """What the new tokens follow when a text is made of a prompt: here the prompt itself."""
        return prompt_ids

    def begin(
        self, prompts: Sequence[Sequence[int]], continued: Sequence[Sequence[int]], max_new_tokens: int
    ) -> tuple[Cache, torch.Tensor]:
        """Begin texts of these prompts: a cache with room for `max_new_tokens` more each, and the first inputs [B, T].

        `continued` is what `continued()` gave for each; shorter ones are padded on the left.
        """
        weight = self.embed_tokens.weight
        length = max(map(len, continued))
        padding = [length - len(ids) for ids in continued]
        inputs_BT = torch.tensor([[0] * n + list(ids) for n, ids in zip(padding, continued, strict=True)])
        starts_B = torch.tensor(padding, device=weight.device) if any(padding) else None
        # The last token is never read back, so it needs no place.
        capacity = self.n_virtual + length + max_new_tokens - 1
        dtype = weight.dtype if self.cache_dtype is None else self.cache_dtype
        dtype = weight.dtype if dtype.itemsize >= weight.dtype.itemsize else dtype
        cache = Cache(self.config, len(continued), capacity, dtype, weight.device, starts_B)
        cache.step = DecodeStep.of(self) or DecodeGraph.of(self)
        return cache, inputs_BT.to(weight.device)
