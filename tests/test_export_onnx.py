"""Exported models on onnxruntime against transformers: at once, in padded batches, and continued from a cache."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil

import numpy as np
import pytest
import tokenizers
import torch

onnx = pytest.importorskip("onnx")
transformers = pytest.importorskip("transformers")

import family_checks as checks  # noqa: E402
import test_decoder_families as decoders  # noqa: E402
import test_encoder_families as encoders  # noqa: E402
import test_seq2seq_families as translators  # noqa: E402

from llmctl import lineage  # noqa: E402
from llmctl.chat.reuse import RememberingModel  # noqa: E402
from llmctl.embedding.embedder import pool  # noqa: E402
from llmctl.errors import CalledWrongly, CheckFailed, UserError  # noqa: E402
from llmctl.evaluate.likelihood import Fork, LikelihoodScorer  # noqa: E402
from llmctl.export.onnx import linear, quantization  # noqa: E402
from llmctl.export.onnx.export import export  # noqa: E402
from llmctl.export.onnx.settings import OnnxSettings  # noqa: E402
from llmctl.generation.complete import prepare  # noqa: E402
from llmctl.generation.decode import decode  # noqa: E402
from llmctl.generation.session import Session  # noqa: E402
from llmctl.generation.settings import Sampling, resolve  # noqa: E402
from llmctl.models.initialization import new_model  # noqa: E402
from llmctl.models.loading import load_model, read_config, save_model  # noqa: E402
from llmctl.models.shapes import for_parameters  # noqa: E402
from llmctl.quantize.run import quantize  # noqa: E402
from llmctl.quantize.settings import QuantizeSettings  # noqa: E402
from llmctl.run_onnx.opening import open_model  # noqa: E402
from llmctl.tokenizer import Tokenizer  # noqa: E402

TOLERANCE = 1e-4
MORE = ("llama-dynamic", "phi3-longrope", "phi3-window-partial", "qwen3_moe-mixed", "smollm3-windows")

SMALL_BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def exported(reference, **settings):
    out = reference.path / "onnx"
    export(reference.directory, out, OnnxSettings(**settings))
    for file in out.glob("*.onnx"):
        onnx.checker.check_model(file, full_check=not settings.get("fuse"))
    return open_model(out, "cpu")


def either_way(names, often):
    """Each plain and fused; of what only repeats others, the slower tests have the one that is not told apart."""
    return [
        pytest.param(
            name,
            fuse,
            id=f"{name}-{'fused' if fuse else 'plain'}",
            marks=() if name in often or fuse else (pytest.mark.slow,),
        )
        for name in names
        for fuse in (False, True)
    ]


OFTEN = ("llama", "gpt2", "gemma2", "mixtral", "phi3-longrope")


@pytest.mark.parametrize(("name", "fuse"), either_way([*decoders.FIRST, *MORE], OFTEN))
def test_decoders(name, fuse, tmp_path):
    """Alone, left-padded, and greedy from a cache in a batch of unequal prompts, beyond windows and LongRoPE's switch."""
    config = decoders.CONFIGS[name]
    if config.model_type == "llama" and fuse:  # GroupQueryAttention turns heads of 16 numbers at least
        config = transformers.LlamaConfig(**decoders.shape(hidden_size=64))
    reference = checks.reference(config, tmp_path)
    model = exported(reference, fuse=fuse)
    ids, mask = checks.token_ids(decoders.V, 2, 14), torch.ones(2, 14, dtype=torch.long)
    mask[1, :5] = 0
    with torch.no_grad():
        expected = reference.model(ids).logits
        alone = reference.model(ids[1:, 5:]).logits
    assert (model(ids) - expected).abs().max() < TOLERANCE
    assert (model(ids, mask)[1:, 5:] - alone).abs().max() < TOLERANCE
    if name != "llama-dynamic":  # its keys would have the angles of their time
        prompts = [checks.token_ids(decoders.V, 1, n, seed=n)[0].tolist() for n in (5, 1, 11)]
        theirs = [checks._their_greedy(reference.model, [prompt], 20)[0] for prompt in prompts]
        assert checks.our_greedy(model, prompts, 20, batch_size=3) == theirs


