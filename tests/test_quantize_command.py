"""llmctl quantize as a person runs it, and a quantized checkpoint in the hands of the other commands."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from llmctl import agreement, lineage
from llmctl.errors import CalledWrongly
from llmctl.finetune import adapter, methods
from llmctl.finetune.assembly import Assembly
from llmctl.finetune.merge import merge
from llmctl.finetune.merge_settings import MergeSettings
from llmctl.finetune.planning import refuse_quantized
from llmctl.finetune.settings import FinetuneSettings
from llmctl.models.initialization import new_model
from llmctl.models.loading import load_model, save_model
from llmctl.models.quantized_linear import QuantizedLinear
from llmctl.models.shapes import for_parameters
from llmctl.models.streaming import StreamedModel
from llmctl.quantize.run import quantize
from llmctl.quantize.settings import QuantizeSettings
from llmctl.quantize.stored import open_weights
from llmctl.tokenizer import Tokenizer


@pytest.fixture(autouse=True)
def plain_products(monkeypatch):
    """The weights are compared here; the kernels round what they multiply, which has tests of its own."""
    monkeypatch.setenv("LLMCTL_KERNELS", "reference")


SHORT = ["--steps", "4", "--seq-len", "64", "--batch-size", "2", "--precision", "fp32", "--threads", "1"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small llama over bytes, with what lies beside weights."""
    path = tmp_path_factory.mktemp("base") / "base"
    path.mkdir()
    tokenizer = Tokenizer.bytes()
    model = new_model(for_parameters("llama", 150_000, tokenizer.vocab_size, 128, {}), 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)), alpha=0.05)
    save_model(model, path)
    tokenizer.save(path)
    (path / "generation_config.json").write_text('{"max_new_tokens": 5}')
    (path / "chat_template.jinja").write_text("{{ messages }}")
    return path


@pytest.fixture(scope="module")
def packed(base, tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / "int4"
    return quantize(base, path, QuantizeSettings(group_size=32)).path


def test_from_a_pipe_to_text(base, tmp_path, some_texts, monkeypatch):
    monkeypatch.delenv("LLMCTL_KERNELS")
    (tmp_path / "corpus.txt").write_text("\n".join(some_texts))
    line = (
        f"{sys.executable} -m llmctl tokenize corpus.txt --tokenizer {base} | "
        f"{sys.executable} -m llmctl quantize {base} --group-size 32 --method gptq --calibration - -o out | "
        f"{sys.executable} -m llmctl generate - -p Once -n 8 --temperature 0"
    )
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {line}"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "KL divergence" in done.stderr and "bits per weight" in done.stderr
    record = lineage.read(tmp_path / "out")
    assert record.command == "quantize" and record.parent_sha256 == lineage.weights_sha256(base)
    assert record.metrics["bytes_after"] < record.metrics["bytes_before"]
    assert 0 < record.metrics["kl_divergence"] < 0.5
    assert record.recipe["method"] == "gptq"
    assert lineage.verify(tmp_path / "out") == []
    for name in ("generation_config.json", "chat_template.jinja", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.txt", "out"]


def test_exit_codes(llmctl, base, tmp_path):
    refused = llmctl("quantize", base, "-o", "out", "--group-size", "24", code=2)
    assert "--group-size 24 does not divide" in refused.stderr
    short = llmctl("quantize", base, "-o", "out", "--method", "awq", "--calibration", "-", input="short", code=1)
    assert "tokens to calibrate on; expected at least 256" in short.stderr
    failed = llmctl("quantize", base, "-o", "out", "--group-size", "32", "--tolerance", "1e-9", code=3)
    assert "KL divergence" in failed.stderr and "--tolerance" in failed.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_flag_that_would_do_nothing_is_refused_though_it_says_the_default(llmctl, base, tmp_path):
    refused = llmctl("quantize", base, "-o", "out", "--act-order", code=2)
    assert "--act-order is for --method gptq, not rtn" in refused.stderr
    (tmp_path / "recipe.yaml").write_text("damping: 0.01\ngroup-size: 32\n")  # as a whole one of defaults may say
    llmctl("quantize", base, "-o", "out", "--recipe", "recipe.yaml")


def test_what_is_printed_is_what_runs_here(base, tmp_path, monkeypatch):
    """By the weights alone, and by products as a loaded model has them."""
    monkeypatch.delenv("LLMCTL_KERNELS")
    found = quantize(base, tmp_path / "out", QuantizeSettings(format="int8", keep=""))
    assert found.running is not None and found.running != found.agreement
    ids = agreement.probe_ids(Tokenizer.bytes(), 257)
    plain = StreamedModel(base)
    loaded = agreement.measure(plain.logits, load_model(tmp_path / "out"), ids)
    assert found.running.kl_divergence == pytest.approx(loaded.kl_divergence, rel=1e-3)
    assert found.running.perplexity_after == pytest.approx(loaded.perplexity_after, rel=1e-5)
    assert lineage.read(tmp_path / "out").metrics["running"]["kl_divergence"] == found.running.kl_divergence
    monkeypatch.setenv("LLMCTL_KERNELS", "reference")
    assert quantize(base, tmp_path / "again", QuantizeSettings(format="int8")).running is None
    assert quantize(base, tmp_path / "fp8", QuantizeSettings(format="fp8")).running is None


def test_inspect_says_how_it_is_stored(llmctl, packed):
    record = json.loads(llmctl("inspect", packed, "--json").stdout.splitlines()[0])
    assert record["quantization"]["method"] == "compressed-tensors"
    assert record["quantization"]["matrices"] == sum("proj" in name for name in open_weights(packed))
    assert record["quantization"]["bits"] == [4]


def test_lora_over_it_and_merged_into_it(llmctl, packed, tmp_path):
    rows = [{"prompt": f"{i} + 1 = ", "completion": str(i + 1)} for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    llmctl("finetune", packed, "rows.jsonl", "-o", "lora", *SHORT)
    model = Assembly.find(tmp_path / "lora").load()
    assert any(isinstance(module, QuantizedLinear) for module in model.modules())
    merged = merge(packed, [tmp_path / "lora"], tmp_path / "merged", MergeSettings(tolerance=1e-5))
    assert merged.agreement.kl_divergence < 1e-5
    ids = torch.randint(0, 256, (2, 16))
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path / "merged")(ids), model(ids), rtol=1e-3, atol=1e-3)
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())


