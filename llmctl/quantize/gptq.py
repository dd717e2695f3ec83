"""GPTQ (arXiv:2210.17323): columns are rounded one after another, and those to come make up for the error so far.

What a matrix's outputs should be is taken from the model as it was, so that each makes up for what the rounding before it
did to its inputs (GPTAQ, arXiv:2504.02692; QEP, arXiv:2504.09629).
"""

from __future__ import annotations

import torch

from llmctl.errors import UserError
from llmctl.models.packed import AffineWeight
from llmctl.quantize import rounding, storage
from llmctl.quantize.hessian import Hessians
from llmctl.quantize.layerwise import Layer, Layerwise
from llmctl.quantize.layouts import compressed_tensors
from llmctl.quantize.method import Method
from llmctl.quantize.scheme import Scheme
from llmctl.quantize.spool import Spool

LEAF = 16
"""Columns that are changed one by one; the errors of more go by a product of matrices."""
ATTEMPTS = 4
REFITS, RIDGE = 1, 0.01
"""How often scales are fitted and codes chosen again, and how much of a scale's own square holds it back."""
MOST_FITTED = 1 << 24
"""Entries of the equations that are solved at a time."""


def solve(
    weight_NK: torch.Tensor,
    hessian_KK: torch.Tensor,
    scheme: Scheme,
    dtype: torch.dtype,
    act_order: bool = True,
    damping: float = 0.01,
    refits: int = REFITS,
    drift_KK: torch.Tensor | None = None,
) -> AffineWeight:
    """Codes of a matrix (float32) whose inputs have the second moments `hessian_KK` (float32, any factor).

    With `drift_KK` (see Hessians; the same factor) the outputs to come near are those of the inputs as they once were.
    Groups keep their own columns and have their scales (of `dtype`) from the start, so that with `act_order`, columns of
    large inputs first, the result looks no different. Then the scales are fitted to the codes, and so on. Raises UserError
    where the moments cannot be inverted.
    """
    n_in, size, top = weight_NK.shape[1], scheme.size(weight_NK.shape[1]), (1 << scheme.bits) - 1
    order = hessian_KK.diagonal().argsort(descending=True) if act_order else torch.arange(n_in)
    back = order.argsort()
    upper_KK = _inverse_root(hessian_KK[order][:, order], damping)
    if drift_KK is not None:
        missing_NK = (weight_NK @ drift_KK)[:, order]
        weight_NK = weight_NK + ((missing_NK @ upper_KK.mT) @ upper_KK)[:, back]
    # what an error of each column costs after the others have made up for it (the paper's equation 2)
    costs_K = upper_KK.diagonal()[back] ** -2
    scales_NJ, zeros_NJ = rounding.scales_and_zeros(weight_NK, scheme, dtype, costs_K)
    middle_NJ = torch.full_like(scales_NJ, 1 << (scheme.bits - 1)) if zeros_NJ is None else zeros_NJ
    groups, ordered_KN = (order // size).tolist(), weight_NK.mT[order]
    for _ in range(refits + 1):
        rounds = _Rounds(
            ordered_KN.clone(), upper_KK, scales_NJ.mT.contiguous(), middle_NJ.mT.contiguous(), groups, top
        )
        rounds.run(0, n_in)
        codes_NK = rounds.codes_KN[back].mT.contiguous()
        if refits:
            scales_NJ = _fitted(weight_NK, hessian_KK, codes_NK, scales_NJ, middle_NJ, size, dtype)
    zeros_NJ = None if zeros_NJ is None else zeros_NJ.to(torch.uint8)
    return AffineWeight(codes_NK, scales_NJ.to(dtype), zeros_NJ, scheme.bits, size)


def _fitted(weight_NK, hessian_KK, codes_NK, scales_NJ, zeros_NJ, size: int, dtype: torch.dtype) -> torch.Tensor:
    """The scales that, with these codes, change the outputs least: least squares of each row in the metric of the moments."""
    rows = max(1, MOST_FITTED // scales_NJ.shape[1] ** 2)
    parts = zip(*(values.split(rows) for values in (weight_NK, codes_NK, scales_NJ, zeros_NJ)))
    return rounding.held(torch.cat([_fitted_rows(*part, hessian_KK, size) for part in parts]), dtype)


def _fitted_rows(weight_NK, codes_NK, scales_NJ, zeros_NJ, hessian_KK, size: int) -> torch.Tensor:
    grid_NJG = rounding.in_groups(codes_NK.float(), size) - zeros_NJ[..., None]
    if (filled := grid_NJG.shape[1] * size - weight_NK.shape[1]) > 0:
        grid_NJG[:, -1, -filled:] = 0.0
    left_NK = weight_NK - (grid_NJG * scales_NJ[..., None]).flatten(1)[:, : weight_NK.shape[1]]
    target_NJ = (rounding.in_groups(left_NK @ hessian_KK, size) * grid_NJG).sum(-1)
    n_groups = grid_NJG.shape[1]
    products_NJJ = torch.empty(len(weight_NK), n_groups, n_groups)
    for group in range(n_groups):
        columns = slice(group * size, min((group + 1) * size, weight_NK.shape[1]))
        moved_NK = grid_NJG[:, group, : columns.stop - columns.start] @ hessian_KK[columns]
        products_NJJ[:, group] = (rounding.in_groups(moved_NK, size) * grid_NJG).sum(-1)
    diagonal_NJ = products_NJJ.diagonal(dim1=1, dim2=2)
    diagonal_NJ += RIDGE * diagonal_NJ + diagonal_NJ.mean().clamp(min=1e-30) * 1e-6
    return scales_NJ + torch.linalg.solve(products_NJJ, target_NJ)


def _inverse_root(hessian_KK: torch.Tensor, damping: float) -> torch.Tensor:
    """Upper triangular U with U^T U = (H + damping mean(diag H))^-1; inputs that are always 0 stand alone. Uses H up."""
    diagonal = hessian_KK.diagonal()
    diagonal[diagonal == 0] = 1.0
    mean = diagonal.mean()
    for _ in range(ATTEMPTS):
        diagonal += damping * mean
        lower, failed = torch.linalg.cholesky_ex(hessian_KK)
        if not failed:
            inverse_KK = torch.cholesky_inverse(lower)
            del lower
            upper, failed = torch.linalg.cholesky_ex(inverse_KK, upper=True)
            if not failed:
                return upper
        damping *= 10
    raise UserError(
        "the inputs of a matrix are too much alike for gptq on this calibration text",
        hint="give more text, or a larger --damping",
    )


class _Rounds:
    """Columns of the matrix, here rows, rounded in their order; a half's errors reach the other half in one product."""

    def __init__(self, weight_KN, upper_KK, scales_JN, zeros_JN, groups: list[int], top: int):
        """`weight_KN` is used up."""
        self._weight_KN, self._upper_KK = weight_KN, upper_KK
        self._scales_JN, self._zeros_JN, self._groups, self._top = scales_JN, zeros_JN, groups, top
        self._pivots = upper_KK.diagonal().tolist()
        self._errors_KN = torch.empty_like(weight_KN)
        self.codes_KN = torch.empty_like(weight_KN, dtype=torch.uint8)

    def run(self, first: int, last: int) -> None:
        if last - first > LEAF:
            middle = (first + last) // 2
            self.run(first, middle)
            self._weight_KN[middle:last].addmm_(
                self._upper_KK[first:middle, middle:last].mT, self._errors_KN[first:middle], alpha=-1
            )
            self.run(middle, last)
            return
        for column in range(first, last):
            scale_N, zero_N = (values[self._groups[column]] for values in (self._scales_JN, self._zeros_JN))
            w_N, error_N = self._weight_KN[column], self._errors_KN[column]
            code_N = (w_N / scale_N).round_().add_(zero_N).clamp_(0, self._top)
            self.codes_KN[column] = code_N
            torch.sub(w_N, code_N.sub_(zero_N).mul_(scale_N), out=error_N)
            error_N.div_(self._pivots[column])
            self._weight_KN[column + 1 : last].addr_(self._upper_KK[column, column + 1 : last], error_N, alpha=-1)


class Gptq(Method):
    """The method over a whole checkpoint, layer by layer."""

    def __init__(self, *job):
        super().__init__(*job)
        self._done: dict[str, AffineWeight] = {}

    def run(self, ids_BT: torch.Tensor, spool: Spool, progress) -> dict[str, torch.Tensor]:
        """Spool every matrix. No other tensor changes."""
        compute = torch.bfloat16 if self._dtype == torch.bfloat16 else torch.float32
        layerwise = Layerwise(self._path, ids_BT, compute, beside=True)
        for number, _ in enumerate(layerwise.run(self._visit)):
            progress("gptq, layer", number + 1, layerwise.n_layers)
            self._put_aside(spool)
        self._outside_layers(layerwise, spool)
        return {}

    def _visit(self, layer: Layer) -> None:
        linears = layer.linears()
        seen = set()
        for stage in layer.stages():
            wanted = [[name for name in group if name in self._scheme_of] for group in stage]
            wanted = [group for group in wanted if group]
            if not wanted:
                continue
            hessians = Hessians.of(layer, [group[0] for group in wanted])
            for group in wanted:
                for name in group:
                    self._solve(name, linears[name], hessians[group[0]], hessians.drifts.get(group[0]))
                    seen.add(name)
        for name, linear in linears.items():  # experts that no token chose
            if name in self._scheme_of and name not in seen:
                self._solve(name, linear, torch.eye(linear.in_features))

    def _solve(self, name: str, linear, hessian_KK: torch.Tensor, drift_KK: torch.Tensor | None = None) -> None:
        settings, dtype = self._settings, self._dtype
        weight = linear.weight.detach().float().clone()
        how = {"act_order": settings.act_order, "damping": settings.damping, "drift_KK": drift_KK}
        found = solve(weight, hessian_KK, self._scheme_of[name], dtype, **how)
        linear.weight.data = found.dequantized(linear.weight.dtype)
        self._done[name] = found

    def _put_aside(self, spool: Spool) -> None:
        """Matrices of the file all of whose parts are there."""
        for matrix in self._matrices:
            if all(ours in self._done for ours in matrix.ours):
                parts = [self._done.pop(ours) for ours in matrix.ours]
                spool.add(matrix.theirs, compressed_tensors.stored(storage.joined(parts)))

    def _outside_layers(self, layerwise: Layerwise, spool: Spool) -> None:
        """A head that is not kept: rounded to the nearest."""
        for matrix in self._matrices:
            if not any("layers." in ours for ours in matrix.ours):
                weight = torch.cat([layerwise.streamed.read(f"{ours}.weight").float() for ours in matrix.ours])
                spool.add(matrix.theirs, storage.rounded(weight, self._schemes[matrix.theirs], self._dtype))
