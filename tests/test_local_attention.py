"""Attention within a window against the same with a whole mask."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llmctl.ops.local_attention import GlobalTokens, local_attention, local_mask


def heads(batch: int, length: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    return tuple(torch.randn(batch, 3, length, 8, requires_grad=True) for _ in range(3))


def limits(batch: int, length: int) -> dict[str, torch.Tensor]:
    """Two documents in the first row, padding on both sides of the second."""
    first, end = torch.zeros(batch, length, dtype=torch.long), torch.full((batch, length), length)
    first[0, length // 3 :] = end[0, : length // 3] = length // 3
    first[1], end[1] = 2, length - 1
    return {"first_BT": first, "end_BT": end}


@pytest.mark.parametrize("with_global", [False, True])
@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("radius, length", [(1, 9), (4, 16), (5, 23), (50, 12), (3, 1 + 3)])
def test_equals_attention_with_a_whole_mask(radius, length, limited, with_global):
    q, k, v = heads(2, length)
    seen = limits(2, length) if limited else {}
    chosen = None
    if with_global:
        is_global = torch.zeros(2, length, dtype=torch.bool)
        is_global[0, 0] = is_global[1, 2] = is_global[1, length // 2] = True
        chosen = GlobalTokens(is_global)
    ours = local_attention(q, k, v, radius, **seen, global_tokens=chosen)
    mask = local_mask(radius, 2, length, q.device, **seen, global_tokens=chosen)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.unsqueeze(1))
    # queries of global tokens have projections of their own, so what they get here is replaced
    compared = ~chosen.is_global_BT if with_global else torch.ones(2, length, dtype=torch.bool)
    difference = (ours - expected).transpose(1, 2)[compared]
    assert difference.abs().max() < 1e-5
    for mine, theirs in zip(
        torch.autograd.grad(ours.transpose(1, 2)[compared].square().sum(), (q, k, v)),
        torch.autograd.grad(expected.transpose(1, 2)[compared].square().sum(), (q, k, v)),
    ):
        assert (mine - theirs).abs().max() < 1e-4


def test_nothing_grows_with_the_square_of_the_length():
    """The largest tensor that the operation makes, at two lengths."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.elements = max(self.elements, result.numel())
            return result

    def largest(length):
        chosen = GlobalTokens(torch.arange(length)[None] == 0)
        with Largest() as seen:
            local_attention(*heads(1, length), 16, global_tokens=chosen)
        return seen.elements

    assert largest(2048) < 2.5 * largest(1024)
