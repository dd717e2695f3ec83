"""The matrix product with weights of few bits: right, and every row by itself."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from llmctl.ops import native
from llmctl.ops.quantized_linear import (
    QuantizedWeight,
    dequantized,
    packed,
    quantized_linear,
    quantized_rows,
    quantized_weight,
    unpacked,
)

pytestmark = pytest.mark.skipif(not native.path().exists(), reason="the native library is not built")
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def kernels_whatever_the_isa(monkeypatch):
    monkeypatch.setenv("LLMCTL_KERNELS", "cpu")


def sample(n_out, n_in, bits, group_size, with_zeros=False, scales=torch.float32):
    generator = torch.Generator().manual_seed(n_in + bits)
    codes = torch.randint(0, 1 << bits, (n_out, n_in), generator=generator)
    n_groups = -(-n_in // group_size)
    scales_NJ = (torch.rand(n_out, n_groups, generator=generator) + 0.1).to(scales)
    zeros_NJ = torch.randint(0, 1 << bits, (n_out, n_groups), generator=generator).to(torch.uint8)
    return quantized_weight(codes.to(torch.uint8), scales_NJ, zeros_NJ if with_zeros else None, bits, group_size)


def test_packing_is_undone():
    for bits in (4, 8):
        codes = torch.randint(0, 1 << bits, (3, 150)).to(torch.uint8)
        weight = QuantizedWeight(bits, 32, 150, packed(codes, bits), torch.ones(3, 5))
        assert torch.equal(unpacked(weight), codes)
        assert weight.codes_NR.shape == (3, 192 * bits // 8)
        assert torch.equal(dequantized(weight, torch.float32), codes.float() - (1 << (bits - 1)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    "n_rows,n_in,n_out,group_size",
    [
        (1, 1, 1, 32),
        (3, 64, 5, 32),
        (7, 200, 70, 64),
        (13, 2500, 3, 128),
        (200, 100, 9, 1000),
        (2, 96, 4, 97),
        (0, 64, 3, 32),
    ],
)
def test_equals_the_product_with_dequantized_weights(isa, n_rows, n_in, n_out, group_size, bits, dtype):
    x, bias = torch.randn(n_rows, n_in).to(dtype), torch.randn(n_out).to(dtype)
    for with_zeros, scales in ((False, torch.float32), (True, torch.bfloat16)):
        weight = sample(n_out, n_in, bits, group_size, with_zeros, scales)
        result = quantized_linear(x, weight, bias)
        assert result.shape == (n_rows, n_out) and result.dtype == dtype
        values = dequantized(weight, dtype).double()
        exact, magnitude = x.double() @ values.T + bias.double(), x.double().abs() @ values.abs().T
        unit = 2.0**-24 if dtype == torch.float32 else 2.0**-8
        assert ((result.double() - exact).abs() <= 1e-6 * magnitude + unit * exact.abs() + 1e-6).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("n_in,group_size", [(200, 64), (96, 200)])
def test_rows_of_an_embedding(n_in, group_size, bits):
    ids = torch.tensor([[0, 36, 5], [5, 17, 1]])
    for with_zeros, scales in ((False, torch.float32), (True, torch.bfloat16), (True, torch.float16)):
        weight = sample(37, n_in, bits, group_size, with_zeros, scales)
        for dtype in DTYPES:
            assert torch.equal(quantized_rows(weight, ids, dtype), dequantized(weight, dtype)[ids])


@pytest.mark.parametrize(
    "bits,group_size,n_groups,message",
    [
        (3, 32, 2, "3 bits; expected 4 or 8"),
        (4, 20, 4, "groups of 20 weights; expected a multiple of 32, or the whole row of 64"),
        (4, 32, 3, r"scales of shape \(3, 3\); 3 rows of 64 weights need \(3, 2\)"),
        (4, 32, 2, "uint8 below 16"),
    ],
)
def test_weights_that_fit_no_layout_are_refused(bits, group_size, n_groups, message):
    with pytest.raises(ValueError, match=message):
        quantized_weight(torch.full((3, 64), 16).byte(), torch.ones(3, n_groups), None, bits, group_size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_does_not_know_its_batch(isa, bits, dtype):
    x, weight = torch.randn(250, 2304).to(dtype), sample(40, 2304, bits, 64)
    whole = quantized_linear(x, weight)
    for n_rows in (1, 2, 5, 6, 7, 20, 193):
        assert torch.equal(quantized_linear(x[-n_rows:], weight), whole[-n_rows:])
    assert torch.equal(quantized_linear(x.view(2, 125, 2304)[:, -1], weight), whole[[124, 249]])


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"bits": 3}, "4 or 8 bits"),
        ({"group_size": 20}, "no multiple of 32"),
        ({"codes_NR": torch.zeros(3, 8).byte()}, "too short"),
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