@pytest.mark.parametrize(("name", "fuse"), either_way(["bert", "roberta", "xlm-roberta", "esm2", "esm1b"], ("esm2",)))
def test_encoders(name, fuse, tmp_path):
    reference = encoders.written(name, tmp_path)
    model, inputs = exported(reference, fuse=fuse), encoders.inputs(reference)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        theirs = reference.model(**inputs, output_hidden_states=True)
    assert (model(**_ours(inputs)) - theirs.logits)[real].abs().max() < TOLERANCE
    states = model.hidden(**_ours(inputs))
    assert (states - theirs.hidden_states[-1])[real].abs().max() < TOLERANCE
    vectors = torch.empty(2, model.config.d_model)
    given = {**inputs, "token_type_ids": torch.zeros_like(inputs["input_ids"])}
    model.graph.run(given, {"sentence_embedding": vectors})
    assert (vectors - pool(theirs.hidden_states[-1], real, "mean")).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    ("name", "how"),
    [
        pytest.param("t5", {}, id="t5"),
        pytest.param("t5-v1.1", {"fuse": True}, id="t5-v1.1-fused"),
        pytest.param("bart", {"merged_decoder": True}, id="bart-merged"),
        pytest.param("mbart", {"fuse": True, "merged_decoder": True}, id="mbart-fused-merged"),
        pytest.param("t5-v1.1", {"merged_decoder": True}, id="t5-v1.1-merged", marks=pytest.mark.slow),
        pytest.param("bart", {"fuse": True}, id="bart-fused", marks=pytest.mark.slow),
        pytest.param("mbart", {}, id="mbart", marks=pytest.mark.slow),
    ],
)
def test_encoder_decoders(name, how, tmp_path):
    reference = checks.reference(translators.CONFIGS[name], tmp_path, transformers.AutoModelForSeq2SeqLM)
    model, vocab_size = exported(reference, **how), reference.vocab_size
    source, written = checks.token_ids(vocab_size, 2, 11).clamp(min=4), checks.token_ids(vocab_size, 2, 9, seed=4)
    mask = torch.ones_like(source)
    mask[1, 8:] = 0
    with torch.no_grad():
        expected = reference.model(input_ids=source, attention_mask=mask, decoder_input_ids=written).logits
    assert (model(source, mask, input_ids_BT=written) - expected).abs().max() < TOLERANCE
    cache, _ = model.begin([source[0].tolist(), source[1, :8].tolist()], [[0], [0]], 9)
    for place in range(9):
        logits = model.next_logits(written[:, place : place + 1], cache)
        assert (logits - expected[:, place]).abs().max() < TOLERANCE


@pytest.mark.parametrize("family", ["lstm", "gru"])
def test_recurrent_decoders(family, tmp_path):
    model = new_model(for_parameters(family, 20_000, 97, 64), seed=0)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    save_model(model, tmp_path / "model")
    export(tmp_path / "model", tmp_path / "onnx", OnnxSettings())
    ours = open_model(tmp_path / "onnx", "cpu")
    prompts = [checks.token_ids(97, 1, n, seed=n)[0].tolist() for n in (5, 1, 11)]
    assert checks.our_greedy(ours, prompts, 20, 3) == checks.our_greedy(model.eval(), prompts, 20, 3)


@pytest.fixture
def llama(tmp_path):
    """A reference whose checkpoint has a tokenizer."""
    config = transformers.LlamaConfig(**decoders.shape(vocab_size=257, hidden_size=64, max_position_embeddings=96))
    config.eos_token_id = 256
    reference = checks.reference(config, tmp_path)
    Tokenizer.bytes().save(reference.directory)
    return reference


