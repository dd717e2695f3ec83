"""What several texts begin with, run once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llmctl.models.cache import Cache
from llmctl.models.causal_lm import CausalLM
from llmctl.models.config import Attention
from llmctl.models.rope_scaling import heeds_length


class SharedPrefix:
    """What several texts begin with, run once; the last one is kept for the texts that come next."""

    def __init__(self, model: CausalLM):
        self._model = model
        self._ids: list[int] = []
        self._cache: Cache | None = None
        config = model.config
        mixers = [config.block(i).mixer for i in range(config.n_layers)]
        self.is_possible = (
            isinstance(model, torch.nn.Module)
            and config.encoder is None
            and not model.n_virtual
            and all(type(mixer) is Attention for mixer in mixers)
            and not any(mixer.rope is not None and heeds_length(mixer.rope) for mixer in mixers)
        )
        """Whether what a model remembers of a text's beginning can be cut anywhere and put in front of another."""

    def begin(
        self,
        shared: Sequence[int],
        prompts: Sequence[Sequence[int]],
        continued: Sequence[Sequence[int]],
        max_new_tokens: int,
    ) -> tuple[Cache, torch.Tensor]:
        """As `CausalLM.begin`, with as much of each row in the cache already as `shared`, which all begin with, allows."""
        cache, inputs_BT = self._model.begin(prompts, continued, max_new_tokens)
        if not shared:
            return cache, inputs_BT
        prefix, n_shared = self._run(list(shared))
        n_new = max(map(len, continued)) - n_shared
        # A row's tokens come to stand at the right: those of a shorter one are run from further left.
        n_new = max(n_new, 1)
        length = inputs_BT.shape[1] - n_new
        cache.begin_with(prefix, length, [max(0, len(ids) - n_new) for ids in continued])
        return cache, inputs_BT[:, -n_new:]

    def _run(self, ids: list[int]) -> tuple[Cache, int]:
        """A cache whose one row begins with at least most of `ids`, and how many of them it holds."""
        common = next((i for i, (a, b) in enumerate(zip(ids, self._ids)) if a != b), min(len(ids), len(self._ids)))
        if self._cache is None or common < 0.75 * len(ids):
            cache, inputs_BT = self._model.begin([ids], [ids], 1)
            self._model.next_logits(inputs_BT, cache)
            self._ids, self._cache, common = ids, cache, len(ids)
        return self._cache, common


class Prefixed:
    """A model as `decode` asks for it, whose texts all begin with `shared`, which is in the cache already."""

    def __init__(self, model: CausalLM, prefix: SharedPrefix, shared: Sequence[int]):
        self._model, self._prefix, self._shared = model, prefix, shared

    def __getattr__(self, name: str):
        return getattr(self._model, name)

    def begin(
        self, prompts: Sequence[Sequence[int]], continued: Sequence[Sequence[int]], max_new_tokens: int
    ) -> tuple[Cache, torch.Tensor]:
        return self._prefix.begin(self._shared, prompts, continued, max_new_tokens)
