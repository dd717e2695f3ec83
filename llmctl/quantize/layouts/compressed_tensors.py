"""compressed-tensors: what llm-compressor writes and vllm reads (https://github.com/vllm-project/compressed-tensors).

pack-quantized keeps codes of 1 to 8 bits as int32 words along a row (`weight_packed`), with `weight_scale`,
`weight_zero_point` (packed down a column) and `weight_shape`; int-quantized and float-quantized keep one byte to a weight.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch

from llmctl.checkpoint import TensorFiles
from llmctl.errors import UserError
from llmctl.models.packed import AffineWeight, FloatWeight
from llmctl.quantize import bits as words
from llmctl.quantize.layouts import parts
from llmctl.quantize.layouts.act_order import by_groups

NAME = "compressed-tensors"
PACKED, ONE_BYTE = "pack-quantized", ("int-quantized", "naive-quantized", "float-quantized")
_ENDINGS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "weight")
_UNUSED = ("input_scale", "input_zero_point", "output_scale", "output_zero_point")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class CompressedTensors:
    """Reads such files; activations are never quantized here, whatever the config says of them."""

    def __init__(self, said: Mapping, files: TensorFiles):
        self._files, self._groups = files, _groups(said, files)
        for group in self._groups:
            kind = group.get("format") or said.get("format")
            if kind not in (PACKED, "dense", *ONE_BYTE):
                raise UserError(
                    f"{files.path}: compressed-tensors of format {kind!r}; llmctl reads {PACKED}, {', '.join(ONE_BYTE)}",
                    hint="vllm runs the others on a GPU that has them",
                )
        if (said.get("sparsity_config") or {}).get("format", "dense") != "dense":
            raise UserError(f"{files.path}: sparse compressed-tensors; llmctl reads dense ones")
        self._modules = parts.modules_with(files, "weight_scale", (*_ENDINGS, *_UNUSED))

    def modules(self) -> dict[str, list[str]]:
        return self._modules

    def shape(self, module: str) -> tuple[int, int]:
        if "weight_packed" not in self._modules[module]:
            return parts.matrix_shape(self._files, module, "weight")
        n_out, n_in = parts.tensor(self._files, module, "weight_shape", (2,), (torch.int64, torch.int32)).tolist()
        if self._files.shape(f"{module}.weight_packed")[:1] != (n_out,) or n_in < 1:
            raise UserError(f"{self._files.path}: {module}.weight_packed does not have the rows of {[n_out, n_in]}")
        return n_out, n_in

    def packed(self, module: str) -> AffineWeight | FloatWeight:
        args = self._args(module)
        if "weight_packed" not in self._modules[module]:
            return self._of_bytes(module, args)
        n_out, n_in = self.shape(module)
        bits = args["num_bits"]
        shape = (n_out, words.words_for(n_in, bits))
        packed_NW = parts.tensor(self._files, module, "weight_packed", shape, (torch.int32,))
        codes_NK = words.unpack(packed_NW, bits, n_in)
        scales_NJ, size = self._scales(module, args, n_out, n_in)
        zeros_NJ = None
        if not args.get("symmetric", True):
            shape = (words.words_for(n_out, bits), scales_NJ.shape[1])
            packed_WJ = parts.tensor(self._files, module, "weight_zero_point", shape, (torch.int32,))
            zeros_NJ = words.unpack(packed_WJ.mT, bits, n_out).mT.contiguous()
        return self._grouped(module, AffineWeight(codes_NK, scales_NJ, zeros_NJ, bits, size))

    def _of_bytes(self, module: str, args: Mapping) -> AffineWeight | FloatWeight:
        dtypes = (torch.int8, torch.float8_e4m3fn)
        values_NK = parts.tensor(self._files, module, "weight", (None, None), dtypes)
        if values_NK.dtype == torch.float8_e4m3fn:
            return self._of_floats(module, values_NK)
        n_out, n_in = values_NK.shape
        scales_NJ, size = self._scales(module, args, n_out, n_in)
        zeros_NJ = None
        if not args.get("symmetric", True):
            zeros = parts.tensor(self._files, module, "weight_zero_point").to(torch.int16)
            zeros_NJ = (zeros.reshape(-1, scales_NJ.shape[1]).expand_as(scales_NJ) + 128).to(torch.uint8)
        codes_NK = (values_NK.to(torch.int16) + 128).to(torch.uint8)
        return self._grouped(module, AffineWeight(codes_NK, scales_NJ, zeros_NJ, 8, size))

    def _of_floats(self, module: str, values_NK: torch.Tensor) -> FloatWeight:
        scales = parts.tensor(self._files, module, "weight_scale", dtypes=_FLOATS)
        scales = scales.reshape(-1, 1) if scales.dim() < 2 else scales
        sizes = zip(values_NK.shape, scales.shape)
        if scales.dim() != 2 or not all(count and size % count == 0 for size, count in sizes):
            raise UserError(
                f"{self._files.path}: {module}.weight_scale has shape {list(scales.shape)}, which does not divide the "
                f"{list(values_NK.shape)} weights into blocks"
            )
        for ending, values in (("weight", values_NK), ("weight_scale", scales)):
            parts.is_finite(self._files, f"{module}.{ending}", values)
        return FloatWeight(values_NK, scales)

    def _scales(self, module: str, args: Mapping, n_out: int, n_in: int) -> tuple[torch.Tensor, int]:
        """[N, J], and how many weights share one."""
        size = parts.number(self._files, args, "group_size") or -1
        size = size if size > 0 else n_in
        scales = parts.tensor(self._files, module, "weight_scale", dtypes=_FLOATS)
        if scales.numel() == 1:
            scales = scales.reshape(1, 1).expand(n_out, 1)
        if tuple(scales.shape) != (n_out, -(-n_in // size)):
            raise UserError(
                f"{self._files.path}: {module}.weight_scale has shape {list(scales.shape)}; groups of {size} in "
                f"{[n_out, n_in]} need {[n_out, -(-n_in // size)]}"
            )
        return parts.is_finite(self._files, f"{module}.weight_scale", scales), size

    def _grouped(self, module: str, weight: AffineWeight) -> AffineWeight:
        """With the columns of a group side by side, where activation order scattered them."""
        if "weight_g_idx" not in self._modules[module]:
            return weight
        groups_K = parts.tensor(self._files, module, "weight_g_idx", (weight.shape[1],))
        return by_groups(weight, groups_K, f"{self._files.path}: {module}.weight_g_idx")

    def _args(self, module: str) -> Mapping:
        """What the config says of the module's weights: names come before patterns, patterns before classes."""
        fitting = [(how, group) for group in self._groups for how in (_fits(group.get("targets", ()), module),) if how]
        if not fitting:
            raise UserError(f"{self._files.path}: quantization_config says nothing of {module}, which is quantized")
        weights = max(fitting, key=lambda pair: pair[0])[1].get("weights")
        if not isinstance(weights, Mapping) or not 1 <= (parts.number(self._files, weights, "num_bits") or 0) <= 8:
            raise UserError(f"{self._files.path}: quantization_config gives {module} the weights {weights!r}")
        return weights