@pytest.mark.parametrize("how", [[], ["--fuse"]], ids=["plain", "fused"])
def test_command_and_who_runs_its_result(llama, llmctl, tmp_path, how):
    """generate writes the checkpoint's own text from it; onnxruntime-genai does, as it is. The command's own part is tried once."""
    greedy = Sampling(max_new_tokens=24, temperature=0.0, seed=0, ignore_eos=True)
    expected = Session.open(llama.directory).begin("Once upon", greedy)
    list(Session.open(llama.directory).stream(expected))
    if how:
        path = llmctl("export-onnx", llama.directory, "-o", "out", *how).stdout.strip()
        told = llmctl("generate", path, "Once upon", "-n", 24, "--temp", 0, "--ignore-eos", "--provider", "cpu")
        assert told.stdout == f"Once upon{expected.text}\n"
    else:
        path = str(export(llama.directory, tmp_path / "out", OnnxSettings()).path)
        found = Session.open(path, provider="cpu").begin("Once upon", greedy)
        assert "".join(Session.open(path, provider="cpu").stream(found)) == expected.text
    assert json.loads((tmp_path / "out" / "llmctl.json").read_text())["metrics"]["greedy_equal"] == 64
    opsets = {entry.domain: entry.version for entry in onnx.load(f"{path}/model.onnx").opset_import}
    assert opsets == {"": 21, **({"com.microsoft": 1} if how else {})}
    genai = pytest.importorskip("onnxruntime_genai")
    model = genai.Model(path)
    settings = genai.GeneratorParams(model)
    ids = expected.prompt_ids
    settings.set_search_options(max_length=len(ids) + 24, min_length=len(ids) + 24, do_sample=False)
    generator = genai.Generator(model, settings)
    assert list(genai.Tokenizer(model).encode("Once upon")) == ids
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    first_end = next((i for i, token in enumerate(expected.ids) if token == 256), 24)
    assert list(generator.get_sequence(0))[len(ids) :][:first_end] == expected.ids[:first_end]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("fuse", [False, True], ids=["plain", "fused"])
def test_quantized_graph_computes_its_weights(llama, bits, fuse, monkeypatch):
    """Against transformers with each linear layer's weights rounded and restored, where onnxruntime rounds nothing else."""
    monkeypatch.setattr(linear, "FAST", 1)
    model = exported(llama, quantize=f"int{bits}", fuse=fuse, tolerance=10.0)
    with torch.no_grad():
        for name, parameter in llama.model.named_parameters():
            if "proj" in name or "lm_head" in name:
                codes, scales = quantization.rounded(parameter, bits, 32)
                parameter.copy_(quantization.restored(codes, scales, parameter.shape[1], bits))
        expected = llama.model(ids := checks.token_ids(257, 2, 20)).logits
    assert (model(ids) - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("fuse", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("llama", {"group_size": 16, "symmetric": False}),
        ("llama", {"format": "int8"}),
        ("gpt2", {"method": "gptq", "group_size": 32, "calibration": "text.txt"}),
        ("phi3", {"group_size": 48}),
    ],
    ids=["asymmetric", "rows", "activation-order", "odd-groups"],
)
def test_calibrated_codes_are_kept(name, how, fuse, tmp_path, monkeypatch, some_texts):
    """The graph has the checkpoint's own codes, and where onnxruntime does not round inputs computes the same."""
    monkeypatch.setattr(linear, "FAST", 1)
    monkeypatch.setenv("LLMCTL_KERNELS", "reference")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("\n".join(some_texts))
    config = transformers.GPT2Config(vocab_size=257, n_positions=64, n_embd=64, n_layer=2, n_head=2)
    if name != "gpt2":
        shape = decoders.shape(vocab_size=257, hidden_size=96, num_attention_heads=6, intermediate_size=96)
        config = type(decoders.CONFIGS[name])(**shape)
    reference = checks.reference(config, tmp_path)
    Tokenizer.bytes().save(reference.directory)
    quantize(reference.directory, tmp_path / "few", QuantizeSettings(**{"tolerance": 10.0, **how}))
    export(tmp_path / "few", tmp_path / "out", OnnxSettings(fuse=fuse))
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    assert sum(node.op_type == "MatMulNBits" for node in graph.node) >= 2 * 2
    ids = checks.token_ids(257, 2, 20)
    with torch.no_grad():
        expected = load_model(tmp_path / "few")(ids)
    assert (open_model(tmp_path / "out", "cpu")(ids) - expected).abs().max() < TOLERANCE


def test_rounding_keeps_the_largest_and_zero():
    weights = torch.randn(3, 40)
    weights[1] = 0
    for bits in (4, 8):
        codes, scales = quantization.rounded(weights, bits, 32)
        back = quantization.restored(codes, scales, 40, bits)
        step = scales.abs().repeat_interleave(32, 1)[:, :40]
        assert ((back - weights).abs() <= step + 1e-6).all() and not back[1].any()
        largest = weights[0, :32].abs().argmax()
        torch.testing.assert_close(back[0, largest], weights[0, largest])