@pytest.mark.parametrize(
    "changes", [{"method": "full"}, {"method": "freeze"}, {"method": "lora", "lora_init": "pissa"}]
)
def test_what_would_change_the_base_is_refused(packed, changes):
    with pytest.raises(CalledWrongly, match="this base is quantized"):
        refuse_quantized(FinetuneSettings(**changes), load_model(packed).config)


@pytest.mark.parametrize("form", [{"group_size": 32}, {"format": "nf4"}, {"format": "fp8"}, {"format": "llm-int8"}])
def test_gradients_pass_through_to_the_adapter(base, tmp_path, form):
    """As through the same weights unpacked."""
    quantize(base, tmp_path / "few", QuantizeSettings(tolerance=9, **form))
    quantize(tmp_path / "few", tmp_path / "plain", QuantizeSettings(format="float32"))
    ids, found = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0)), []
    for name in ("few", "plain"):
        model = load_model(tmp_path / name)
        adapter.attach(model, methods.Lora(rank=2, targets=("all-linear",)))
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if "lora_B" in parameter_name:
                    parameter.fill_(0.01)
        model.train()(ids).square().mean().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert found[0].keys() == found[1].keys()
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-3, atol=1e-5)


def test_an_encoder_fills_gaps_and_gives_vectors(tmp_path):
    model = new_model(for_parameters("bert", 150_000, 97, 64, {}), 0)
    save_model(model, tmp_path)
    quantize(tmp_path, tmp_path / "out", QuantizeSettings(format="int8"))
    few, ids = load_model(tmp_path / "out"), torch.randint(0, 97, (2, 12))
    assert any(isinstance(module, QuantizedLinear) for module in few.modules())
    with torch.no_grad():
        torch.testing.assert_close(few(ids), model.eval()(ids), rtol=0.05, atol=0.05)
        torch.testing.assert_close(StreamedModel(tmp_path / "out").logits(ids), few(ids), rtol=0.02, atol=0.02)


def test_another_dtype_and_device_take_the_packed_matrices_along(packed):
    ids = torch.randint(0, 256, (2, 16))
    with torch.no_grad():
        whole = load_model(packed)(ids)
        half = load_model(packed, torch.bfloat16)
        assert half(ids).dtype == torch.bfloat16
        torch.testing.assert_close(half(ids).float(), whole, rtol=0.1, atol=0.1)
        assert load_model(packed).to(torch.bfloat16).layers[0].mixer.q_proj.weight.dtype == torch.bfloat16
        assert torch.equal(load_model(packed).to("cpu")(ids), whole)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_peak_memory_is_a_few_layers(tmp_path, method):
    """A model of ten layers in 137 MB, quantized by a process that may have far less than that beyond torch itself."""
    (tmp_path / "base").mkdir()
    hf = dict(vocab_size=300, hidden_size=512, intermediate_size=1536, num_hidden_layers=10, num_attention_heads=8)
    (tmp_path / "hf.json").write_text(json.dumps({"model_type": "llama", **hf}))
    from llmctl.models.loading import read_config

    model = new_model(read_config(tmp_path / "hf.json"), 0)
    save_model(model, tmp_path / "base")
    Tokenizer.bytes().save(tmp_path / "base")
    (tmp_path / "text").write_text("all work and no play makes jack a dull boy. " * 200)
    size = (tmp_path / "base" / "model.safetensors").stat().st_size
    program = (
        "import resource, sys; from llmctl.quantize.run import quantize; from llmctl.quantize.settings import QuantizeSettings;"
        "import torch, llmctl.quantize.run; torch.set_num_threads(1); torch.ones(600, 600) @ torch.ones(600, 600);"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "quantize(*sys.argv[1:3], QuantizeSettings(method=sys.argv[3], calibration=sys.argv[4], calibration_length=128, tolerance=9));"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)"
    )
    words = [tmp_path / "base", tmp_path / "out", method, tmp_path / "text"]
    done = subprocess.run([sys.executable, "-c", program, *map(str, words)], capture_output=True, text=True, check=True)
    assert size > 130e6 and int(done.stdout) < 0.6 * size
