"""The matrix product of inference: right to float32's rounding, and every row by itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llmctl.ops import native
from llmctl.ops.linear import float32_products, linear, reference

pytestmark = pytest.mark.skipif(not native.path().exists(), reason="the native library is not built")
# rows, inputs, outputs: no multiples of anything, one block of the summed dimension and several, and nothing at all
SHAPES = [(1, 1, 1), (3, 5, 7), (7, 33, 2), (6, 64, 4), (1, 100, 300), (13, 1030, 67), (200, 97, 65), (2, 4500, 5)]
MANY = [(515, 70, 33), (1030, 300, 9)]  # where a tile unit lets the operands change places
EMPTY = [(0, 5, 3), (3, 5, 0), (3, 0, 4)]


@pytest.fixture(autouse=True)
def kernels_whatever_the_isa(monkeypatch):
    monkeypatch.setenv("LLMCTL_KERNELS", "cpu")


@pytest.fixture(params=["float32", "float32 high", "bfloat16"])
def dtype(request):
    name, _, precision = request.param.partition(" ")
    with float32_products(precision or "highest"):
        yield getattr(torch, name)


def sample(n_rows, n_in, n_out, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed + n_rows + n_in + n_out)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in [(n_rows, n_in), (n_out, n_in), (n_out,)]]


def check(result, x, weight, bias, of_product=1e-6):
    """Within `of_product` of each product, float32's rounding of their sum, and that of the result to its dtype."""
    x, weight, bias = x.double(), weight.double(), 0.0 if bias is None else bias.double()
    exact, magnitude = x @ weight.T + bias, x.abs() @ weight.abs().T + (bias.abs() if torch.is_tensor(bias) else 0)
    unit = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}[result.dtype]
    allowed = of_product * magnitude + unit * exact.abs() + 1e-30
    assert ((result.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("shape", SHAPES + MANY + EMPTY)
def test_equals_the_exact_product(isa, shape, dtype, request):
    # Two bfloat16 leave 2^-17 of either operand, and the product of the lower ones.
    of_product = 2.0**-15 if request.node.callspec.params["dtype"] == "float32 high" and isa == "amx" else 1e-6
    x, weight, bias = sample(*shape, dtype)
    for b in (None, bias):
        result = linear(x, weight, b)
        assert result.shape == (shape[0], shape[2]) and result.dtype == dtype
        check(result, x, weight, b, of_product)
        check(reference(x, weight, b), x, weight, b)


@pytest.mark.parametrize("n_in,n_out", [(1, 1), (47, 9), (2500, 70)])
def test_a_row_does_not_know_its_batch(isa, n_in, n_out, dtype):
    x, weight, bias = sample(400, n_in, n_out, dtype)
    whole = linear(x, weight, bias)
    for n_rows in [1, 2, 3, 5, 6, 7, 12, 13, 64, 193, 399]:
        first = 400 - n_rows
        assert torch.equal(linear(x[first:], weight, bias), whole[first:])
    for n in (1, n_out // 2 + 1):
        assert torch.equal(linear(x, weight[:n], bias[:n]), whole[:, :n])


def test_nor_that_the_operands_change_places(isa, dtype):
    x, weight, bias = sample(1100, 90, 600, dtype)
    whole = linear(x, weight, bias)
    for first, last in [(0, 512), (3, 514), (500, 1100), (1099, 1100), (7, 40)]:
        assert torch.equal(linear(x[first:last], weight, bias), whole[first:last])
    assert torch.equal(linear(x, weight[1:18], bias[1:18]), whole[:, 1:18])


def test_high_precision_is_whole_where_there_is_no_tile_unit(isa):
    x, weight, bias = sample(600, 130, 40, torch.float32)
    with float32_products("high"):
        high = linear(x, weight, bias)
    assert torch.equal(linear(x, weight, bias), high) == (isa != "amx")


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing(threads):
    x, weight, bias = sample(70, 300, 900, torch.bfloat16)
    expected, before = linear(x, weight, bias), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(linear(x, weight, bias), expected)
        assert native.load().llmctl_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_strides_and_any_shape_of_rows(isa, dtype):
    x, weight, bias = sample(24, 37, 10, dtype)
    expected = linear(x, weight, bias)
    wide = torch.full((24, 3, 37), float("nan"), dtype=dtype)
    wide[:, -1] = x
    assert torch.equal(linear(wide[:, -1], weight, bias), expected)
    assert torch.equal(linear(x.view(2, 3, 4, 37), weight, bias), expected.view(2, 3, 4, 10))
    assert torch.equal(linear(x.T.contiguous().T, weight.T.contiguous().T, bias.repeat(2)[10:]), expected)
    assert torch.equal(linear(x[0], weight, bias), expected[0])
    shifted = torch.empty(10 * 37 + 1, dtype=dtype)[1:].view(10, 37).copy_(weight)  # as in a mapped file
    assert torch.equal(linear(x, shifted, bias), expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(isa, dtype, bad):
    x, weight, _ = sample(9, 70, 11, dtype)
    expected = linear(x, weight)
    x[4, 69] = bad
    result = linear(x, weight)
    assert not result[4].isfinite().any()
    kept = torch.arange(9) != 4
    assert torch.equal(result[kept], expected[kept])


def test_training_and_other_dtypes_go_to_torch():
    x, weight, bias = sample(3, 5, 4, torch.float32)
    weight.requires_grad_()
    linear(x, weight, bias).sum().backward()
    assert weight.grad is not None
    x, weight = x.half(), weight.detach().half()
    assert torch.equal(linear(x, weight), F.linear(x, weight))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x.float(), weight.float()).dtype == torch.bfloat16


def test_wrong_shapes_are_torchs_error():
    x, weight, bias = sample(3, 5, 4, torch.float32)
    with pytest.raises(RuntimeError, match="shapes"):
        linear(x[:, :4], weight, bias)
    with pytest.raises(RuntimeError):
        linear(x, weight, bias[:3])


def test_the_operator_keeps_torchs_contract():
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.llmctl.linear, sample(3, 5, 4, torch.float32), test_utils=checks)