def test_the_model_is_not_replaced(llama):
    before = sorted(llama.directory.iterdir())
    with pytest.raises(CalledWrongly, match="would replace .*, which is read"):
        export(llama.directory, llama.directory, OnnxSettings(overwrite=True))
    assert sorted(llama.directory.iterdir()) == before


def test_half_precision_and_data_files(llama):
    """The same weights inside the graph or beside it."""
    ids = checks.token_ids(257, 2, 20)
    inside, half = exported(llama)(ids), None
    for settings in ({"external_data_above": 0}, {"dtype": "float16"}):
        model = exported(llama, overwrite=True, **settings)
        assert (llama.path / "onnx" / "model.onnx.data").exists() == ("dtype" not in settings)
        half = model(ids)
        assert (half.float() - inside).abs().max() < (0.1 if "dtype" in settings else 1e-6)
    assert half.dtype == torch.float16


def test_a_tokenizer_that_genai_lacks_is_named(llama, tmp_path, caplog):
    vocabulary = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "<unk>": 2}, "<unk>"))
    vocabulary.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    vocabulary.save(str(llama.directory / "tokenizer.json"))
    exported(llama)
    assert "its model is WordLevel" in caplog.text and not (llama.path / "onnx" / "genai_config.json").exists()


def test_adapters_are_folded_in(llama, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(llama.model, config)
    theirs.save_pretrained(tmp_path / "adapter")
    export(llama.directory, tmp_path / "out", OnnxSettings(adapter=(str(tmp_path / "adapter"),)))
    ids = checks.token_ids(257, 2, 20)
    with torch.no_grad():
        assert (open_model(tmp_path / "out", "cpu")(ids) - theirs(ids).logits).abs().max() < TOLERANCE
    with pytest.raises(CalledWrongly, match="takes no adapters"):
        Session.open(tmp_path / "out", adapters=[str(tmp_path / "adapter")])


@pytest.mark.parametrize(
    ("name", "how"),
    [("llama", {}), ("llama", {"fuse": True}), ("gpt2", {"fuse": True}), ("bert", {}), ("llama", {"dtype": "float16"})],
    ids=["plain", "fused", "gpt2", "encoder", "half"],
)
def test_adapters_are_inputs(name, how, tmp_path):
    """Without one the base, with one or two what peft computes: in llmctl, and with the files in onnxruntime and genai."""
    peft = pytest.importorskip("peft")
    task, config = "CausalLM", transformers.LlamaConfig(**decoders.shape(vocab_size=257, hidden_size=64))
    targets = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"], "bert": ["query", "dense"]}[
        name
    ]
    if name == "gpt2":
        config = transformers.GPT2Config(vocab_size=257, n_positions=40, n_embd=64, n_layer=2, n_head=4)
    elif name == "bert":
        task, config = "MaskedLM", transformers.BertConfig(vocab_size=257, **SMALL_BERT)
    reference = checks.reference(config, tmp_path, getattr(transformers, f"AutoModelFor{task}"))
    Tokenizer.bytes().save(reference.directory)
    ids = checks.token_ids(257, 2, 20)
    with torch.no_grad():
        base = reference.model(ids).logits
    paths = [tmp_path / "first", tmp_path / "second"]
    for rank, path in enumerate(paths, 3):
        lora = peft.LoraConfig(r=rank, lora_alpha=9, target_modules=targets, init_lora_weights=False)
        theirs = peft.get_peft_model(copy.deepcopy(reference.model), lora)
        theirs.save_pretrained(path)
    whole = peft.PeftModel.from_pretrained(copy.deepcopy(reference.model), paths[0])
    with torch.no_grad():
        expected = whole(ids).logits
    out, tolerance = tmp_path / "out", 0.02 if how.get("dtype") else TOLERANCE
    export(reference.directory, out, OnnxSettings(adapter=(str(paths[0]),), adapter_inputs=True, **how))
    assert (expected - base).abs().max() > 0.1 + tolerance
    assert (open_model(out, "cpu")(ids) - base).abs().max() < tolerance
    assert (open_model(out, "cpu", adapters=[(paths[0], 1.0)])(ids) - expected).abs().max() < tolerance
    both = peft.PeftModel.from_pretrained(reference.model, paths[0], "first")
    both.load_adapter(paths[1], "second")
    both.add_weighted_adapter(["first", "second"], [0.3, 0.6], "both", combination_type="cat")
    both.set_adapter("both")
    with torch.no_grad():
        expected_of_both = both(ids).logits
    two = open_model(out, "cpu", adapters=list(zip(paths, (0.3, 0.6))))
    assert (two(ids) - expected_of_both).abs().max() < tolerance
    if name == "llama":
        _in_onnxruntime(out, ids, expected, tolerance)
    if name == "llama" and not how.get("dtype"):
        _in_genai(out, ids, expected)


