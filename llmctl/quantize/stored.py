"""The tensors of a checkpoint by the names that they have unquantized, whichever way it is stored."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from llmctl import checkpoint, files
from llmctl.checkpoint import LazyTensor, TensorFiles
from llmctl.errors import UserError
from llmctl.models import families
from llmctl.models.packed import PackedWeight
from llmctl.quantize import layouts
from llmctl.tensor_file import NamedTensors

CONFIG_KEY = "quantization_config"
_CODES = (torch.int8, torch.uint8, torch.float8_e4m3fn)


def open_weights(path: str | os.PathLike) -> TensorFiles | QuantizedFiles:
    """The tensors of a checkpoint directory, by the names of an ordinary one; quantized matrices are unpacked as they are read."""
    stored = checkpoint.open_tensors(path)
    config_file = Path(path) / "config.json"
    hf = files.read_json(config_file) if config_file.is_file() else {}
    return QuantizedFiles(stored, hf) if hf.get(CONFIG_KEY) else stored


class QuantizedFiles(NamedTensors):
    """`TensorFiles` of a quantized checkpoint: `X.weight` stands for the tensors that hold the matrix of module X."""

    def __init__(self, stored: TensorFiles, hf: dict):
        self.stored, self.path = stored, stored.path
        self._layout = layouts.find(hf[CONFIG_KEY], stored)
        parts = set(layouts.names_of(self._layout))
        self._modules = {f"{module}.weight": module for module in self._layout.modules()}
        self._named = dict.fromkeys([*(name for name in stored if name not in parts), *self._modules])
        self._transposed = _transposed(hf.get("model_type"))
        self._dtype = self._plain_dtype(hf)
        self._refuse_bare_codes()

    def bits(self, name: str) -> int | None:
        """In how many a weight of a quantized matrix is stored, scales aside; None for other tensors."""
        if (module := self._modules.get(name)) is None:
            return None
        n_out, n_in = self._layout.shape(module)
        codes = next(
            f"{module}.{end}" for end in ("weight_packed", "qweight", "weight") if f"{module}.{end}" in self.stored
        )
        return round(8 * self.stored.nbytes(codes) / (n_out * n_in))

    def is_packed(self, name: str) -> bool:
        return name in self._modules

    def packed(self, name: str) -> PackedWeight | None:
        """The matrix [out, in] of a quantized module's weight, as it is stored; None for other tensors."""
        module = self._modules.get(name)
        return None if module is None else self._layout.packed(module)

    def parts(self) -> dict[str, LazyTensor]:
        """The tensors that hold quantized matrices, as they lie in the file."""
        return {name: self.stored.lazy(name) for name in layouts.names_of(self._layout)}

    def get(self, name: str) -> torch.Tensor:
        packed = self.packed(name)
        if packed is None:
            return self.stored.get(name)
        weight = packed.dequantized(self._dtype)
        return weight.mT.contiguous() if self._is_transposed(name) else weight

    def copy(self, name: str, rows: slice = slice(None)) -> torch.Tensor:
        return self.get(name)[rows] if name in self._modules else self.stored.copy(name, rows)

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._modules:
            return self.stored.shape(name)
        shape = self._layout.shape(self._modules[name])
        return shape[::-1] if self._is_transposed(name) else shape

    def dtype(self, name: str) -> torch.dtype:
        return self._dtype if name in self._modules else self.stored.dtype(name)

    def dtype_name(self, name: str) -> str:
        return str(self.dtype(name)).removeprefix("torch.")

    def nbytes(self, name: str) -> int:
        """As unpacked."""
        return self.lazy(name).nbytes

    def lazy(self, name: str) -> LazyTensor:
        return LazyTensor(self.shape(name), self.dtype(name), lambda: self.copy(name))

    def _refuse_bare_codes(self) -> None:
        for name in self._named:
            if name.endswith(".weight") and name not in self._modules and self.stored.dtype(name) in _CODES:
                kind = self.stored.dtype_name(name)
                raise UserError(
                    f"{self.path}: {name} is {kind} and has no scale beside it", hint="the checkpoint is incomplete"
                )

    def _is_transposed(self, name: str) -> bool:
        return any(pattern.search(name) for pattern in self._transposed)

    def _plain_dtype(self, hf: dict) -> torch.dtype:
        """What the rest is in, as config.json says, or the first of its floating tensors."""
        name = hf.get("torch_dtype") or hf.get("dtype")
        if name in ("float32", "float16", "bfloat16"):
            return getattr(torch, name)
        plain = (self.stored.dtype(name) for name in self if name in self.stored)
        found = next((dtype for dtype in plain if dtype.is_floating_point and dtype.itemsize > 1), None)
        if found is None:
            raise UserError(f"{self.path}: config.json does not say the dtype of a checkpoint that is quantized whole")
        return found


def _transposed(model_type: str | None) -> list[re.Pattern]:
    """The names of matrices that the family's files keep as [in, out]; packed ones are [out, in] always."""
    rows = [row for row in families.find(model_type).WEIGHTS if row.change == "split_columns"]
    names = (re.escape(row.theirs).replace(r"\{\}", r"\d+") for row in rows if row.theirs.endswith(".weight"))
    return [re.compile(f"{name.partition('.')[2]}$" if name.count(".") > 1 else f"{name}$") for name in names]
