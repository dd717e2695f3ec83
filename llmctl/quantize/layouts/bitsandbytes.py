"""bitsandbytes' serialized form (https://github.com/bitsandbytes-foundation/bitsandbytes), as transformers reads it.

4 bits (arXiv:2305.14314): a byte holds two codes of a table (`weight.quant_map`) over blocks of the flattened matrix, whose
scales (`weight.absmax`) may be 8-bit codes themselves, less their mean ("double quantization"). 8 bits (LLM.int8,
arXiv:2208.07339): int8 and the largest of each row (`SCB`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import torch

from llmctl.checkpoint import TensorFiles
from llmctl.errors import UserError
from llmctl.models.packed import AffineWeight, TableWeight
from llmctl.quantize.layouts import parts

NAME = "bitsandbytes"
NESTED_BLOCK = 256
_STATES = ("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4")
_NESTED = ("weight.nested_absmax", "weight.nested_quant_map")
_OF_4_BITS = ("weight", "weight.absmax", "weight.quant_map", *_NESTED, *_STATES)
_OF_8_BITS = ("weight", "SCB", "weight_format")


class BitsAndBytes:
    """Reads such files."""

    def __init__(self, said: Mapping, files: TensorFiles):
        self._files = files
        self._modules = {
            **parts.modules_with(files, "weight.absmax", _OF_4_BITS),
            **parts.modules_with(files, "SCB", _OF_8_BITS),
        }
        if not self._modules:
            raise UserError(
                f"{files.path}: its config.json speaks of bitsandbytes, but its weights are not quantized",
                hint="take quantization_config out of config.json",
            )

    def modules(self) -> dict[str, list[str]]:
        return self._modules

    def shape(self, module: str) -> tuple[int, int]:
        if "SCB" in self._modules[module]:
            return parts.matrix_shape(self._files, module, "weight")
        return tuple(self._state(module)["shape"])

    def packed(self, module: str) -> AffineWeight | TableWeight:
        if "SCB" not in self._modules[module]:
            return self._table(module)
        values_NK = parts.tensor(self._files, module, "weight", (None, None), (torch.int8,))
        scales_N = parts.tensor(self._files, module, "SCB", (len(values_NK),), (torch.float32,))
        scales_N = parts.is_finite(self._files, f"{module}.SCB", scales_N)
        if "weight_format" in self._modules[module] and parts.tensor(self._files, module, "weight_format").any():
            raise UserError(
                f"{self._files.path}: {module} is in a GPU's own order; llmctl reads rows",
                hint="save it again with bitsandbytes 0.45 or later",
            )
        return of_8_bits(values_NK, scales_N)

    def _table(self, module: str) -> TableWeight:
        state, (n_out, n_in) = self._state(module), self.shape(module)
        bytes_M = parts.tensor(self._files, module, "weight").view(torch.uint8).flatten()
        n_blocks = -(-n_out * n_in // state["blocksize"])
        dtypes = (torch.uint8,) if "nested_blocksize" in state else (torch.float32, torch.float16, torch.bfloat16)
        scales_B = parts.tensor(self._files, module, "weight.absmax", dtypes=dtypes).flatten()
        if len(bytes_M) != -(-n_out * n_in // 2) or len(scales_B) != n_blocks:
            raise UserError(
                f"{self._files.path}: {module} has {len(bytes_M):,} bytes and {len(scales_B):,} scales; "
                f"{[n_out, n_in]} in blocks of {state['blocksize']} needs {-(-n_out * n_in // 2):,} and {n_blocks:,}",
                hint="the checkpoint is truncated",
            )
        if "nested_blocksize" in state:
            sizes = (-(-n_blocks // state["nested_blocksize"]), 256)
            nested, code = (
                parts.tensor(self._files, module, *each).float() for each in zip(_NESTED, ((n,) for n in sizes))
            )
            outer_B = nested.repeat_interleave(state["nested_blocksize"])[:n_blocks]
            scales_B = code[scales_B.int()] * outer_B + state["nested_offset"]
        table_16 = parts.tensor(self._files, module, "weight.quant_map", (16,)).float()
        for ending, values in (("absmax", scales_B), ("quant_map", table_16)):
            parts.is_finite(self._files, f"{module}.weight.{ending}", values)
        scales_B = scales_B.float()
        return TableWeight(bytes_M, table_16, scales_B, state["blocksize"], (n_out, n_in))

    def _state(self, module: str) -> dict:
        ending = next((ending for ending in _STATES if ending in self._modules[module]), _STATES[0])
        try:
            state = json.loads(bytes(parts.tensor(self._files, module, ending).tolist()))
            n_out, n_in = state["shape"]
            sizes = {key: int(state[key]) for key in ("blocksize", "nested_blocksize") if key in state}
            if any(size < 1 for size in sizes.values()):
                raise ValueError(sizes)
            offset = float(state["nested_offset"]) if "nested_blocksize" in state else 0.0
            return {**state, **sizes, "nested_offset": offset, "shape": (int(n_out), int(n_in))}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self._files.path}: {module}.{ending} is no description of 4-bit weights") from error


def of_8_bits(values_NK: torch.Tensor, largest_N: torch.Tensor) -> AffineWeight:
    """A matrix of int8 values and the largest of each row, float32."""
    codes_NK = (values_NK.to(torch.int16) + 128).to(torch.uint8)
    return AffineWeight(codes_NK, largest_N[:, None] / 127, None, 8, values_NK.shape[1])


def stored_8_bits(values_NK: torch.Tensor, largest_N: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors of a module by their endings; int8 and float32."""
    return {"weight": values_NK, "SCB": largest_N, "weight_format": torch.tensor(0, dtype=torch.uint8)}


