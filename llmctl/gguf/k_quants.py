"""llama.cpp's formats of 4 and 6 bits with scales of scales ("K-quants"), written; the `gguf` library reads them only.

256 values of a row make a block. Q4_K: 8 groups of 32, value = d * scale * code - dmin * minimum, codes of 4 and scales and
minima of 6 bits. Q6_K: 16 groups of 16, value = d * scale * (code - 32), codes of 6 and scales of 8 bits. Scales are found by
trying several for each group and keeping the one of the least squared error, weighted by the values' sizes.
"""

from __future__ import annotations

import numpy as np
import torch

BLOCK = 256
ROWS_AT_ONCE = 1 << 13
"""Blocks that are worked on together: about 100 MB of intermediate results."""


def quantize_q4_k(values: np.ndarray) -> np.ndarray:
    """uint8 [rows, blocks * 144] of float32 [rows, columns], columns a multiple of 256."""
    return _by_blocks(values, _q4_k)


def quantize_q6_k(values: np.ndarray) -> np.ndarray:
    """uint8 [rows, blocks * 210] of float32 [rows, columns], columns a multiple of 256."""
    return _by_blocks(values, _q6_k)


def _by_blocks(values: np.ndarray, quantize) -> np.ndarray:
    blocks = torch.from_numpy(np.ascontiguousarray(values, np.float32)).reshape(-1, BLOCK)
    made = np.concatenate([quantize(part) for part in blocks.split(ROWS_AT_ONCE)])
    return made.reshape(*values.shape[:-1], -1)


def _q4_k(x_NB: torch.Tensor) -> np.ndarray:
    x_NGE = x_NB.view(-1, 8, 32)
    weight_NGE = x_NGE.abs() + x_NGE.square().mean(-1, keepdim=True).sqrt()
    scale_NG, minimum_NG = _scale_and_minimum(x_NGE, weight_NGE, 15)
    d_N1, dmin_N1 = (_half(part.amax(1, keepdim=True) / 63) for part in (scale_NG, minimum_NG))
    scales_NG, minima_NG = (_codes(part, d, 63) for part, d in ((scale_NG, d_N1), (minimum_NG, dmin_N1)))
    step_NG1, below_NG1 = (d_N1 * scales_NG)[..., None], (dmin_N1 * minima_NG)[..., None]
    codes_NGE = torch.where(step_NG1 > 0, (x_NGE + below_NG1) / step_NG1, 0.0).round().clamp(0, 15).to(torch.uint8)
    pairs_N4 = codes_NGE.view(-1, 4, 2, 32)
    packed_NB = (pairs_N4[:, :, 0] | pairs_N4[:, :, 1] << 4).reshape(-1, 128)
    sizes = [_bytes_of_half(d_N1), _bytes_of_half(dmin_N1), _packed_scales(scales_NG, minima_NG), packed_NB.numpy()]
    return np.concatenate(sizes, axis=1)


def _packed_scales(scales_NG: torch.Tensor, minima_NG: torch.Tensor) -> np.ndarray:
    """12 bytes: the first four of each with two high bits of the last four, and the low bits of those."""
    s, m = scales_NG.to(torch.uint8), minima_NG.to(torch.uint8)
    low = s[:, :4] | (s[:, 4:] >> 4) << 6, m[:, :4] | (m[:, 4:] >> 4) << 6
    return torch.cat([*low, (s[:, 4:] & 15) | (m[:, 4:] & 15) << 4], 1).numpy()