def _in_onnxruntime(out, ids, expected, tolerance):
    """The file of an adapter beside the graph."""
    import onnxruntime

    file = str(out / "adapters" / "first.onnx_adapter")
    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    loaded, options = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
    loaded.Load(file)
    options.add_active_adapter(loaded)
    feeds = {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()}
    places = {place.name: place for place in session.get_inputs()}
    if "position_ids" in places:
        feeds["position_ids"] = torch.arange(ids.shape[1]).expand_as(ids).numpy()
    for place in places.values():
        if place.name.startswith("past_"):
            dtype = np.float16 if place.type == "tensor(float16)" else np.float32
            feeds[place.name] = np.zeros((2, place.shape[1], 0, place.shape[3]), dtype)
    found = torch.from_numpy(session.run(["logits"], feeds, options)[0])
    assert (found.float() - expected).abs().max() < tolerance


def _in_genai(out, ids, expected):
    file = str(out / "adapters" / "first.onnx_adapter")
    genai = pytest.importorskip("onnxruntime_genai")
    model = genai.Model(str(out))
    adapters, settings = genai.Adapters(model), genai.GeneratorParams(model)
    adapters.load(file, "first")
    settings.set_search_options(max_length=ids.shape[1] + 1, do_sample=False)
    generator = genai.Generator(model, settings)
    generator.set_active_adapter(adapters, "first")
    generator.append_tokens(ids[0].tolist())
    generator.generate_next_token()
    assert int(generator.get_sequence(0)[-1]) == int(expected[0, -1].argmax())


def test_adapters_that_cannot_be_inputs(llama, tmp_path):
    peft = pytest.importorskip("peft")
    cases = {
        "dora": ({"use_dora": True, "target_modules": ["q_proj"]}, "only plain LoRA"),
        "embedding": ({"target_modules": ["embed_tokens"]}, "only plain LoRA"),
        "whole": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "only plain LoRA"),
        "other": ({"target_modules": ["k_proj"]}, "has no input layers.0.mixer.k_proj.lora_A"),
        "good": ({"target_modules": ["q_proj"]}, None),
    }
    for name, (how, _) in cases.items():
        theirs = peft.get_peft_model(copy.deepcopy(llama.model), peft.LoraConfig(r=2, init_lora_weights=False, **how))
        theirs.save_pretrained(tmp_path / name)
    good = OnnxSettings(adapter=(str(tmp_path / "good"),), adapter_inputs=True)
    export(llama.directory, tmp_path / "out", good)
    for name, (_, told) in cases.items():
        if name in ("dora", "embedding", "whole"):
            with pytest.raises(UserError, match=told):
                export(llama.directory, tmp_path / "no", dataclasses.replace(good, adapter=(str(tmp_path / name),)))
    with pytest.raises(UserError, match=cases["other"][1]):
        Session.open(tmp_path / "out", adapters=[str(tmp_path / "other")])
    with pytest.raises(CalledWrongly, match="is what an adapter says"):
        export(llama.directory, tmp_path / "no", OnnxSettings(adapter_inputs=True))
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(tmp_path / "good", tmp_path / "elsewhere" / "good")
    both = (str(tmp_path / "good"), str(tmp_path / "elsewhere" / "good"))
    with pytest.raises(CalledWrongly, match="two adapters are called good"):
        export(llama.directory, tmp_path / "no", dataclasses.replace(good, adapter=both))
    lineage.write(tmp_path / "good", lineage.Lineage("finetune", parent_sha256="0" * 64))
    with pytest.raises(UserError, match="trained on another base"):
        Session.open(tmp_path / "out", adapters=[str(tmp_path / "good")])
    parent = lineage.weights_sha256(llama.directory)
    lineage.write(tmp_path / "good", lineage.Lineage("finetune", parent_sha256=parent))
    assert Session.open(tmp_path / "out", adapters=[str(tmp_path / "good")])
    assert not (tmp_path / "no").exists()


