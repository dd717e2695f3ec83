"""Which matrices deserve more bits: those whose rounding alone moves the predictions most, for their size."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from llmctl import agreement
from llmctl.errors import CalledWrongly
from llmctl.models.streaming import StreamedModel
from llmctl.quantize import matrices, rounding
from llmctl.quantize.calibration import Rows
from llmctl.quantize.matrices import Matrix
from llmctl.quantize.scheme import Scheme

MOST_ROWS, MOST_TOKENS = 4, 128
WIDE = 8
_TOGETHER = ((r"\.[qkv]_proj$", ".qkv"), (r"\.(gate|up)_proj$", ".gate_up"))
"""Matrices that vllm joins into one, and so must agree in their bits."""


def widen(
    path: Path, chosen: list[Matrix], schemes: Mapping[str, Scheme], target: float, rows: Rows, progress
) -> dict[str, Scheme]:
    """The schemes with 8 bits for the most sensitive matrices, as many as the mean of stored bits lets be `target`.

    Raises CalledWrongly where it is above the target already.
    """
    schemes = dict(schemes)
    if (least := matrices.mean_bits(chosen, schemes)) > target:
        raise CalledWrongly(
            f"--target-bits {target:g}: with scales and zero points the matrices take {least:.3g} bits already",
            hint="raise it, or --group-size",
        )
    units = _units(chosen, schemes)
    costs = _divergences(path, units, schemes, rows, progress)
    size = {name: sum(matrix.size for matrix in unit) for name, unit in units.items()}
    for name in sorted(units, key=lambda name: costs[name] / size[name], reverse=True):
        wider = {matrix.theirs: matrices.of_bits(schemes[matrix.theirs], WIDE) for matrix in units[name]}
        if matrices.mean_bits(chosen, {**schemes, **wider}) <= target:
            schemes |= wider
    return schemes


def _units(chosen: list[Matrix], schemes: Mapping[str, Scheme]) -> dict[str, list[Matrix]]:
    """What changes its bits together, of those that are not wide by the user's own word."""
    units: dict[str, list[Matrix]] = {}
    for matrix in chosen:
        if schemes[matrix.theirs].bits < WIDE:
            name = matrix.ours[0]
            for pattern, joined in _TOGETHER:
                name = re.sub(pattern, joined, name)
            units.setdefault(name, []).append(matrix)
    return units


def _divergences(path: Path, units, schemes: Mapping[str, Scheme], rows: Rows, progress) -> dict[str, float]:
    """KL divergence, in nats, from the model to itself with one unit rounded."""
    source = rows.held_out_BT if rows.calibration_BT is None else rows.calibration_BT
    ids_BT = source[:MOST_ROWS, :MOST_TOKENS]
    plain = StreamedModel(path).logits(ids_BT)
    found = {}
    for number, (name, unit) in enumerate(units.items()):
        progress("sensitivity of", number, len(units))
        by_name = {f"{matrix.theirs}.weight": matrix for matrix in unit}

        def rounded(tensor_name: str, tensor: torch.Tensor, by_name=by_name) -> torch.Tensor:
            if tensor_name not in by_name:
                return tensor
            matrix = by_name[tensor_name]
            scheme, dtype = schemes[matrix.theirs], tensor.dtype
            weight = rounding.affine(matrix.upright(tensor), scheme, dtype).dequantized(torch.float32)
            return weight.mT if matrix.transposed else weight

        changed = StreamedModel(path, replaced=rounded).logits(ids_BT)
        found[name] = agreement.measure(lambda _: plain, lambda _, changed=changed: changed, ids_BT).kl_divergence
    return found
