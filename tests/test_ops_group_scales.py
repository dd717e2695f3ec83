"""The search for scales of groups: as good as torch's by the error that is asked for, in every format."""

from __future__ import annotations

import pytest
import torch

from llmctl.ops.group_scales import group_scales, in_groups, reference

SHRINKS = (1.06, 1.0, -1.0, 0.9, -0.9, 0.8, 0.7, 0.55)


def errors(weight_NK, scales_NJ, zeros_NJ, size, bits, importance_K):
    groups, zeros = in_groups(weight_NK.double(), size), zeros_NJ.double()[..., None]
    scales = scales_NJ.double()[..., None]
    codes = ((groups / scales).round() + zeros).clamp(0, (1 << bits) - 1)
    weights = 1.0 if importance_K is None else in_groups(importance_K[None].double(), size)
    return (((codes - zeros) * scales - groups).square() * weights).sum(-1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    "bits,size,shape", [(4, 32, (7, 96)), (3, 64, (5, 100)), (8, 130, (9, 130)), (4, 1000, (3, 70))]
)
@pytest.mark.parametrize("weighed", [False, True])
def test_nothing_tried_is_better(dtype, symmetric, bits, size, shape, weighed):
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(shape, generator=generator) * torch.logspace(-6, 1, shape[0])[:, None]
    importance = torch.rand(shape[1], generator=generator) if weighed else None
    shrinks = SHRINKS if symmetric else tuple(s for s in SHRINKS if s > 0)
    how = (weight, size, bits, symmetric)
    scales, zeros = group_scales(*how, shrinks, importance, dtype)
    assert torch.equal(scales.to(dtype).float(), scales) and torch.equal(zeros.round(), zeros)
    found = errors(weight, scales, zeros, size, bits, importance)
    for shrink in shrinks:
        tried = reference(*how, (shrink,), importance, dtype)
        least = errors(weight, *tried, size, bits, importance)
        assert (found <= least * (1 + 1e-4) + 1e-30).all()
    same = group_scales(*how, (1.0,), importance, dtype)
    for ours, theirs in zip(same, reference(*how, (1.0,), importance, dtype)):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_of_nothing_and_of_no_numbers(symmetric):
    weight = torch.zeros(3, 64)
    weight[1, 5], weight[2, 40] = float("nan"), 1e-40
    for dtype in (torch.bfloat16, torch.float16):
        for ours, theirs in zip(
            group_scales(weight, 32, 4, symmetric, SHRINKS, None, dtype),
            reference(weight, 32, 4, symmetric, SHRINKS, None, dtype),
        ):
            assert torch.equal(ours[[0, 2]], theirs[[0, 2]]) and ours.isfinite().all()
    assert group_scales(torch.zeros(0, 64), 32, 4, symmetric, SHRINKS)[0].shape == (0, 2)


def test_rows_that_lie_apart_and_those_that_do_not():
    weight = torch.randn(6, 256, generator=torch.Generator().manual_seed(0))
    for view in (weight[::2, 64:192], weight[:, ::2], weight.mT):
        found = group_scales(view, 32, 4, True, SHRINKS)
        for ours, theirs in zip(found, group_scales(view.contiguous(), 32, 4, True, SHRINKS)):
            assert torch.allclose(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_of_another_dtype_are_not_taken_for_float32(dtype):
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    for ours, theirs in zip(group_scales(weight, 32, 4, True, (1.0,)), reference(weight, 32, 4, True, (1.0,))):
        assert torch.equal(ours, theirs)
