"""Matrices by their scheme: to tensors of a checkpoint, and what config.json says of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch

from llmctl.models.packed import AffineWeight
from llmctl.quantize import rounding
from llmctl.quantize.layouts import bitsandbytes, compressed_tensors
from llmctl.quantize.scheme import Scheme


def rounded(weight_NK: torch.Tensor, scheme: Scheme, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors, by their endings, of a matrix [out, in] (float32) rounded to the nearest; `dtype` is the
    checkpoint's, and that of scales."""
    if scheme.kind == "int":
        return compressed_tensors.stored(rounding.affine(weight_NK, scheme, dtype))
    if scheme.kind == "fp8":
        return compressed_tensors.stored(rounding.in_fp8(weight_NK, dtype))
    if scheme.kind == "llm-int8":
        return bitsandbytes.stored_8_bits(*rounding.in_llm_int8(weight_NK))
    return bitsandbytes.stored_4_bits(rounding.in_table(weight_NK, scheme.kind), scheme.kind, dtype, scheme.double)


def joined(parts: Sequence[AffineWeight]) -> AffineWeight:
    """One matrix of several with the same inputs and scheme, one above the other."""
    if len(parts) == 1:
        return parts[0]
    zeros = None if parts[0].zeros_NJ is None else torch.cat([part.zeros_NJ for part in parts])
    codes, scales = (torch.cat([getattr(part, name) for part in parts]) for name in ("codes_NK", "scales_NJ"))
    return AffineWeight(codes, scales, zeros, parts[0].bits, parts[0].group_size)


def quantization_config(
    schemes: Mapping[str, Scheme], kept: Sequence[str], dtype: torch.dtype, act_order: bool
) -> dict:
    """config.json's `quantization_config` for modules of these schemes; `kept` are the linear modules without one."""
    by_scheme: dict[Scheme, list[str]] = defaultdict(list)
    for module, scheme in schemes.items():
        by_scheme[scheme].append(module)
    first = next(iter(by_scheme))
    if first.kind in ("nf4", "fp4", "llm-int8"):
        return bitsandbytes.config(first.kind, first.double, kept, dtype)
    groups = {}
    for number, (scheme, modules) in enumerate(by_scheme.items()):
        targets = ["Linear"] if len(by_scheme) == 1 else modules
        groups[f"group_{number}"] = _said(scheme, act_order), targets
    return compressed_tensors.config(groups, kept, packed=first.kind == "int")


def _said(scheme: Scheme, act_order: bool) -> dict:
    """A scheme in the words of compressed-tensors."""
    has_groups = scheme.group_size is not None
    said = {
        "num_bits": scheme.bits,
        "type": "float" if scheme.kind == "fp8" else "int",
        "symmetric": scheme.symmetric,
        "strategy": "group" if has_groups else "channel",
        "group_size": scheme.group_size,
    }
    return said | ({"actorder": "weight"} if act_order else {})
