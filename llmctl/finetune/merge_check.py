"""What merging wrote, run beside what it was made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import nn

from llmctl import agreement
from llmctl.finetune import adapter
from llmctl.finetune.assembly import Assembly
from llmctl.finetune.changes import AdapterChanges
from llmctl.models.config import ModelConfig
from llmctl.models.streaming import StreamedModel
from llmctl.tokenization.files import has_tokenizer
from llmctl.tokenizer import Tokenizer


def attached(changes: Sequence[AdapterChanges], weights: Sequence[float]) -> Callable[[nn.Module], None]:
    """Puts the adapters beside a model's weights, as they were when they were trained."""

    def attach(model: nn.Module) -> None:
        for change, weight in zip(changes, weights, strict=True):
            adapter.load(model, change.path, weight)

    return attach


class Assembled:
    """A base with one adapter, mapped whole: for what an adapter brings in the place of the base's tensors."""

    def __init__(self, base: Path, change: AdapterChanges, dtype: torch.dtype):
        self.model, self.dtype = Assembly(base, ((change.path, 1.0),)).load(dtype), dtype
        self.config = self.model.config

    @torch.no_grad()
    def logits(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """As those of a StreamedModel."""
        if self.config.classifier is not None:
            return self.model(ids_BT)[:, None]
        return self.model(ids_BT) if self.config.encoder is None else self.model(ids_BT, input_ids_BT=ids_BT)


def compare(base: Path, before: StreamedModel | Assembled, after: StreamedModel) -> agreement.Agreement:
    """Of both on a few texts; one matrix of each is in memory at a time."""
    tokenizer = Tokenizer.load(base) if has_tokenizer(base) else None
    probes = agreement.probe_ids(tokenizer, before.config.vocab_size)
    first_BTV, second_BTV = _side_by_side(before, after, probes)
    return agreement.measure(lambda _: first_BTV, lambda _: second_BTV, probes)


def dtype_of(config: ModelConfig) -> torch.dtype:
    """bfloat16 for a model that is stored and will run in it; else float32."""
    said = config.hf.get("dtype") or config.hf.get("torch_dtype")
    return torch.bfloat16 if said == "bfloat16" else torch.float32


def _side_by_side(
    before: StreamedModel | Assembled, after: StreamedModel, probes: torch.Tensor
) -> Sequence[torch.Tensor]:
    """Both models' logits, each with half of the threads: reading weights is work for one thread each."""
    threads = torch.get_num_threads()

    def logits(model: StreamedModel | Assembled) -> torch.Tensor:
        torch.set_num_threads(max(1, threads // 2))
        # torch's own products, which are the fastest for many rows
        with torch.autocast("cpu", model.dtype, enabled=model.dtype != torch.float32):
            return model.logits(probes)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(logits, (before, after)))
    torch.set_num_threads(threads)
    return found
