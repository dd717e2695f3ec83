"""A GGUF file as a checkpoint: its config, tensors and tokenizer as those of a Hugging Face directory.

Tensors have the names and layouts of the family's Hugging Face files, and values are dequantized when they are read.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from llmctl.errors import UserError
from llmctl.gguf import architectures, hf_config, tensors
from llmctl.gguf.blocks import BLOCK, PACKED, unpacked
from llmctl.models import families, weights
from llmctl.models.config import ModelConfig
from llmctl.models.packed import AffineWeight
from llmctl.tensor_file import LazyTensor, NamedTensors

_STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


class _Reader(gguf.GGUFReader):
    """Takes an array at once, where the library goes number by number: seconds for a vocabulary, and more for a table of characters."""

    def _get_field_parts(self, orig_offs: int, raw_type: int):
        if raw_type != gguf.GGUFValueType.ARRAY or self.byte_order == "S":
            return super()._get_field_parts(orig_offs, raw_type)
        kind, count = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
        item, begin, n = gguf.GGUFValueType(kind[0]), orig_offs + 12, int(count[0])
        if item == gguf.GGUFValueType.STRING:
            texts, end = _texts(self.data.view(np.ndarray), begin, n)
            return end - orig_offs, [kind, count, *texts], list(range(2, 2 + n)), [gguf.GGUFValueType.ARRAY, item]
        dtype = self.gguf_scalar_to_np.get(item)
        if dtype is None or n == 0:
            return super()._get_field_parts(orig_offs, raw_type)
        values = self._get(begin, dtype, n)
        if len(values) != n:
            raise ValueError(f"an array of {n} numbers, of which {len(values)} are there")
        return begin + values.nbytes - orig_offs, [kind, count, values], [2], [gguf.GGUFValueType.ARRAY, item]


def _texts(data: np.ndarray, begin: int, count: int) -> tuple[list[np.ndarray], int]:
    """The bytes of so many strings, each behind its length in 8 bytes, and the place behind the last."""
    found = []
    for _ in range(count):
        start = begin + 8
        begin = start + int.from_bytes(data[begin:start].tobytes(), "little")
        if begin > len(data):
            raise ValueError(f"a string reaches to byte {begin}, the file has {len(data)}")
        found.append(data[start:begin])
    return found, begin


class GgufFile:
    """The keys of a file, and its tensors as the `gguf` library maps them."""

    def __init__(self, path: Path):
        self.path = path
        try:
            reader = _Reader(path)
            self.fields: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
            self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        except OSError as error:
            raise UserError(f"{path}: {error.strerror or error}") from error
        except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
            raise UserError(
                f"{path}: truncated or corrupt GGUF file: {error}", hint="copy or download the file again"
            ) from error

    def read(self, name: str, rows: slice = slice(None)) -> torch.Tensor:
        """float32, in the file's layout; all of it or some rows."""
        tensor = self.tensors[name]
        shape = [int(size) for size in reversed(tensor.shape)]
        data = tensor.data if rows == slice(None) else tensor.data[rows]
        values = gguf.quants.dequantize(data, tensor.tensor_type).astype(np.float32, copy=False)
        return torch.from_numpy(np.array(values)).reshape(-1, *shape[1:])

    def describe(self) -> list[dict[str, Any]]:
        """Name, shape, type and bytes of each tensor, as the file has them."""
        return [
            {
                "name": tensor.name,
                "shape": [int(size) for size in reversed(tensor.shape)],
                "dtype": tensor.tensor_type.name.lower(),
                "bytes": int(tensor.n_bytes),
            }
            for tensor in self.tensors.values()
        ]

    @property
    def dtype(self) -> torch.dtype:
        """That of the matrices where it is one of torch's, float32 of quantized ones."""
        return _STORED.get(self.tensors["token_embd.weight"].tensor_type.name, torch.float32)


@functools.lru_cache(maxsize=2)
def _opened(path: str, stamp: tuple[int, int]) -> GgufFile:
    return GgufFile(Path(path))


