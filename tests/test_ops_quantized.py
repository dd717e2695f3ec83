"""The matrix product with weights of few bits: right, and every row by itself."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from llmctl.ops import native
from llmctl.ops.quantized_linear import (
    dequantized,
    quantized_linear,
    quantized_rows,
    quantized_weight,
    reference,
    unpacked,
)

pytestmark = pytest.mark.skipif(not native.path().exists(), reason="the native library is not built")
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def kernels_whatever_the_isa(monkeypatch):
    monkeypatch.setenv("LLMCTL_KERNELS", "cpu")


def parts(n_out, n_in, bits, group_size, with_zeros=False, scales=torch.float32):
    generator = torch.Generator().manual_seed(n_in + bits)
    n_groups = -(-n_in // group_size)
    codes_NK = torch.randint(0, 1 << bits, (n_out, n_in), generator=generator).to(torch.uint8)
    scales_NJ = (torch.rand(n_out, n_groups, generator=generator) + 0.1).to(scales)
    zeros_NJ = torch.randint(0, 1 << bits, (n_out, n_groups), generator=generator).to(torch.uint8)
    return codes_NK, scales_NJ, zeros_NJ if with_zeros else None


def sample(n_out, n_in, bits, group_size, with_zeros=False, scales=torch.float32):
    return quantized_weight(*parts(n_out, n_in, bits, group_size, with_zeros, scales), bits, group_size)


def assert_close(result, x, weight, bias=None):
    """To what sums in float32 and one rounding at the end may lose."""
    expected = reference(x.float(), weight, None if bias is None else bias.float()).double()
    magnitude = x.double().abs() @ dequantized(weight, torch.float64).abs().T
    unit = 2.0**-24 if result.dtype == torch.float32 else 2.0**-8
    assert ((result.double() - expected).abs() <= 1e-6 * magnitude + 2 * unit * expected.abs() + 1e-6).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("n_out,n_in,group_size", [(3, 150, 32), (37, 200, 96), (16, 128, 64), (5, 90, 90)])
def test_layout_is_undone(n_out, n_in, group_size, bits):
    for scales in (torch.float32, torch.bfloat16, torch.float16):
        codes, scales_NJ, zeros_NJ = parts(n_out, n_in, bits, group_size, True, scales)
        weight = quantized_weight(codes, scales_NJ, zeros_NJ, bits, group_size)
        assert torch.equal(unpacked(weight), codes)
        of_each = torch.arange(n_in) // group_size
        expected = (codes.float() - zeros_NJ[:, of_each]) * scales_NJ[:, of_each].float()
        assert torch.equal(dequantized(weight, torch.float32), expected)


def test_scales_are_kept_in_16_bits_where_that_loses_nothing():
    codes = torch.zeros(16, 128).byte()
    for scale, dtype in ((0.75, torch.bfloat16), (1 + 2**-10, torch.float16), (1 + 2**-20, torch.float32)):
        weight = quantized_weight(codes, torch.full((16, 1), scale), None, 4, 128)
        assert weight.scales_PBU16.dtype == dtype
        assert weight.nbytes == 16 * 128 // 2 + 16 * dtype.itemsize


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    "n_rows,n_in,n_out,group_size",
    [
        (1, 1, 1, 32),
        (3, 64, 5, 32),
        (7, 200, 70, 64),
        (13, 2500, 3, 128),
        (33, 300, 33, 96),
        (200, 100, 9, 1000),
        (2, 96, 4, 97),
        (40, 256, 80, 256),
        (0, 64, 3, 32),
        (600, 40, 17, 32),
    ],
)
def test_equals_the_reference(isa, n_rows, n_in, n_out, group_size, bits, dtype):
    x, bias = torch.randn(n_rows, n_in).to(dtype), torch.randn(n_out).to(dtype)
    for with_zeros, scales in ((False, torch.float32), (True, torch.bfloat16), (True, torch.float16)):
        weight = sample(n_out, n_in, bits, group_size, with_zeros, scales)
        result = quantized_linear(x, weight, bias)
        assert result.shape == (n_rows, n_out) and result.dtype == dtype
        assert_close(result, x, weight, bias)


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_activations_loses_little(isa, bits):
    x, weight = torch.randn(20, 1000), sample(64, 1000, bits, 64)
    exact = x @ dequantized(weight, torch.float32).T
    assert (quantized_linear(x, weight) - exact).norm() < 0.008 * exact.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("n_in,n_out,group_size", [(2304, 40, 64), (512, 100, 32), (700, 16, 128)])
def test_a_row_does_not_know_its_batch(isa, n_in, n_out, group_size, bits, dtype):
    x, weight = torch.randn(250, n_in).to(dtype), sample(n_out, n_in, bits, group_size, with_zeros=n_in == 512)
    whole = quantized_linear(x, weight)
    for n_rows in (1, 2, 4, 5, 6, 7, 15, 20, 193):
        assert torch.equal(quantized_linear(x[-n_rows:], weight), whole[-n_rows:])
    assert torch.equal(quantized_linear(x.view(2, 125, n_in)[:, -1], weight), whole[[124, 249]])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("n_rows", [3, 40])
def test_rows_of_extreme_values(isa, n_rows, bits):
    weight = sample(20, 300, bits, 64)
    x = torch.randn(n_rows, 300)
    x[0], x[1], x[2] = x[0] * 1e-33, x[1] * 1e30, 0
    assert_close(quantized_linear(x[1:], weight), x[1:], weight)
    assert torch.equal(quantized_linear(x[[0, 2]], weight), torch.zeros(2, 20))  # too small for a scale
    expected = quantized_linear(x, weight)
    for bad in (torch.nan, torch.inf, -torch.inf):
        x[2, 290] = bad
        result = quantized_linear(x, weight)
        assert result[2].isnan().all()
        result[2] = expected[2]
        assert torch.equal(result, expected)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("n_in,group_size", [(200, 64), (96, 200)])
def test_rows_of_an_embedding(n_in, group_size, bits):
    ids = torch.tensor([[0, 36, 5], [5, 17, 1]])
    for with_zeros, scales in ((False, torch.float32), (True, torch.bfloat16), (True, torch.float16)):
        weight = sample(37, n_in, bits, group_size, with_zeros, scales)
        for dtype in DTYPES:
            assert torch.equal(quantized_rows(weight, ids, dtype), dequantized(weight, dtype)[ids])
    assert quantized_rows(weight, ids[:0]).shape == (0, 3, n_in)
    with pytest.raises(IndexError, match="row 0 to 37 of 37"):
        quantized_rows(weight, ids.flatten().where(ids.flatten() != 36, 37))


@pytest.mark.parametrize(
    "bits,group_size,n_groups,largest,message",
    [
        (3, 32, 2, 1, "3 bits; expected 4 or 8"),
        (4, 20, 4, 1, "groups of 20 weights; expected a multiple of 32, or the whole row of 64"),
        (4, 32, 3, 1, r"scales of shape \(3, 3\); 3 rows of 64 weights need \(3, 2\)"),
        (4, 32, 2, 16, "codes of torch.uint8; expected uint8 of at most 15"),
    ],
)
def test_weights_that_fit_no_layout_are_refused(bits, group_size, n_groups, largest, message):
    with pytest.raises(ValueError, match=message):
        quantized_weight(torch.full((3, 64), largest).byte(), torch.ones(3, n_groups), None, bits, group_size)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"bits": 3}, "4 or 8 bits"),
        ({"unit": 20}, "units of 32, 64 or 128"),
    ],
)
def test_wrong_weights_are_refused(changes, message):
    weight = dataclasses.replace(sample(3, 64, 4, 32), **changes)
    with pytest.raises(RuntimeError, match=message):
        quantized_linear(torch.randn(2, 64), weight)


def test_training_takes_the_dequantized_weights():
    x, weight = torch.randn(2, 64, requires_grad=True), sample(3, 64, 4, 32)
    quantized_linear(x, weight).sum().backward()
    assert x.grad is not None
    with pytest.raises(ValueError, match="x has 63 columns, the weights 64"):
        quantized_linear(torch.randn(2, 63), weight)
