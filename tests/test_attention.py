"""Blocked causal attention, forward and backward, against torch's attention with a mask, in float64 where it matters."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llmctl.ops import blocked_attention, native, training_attention
from llmctl.ops.attention import attention
from llmctl.ops.visibility import Visibility

pytestmark = pytest.mark.skipif(not native.path().exists(), reason="the native library is not built")

# batch, query heads, kv heads, length, head size
SHAPES = [(1, 1, 1, 1, 8), (2, 4, 2, 7, 16), (3, 6, 1, 33, 20), (2, 4, 4, 300, 32), (1, 2, 1, 513, 64)]
TILED_SHAPES = [
    (1, 1, 1, 1, 32),
    (2, 6, 2, 150, 64),
    (1, 4, 4, 64, 128),
    (2, 3, 1, 65, 96),
    (1, 2, 2, 200, 256),
    *SHAPES[3:],
]


def sample(shape, dtype):
    batch, heads, kv_heads, length, size = shape
    generator = torch.Generator().manual_seed(length)
    sizes = [(batch, heads, length, size), (batch, kv_heads, length, size), (batch, kv_heads, length, size)]
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in sizes]


def random_starts(batch, length):
    """Documents of random lengths in each row."""
    generator = torch.Generator().manual_seed(length + 1)
    is_first = torch.rand(batch, length, generator=generator) < 0.1
    is_first[:, 0] = True
    return torch.where(is_first, torch.arange(length), 0).cummax(1).values


def mask_of(starts):
    """bool [B, T, S = T]: a query sees the keys from its document's first on, up to itself."""
    keys = torch.arange(starts.shape[1])
    return (keys >= starts[:, :, None]) & (keys <= keys[:, None])


def expected(q, k, v, starts):
    """Output and gradients of torch's math attention in float64, for the gradient of sum(out * weights)."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_of(starts)[:, None], enable_gqa=True)
    (out * weights(out)).sum().backward()
    return out, q.grad, k.grad, v.grad


def weights(out):
    return torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)


def check_equals_torch(shape, dtype, tolerance, packed):
    q, k, v = sample(shape, dtype)
    starts = random_starts(shape[0], shape[3]) if packed else torch.zeros(shape[0], shape[3], dtype=torch.int64)
    out = blocked_attention.causal_attention(q, k, v, starts if packed else None)
    (out * weights(out)).sum().backward()
    for ours, theirs in zip((out, q.grad, k.grad, v.grad), expected(q, k, v, starts)):
        assert (ours.double() - theirs).norm() <= tolerance * (theirs.norm() + 0.1)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("packed", [False, True])
def test_equals_torch(monkeypatch, shape, dtype, tolerance, packed):
    monkeypatch.setattr(blocked_attention, "SCORES_PER_BLOCK", 5000)  # so that heads are cut into several blocks
    monkeypatch.setattr(training_attention, "applies", lambda _: False)
    check_equals_torch(shape, dtype, tolerance, packed)


@pytest.mark.parametrize("shape", TILED_SHAPES)
@pytest.mark.parametrize("packed", [False, True])
def test_tiles_equal_torch(shape, packed):
    if not training_attention.applies(torch.empty(1, 1, 1, shape[4], dtype=torch.bfloat16)):
        pytest.skip("the processor has no tile registers")
    check_equals_torch(shape, torch.bfloat16, 1e-2, packed)


def test_attention_chooses_the_kernel_for_packed_rows_and_the_mask_without_it(monkeypatch):
    q, k, v = sample((2, 4, 2, 50, 16), torch.float32)
    starts = random_starts(2, 50)
    native_out = attention(q, k, v, Visibility(True, first_BT=starts))
    monkeypatch.setenv("LLMCTL_KERNELS", "reference")
    assert not blocked_attention.applies(q, True)
    masked_out = attention(q, k, v, Visibility(True, first_BT=starts))
    torch.testing.assert_close(native_out, masked_out, rtol=1e-4, atol=1e-5)


def test_the_operators_keep_torchs_contract():
    q, k, v = sample((1, 2, 1, 9, 8), torch.float32)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.llmctl.blocked_attention, (q, k, v, None), test_utils=checks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_softmax_of_extreme_scores(dtype):
    """Scores far apart, and one key only: probabilities stay in [0, 1] and sum to 1."""
    q = torch.full((1, 1, 40, 16), 30.0, dtype=dtype)
    k = torch.randn(1, 1, 40, 16, generator=torch.Generator().manual_seed(0)).to(dtype) * 30
    out = blocked_attention.causal_attention(q, k, torch.ones_like(k), None)
    torch.testing.assert_close(out, torch.ones_like(out), rtol=1e-2, atol=1e-2)
