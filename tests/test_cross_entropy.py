"""Cross-entropy: the native kernel and the chunked loss against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llmctl.ops import cross_entropy as ops
from llmctl.ops import native
from llmctl.train import loss

needs_native = pytest.mark.skipif(not native.path().exists(), reason="the native library is not built")


def sample(n, vocabulary, dtype, scale=5.0):
    generator = torch.Generator().manual_seed(n * vocabulary)
    logits = (torch.randn(n, vocabulary, generator=generator) * scale).to(dtype)
    targets = torch.randint(0, vocabulary, (n,), generator=generator)
    targets[::5] = -100
    return logits, targets


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n,vocabulary", [(1, 1), (3, 2), (7, 33), (64, 1000), (20, 50257)])
@pytest.mark.parametrize("scale", [0.0, 3.0, 300.0])
def test_kernel_equals_its_reference(n, vocabulary, dtype, scale):
    logits, targets = sample(n, vocabulary, dtype, scale)
    expected_grad = logits.clone()
    expected = ops.reference_(expected_grad, targets, 1e-3)
    losses = ops.cross_entropy_(logits, targets, 1e-3)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-3
    torch.testing.assert_close(logits.float(), expected_grad.float(), rtol=tolerance, atol=tolerance)


@needs_native
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_kernel_reports_what_is_not_finite(bad):
    logits, targets = sample(2, 50, torch.float32)
    logits[1, 3], targets[1] = bad, 7
    losses = ops.cross_entropy_(logits, targets)
    assert losses[0].isfinite() and not losses[1].isfinite()


@needs_native
def test_kernel_refuses_a_target_beyond_the_vocabulary():
    logits, _ = sample(1, 5, torch.float32)
    with pytest.raises(RuntimeError, match="vocabulary"):
        ops.cross_entropy_(logits, torch.tensor([5]))


@pytest.mark.parametrize("chunk", [1 << 28, 700])
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_loss_and_gradients_equal_torch(monkeypatch, chunk, kernels):
    monkeypatch.setenv("LLMCTL_KERNELS", kernels)
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", chunk)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 16, generator=generator, requires_grad=True)
    head = torch.randn(97, 16, generator=generator, requires_grad=True)
    _, targets = sample(40, 97, torch.float32)
    ours = loss.cross_entropy(hidden, head, targets, z_loss=1e-2)
    (ours * 0.5).backward()
    grads = hidden.grad.clone(), head.grad.clone()
    hidden.grad = head.grad = None
    logits = hidden @ head.T
    z_term = 1e-2 * (torch.logsumexp(logits, -1).square() * (targets >= 0)).sum()
    theirs = F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum") + z_term
    (theirs * 0.5).backward()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(grads[0], hidden.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grads[1], head.grad, rtol=1e-4, atol=1e-5)


def test_token_losses_equal_torch():
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(40, 16, generator=generator), torch.randn(97, 16, generator=generator)
    _, targets = sample(40, 97, torch.float32)
    expected = F.cross_entropy(hidden @ head.T, targets, ignore_index=-100, reduction="none")
    torch.testing.assert_close(loss.token_losses(hidden, head, targets), expected)
