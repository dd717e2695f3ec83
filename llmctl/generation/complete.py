"""Many prompts: checked, sorted by length into batches, and given back in the order they came."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

from llmctl.errors import UserError
from llmctl.generation.completion import Completion
from llmctl.generation.decode import decode
from llmctl.generation.settings import NO_MARKS, Marks, Sampling
from llmctl.models.causal_lm import CausalLM
from llmctl.models.transformer import Stack
from llmctl.tokenizer import Tokenizer

BATCHES_PER_WINDOW = 32  # prompts are sorted within so many batches: enough for equal lengths, few enough to stream


def encode_prompt(tokenizer: Tokenizer, text: str, name: str = "the prompt") -> list[int]:
    """Ids of a prompt by the tokenizer's own rule for special tokens; an empty one begins a new text."""
    refuse_what_is_no_text(text, name)
    ids = tokenizer.encode(text)
    if ids:
        return ids
    start = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    if start is None:
        raise UserError("the prompt is empty and the tokenizer has neither a BOS nor an EOS token to begin with")
    return [start]


def refuse_what_is_no_text(text: str, name: str) -> None:
    """Raise `UserError` for bytes that an argument brought and for half a surrogate pair, which no UTF-8 can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code, offset = ord(text[error.start]), len(text[: error.start].encode())
        if 0xDC80 <= code <= 0xDCFF:
            raise UserError(f"{name} is not UTF-8: byte {code - 0xDC00:#04x} at offset {offset}") from error
        raise UserError(f"{name} has half of a surrogate pair at character {error.start}") from error


def prepare(
    model: CausalLM,
    prompt_ids: Sequence[int],
    sampling: Sampling,
    *,
    sequence: int = 0,
    marks: Marks = NO_MARKS,
    tokenizer: Tokenizer | None = None,
    name: str = "the prompt",
) -> Completion:
    """A completion that has yet to begin. Raises `UserError` for a prompt that the model cannot read whole.

    `sampling` is resolved. The new tokens fill the context at most; the last one may lie just outside, since it is
    not read back.
    """
    config = model.config
    context, vocab_size = _room(model.encoder if config.encoder else model), config.vocab_size
    if context is not None and len(prompt_ids) > context:
        raise UserError(
            f"{name} has {len(prompt_ids)} tokens; the model's context is {context}", hint="shorten it: it is never cut"
        )
    if max(prompt_ids) >= vocab_size:
        raise UserError(
            f"{name} has token {max(prompt_ids)}; the model's vocabulary ends at {vocab_size - 1}",
            hint="this is not the tokenizer that the model was trained with",
        )
    continued = model.continued(prompt_ids, marks.start)
    max_new_tokens = sampling.max_new_tokens
    if (room := _room(model)) is not None:
        max_new_tokens = min(max_new_tokens, room - len(continued) + 1)
    return Completion(prompt_ids, sampling, sequence, max_new_tokens, marks, tokenizer, continued)


def _room(stack: Stack) -> int | None:
    """Tokens of a text that a stack can read; None where there is no end."""
    return None if stack.config.max_positions is None else stack.config.max_positions - stack.n_virtual


def complete(model: CausalLM, completions: Iterable[Completion], batch_size: int) -> Iterator[Completion]:
    """Run prepared completions to their ends; each is given back as soon as all before it have been.

    `batch_size` counts the sequences that run together: as many for a completion as its search has beams.
    """
    waiting = iter(completions)
    while window := list(itertools.islice(waiting, batch_size * BATCHES_PER_WINDOW)):
        given = 0
        for batch in _batches(window, batch_size):
            for _ in decode(model, batch):
                while given < len(window) and window[given].finish_reason is not None:
                    yield window[given]
                    given += 1


def _batches(completions: Sequence[Completion], batch_size: int) -> Iterator[list[Completion]]:
    """Like with like: of one number of beams, and of near lengths. Longest first: if memory is short, it shows at once."""
    ordered = sorted(completions, key=lambda completion: (completion.sampling.num_beams, -len(completion.prompt_ids)))
    for n_beams, alike in itertools.groupby(ordered, key=lambda completion: completion.sampling.num_beams):
        while batch := list(itertools.islice(alike, max(1, batch_size // n_beams))):
            yield batch