def opened(path: str | os.PathLike) -> GgufFile:
    """The file, whose keys (a vocabulary, mostly) are read once as long as it does not change."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    return _opened(os.path.abspath(path), (status.st_mtime_ns, status.st_size))


def read_config(path: str | os.PathLike) -> dict[str, Any]:
    """The content of the config.json that the file stands for. Raises UserError for an architecture without a family."""
    file = opened(path)
    try:
        return hf_config.of_keys(file.fields, set(file.tensors), file.read)
    except KeyError as error:
        raise UserError(f"{path}: the GGUF file lacks the key {error}") from error
    except UserError as error:
        raise UserError(f"{path}: {error.message}", hint=error.hint) from error


class GgufTensors(NamedTensors):
    """What `checkpoint.TensorFiles` is for safetensors."""

    def __init__(self, path: str | os.PathLike):
        self.path, self._file = Path(path), opened(path)
        hf = read_config(path)
        self._family = families.find(hf["model_type"])
        self._config: ModelConfig = architectures.in_file(self._family.config_from_hf(hf))
        self._shapes = shapes = _shapes(self._config)
        found = [entry for entry in tensors.entries(self._config, shapes) if entry.change != "scaled"]
        missing = [entry.name for entry in found if entry.name not in self._file.tensors]
        known = {entry.name for entry in found}
        extra = [name for name in self._file.tensors if name not in known and name not in _FACTORS]
        for complaint, some in (("lacks", missing), ("has the unknown", extra)):
            if some:
                raise UserError(f"{path}: the GGUF file {complaint} {some[0]} ({len(some)} such)")
        self._entries = {name: entry for entry in found for name in entry.ours}
        self._named = {theirs: (ours, change) for theirs, ours, change in weights.matches(self._family.WEIGHTS, shapes)}

    def get(self, name: str) -> torch.Tensor:
        ours, change = self._of(name)
        parts = [self._ours(each) for each in ours]
        return weights.to_theirs(change, parts).to(self._file.dtype).contiguous()

    def packed(self, name: str) -> AffineWeight | None:
        """The matrix [out, in] of a weight that is stored in a form which products can be taken with as it is; else None."""
        ours, _ = self._of(name)
        entry = self._entries[ours[0]]
        stored = self._file.tensors[entry.name]
        if entry.ours != tuple(ours) or stored.tensor_type.name not in PACKED or entry.change == "stack":
            return None
        codes_NK, scales_NJ = unpacked(stored.data, stored.tensor_type.name)
        order = tensors.rows_in_order(entry, self._config, len(codes_NK))
        bits = PACKED[stored.tensor_type.name]
        return AffineWeight(codes_NK[order], scales_NJ[order], None, bits, BLOCK)

    def parts(self) -> dict[str, LazyTensor]:
        """What a checkpoint holds in place of packed matrices: they are unpacked when they are saved."""
        return {name: self.lazy(name) for name in self if self.packed(name) is not None}

    def copy(self, name: str, rows: slice = slice(None)) -> torch.Tensor:
        """The tensor, or some of its rows; a vocabulary's matrix is dequantized in parts."""
        ours, change = self._of(name)
        entry = self._entries[ours[0]]
        if rows != slice(None) and change == entry.change == "rename":
            return self._file.read(entry.name, rows).to(self._file.dtype)
        return self.get(name)[rows].clone()

    def shape(self, name: str) -> tuple[int, ...]:
        ours, change = self._of(name)
        return tuple(weights.to_theirs(change, [torch.empty(self._shapes[n], device="meta") for n in ours]).shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._file.dtype

    def dtype_name(self, name: str) -> str:
        return str(self._file.dtype).removeprefix("torch.")

    def nbytes(self, name: str) -> int:
        return int(np.prod(self.shape(name))) * self._file.dtype.itemsize

    def lazy(self, name: str) -> LazyTensor:
        return LazyTensor(self.shape(name), self._file.dtype, lambda: self.copy(name))

    def _ours(self, name: str) -> torch.Tensor:
        entry = self._entries[name]
        whole = self._file.read(entry.name)
        sizes = [self._shapes[part][0] for part in entry.ours]
        expected = tensors.to_gguf(entry, [torch.empty(self._shapes[part]) for part in entry.ours], self._config).shape
        if whole.shape != expected:
            raise UserError(f"{self.path}: {entry.name} has shape {list(whole.shape)}, expected {list(expected)}")
        return tensors.to_ours(entry, whole, sizes, self._config)[entry.ours.index(name)]


def _shapes(config: ModelConfig) -> dict[str, torch.Size]:
    from llmctl.models.loading import new_empty  # which reads checkpoints itself

    with torch.device("meta"):
        model = new_empty(config)
    return {name: parameter.shape for name, parameter in model.named_parameters()}
