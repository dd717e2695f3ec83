"""Prefill and decode steps of one batch over a cache: the one loop, whatever the model and however tokens are chosen."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from llmctl.errors import UserError
from llmctl.generation.beam_search import BeamSearch
from llmctl.generation.completion import Completion
from llmctl.generation.drawing import Drawing
from llmctl.models.cache import Cache
from llmctl.models.causal_lm import CausalLM


class Choice(Protocol):
    """How the next tokens are chosen; it hands them to its completions, which end as they will."""

    def step(self, model: CausalLM, ids_BT: torch.Tensor, cache: Cache) -> tuple[torch.Tensor, list[int]]:
        """Has the model read the ids; the tokens [B'] to read next, and which row each goes on from; none where all has
        ended."""


@torch.inference_mode()
def decode(model: CausalLM, completions: Sequence[Completion]) -> Iterator[None]:
    """Grow unfinished completions to their ends, together: a token for each row of the batch per iteration.

    Either all search, with one number of beams, or none does. Prompts of unequal lengths are padded; a completion that
    finishes leaves the batch. Raises `UserError` when memory does not hold the batch or the model computes no numbers.
    """
    device = model.device
    max_new_tokens = max(completion.max_new_tokens for completion in completions)
    n_beams = completions[0].sampling.num_beams
    length = max(len(completion.continued) for completion in completions) + max_new_tokens - 1
    with _explained_out_of_memory(len(completions) * n_beams, length):
        prompts = [completion.prompt_ids for completion in completions]
        continued = [completion.continued for completion in completions]
        cache, inputs_BT = model.begin(prompts, continued, max_new_tokens)
        kind = BeamSearch if n_beams > 1 else Drawing
        choice: Choice = kind(completions, model.config.vocab_size, device)
        rows = list(range(len(completions)))
        while rows:
            n_rows = len(inputs_BT)
            tokens_B, rows = choice.step(model, inputs_BT, cache)
            if rows and rows != list(range(n_rows)):
                cache.select(torch.tensor(rows, device=device))
            inputs_BT = tokens_B[:, None]
            yield


@contextlib.contextmanager
def _explained_out_of_memory(n_sequences: int, length: int) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        known = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
        if not known:
            raise
        raise UserError(
            f"out of memory for {n_sequences} sequences of up to {length} tokens",
            hint="lower --batch-size or --max-new-tokens",
        ) from error