def _groups(said: Mapping, files: TensorFiles) -> list[Mapping]:
    """The groups of a config. Raises UserError for what is none."""
    groups = said.get("config_groups") or {}
    for group in groups.values() if isinstance(groups, Mapping) else [groups]:
        targets = group.get("targets", []) if isinstance(group, Mapping) else None
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            raise UserError(
                f"{files.path}: quantization_config has the group {group!r}; expected an object with targets"
            )
        for target in (target for target in targets if target.startswith("re:")):
            try:
                re.compile(target[3:])
            except re.error as error:
                raise UserError(f"{files.path}: quantization_config has the target {target!r}: {error}") from error
    return list(groups.values())


def _fits(targets: Sequence[str], module: str) -> int:
    """How closely targets name a module: 3 by name, 2 by pattern, 1 by class, 0 not."""
    best = 0
    for target in targets:
        if target == module or module.endswith(f".{target}"):
            best = 3
        elif target.startswith("re:") and re.match(target[3:], module):
            best = max(best, 2)
        elif target[:1].isupper():  # the name of a class: Linear
            best = max(best, 1)
    return best


def stored(weight: AffineWeight | FloatWeight) -> dict[str, torch.Tensor]:
    """The tensors of a module by their endings."""
    if isinstance(weight, FloatWeight):
        return {"weight": weight.values_NK, "weight_scale": weight.scales}
    found = {
        "weight_packed": words.pack(weight.codes_NK, weight.bits),
        "weight_scale": weight.scales_NJ.contiguous(),
        "weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }
    if weight.zeros_NJ is not None:
        found["weight_zero_point"] = words.pack(weight.zeros_NJ.mT.contiguous(), weight.bits).mT.contiguous()
    return found


def config(groups: Mapping[str, tuple[Mapping, Sequence[str]]], ignored: Sequence[str], packed: bool) -> dict:
    """`quantization_config`: of each group what its weights are and the modules that have them, or Linear for all."""
    kind = PACKED if packed else "float-quantized"
    return {
        "quant_method": NAME,
        "format": kind,
        "quantization_status": "compressed",
        "config_groups": {
            name: {
                "targets": list(targets),
                "weights": {"dynamic": False, **weights},
                "input_activations": None,
                "output_activations": None,
                "format": kind,
            }
            for name, (weights, targets) in groups.items()
        },
        "ignore": list(ignored),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
