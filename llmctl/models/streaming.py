"""Runs a model whose weights stay in their files: each module's are read when it runs and go when it is done.

The memory of a forward pass is then one matrix and the activations, whatever the size of the model.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from llmctl import checkpoint
from llmctl.models import families, weights
from llmctl.models.head import logits
from llmctl.models.loading import new_empty, read_config, reset_buffers

HEAD_ROWS = 4096
"""Rows of the vocabulary matrix in memory at a time."""


class StreamedModel:
    """A checkpoint that computes in `dtype` without ever being in memory.

    `change(model)` may wrap modules of it, as adapters do, before anything is read: a wrapper keeps what it wraps as `base`.
    `replaced(name in the file, tensor)` may give another tensor in the place of one that was read, `head_VD` a head.
    """

    def __init__(
        self,
        path: str | Path,
        dtype: torch.dtype = torch.float32,
        change: Callable[[nn.Module], object] | None = None,
        replaced: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
        head_VD: torch.Tensor | None = None,
    ):
        self.config, self.dtype, self._replaced = read_config(path), dtype, replaced
        self._head_VD = head_VD
        self._files = checkpoint.open_tensors(path)
        with torch.device("meta"):
            self.model = new_empty(self.config).eval()
        reset_buffers(self.model)
        shapes = {name: parameter.shape for name, parameter in self.model.named_parameters()}
        self._sources = weights.sources(families.find(self.config.family), shapes, self._files.keys())
        if change is not None:
            change(self.model)
        for name, module in list(self.model.named_modules()):
            self._stream(name, module)

    @torch.no_grad()
    def logits(self, input_ids_BT: torch.Tensor) -> torch.Tensor:
        """[B, T, V]"""
        hidden_BTD = self.model.head_input(self.model.hidden(input_ids_BT))
        name = "embed_tokens.weight" if self.config.tie_embeddings else "lm_head.weight"
        bias = next((source for source in ("head_bias", "lm_head.bias") if source in self._sources), None)
        bias_V = None if bias is None else self._read(bias)
        parts = []
        for first in range(0, self.config.vocab_size, HEAD_ROWS):
            rows = slice(first, first + HEAD_ROWS)
            weight_VD = self._rows(name, rows) if self._head_VD is None else self._head_VD[rows].to(self.dtype)
            parts.append(logits(self.config.head, hidden_BTD, weight_VD, None if bias_V is None else bias_V[rows]))
        return torch.cat(parts, -1)

    def _stream(self, prefix: str, module: nn.Module) -> None:
        """Read the module's own parameters when it, or what is wrapped around it, runs."""
        plain = re.sub(r"\.base(?=\.|$)", "", prefix)
        sources = {name: f"{plain}.{name}".lstrip(".") for name, _ in module.named_parameters(recurse=False)}
        sources = {name: source for name, source in sources.items() if source in self._sources}
        if not sources:
            return

        def read(*_):
            for name, source in sources.items():
                module._parameters[name] = nn.Parameter(self._read(source), requires_grad=False)

        def forget(*_):
            for name in sources:
                module._parameters[name] = nn.Parameter(module._parameters[name].to("meta"), requires_grad=False)

        if isinstance(module, nn.Embedding):  # few of its rows are used
            source = next(iter(sources.values()))
            module.forward = lambda ids_BT: self._embedded(source, ids_BT)
            return
        outermost = self.model.get_submodule(re.sub(r"(\.base)+$", "", prefix))
        outermost.register_forward_pre_hook(read)
        outermost.register_forward_hook(forget)

    def _read(self, name: str) -> torch.Tensor:
        source = self._sources[name]
        tensor = self._files.copy(source.theirs)
        return source.cut(tensor if self._replaced is None else self._replaced(source.theirs, tensor)).to(self.dtype)

    def _rows(self, name: str, rows: slice) -> torch.Tensor:
        if self._replaced is not None:
            return self._read(name)[rows]
        return self._files.copy(self._sources[name].theirs, rows).to(self.dtype)

    def _embedded(self, name: str, ids_BT: torch.Tensor) -> torch.Tensor:
        """Rows of the mapped file: few of its pages are touched."""
        table = self._files.get(self._sources[name].theirs) if self._replaced is None else self._read(name)
        return table[ids_BT].to(self.dtype)
