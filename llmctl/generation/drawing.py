"""Texts that grow by one chosen token after another, each row by its own settings."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llmctl.generation.completion import Completion, TokenLogprob
from llmctl.generation.rules import Rules, not_numbers
from llmctl.generation.sampling import Draw, Sampler
from llmctl.models.cache import Cache
from llmctl.models.causal_lm import CausalLM


class Drawing:
    """A sampler over the rows that have not ended."""

    def __init__(self, completions: Sequence[Completion], vocab_size: int, device: torch.device):
        self.live = list(completions)
        settings = [completion.sampling for completion in self.live]
        sequences = [completion.sequence for completion in self.live]
        self.sampler = Sampler(settings, sequences, Rules.of(self.live, vocab_size, device), device)

    def step(self, model: CausalLM, ids_BT: torch.Tensor, cache: Cache) -> tuple[torch.Tensor, list[int]]:
        draw = self._draw(model, ids_BT, cache)
        _push(self.live, draw)
        rows = [i for i, completion in enumerate(self.live) if completion.finish_reason is None]
        if not rows or len(rows) == len(self.live):
            return draw.tokens_B, rows
        self.live = [self.live[i] for i in rows]
        self.sampler.select(rows)
        return draw.tokens_B[torch.tensor(rows, device=draw.tokens_B.device)], rows

    def _draw(self, model: CausalLM, ids_BT: torch.Tensor, cache: Cache) -> Draw:
        settings = self.sampler.for_kernel()
        # models that are no torch modules have nothing to draw with
        next_tokens = getattr(model, "next_tokens", None)
        if settings is not None and next_tokens is not None:
            drawn_B = next_tokens(ids_BT, cache, settings, self.sampler.rules.position)
            if drawn_B is not None:
                return self.sampler.taken(drawn_B, settings)
        return self.sampler.draw(model.next_logits(ids_BT, cache))


def _push(live: list[Completion], draw: Draw) -> None:
    """Hand each completion its token: the one place in a step that waits for the device."""
    tokens = draw.tokens_B.tolist()
    if min(tokens) < 0:
        raise not_numbers()
    if draw.logprobs_B is None:
        for completion, token in zip(live, tokens, strict=True):
            completion.push(token)
        return
    logprobs = draw.logprobs_B.tolist()
    tops = zip(draw.top_ids_BN.tolist(), draw.top_logprobs_BN.tolist(), strict=True)
    for completion, token, logprob, (ids, values) in zip(live, tokens, logprobs, tops, strict=True):
        wanted = completion.sampling.logprobs
        if wanted is None:
            completion.push(token)
            continue
        top = tuple(zip(ids[:wanted], values[:wanted], strict=True))
        completion.push(token, TokenLogprob(token, logprob, top))
