"""Gradients of what our kernels compute in training, against torch's in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llmctl.ops import activation, native, norm, rotary
from llmctl.train import loss

pytestmark = pytest.mark.skipif(not native.path().exists(), reason="the native library is not built")


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + len(shape)))


def angles(tokens, dims):
    half = random(tokens, dims // 2)
    return torch.cat([half.cos()] * 2, 1), torch.cat([half.sin()] * 2, 1)


COS, SIN = angles(5, 6)
CASES = {
    **{
        kind: (
            lambda x, up, kind=kind: activation.activate(kind, x, up),
            lambda x, up, kind=kind: activation.reference(kind, x, up),
            (random(5, 7), random(5, 7, seed=1)),
        )
        for kind in activation.KINDS
    },
    "norm": (
        lambda x, w: norm.rms_norm(x, w, 1e-5),
        lambda x, w: F.rms_norm(x, w.shape, w, 1e-5),
        (random(3, 5, 8), random(8)),
    ),
    "norm with an offset": (
        lambda x, w: norm.rms_norm(x, w, 1e-5, 1.0),
        lambda x, w: F.rms_norm(x, w.shape, 1 + w, 1e-5),
        (random(3, 5, 8), random(8)),
    ),
    "rotation": (
        lambda x: rotary.rotate(x, COS, SIN),
        lambda x: rotary.reference(x, COS.double(), SIN.double()),
        (random(2, 3, 5, 8),),
    ),
}


@pytest.mark.parametrize("ours,reference,inputs", CASES.values(), ids=CASES)
@pytest.mark.parametrize("kernels", ["cpu", "reference"])
def test_gradients_equal_torchs(ours, reference, inputs, kernels, monkeypatch):
    monkeypatch.setenv("LLMCTL_KERNELS", kernels)
    found = [x.clone().requires_grad_() for x in inputs]
    expected = [x.double().requires_grad_() for x in inputs]
    y, z = ours(*found), reference(*expected)
    towards = random(*z.shape, seed=5)
    y.backward(towards)
    z.backward(towards.double())
    torch.testing.assert_close(y.double(), z, rtol=1e-5, atol=1e-5)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("rows,columns", [(1, 1), (3, 37), (70, 130)])
def test_gradients_on_every_instruction_set(isa, rows, columns, dtype, tolerance):
    """Of large values, too, and of rows that no vector fits."""
    shapes = [(rows, columns)] * 2, [(rows, columns), (columns,)]
    for (kind, (ours, reference, _)), sizes in zip(
        [*((kind, CASES[kind]) for kind in activation.KINDS), ("norm", CASES["norm with an offset"])],
        [shapes[0]] * len(activation.KINDS) + [shapes[1]],
    ):
        inputs = [(random(*size, seed=i) * 4).to(dtype) for i, size in enumerate(sizes)]
        found = [x.clone().requires_grad_() for x in inputs]
        expected = [x.double().requires_grad_() for x in inputs]
        y, z = ours(*found), reference(*expected)
        towards = random(rows, columns, seed=7).to(dtype)
        y.backward(towards)
        z.backward(towards.double())
        for one, other in zip(found, expected):
            difference = (one.grad.double() - other.grad).norm()
            assert difference <= tolerance * (other.grad.norm() + 1e-3), kind


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_is_frozen_gets_no_gradient(frozen):
    for ours, _, inputs in (CASES["silu"], CASES["norm"]):
        inputs = [x.clone().requires_grad_(i != frozen) for i, x in enumerate(inputs)]
        ours(*inputs).sum().backward()
        assert [x.grad is None for x in inputs] == [i == frozen for i in range(2)]


def test_a_frozen_head_gets_no_gradient():
    hidden, head, targets = random(6, 8), random(20, 8), torch.arange(6)
    frozen, trained = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    loss.cross_entropy(frozen, head, targets).backward()
    learned = head.clone().requires_grad_()
    loss.cross_entropy(trained, learned, targets).backward()
    assert torch.equal(frozen.grad, trained.grad) and learned.grad is not None