def test_a_result_that_differs_is_not_left(llama, tmp_path):
    with pytest.raises(CheckFailed, match="does not compute"):
        export(llama.directory, tmp_path / "out", OnnxSettings(quantize="int4", tolerance=0.0))
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_a_fused_graph_has_no_more_than_it_needs(llama):
    """All that is computed reaches an output; GroupQueryAttention counts by itself, so that no places are."""
    exported(llama, fuse=True)
    graph = onnx.load(llama.path / "onnx" / "model.onnx").graph
    used = {name for node in graph.node for name in node.input} | {place.name for place in graph.output}
    assert not [node.name for node in graph.node if not used.intersection(node.output)]
    assert not {"Range", "Identity"}.intersection(node.op_type for node in graph.node)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"opset": 99}, "--opset 99: expected 20 to"),
        ({"opset": 12}, "--opset 12: expected 20 to"),
        ({"provider": "abacus"}, "no provider 'abacus'"),
        ({"dtype": "bfloat16"}, "does not compute in it"),
        ({"merged_decoder": True}, "no encoder-decoder"),
        ({"group_size": 48}, "power of 2"),
    ],
)
def test_what_cannot_be_is_said_first(llama, tmp_path, settings, told):
    with pytest.raises(UserError, match=told):
        export(llama.directory, tmp_path / "out", OnnxSettings(**settings))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["mamba", "mamba2", "longformer"])
def test_families_without_an_onnx_form(family, tmp_path):
    config = for_parameters(family, 100_000, 97, 64)
    save_model(new_model(config, seed=0), tmp_path / "model")
    with pytest.raises(UserError, match=f"{family} cannot be exported"):
        export(tmp_path / "model", tmp_path / "out", OnnxSettings())


def test_classifiers(tmp_path):
    """Of encoders and decoders, as classify calls them."""
    shapes = {"bert": encoders.CONFIGS["bert"], "llama": decoders.CONFIGS["llama"]}
    for name, config in shapes.items():
        config.num_labels, config.pad_token_id = 3, 0
        reference = checks.reference(config, tmp_path / name, transformers.AutoModelForSequenceClassification)
        model, ids = exported(reference), checks.token_ids(97, 2, 12).clamp(min=1)
        mask = torch.ones_like(ids)
        mask[1, 9:], ids[1, 9:] = 0, 0
        ours = load_model(reference.directory)
        with torch.no_grad():
            assert (model(ids, mask) - ours(ids, mask)).abs().max() < TOLERANCE
            assert model.config.classifier == read_config(reference.directory).classifier


def _ours(inputs: dict) -> dict:
    return {f"{name}_BT": tensor for name, tensor in inputs.items()}


@pytest.mark.parametrize("fuse", [False, True], ids=["plain", "fused"])
def test_chat_and_eval_of_an_exported_model(llama, fuse, tmp_path):
    """Log-likelihoods of continuations, and turns that go on in a cache, as the checkpoint's own."""
    exported(llama, fuse=fuse)
    forks = [Fork([1, 2, 3, 4], [[5, 6, 7], [8]]), Fork([9], [[1, 2], [3, 4, 5, 6]])]
    found = []
    for path in (llama.directory, llama.path / "onnx"):
        session = Session.open(path, device="cpu")
        scores = dict(LikelihoodScorer(session.model, None).score(forks))
        remembering, sampling = RememberingModel(session.model), resolve(Sampling(max_new_tokens=12, temperature=0.0))
        texts = []
        for prompt in ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 9, 9], [1, 2, 7]):
            completion = prepare(session.model, prompt, sampling)
            list(decode(remembering, [completion]))
            texts.append(completion.ids)
        found.append(([each.logprob for number in (0, 1) for each in scores[number]], texts, remembering.n_reused))
    assert found[0][1:] == found[1][1:] and found[1][2] > 0
    torch.testing.assert_close(torch.tensor(found[0][0]), torch.tensor(found[1][0]), atol=1e-4, rtol=1e-4)
