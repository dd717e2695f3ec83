"""RMSNorm, LayerNorm and rotary positions of inference against their references in float64."""

from __future__ import annotations

import pytest
import torch

from llmctl.ops import native, norm, rotary

pytestmark = pytest.mark.skipif(not native.path().exists(), reason="the native library is not built")
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def kernels_whatever_the_isa(monkeypatch):
    monkeypatch.setenv("LLMCTL_KERNELS", "cpu")


def check(result, expected):
    unit = 2e-6 if result.dtype == torch.float32 else 2.0**-8
    assert ((result.double() - expected).abs() <= unit * (expected.abs() + 1e-3)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 64), (4, 1, 1000), (200, 130), (0, 9)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(isa, shape, dtype, offset):
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    result = norm.rms_norm(x, weight, 1e-5, offset)
    assert result.shape == shape and result.dtype == dtype
    check(result, norm.reference(x.double(), weight.double(), 1e-5, 0.0) if not offset else wide(x, weight, offset))
    if x.dim() == 3:  # a row by itself, and rows that do not follow each other
        assert torch.equal(norm.rms_norm(x[1, -1], weight, 1e-5, offset), result[1, -1])
        assert torch.equal(norm.rms_norm(x[:, -1], weight, 1e-5, offset), result[:, -1])


def wide(x, weight, offset):
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * (offset + weight.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 64), (4, 1, 1000), (200, 130), (0, 9)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_layer_norm(isa, shape, dtype, has_bias):
    x, weight = (torch.randn(shape) + 3).to(dtype), torch.randn(shape[-1]).to(dtype)
    bias = torch.randn(shape[-1]).to(dtype) if has_bias else None
    result = norm.layer_norm(x, weight, bias, 1e-5)
    assert result.shape == shape and result.dtype == dtype
    wide = torch.nn.functional.layer_norm(
        x.double(), weight.shape, weight.double(), bias.double() if has_bias else None, 1e-5
    )
    unit = 4e-6 if dtype == torch.float32 else 2.0**-8
    assert ((result.double() - wide).abs() <= unit * (wide.abs() + 2)).all()
    if x.dim() == 3:
        assert torch.equal(norm.layer_norm(x[1, -1], weight, bias, 1e-5), result[1, -1])
        assert torch.equal(norm.layer_norm(x[:, -1], weight, bias, 1e-5), result[:, -1])
    x[-1:, ..., -1] = float("nan")
    assert norm.layer_norm(x, weight, bias, 1e-5)[-1:].flatten(0, -2)[-1:].isnan().all()


def test_rms_norm_of_what_is_not_finite(isa):
    x = torch.randn(3, 50)
    x[1, 49] = float("nan")
    result = norm.rms_norm(x, torch.ones(50), 1e-5)
    assert result[1].isnan().all() and result[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim,dims", [(2, 2), (64, 64), (80, 80), (20, 14), (64, 16), (6, 0)])
@pytest.mark.parametrize("per_row", [False, True])
def test_rotate(isa, head_dim, dims, dtype, per_row):
    x = torch.randn(3, 5, 4, head_dim).to(dtype).transpose(1, 2)
    tables = [torch.randn((3, 1, 5, dims) if per_row else (5, dims)).to(dtype) for _ in range(2)]
    result = rotary.rotate(x, *tables)
    assert result.shape == x.shape and result.dtype == dtype
    expected = rotary.reference(x.double(), *(t.double() for t in tables))
    assert ((result.double() - expected).abs() <= (1e-6 if dtype == torch.float32 else 2.0**-7) * 9).all()
    assert torch.equal(result[..., dims:], x[..., dims:])
    one = [t[1:2, :, 3:4] if per_row else t[3:4] for t in tables]
    assert torch.equal(rotary.rotate(x[1:2, :, 3:4], *one), result[1:2, :, 3:4])


def test_a_width_without_pairs_is_refused():
    with pytest.raises(RuntimeError, match="no pairs"):
        rotary.rotate(torch.randn(1, 1, 1, 6), torch.randn(1, 5), torch.randn(1, 5))


def test_training_goes_to_torch():
    x, weight = torch.randn(2, 3, 4, 8, requires_grad=True), torch.randn(8)
    rotary.rotate(norm.rms_norm(x, weight, 1e-5), torch.randn(4, 8), torch.randn(4, 8)).sum().backward()
    assert x.grad is not None


def test_the_operators_keep_torchs_contract():
    checks = ("test_schema", "test_faketensor")
    x = torch.randn(2, 3, 4, 8)
    torch.library.opcheck(torch.ops.llmctl.rms_norm, (x, torch.randn(8), 1e-5, 1.0), test_utils=checks)
    torch.library.opcheck(torch.ops.llmctl.rotate, (x, torch.randn(4, 8), torch.randn(4, 8)), test_utils=checks)
