"""GPTQ and AWQ checkpoints as their own tools write them, and quantized files that are not what they should be."""

from __future__ import annotations

import json

import pytest
import torch

from llmctl import checkpoint
from llmctl.errors import UserError
from llmctl.models.initialization import new_model
from llmctl.models.loading import load_model, save_model
from llmctl.models.quantized_linear import QuantizedLinear
from llmctl.models.shapes import for_parameters
from llmctl.quantize.run import quantize
from llmctl.quantize.settings import QuantizeSettings
from llmctl.quantize.stored import open_weights


@pytest.fixture(autouse=True)
def plain_products(monkeypatch):
    """The weights are compared here; the kernels round what they multiply, which has tests of its own."""
    monkeypatch.setenv("LLMCTL_KERNELS", "reference")


IDS = torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(1))
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
LINEAR = "model.layers.0.mlp.down_proj"


def packed_rows(values: torch.Tensor, width: int) -> torch.Tensor:
    """Each row as one number whose digits of `width` bits are the values, the first one lowest, cut into words."""
    rows = []
    for row in values.tolist():
        number = sum(value << (i * width) for i, value in enumerate(row))
        whole = number.to_bytes(-(-len(row) * width // 32) * 4, "little")
        rows.append(torch.frombuffer(bytearray(whole), dtype=torch.int32))
    return torch.stack(rows)


def gptq_tensors(width: int, size: int, version: str, desc_act: bool, n_in: int, n_out: int):
    """(tensors of a module, the weights [out, in] that they stand for)."""
    generator = torch.Generator().manual_seed(width)
    groups = torch.arange(n_in) // size
    if desc_act:
        groups = groups[torch.randperm(n_in, generator=generator)]
    codes = torch.randint(0, 1 << width, (n_in, n_out), generator=generator)
    zeros = torch.randint(1, 1 << width, (n_in // size, n_out), generator=generator)
    scales = (torch.rand(n_in // size, n_out, generator=generator) * 0.02 + 0.005).half()
    weight = (codes - zeros[groups]).float() * scales[groups].float()
    tensors = {
        "qweight": packed_rows(codes.mT, width).mT.contiguous(),
        "qzeros": packed_rows(zeros - int(version == "gptq"), width),
        "scales": scales,
        "g_idx": groups.int(),
    }
    return tensors, weight.mT


def awq_tensors(size: int, n_in: int, n_out: int):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (n_in, n_out), generator=generator)
    zeros = torch.randint(0, 16, (n_in // size, n_out), generator=generator)
    scales = (torch.rand(n_in // size, n_out, generator=generator) * 0.02 + 0.005).half()
    weight = (codes - zeros.repeat_interleave(size, 0)).float() * scales.float().repeat_interleave(size, 0)

    def in_words(values):
        return packed_rows(values.unflatten(1, (-1, 8))[..., AWQ_ORDER].flatten(1), 4)

    return {"qweight": in_words(codes), "qzeros": in_words(zeros), "scales": scales}, weight.mT


def write(path, make, said: dict):
    """A Llama whose matrices are of `make(in, out)`; beside it the same unquantized."""
    model = new_model(for_parameters("llama", 20_000, 96, 64, {}), 0)
    (path / "plain").mkdir()
    (path / "packed").mkdir()
    save_model(model, path / "plain")
    stored = checkpoint.open_tensors(path / "plain")
    plain, packed = {}, {}
    for name in stored:
        if "proj" not in name:
            plain[name] = packed[name] = stored.copy(name)
            continue
        tensors, plain[name] = make(*reversed(stored.shape(name)))
        packed |= {f"{name.removesuffix('.weight')}.{ending}": tensor for ending, tensor in tensors.items()}
    checkpoint.save_tensors(path / "plain", plain)
    checkpoint.save_tensors(path / "packed", packed)
    config = json.loads((path / "plain" / "config.json").read_text())
    (path / "packed" / "config.json").write_text(json.dumps({**config, "quantization_config": said}))
    return path / "plain", path / "packed"


def logits(path) -> torch.Tensor:
    with torch.no_grad():
        return load_model(path)(IDS)


def gptq_said(width=4, size=32, version="gptq", desc_act=False, **changes) -> dict:
    said = {"quant_method": "gptq", "bits": width, "group_size": size, "desc_act": desc_act, "sym": False}
    return {**said, "checkpoint_format": version, **changes}


@pytest.mark.parametrize("desc_act", [True, False])
@pytest.mark.parametrize("version,width", [("gptq", 4), ("gptq_v2", 4), ("gptq", 3), ("gptq_v2", 8), ("gptq", 2)])
def test_gptq(tmp_path, version, width, desc_act):
    plain, packed = write(
        tmp_path,
        lambda n_in, n_out: gptq_tensors(width, 32, version, desc_act, n_in, n_out),
        gptq_said(width, 32, version, desc_act),
    )
    first, second = open_weights(plain), open_weights(packed)
    assert sorted(first) == sorted(second)
    for name in first:
        torch.testing.assert_close(second.get(name), first.get(name), rtol=1e-6, atol=1e-7)
    model = load_model(packed)
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert layers and all(layer.quantized is not None for layer in layers)
    assert all((layer.columns_K is not None) == (desc_act and layer.in_features > 32) for layer in layers)
    torch.testing.assert_close(logits(packed), logits(plain), rtol=1e-3, atol=1e-3)


def test_awq(tmp_path):
    said = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    plain, packed = write(tmp_path, lambda n_in, n_out: awq_tensors(32, n_in, n_out), said)
    torch.testing.assert_close(logits(packed), logits(plain), rtol=1e-3, atol=1e-3)


def test_awq_words_are_those_that_compressed_tensors_unpacks():
    module = pytest.importorskip("compressed_tensors.entrypoints.convert.converters.autoawq")
    tensors, weight = awq_tensors(32, 64, 48)
    codes, zeros = module.AutoAWQConverter.unpack_awq(tensors["qweight"], tensors["qzeros"], 4)
    codes, zeros = module.AutoAWQConverter.reverse_awq_order(codes, zeros, 4)
    codes, zeros = codes & 15, (zeros & 15).repeat_interleave(32, 0)
    found = (codes.float() - zeros.float()) * tensors["scales"].float().repeat_interleave(32, 0)
    torch.testing.assert_close(found.mT, weight)


def test_back_to_an_ordinary_checkpoint(tmp_path):
    plain, packed = write(tmp_path, lambda i, o: gptq_tensors(4, 32, "gptq", True, i, o), gptq_said(desc_act=True))
    found = quantize(packed, tmp_path / "back", QuantizeSettings(format="float32"))
    assert found.agreement.kl_divergence < 1e-6
    torch.testing.assert_close(logits(tmp_path / "back"), logits(plain), rtol=1e-4, atol=1e-4)
    assert "quantization_config" not in (tmp_path / "back" / "config.json").read_text()


def edit(path, change) -> None:
    stored = checkpoint.open_tensors(path)
    tensors = {name: stored.copy(name) for name in stored}
    change(tensors)
    checkpoint.save_tensors(path, tensors)


def cut(tensors, name) -> None:
    tensors[f"{LINEAR}.{name}"] = tensors[f"{LINEAR}.{name}"][:-1].contiguous()


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda tensors: cut(tensors, "scales"), rf"{LINEAR}.scales has shape .* the layout says"),
        (lambda tensors: tensors.pop(f"{LINEAR}.qzeros"), "has no qzeros"),
        (lambda tensors: tensors[f"{LINEAR}.scales"].fill_(torch.nan), "values that are no numbers"),
        (lambda tensors: tensors[f"{LINEAR}.g_idx"].fill_(1), "does not part"),
        (lambda tensors: tensors.update({f"{LINEAR}.qweight": tensors[f"{LINEAR}.qweight"].float()}), "dtype float32"),
        (lambda tensors: cut(tensors, "qweight"), "shape|needs|part"),
        (
            lambda tensors: tensors.update({f"{LINEAR}.qweight": torch.tensor(3)}),
            "qweight has shape .*; the layout says",
        ),
        (
            lambda tensors: tensors.update({f"{LINEAR}.qweight": torch.zeros(9)}),
            "qweight has shape .*; the layout says",
        ),
    ],
)
def test_what_is_truncated_or_damaged_is_named(tmp_path, change, message):
    _, packed = write(tmp_path, lambda i, o: gptq_tensors(4, 32, "gptq", False, i, o), gptq_said())
    edit(packed, change)
    with pytest.raises(UserError, match=message):
        load_model(packed)


def packed_said(group) -> dict:
    """compressed-tensors' config with one group."""
    said = {"quant_method": "compressed-tensors", "format": "pack-quantized", "sparsity_config": None}
    return {**said, "config_groups": {"g": group}}


@pytest.mark.parametrize(
    "said,message",
    [
        ({"quant_method": "quip"}, "quantized by 'quip'; llmctl reads"),
        ({"quant_method": {"a": 1}}, "quantized by {'a': 1}; llmctl reads"),
        ({"quant_method": "gptq", "bits": 5}, "GPTQ with 5 bits"),
        (gptq_said(version="marlin"), "'marlin'"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "'gemv'"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "its weights are not quantized"),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "x",
                "config_groups": {"g": {"format": "nvfp4-pack-quantized"}},
            },
            "nvfp4-pack-quantized",
        ),
        ("int4", "quantization_config is 'int4'; expected an object"),
        ({"quant_method": "gptq", "bits": 4, "group_size": "all"}, "group_size 'all'; expected a whole number"),
        (packed_said("x"), "the group 'x'; expected an object"),
        (packed_said({"targets": None}), "expected an object with targets"),
        (packed_said({"targets": ["re:["]}), r"the target 're:\['"),
        (packed_said([]), "expected an object"),
    ],
)
def test_layouts_that_are_unknown_are_named(tmp_path, said, message):
    _, packed = write(tmp_path, lambda i, o: gptq_tensors(4, 32, "gptq", False, i, o), said)
    with pytest.raises(UserError, match=message):
        load_model(packed)


@pytest.mark.parametrize("ending", ["weight.nested_absmax", "weight.nested_quant_map"])
def test_scales_of_scales_that_are_cut_are_named(tmp_path, ending):
    plain, _ = write(tmp_path, lambda i, o: gptq_tensors(4, 32, "gptq", False, i, o), gptq_said())
    quantize(plain, tmp_path / "nf4", QuantizeSettings(format="nf4"))
    edit(tmp_path / "nf4", lambda tensors: cut(tensors, ending))
    with pytest.raises(UserError, match=f"{ending} has shape"):
        load_model(tmp_path / "nf4")


@pytest.mark.parametrize(
    "form,ending,change,message",
    [
        ("fp8", "weight_scale", lambda scales: scales[None], "does not divide"),
        ("fp8", "weight_scale", lambda scales: scales[:0], "does not divide"),
        ("fp8", "weight_scale", lambda scales: scales[:-1], "does not divide"),
        ("fp8", "weight_scale", lambda _: None, "is float8_e4m3fn and has no scale"),
        ("fp8", "weight", lambda weight: weight.view(torch.int8).fill_(127).view(weight.dtype), "are no numbers"),
        ("llm-int8", "SCB", lambda _: None, "is int8 and has no scale"),
        ("llm-int8", "weight_format", lambda kind: kind[None].repeat(2) + 1, "in a GPU's own order"),
        ("nf4", "weight.quant_map", lambda table: table * torch.nan, "quant_map has values that are no numbers"),
        ("nf4", "weight.absmax", lambda codes: codes.float(), "dtype float32; the layout says uint8"),
    ],
)
def test_what_is_damaged_in_other_layouts_is_named(tmp_path, form, ending, change, message):
    plain, _ = write(tmp_path, lambda i, o: gptq_tensors(4, 32, "gptq", False, i, o), gptq_said())
    quantize(plain, tmp_path / "few", QuantizeSettings(format=form))

    def damage(tensors):
        found = change(tensors.pop(f"{LINEAR}.{ending}"))
        if found is not None:
            tensors[f"{LINEAR}.{ending}"] = found.contiguous()

    edit(tmp_path / "few", damage)
    with pytest.raises(UserError, match=message):
        load_model(tmp_path / "few")


@pytest.mark.parametrize("key,value", [("num_bits", "4"), ("num_bits", None), ("group_size", "all")])
def test_numbers_that_are_none_are_named(tmp_path, key, value):
    plain, _ = write(tmp_path, lambda i, o: gptq_tensors(4, 32, "gptq", False, i, o), gptq_said())
    quantize(plain, tmp_path / "int4", QuantizeSettings(format="int4", tolerance=9))
    config = json.loads((tmp_path / "int4" / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"][key] = value
    (tmp_path / "int4" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=key):
        load_model(tmp_path / "int4")