def _scale_and_minimum(x_NGE: torch.Tensor, weight_NGE: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, minimum >= 0) of each group for x = scale * code - minimum, codes from 0 to `top`."""
    lowest_NG1 = x_NGE.amin(-1, keepdim=True).clamp(max=0)
    span_NG1 = (x_NGE.amax(-1, keepdim=True) - lowest_NG1).clamp(min=1e-30)
    best = best_error = None
    for shrunk in torch.linspace(-1.0, 0.9, 20).tolist():
        codes_NGE = ((x_NGE - lowest_NG1) * ((top + shrunk) / span_NG1)).round().clamp(0, top)
        found = _fitted(x_NGE, weight_NGE, codes_NGE)
        error_NG = (weight_NGE * (found[0][..., None] * codes_NGE - found[1][..., None] - x_NGE).square()).sum(-1)
        if best is None:
            best, best_error = found, error_NG
            continue
        better = error_NG < best_error
        best = tuple(torch.where(better, new, old) for new, old in zip(found, best))
        best_error = torch.where(better, error_NG, best_error)
    return best


def _fitted(x, weight, codes) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted least squares of scale and minimum for given codes; without a minimum where it would be negative."""
    sums = [(weight * part).sum(-1) for part in (torch.ones_like(x), codes, codes * codes, x, codes * x)]
    w, c, cc, s, cs = sums
    determinant = w * cc - c * c
    scale = torch.where(determinant > 0, (w * cs - c * s) / determinant, 0.0)
    minimum = torch.where(determinant > 0, (c * cs - cc * s) / determinant, 0.0)
    alone = torch.where(cc > 0, cs / cc, 0.0)
    scale = torch.where((minimum < 0) | (determinant <= 0), alone, scale)
    return scale.clamp(min=0), minimum.clamp(min=0)


def _q6_k(x_NB: torch.Tensor) -> np.ndarray:
    x_NGE = x_NB.view(-1, 16, 16)
    scale_NG = _scale(x_NGE, 32)
    extreme_N1 = scale_NG.gather(1, scale_NG.abs().argmax(1, keepdim=True))
    d_N1 = _half(extreme_N1 / -128)
    scales_NG = torch.where(d_N1 != 0, scale_NG / d_N1, 0.0).round().clamp(-128, 127)
    step_NG1 = (d_N1 * scales_NG)[..., None]
    codes_NGE = torch.where(step_NG1 != 0, x_NGE / step_NG1, 0.0).round().clamp(-32, 31) + 32
    codes = codes_NGE.to(torch.uint8).view(-1, 2, 4, 32)
    low = torch.cat([codes[:, :, :2] & 15 | (codes[:, :, 2:] & 15) << 4], 1).reshape(-1, 128)
    high = codes >> 4
    high = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    sizes = scales_NG.to(torch.int8).numpy().view(np.uint8)
    return np.concatenate([low.numpy(), high.reshape(-1, 64).numpy(), sizes, _bytes_of_half(d_N1)], axis=1)


def _scale(x_NGE: torch.Tensor, top: int) -> torch.Tensor:
    """The scale of each group for x = scale * code, codes from -top to top - 1; the largest value is -top of it, or near."""
    extreme_NG1 = x_NGE.gather(-1, x_NGE.abs().argmax(-1, keepdim=True))
    safe_NG1 = torch.where(extreme_NG1 == 0, 1.0, extreme_NG1)
    weight_NGE = x_NGE.square()
    best_scale = torch.zeros_like(extreme_NG1).squeeze(-1)
    best_gain = torch.full_like(best_scale, -1.0)
    for shift in torch.arange(-9, 10).tolist():
        codes_NGE = (x_NGE * (-(top + 0.1 * shift) / safe_NG1)).round().clamp(-top, top - 1)
        cross, square = (weight_NGE * codes_NGE * x_NGE).sum(-1), (weight_NGE * codes_NGE.square()).sum(-1)
        gain = torch.where(square > 0, cross * cross / square, 0.0)
        better = gain > best_gain
        best_scale = torch.where(better, torch.where(square > 0, cross / square, 0.0), best_scale)
        best_gain = torch.where(better, gain, best_gain)
    return best_scale


def _codes(values: torch.Tensor, step: torch.Tensor, top: int) -> torch.Tensor:
    return torch.where(step > 0, values / step, 0.0).round().clamp(0, top)


def _half(values: torch.Tensor) -> torch.Tensor:
    """As float16 holds them, so that codes are chosen for the scale that a reader sees."""
    return values.half().float()


def _bytes_of_half(values_N1: torch.Tensor) -> np.ndarray:
    return values_N1.half().numpy().view(np.uint8)
