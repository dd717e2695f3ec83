"""A base in few bits under an adapter: bitsandbytes' numbers, gradients, memory, and what it takes to go on."""

from __future__ import annotations

import pytest
import torch

bitsandbytes = pytest.importorskip("bitsandbytes")

from llmctl.finetune import adapter, methods, quantized  # noqa: E402
from llmctl.finetune.sites import find_sites  # noqa: E402
from llmctl.models.config import ModelConfig  # noqa: E402
from llmctl.models.initialization import new_model  # noqa: E402
from llmctl.models.linear import Linear  # noqa: E402
from llmctl.models.quantized_linear import QuantizedLinear  # noqa: E402
from llmctl.models.shapes import for_parameters  # noqa: E402

IDS = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(1))


def small() -> ModelConfig:
    return for_parameters("llama", 200_000, 97, 64, {})


def layer(linear: Linear, kind: str, double: bool) -> QuantizedLinear:
    return QuantizedLinear(quantized.packed(linear.weight.detach(), kind, double), linear.bias, linear.weight.dtype)


@pytest.mark.parametrize("double", [True, False])
def test_nf4_is_bitsandbytes(double):
    torch.manual_seed(0)
    linear = Linear(128, 96)
    theirs = bitsandbytes.nn.Linear4bit(
        128, 96, compute_dtype=torch.float32, compress_statistics=double, quant_type="nf4"
    )
    theirs.load_state_dict({name: tensor.clone() for name, tensor in linear.state_dict().items()})
    theirs = theirs.to("cpu")
    x = torch.randn(5, 128)
    with torch.no_grad():
        ours = layer(linear, "nf4", double)
        expected = theirs(x)
        torch.testing.assert_close(ours(x), expected, rtol=1e-3, atol=1e-3)
        assert 1e-3 < (expected - linear(x)).abs().max() < 0.5


@pytest.mark.parametrize("kind,error", [("nf4", 0.12), ("int8", 0.01)])
def test_products_and_gradients_are_those_of_the_unpacked_matrix(kind, error):
    torch.manual_seed(0)
    linear = Linear(128, 96)
    packed = layer(linear, kind, True)
    weight = packed.weight
    assert (weight - linear.weight).abs().mean() < error * linear.weight.abs().mean()
    x = torch.randn(3, 128, requires_grad=True)
    packed(x).square().sum().backward()
    x2 = x.detach().clone().requires_grad_()
    torch.nn.functional.linear(x2, weight, linear.bias).square().sum().backward()
    torch.testing.assert_close(x.grad, x2.grad)
    codes = packed.packed.codes if kind == "nf4" else packed.quantized.codes_PB
    bits = codes.numel() * codes.element_size() * 8 / linear.weight.numel()
    assert bits == {"nf4": 4, "int8": 8}[kind]


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_base_alone_is_packed(kind):
    torch.manual_seed(0)
    model = new_model(small(), 0)
    sites = {site.ours: site for site in find_sites(model)}
    adapter.attach(model, methods.Lora(rank=2, targets=("all-linear",), modules_to_save=("layers.0.ffn.up_proj",)))
    quantized.quantize(model, kind, True)
    assert {site.ours: site for site in find_sites(model)} == sites
    kept = {name for name, module in model.named_modules() if isinstance(module, Linear)}
    assert {name for name in kept if "layers." in name} == {"layers.0.ffn.up_proj.base"}
    model(IDS).sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if p.requires_grad)
    before = model(IDS)
    assert torch.equal(model.to("cpu")(IDS), before)
