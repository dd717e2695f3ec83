"""Runs a model whose weights stay in their files: each module's are read when it runs and go when it is done.

The memory of a forward pass is then one matrix and the activations, whatever the size of the model.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from llmctl.models import families, weights
from llmctl.models.head import logits, softcapped
from llmctl.models.linear import Linear
from llmctl.models.loading import new_empty, reset_buffers, stored_config, stored_tensors
from llmctl.models.mamba import Mamba
from llmctl.models.mamba2 import Mamba2
from llmctl.models.quantized_linear import QuantizedLinear
from llmctl.quantize.stored import open_weights

HEAD_ROWS = 4096
"""Rows of the vocabulary matrix in memory at a time."""


class _InFewBits(nn.Module):
    """A linear layer whose matrix is stored in few bits, which `read` gives whenever it runs."""

    def __init__(self, read: Callable[[], QuantizedLinear]):
        super().__init__()
        self._read = read

    @property
    def weight(self) -> torch.Tensor:
        return self._read().weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._read()(x)


class StreamedModel:
    """A checkpoint that computes in `dtype` without ever being in memory.

    `change(model)` may wrap modules of it, as adapters do, before anything is read: a wrapper keeps what it wraps as `base`.
    `replaced(name in the file, tensor)` may give another tensor in the place of one that was read, `head_VD` a head.
    Matrices in few bits are unpacked; where they are `packed`, products are those of a loaded model.
    """

    def __init__(
        self,
        path: str | Path,
        dtype: torch.dtype = torch.float32,
        change: Callable[[nn.Module], object] | None = None,
        replaced: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
        head_VD: torch.Tensor | None = None,
        packed: bool = False,
    ):
        self.config, self.dtype, self._replaced = stored_config(path), dtype, replaced
        self._head_VD = head_VD
        self._files = open_weights(path)
        self._held: set[str] = set()
        with torch.device("meta"):
            self.model = new_empty(self.config).eval()
        reset_buffers(self.model)
        shapes = {name: tensor.shape for name, tensor in stored_tensors(self.model).items()}
        self._sources = weights.sources(families.find(self.config.family), shapes, self._files.keys())
        for name, _ in self.model.named_buffers():
            if name in self._sources:  # those are small
                owner, _, leaf = name.rpartition(".")
                setattr(self.model.get_submodule(owner), leaf, self.read(name))
        if change is not None:
            change(self.model)
        if packed:
            self._keep_packed()
        for name, module in list(self.model.named_modules()):
            self._stream(name, module)

    def names(self) -> list[str]:
        """Of the file's tensors, unquantized."""
        return list(self._files)

    @torch.no_grad()
    def logits(self, input_ids_BT: torch.Tensor) -> torch.Tensor:
        """[B, T, V]; of a classifier [B, 1, labels]. An encoder-decoder reads the ids and writes them again."""
        if self.config.classifier is not None:
            return self.model(input_ids_BT)[:, None]
        return self.head(self.hidden(input_ids_BT))

    @torch.no_grad()
    def hidden(self, input_ids_BT: torch.Tensor, attention_mask_BT: torch.Tensor | None = None) -> torch.Tensor:
        """What the head reads, [B, T, D]."""
        if self.config.encoder is None:
            return self.model.hidden(input_ids_BT, attention_mask_BT)
        return self.model.hidden(input_ids_BT, memory=self.model.encode(input_ids_BT))

    @torch.no_grad()
    def answers(
        self, source_ids_BS: torch.Tensor, source_mask_BS: torch.Tensor, input_ids_BT: torch.Tensor
    ) -> torch.Tensor:
        """The logits [B, T, V] of a decoder with a source."""
        memory = self.model.encode(source_ids_BS, source_mask_BS)
        return self.head(self.model.hidden(input_ids_BT, memory=memory))

    @torch.no_grad()
    def head(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """[B, T, V] of `hidden`; of a base model the hidden states themselves."""
        if self.config.head is None:
            return hidden_BTD
        hidden_BTD = self.model.head_input(hidden_BTD)
        if isinstance(self.model.lm_head, _InFewBits):
            return softcapped(self.config.head, self.model.lm_head(hidden_BTD))
        name = "embed_tokens.weight" if self.config.tie_embeddings else "lm_head.weight"
        bias = next((source for source in ("head_bias", "lm_head.bias") if source in self._sources), None)
        bias_V = None if bias is None else self.read(bias)
        if self.config.head.bias == "fixed":
            bias_V = self.model.logits_bias
        parts = []
        for first in range(0, self.config.vocab_size, HEAD_ROWS):
            rows = slice(first, first + HEAD_ROWS)
            weight_VD = self._rows(name, rows) if self._head_VD is None else self._head_VD[rows].to(self.dtype)
            parts.append(logits(self.config.head, hidden_BTD, weight_VD, None if bias_V is None else bias_V[rows]))
        return torch.cat(parts, -1)

    @contextlib.contextmanager
    def holding(self, module: nn.Module) -> Iterator[None]:
        """Keep all weights of one module in memory, where they may be changed, while the block runs."""
        inside = {id(part) for part in module.modules()}
        held = {name: part for name, part in self.model.named_modules() if id(part) in inside}
        parameters = {}
        for name, part in held.items():
            for leaf in part._parameters:
                source = re.sub(r"\.base(?=\.|$)", "", f"{name}.{leaf}")
                if source in self._sources:
                    parameters[name, leaf] = part._parameters[leaf]
                    part._parameters[leaf] = nn.Parameter(self.read(source), requires_grad=False)
        self._held |= set(held)
        try:
            yield
        finally:
            self._held -= set(held)
            for (name, leaf), parameter in parameters.items():
                held[name]._parameters[leaf] = parameter

    def _keep_packed(self) -> None:
        """Put `_InFewBits` in the place of Linears of which the file has matrices in few bits."""
        is_packed = getattr(self._files, "is_packed", lambda _: False)
        for name, module in list(self.model.named_modules()):
            source = self._sources.get(f"{name}.weight")
            if isinstance(module, Linear) and source is not None and is_packed(source.theirs):
                owner, _, leaf = name.rpartition(".")
                read = functools.partial(self._quantized_linear, name, module.bias is not None)
                setattr(self.model.get_submodule(owner), leaf, _InFewBits(read))

    def _quantized_linear(self, name: str, has_bias: bool) -> QuantizedLinear:
        source = self._sources[f"{name}.weight"]
        bias = nn.Parameter(self.read(f"{name}.bias"), requires_grad=False) if has_bias else None
        return QuantizedLinear(source.cut_packed(self._files.packed(source.theirs)), bias, self.dtype)

    def _stream(self, prefix: str, module: nn.Module) -> None:
        """Read the module's own parameters when it, or what is wrapped around it, runs."""
        plain = re.sub(r"\.base(?=\.|$)", "", prefix)
        sources = {name: f"{plain}.{name}".lstrip(".") for name, _ in module.named_parameters(recurse=False)}
        sources = {name: source for name, source in sources.items() if source in self._sources}
        if not sources:
            return

        def read(*_):
            if prefix in self._held:
                return
            for name, source in sources.items():
                module._parameters[name] = nn.Parameter(self.read(source), requires_grad=False)

        def forget(*_):
            if prefix in self._held:
                return
            for name in sources:
                module._parameters[name] = nn.Parameter(module._parameters[name].to("meta"), requires_grad=False)

        if prefix.endswith("embed_types"):  # a few rows, which the stack takes without asking the module
            read()
            return
        if isinstance(module, nn.Embedding):  # few of its rows are used
            source = next(iter(sources.values()))
            module.forward = lambda ids_BT: self._embedded(source, ids_BT)
            return
        outermost = self._state_space(prefix) or self.model.get_submodule(re.sub(r"(\.base)+$", "", prefix))
        outermost.register_forward_pre_hook(read)
        outermost.register_forward_hook(forget)

    def _state_space(self, prefix: str) -> nn.Module | None:
        """The mixer of a module whose weights it takes without asking the module."""
        found = re.match(r"(.*layers\.\d+\.mixer)\.", prefix)
        mixer = found and self.model.get_submodule(found.group(1))
        return mixer if isinstance(mixer, (Mamba, Mamba2)) else None

    def read(self, name: str) -> torch.Tensor:
        """One parameter of ours."""
        source = self._sources[name]
        tensor = self._files.copy(source.theirs)
        return source.cut(tensor if self._replaced is None else self._replaced(source.theirs, tensor)).to(self.dtype)

    def _rows(self, name: str, rows: slice) -> torch.Tensor:
        if self._replaced is not None:
            return self.read(name)[rows]
        return self._files.copy(self._sources[name].theirs, rows).to(self.dtype)

    def _embedded(self, name: str, ids_BT: torch.Tensor) -> torch.Tensor:
        """Rows of the mapped file: few of its pages are touched."""
        table = self._files.get(self._sources[name].theirs) if self._replaced is None else self.read(name)
        return table[ids_BT].to(self.dtype)