def stored_4_bits(weight: TableWeight, kind: str, dtype: torch.dtype, double: bool) -> dict[str, torch.Tensor]:
    """The tensors of a module by their endings; `dtype` is what it was before. With `double` the scales are rounded."""
    state = {
        "quant_type": kind,
        "blocksize": weight.block_size,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    found = {"weight": weight.bytes_M[:, None], "weight.quant_map": weight.table_16}
    if double:
        code = dynamic_map()
        offset = weight.scales_B.mean()
        codes_B, largest = _in_blocks(weight.scales_B - offset, code)
        found |= {"weight.absmax": codes_B, "weight.nested_absmax": largest, "weight.nested_quant_map": code}
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset.item()}
    else:
        found["weight.absmax"] = weight.scales_B
    text = json.dumps(state).encode()
    found[f"weight.quant_state.bitsandbytes__{kind}"] = torch.tensor(list(text), dtype=torch.uint8)
    return found


def _in_blocks(values: torch.Tensor, code: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest of `code` (sorted, to 1) to each value over the largest of its block: (uint8, the largest)."""
    padded = torch.nn.functional.pad(values, (0, -len(values) % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    largest = padded.abs().amax(1)
    scaled = (padded / largest.clamp(min=1e-38)[:, None]).flatten()[: len(values)]
    return torch.bucketize(scaled, (code[:-1] + code[1:]) / 2).to(torch.uint8), largest


def dynamic_map() -> torch.Tensor:
    """The 256 values of dynamic 8-bit numbers (arXiv:1511.04561): a sign, a decimal exponent, a linear fraction."""
    values = [torch.tensor([0.0, 1.0])]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        middles = 10.0 ** (exponent - 6) * (edges[:-1] + edges[1:]) / 2
        values += [middles, -middles]
    return torch.cat(values).sort().values


def config(kind: str, double: bool, kept: Sequence[str], dtype: torch.dtype) -> dict:
    """`quantization_config` of "nf4", "fp4" or "llm-int8"."""
    is_8 = kind == "llm-int8"
    return {
        "quant_method": NAME,
        "load_in_4bit": not is_8,
        "load_in_8bit": is_8,
        "_load_in_4bit": not is_8,
        "_load_in_8bit": is_8,
        "bnb_4bit_quant_type": "fp4" if is_8 else kind,
        "bnb_4bit_use_double_quant": double and not is_8,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": list(kept),
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
    }
