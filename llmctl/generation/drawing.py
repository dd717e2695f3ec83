"""Texts that grow by one chosen token after another, each row by its own settings."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from llmctl.generation.completion import Completion, TokenLogprob
from llmctl.generation.rules import Rules, not_numbers
from llmctl.generation.sampling import Draw, Sampler
from llmctl.models.cache import Cache
from llmctl.models.causal_lm import CausalLM
from llmctl.ops.sampling import Settings

BURST, MAX_AHEAD = 0.004, 32
"""A small model draws for so many seconds, or tokens, at once: Python between its tokens would take as long as they."""


class Drawing:
    """A sampler over the rows that have not ended."""

    def __init__(self, completions: Sequence[Completion], vocab_size: int, device: torch.device):
        self.live = list(completions)
        self._ahead: list[torch.Tensor] = []
        """Tokens [B] of the steps to come, which the cache has been read on with but for the last."""
        self._seconds: float | None = None
        settings = [completion.sampling for completion in self.live]
        sequences = [completion.sequence for completion in self.live]
        self.sampler = Sampler(settings, sequences, Rules.of(self.live, vocab_size, device), device)

    def step(self, model: CausalLM, ids_BT: torch.Tensor, cache: Cache) -> tuple[torch.Tensor, list[int]]:
        draw = self._drawn_ahead() if self._ahead else self._draw(model, ids_BT, cache)
        _push(self.live, draw)
        rows = [i for i, completion in enumerate(self.live) if completion.finish_reason is None]
        if not rows and self._ahead:
            cache.length -= len(self._ahead)  # nobody goes on from them
        if not rows or len(rows) == len(self.live):
            return draw.tokens_B, rows
        self._ahead = [tokens_B[rows] for tokens_B in self._ahead]
        self.live = [self.live[i] for i in rows]
        self.sampler.select(rows)
        return draw.tokens_B[torch.tensor(rows, device=draw.tokens_B.device)], rows

    def _draw(self, model: CausalLM, ids_BT: torch.Tensor, cache: Cache) -> Draw:
        settings = self.sampler.for_kernel()
        # models that are no torch modules have nothing to draw with
        next_tokens = getattr(model, "next_tokens", None)
        if settings is not None and next_tokens is not None:
            how = self._steps(settings, cache) if getattr(model, "draws_ahead", False) else {}
            start = time.perf_counter()
            found = next_tokens(ids_BT, cache, settings, self.sampler.rules.position, **how)
            if found is not None:
                # the first call reads a prompt, and says nothing of those that follow
                self._seconds = (time.perf_counter() - start) / len(found) if self.live[0].ids else None
                self._ahead = found
                return self._drawn_ahead()
        return self.sampler.draw(model.next_logits(ids_BT, cache))

    def _drawn_ahead(self) -> Draw:
        return self.sampler.taken(self._ahead.pop(0), self.sampler.for_kernel())

    def _steps(self, settings: Settings, cache: Cache) -> dict[str, int]:
        """As many as nobody has to wait for, and as somebody may want."""
        if self._seconds is None or settings.needs_every_step:
            return {}
        wanted = max(completion.max_new_tokens - len(completion.ids) for completion in self.live)
        return {"n_steps": max(1, min(int(BURST / self._seconds), MAX_AHEAD, wanted, cache.capacity - cache.length))}


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
