"""Quantized checkpoints between us, compressed-tensors, bitsandbytes and transformers: each reads what the other wrote."""

from __future__ import annotations

import json

import pytest
import torch

transformers = pytest.importorskip("transformers")

from llmctl import checkpoint  # noqa: E402
from llmctl.models.loading import load_model, save_model  # noqa: E402
from llmctl.models.packed import AffineWeight  # noqa: E402
from llmctl.models.quantized_linear import QuantizedLinear  # noqa: E402
from llmctl.quantize import bits, rounding  # noqa: E402
from llmctl.quantize.layouts import bitsandbytes as bnb_layout  # noqa: E402
from llmctl.quantize.run import quantize  # noqa: E402
from llmctl.quantize.scheme import Scheme  # noqa: E402
from llmctl.quantize.settings import QuantizeSettings  # noqa: E402
from llmctl.quantize.stored import open_weights  # noqa: E402

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
IDS = torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def plain_products(monkeypatch):
    """The weights are compared here; the kernels round what they multiply, which has tests of its own."""
    monkeypatch.setenv("LLMCTL_KERNELS", "reference")


BF16 = 0.1
"""bitsandbytes multiplies in bfloat16 where the processor does; logits are a few."""


def shapes(**changes):
    usual = dict(vocab_size=96, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)
    return {**usual, **changes}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A Llama with random weights, in float32."""
    torch.manual_seed(0)
    llama = dict(hidden_size=64, intermediate_size=128, num_key_value_heads=2, tie_word_embeddings=False)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shapes(**llama), initializer_range=0.15))
    path = tmp_path_factory.mktemp("base") / "llama"
    model.save_pretrained(path)
    return path


def quantized(base, path, **settings):
    return quantize(base, path, QuantizeSettings(tolerance=100.0, **settings)).path


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        found = model(IDS)
    return getattr(found, "logits", found).float()


def theirs(path, **how):
    return transformers.AutoModelForCausalLM.from_pretrained(path, **how).eval()


def linear_names(path) -> list[str]:
    return [name for name in open_weights(path) if "proj" in name]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind,size", [("int4", 32), ("int4", 0), ("int8", 64), ("int8", 0), ("fp8", None)])
def test_transformers_computes_the_same_with_compressed_tensors(base, tmp_path, kind, size, symmetric):
    pytest.importorskip("compressed_tensors")
    more = {} if kind == "fp8" else {"group_size": size, "symmetric": symmetric}
    path = quantized(base, tmp_path / "out", format=kind, **more)
    ours = load_model(path)
    assert sum(isinstance(module, QuantizedLinear) for module in ours.modules()) == 14
    # compressed-tensors 0.20 does not expect packed zero points where transformers keeps weights packed
    how = {} if symmetric else {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)}
    torch.testing.assert_close(logits(ours), logits(theirs(path, **how)), rtol=1e-4, atol=1e-4)
    assert (logits(ours) - logits(load_model(base))).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["nf4", "fp4", "llm-int8"])
@pytest.mark.parametrize("double", [True, False])
def test_transformers_computes_the_same_with_bitsandbytes(base, tmp_path, kind, double):
    pytest.importorskip("bitsandbytes")
    how = {} if kind == "llm-int8" else {"double_quantization": double}  # which has no scales of scales
    path = quantized(base, tmp_path / "out", format=kind, **how)
    ours, reader = load_model(path), theirs(path)
    for name, module in reader.named_modules():
        if name.endswith("proj"):
            unpacked = transformers.integrations.bitsandbytes.dequantize_bnb_weight(
                module.weight, getattr(module, "state", None)
            )
            mine = open_weights(path).get(f"{name}.weight")
            torch.testing.assert_close(
                mine, unpacked.float().view_as(mine), rtol=2e-3 if kind == "llm-int8" else 1e-6, atol=1e-6
            )
    if kind != "llm-int8":  # there the inputs are rounded too
        torch.testing.assert_close(logits(ours), logits(reader), rtol=BF16, atol=BF16)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_4_bit_codes_and_scales_are_bitsandbytes_own(kind):
    functional = pytest.importorskip("bitsandbytes").functional
    weight = torch.randn(37, 130, generator=torch.Generator().manual_seed(0))
    expected, state = functional.quantize_4bit(weight, blocksize=64, quant_type=kind, compress_statistics=True)
    found = bnb_layout.stored_4_bits(rounding.in_table(weight, kind), kind, torch.float32, True)
    assert torch.equal(found["weight"], expected)
    for name, value in state.as_dict(packed=True).items():
        assert torch.equal(found[f"weight.{name}"], value), name


def test_what_bitsandbytes_packed_on_loading_loads_here(base, tmp_path):
    pytest.importorskip("bitsandbytes")
    how = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = theirs(base, quantization_config=how)
    model.save_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(logits(load_model(tmp_path / "theirs")), logits(model), rtol=BF16, atol=BF16)


@pytest.mark.parametrize("width,symmetric,size", [(4, True, 32), (4, False, 64), (8, True, 0), (3, True, 32)])
def test_what_compressed_tensors_own_compressor_wrote_loads_here(base, tmp_path, width, symmetric, size):
    library = pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(num_bits=width, symmetric=symmetric, group_size=size or -1)
    scheme = library.quantization.QuantizationScheme(targets=["Linear"], weights=args)
    config = QuantizationConfig(config_groups={"g": scheme}, ignore=["lm_head"], format="pack-quantized")
    model = theirs(base)
    apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            groups = module.weight.detach().unflatten(1, (-1, size or module.in_features))
            scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
            module.weight_scale.data.copy_(scale)
            if not symmetric:
                module.weight_zero_point.data.copy_(zero)
    expected = logits(model)
    compressor = ModelCompressor.from_pretrained_model(model, quantization_format="pack-quantized")
    compressor.compress_model(model)
    model.save_pretrained(tmp_path / "theirs")
    compressor.update_config(tmp_path / "theirs")
    torch.testing.assert_close(logits(load_model(tmp_path / "theirs")), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("width", range(1, 9))
def test_words_are_packed_as_compressed_tensors_packs_them(width):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = torch.randint(0, 1 << width, (5, 45), generator=torch.Generator().manual_seed(width)).to(torch.uint8)
    expected = helpers.pack_to_int32((codes.to(torch.int16) - (1 << (width - 1))).to(torch.int8), width)
    assert torch.equal(bits.pack(codes, width), expected)
    assert torch.equal(bits.unpack(expected, width, 45), codes)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("width", [4, 8])
def test_within_the_range_a_weight_is_off_by_half_a_step(width, symmetric):
    weight = torch.randn(40, 96, generator=torch.Generator().manual_seed(0))
    weight[3, 32:64] = 0.0
    weight[5] = 2.5
    found = rounding.affine(weight, Scheme("int", width, 32, symmetric), torch.bfloat16)
    step = found.scales_NJ.float().abs().repeat_interleave(32, 1)
    inside = (found.codes_NK > 0) & (found.codes_NK < (1 << width) - 1)
    off = (found.dequantized(torch.float32) - weight).abs()
    assert (off <= step * 0.5001)[inside].all()
    assert inside.float().mean() > 0.7
    assert (off[3, 32:64] == 0).all()


def test_saved_again_it_is_the_same_file(base, tmp_path):
    path = quantized(base, tmp_path / "out", format="int4", group_size=32)
    (tmp_path / "again").mkdir()
    save_model(load_model(path), tmp_path / "again")
    first, second = (checkpoint.open_tensors(tmp_path / name) for name in ("out", "again"))
    assert sorted(first.keys()) == sorted(second.keys())
    assert all(torch.equal(first.get(name), second.get(name)) for name in first)
    assert torch.equal(logits(load_model(path)), logits(load_model(tmp_path / "again")))


def test_taken_back_it_is_what_the_codes_say(base, tmp_path):
    path = quantized(base, tmp_path / "out", format="int4", group_size=32)
    plain = quantized(path, tmp_path / "plain", format="float32")
    assert "quantization_config" not in json.loads((plain / "config.json").read_text())
    torch.testing.assert_close(logits(theirs(plain)), logits(load_model(path)), rtol=1e-4, atol=1e-4)
    for name in linear_names(path):
        assert torch.equal(checkpoint.open_tensors(plain).get(name), open_weights(path).get(name))


def test_overrides_and_what_is_kept(base, tmp_path):
    path = quantized(
        base,
        tmp_path / "out",
        format="int4",
        keep="lm_head,layers.0.self_attn.o_proj",
        bits=("down_proj=8", r".*\.1\..*k_proj=16"),
    )
    stored = open_weights(path)
    packed = {name.removeprefix("model.").removesuffix(".weight"): stored.packed(name) for name in linear_names(path)}
    plain = {name for name, weight in packed.items() if weight is None}
    assert plain == {"layers.0.self_attn.o_proj", "layers.1.self_attn.k_proj"}
    assert {name for name, weight in packed.items() if weight is not None and weight.bits == 8} == {
        "layers.0.mlp.down_proj",
        "layers.1.mlp.down_proj",
    }
    if pytest.importorskip("compressed_tensors"):
        torch.testing.assert_close(logits(theirs(path)), logits(load_model(path)), rtol=1e-4, atol=1e-4)


def test_the_head_is_quantized_when_nothing_is_kept(base, tmp_path):
    pytest.importorskip("compressed_tensors")
    path = quantized(base, tmp_path / "out", format="int8", keep="")
    ours = load_model(path)
    assert isinstance(ours.lm_head, QuantizedLinear)
    torch.testing.assert_close(logits(ours), logits(theirs(path)), rtol=1e-4, atol=1e-4)


FAMILIES = {
    "gpt2": dict(n_embd=64, n_layer=2, n_head=4, vocab_size=96, n_positions=64, initializer_range=0.15),
    "phi3": dict(
        **shapes(), hidden_size=64, intermediate_size=128, num_key_value_heads=2, pad_token_id=0, initializer_range=0.15
    ),
    "qwen2": dict(**shapes(), hidden_size=64, intermediate_size=128, num_key_value_heads=2, initializer_range=0.15),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families(tmp_path, family):
    """GPT-2 keeps its matrices on their side, and q, k, v in one; phi3 has q, k, v in one."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(family, **FAMILIES[family])
    ).eval()
    model.save_pretrained(tmp_path / "base")
    path = quantized(tmp_path / "base", tmp_path / "out", format="int8", group_size=32)
    error = (logits(load_model(path)) - logits(model)).abs().max()
    assert 0 < error < 0.15
    plain = quantized(path, tmp_path / "plain", format="float32")
    torch.testing.assert_close(logits(theirs(plain)), logits(load_model(path)), rtol=1e-4, atol=1e-4)
    if family == "gpt2":
        nf4 = quantized(tmp_path / "base", tmp_path / "nf4", format="nf4")
        torch.testing.assert_close(logits(load_model(nf4)), logits(theirs(nf4)), rtol=BF16, atol=BF16)
    elif family == "qwen2":
        torch.testing.assert_close(logits(theirs(path)), logits(load_model(path)), rtol=1e-4, atol=1e-4)


def test_a_group_size_without_a_kernel_unpacks():
    weight = torch.randn(16, 40, generator=torch.Generator().manual_seed(0))
    packed = rounding.affine(weight, Scheme("int", 4, 8, False), torch.bfloat16)
    layer = QuantizedLinear(packed, None, torch.float32)
    assert layer.quantized is None
    x = torch.randn(3, 40)
    torch.testing.assert_close(layer(x), x @ packed.dequantized(torch.float32).mT)


def test_columns_in_another_order_are_multiplied_in_theirs():
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    columns = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    packed = rounding.affine(weight[:, columns], Scheme("int", 8, 32, True), torch.float32)
    packed = AffineWeight(packed.codes_NK, packed.scales_NJ, None, 8, 32, columns)
    torch.testing.assert_close(packed.dequantized(torch.float32), weight, rtol=0, atol=0.03)
    layer = QuantizedLinear(packed, None, torch.float32)
    x = torch.randn(3, 64)
    torch.testing.assert_close(layer(x), x @ layer.weight.mT, rtol=1e-3, atol=1e-3)
    x.requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand_as(x))
