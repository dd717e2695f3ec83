"""llmctl: composable commands for the whole life of a language model, and three functions for notebooks and tests.

Nothing heavy is imported before one of them is called.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from llmctl.generation.completion import Completion
    from llmctl.models.causal_lm import CausalLM
    from llmctl.tokenizer import Tokenizer

__version__ = "0.1.0"


def load(
    path: str | os.PathLike, dtype: torch.dtype | str | None = None, device: torch.device | str | None = None
) -> CausalLM:
    """The model of a checkpoint directory: a torch module from `input_ids_BT` (and `attention_mask_BT`) to `logits_BTV`.

    dtype None keeps the stored one. Raises `UserError` where the checkpoint is missing, broken or of an unknown family.
    """
    from llmctl.models.loading import load_model

    return load_model(path, dtype, device)


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """The tokenizer of a checkpoint directory, or of a tokenizer.json."""
    from llmctl.tokenizer import Tokenizer

    return Tokenizer.load(path)


def generate(
    model: CausalLM, tokenizer: Tokenizer, prompts: str | Sequence[str], *, batch_size: int = 32, **sampling: Any
) -> list[Completion]:
    """Completions of the prompts, in their order; `.text` is what follows a prompt, `.finish_reason` why it ends.

    `sampling` takes the flags of `llmctl generate` with underscores: temperature, top_k, max_new_tokens, stop, seed, ...
    """
    from llmctl.generation.records import Row
    from llmctl.generation.session import Session, marks_of
    from llmctl.generation.settings import Sampling, sampling_from

    recommended = sampling_from({}, has_source=model.config.encoder is not None)
    session = Session(model, tokenizer, recommended, marks_of(model, tokenizer, {}))
    rows = [Row(prompt) for prompt in ([prompts] if isinstance(prompts, str) else prompts)]
    return [answer.completion for answer in session.answer(rows, Sampling(**sampling), batch_size=batch_size)]
