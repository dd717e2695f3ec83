"""Prefill and decode steps of one batch over a key-value cache."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from llmctl.errors import UserError
from llmctl.generation.completion import Completion, TokenLogprob
from llmctl.generation.sampling import Draw, Sampler
from llmctl.models.cache import Cache
from llmctl.models.causal_lm import CausalLM


@torch.inference_mode()
def decode(model: CausalLM, completions: Sequence[Completion]) -> Iterator[None]:
    """Grow unfinished completions to their ends, together: one token for each of them per iteration.

    Prompts of unequal lengths are padded on the left. A completion that finishes leaves the batch. Raises `UserError`
    when memory does not hold the batch or the model computes no numbers.
    """
    live = list(completions)
    lengths = [len(completion.prompt_ids) for completion in live]
    device = model.head_weight.device
    padding = [max(lengths) - length for length in lengths]
    inputs_BT = torch.tensor([[0] * n + completion.prompt_ids for n, completion in zip(padding, live, strict=True)])
    # The last token drawn is never read back, so it needs no place.
    capacity = max(lengths) + max(completion.max_new_tokens for completion in live) - 1
    with _explained_out_of_memory(len(live), capacity):
        starts_B = torch.tensor(padding, device=device) if any(padding) else None
        cache = Cache(model.config, len(live), capacity, model.head_weight.dtype, device, starts_B)
        sampler = Sampler(
            [completion.sampling for completion in live],
            [completion.sequence for completion in live],
            [completion.prompt_ids for completion in live],
            model.config.vocab_size,
            device,
        )
        inputs_BT = inputs_BT.to(device)
        while live:
            last_BD = model.hidden(inputs_BT, cache=cache)[:, -1]
            draw = sampler.draw(model.logits(last_BD))
            _push(live, draw)
            rows = [i for i, completion in enumerate(live) if completion.finish_reason is None]
            tokens_B = draw.tokens_B
            if 0 < len(rows) < len(live):
                where = torch.tensor(rows, device=device)
                cache.select(where)
                sampler.select(rows)
                tokens_B = tokens_B[where]
            live = [live[i] for i in rows]
            inputs_BT = tokens_B[:, None]
            yield


def _push(live: list[Completion], draw: Draw) -> None:
    """Hand each completion its token: the one place in a step that waits for the device."""
    tokens = draw.tokens_B.tolist()
    if min(tokens) < 0:
        raise UserError("the model's logits are not numbers (NaN)", hint="check its weights, or try --dtype float32")
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


@contextlib.contextmanager
def _explained_out_of_memory(n_sequences: int, capacity: int) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        known = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
        if not known:
            raise
        raise UserError(
            f"out of memory for {n_sequences} sequences of up to {capacity} tokens",
            hint="lower --batch-size or --max-new-tokens",
        ) from error
