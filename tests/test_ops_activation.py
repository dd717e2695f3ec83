"""Activations of inference against torch's in float64."""

from __future__ import annotations

import pytest
import torch

from llmctl.ops import native
from llmctl.ops.activation import KINDS, activate, reference

pytestmark = pytest.mark.skipif(not native.path().exists(), reason="the native library is not built")


@pytest.fixture(autouse=True)
def kernels_whatever_the_isa(monkeypatch):
    monkeypatch.setenv("LLMCTL_KERNELS", "cpu")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_torch_in_float64(isa, kind, dtype):
    x = torch.cat([torch.linspace(-100, 100, 20011), torch.linspace(-1e-3, 1e-3, 101), torch.tensor([0.0, -0.0])])
    x = x.to(dtype)
    up = torch.linspace(-3, 3, len(x)).to(dtype)
    for other in (None, up):
        expected = reference(kind, x.double(), None if other is None else other.double())
        result = activate(kind, x, other)
        assert result.dtype == dtype
        tolerance = 1e-6 if dtype == torch.float32 else 2.0**-8
        assert ((result.double() - expected).abs() <= tolerance * (expected.abs() + x.double().abs() + 1e-30)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_an_element_does_not_know_its_place(isa, kind):
    x = torch.randn(40_001, generator=torch.Generator().manual_seed(0)) * 3
    whole = activate(kind, x)
    for first, last in [(0, 1), (1, 18), (3, 40_000), (16_380, 16_390)]:
        assert torch.equal(activate(kind, x[first:last]), whole[first:last])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite(isa, kind):
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0]).repeat(5)
    result = activate(kind, x)
    assert result[0::4].isnan().all() and (result[1::4] == float("inf")).all()
    assert torch.equal(result[3::4], activate(kind, x[3:4]).expand(5))


def test_shapes_strides_and_training(isa):
    x, up = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    expected = activate("silu", x, up)
    assert torch.equal(activate("silu", x.mT.contiguous().mT, up), expected)
    assert activate("silu", x[:0]).shape == (0, 4, 5)
    x.requires_grad_()
    activate("silu", x, up).sum().backward()
    assert x.grad is not None


def test_the_operator_keeps_torchs_contract():
    checks = ("test_schema", "test_faketensor")
    for kind, x, up in (("silu", torch.randn(3, 4), None), ("relu", torch.randn(3, 4), torch.randn(3, 4))):
        torch.library.opcheck(torch.ops.llmctl.activation, (kind, x, up), test_utils=checks)
