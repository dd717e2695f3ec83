"""`llmctl export-gguf` and reading GGUF: against llama.cpp where it is installed, and there and back in any case."""

from __future__ import annotations

import collections
import copy
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")

import family_checks as checks  # noqa: E402
from test_decoder_families import CONFIGS, GEMMA2, GEMMA3, LLAMA3, SHAPE, YARN, longrope  # noqa: E402
from test_seq2seq_families import untie  # noqa: E402
from test_tokenizer_sentencepiece import T5_IDS, train  # noqa: E402, F401

from llmctl import lineage  # noqa: E402
from llmctl.errors import CalledWrongly, UserError  # noqa: E402
from llmctl.export.c import check  # noqa: E402
from llmctl.export.c.export import export as export_c  # noqa: E402
from llmctl.export.c.settings import ExportCSettings  # noqa: E402
from llmctl.export.gguf.export import export  # noqa: E402
from llmctl.export.gguf.settings import ExportGgufSettings  # noqa: E402
from llmctl.finetune.adapter import attach, save  # noqa: E402
from llmctl.finetune.assembly import Assembly  # noqa: E402
from llmctl.finetune.merge import merge  # noqa: E402
from llmctl.finetune.merge_settings import MergeSettings  # noqa: E402
from llmctl.finetune.methods import Lora  # noqa: E402
from llmctl.generation.session import Session  # noqa: E402
from llmctl.generation.settings import Sampling  # noqa: E402
from llmctl.gguf import k_quants, vocabulary  # noqa: E402
from llmctl.gguf.file import GgufFile, GgufTensors  # noqa: E402
from llmctl.inspection import inspect  # noqa: E402
from llmctl.models.loading import load_model, read_config, save_model  # noqa: E402
from llmctl.models.quantized_linear import QuantizedLinear  # noqa: E402
from llmctl.quantize.run import quantize  # noqa: E402
from llmctl.quantize.settings import QuantizeSettings  # noqa: E402
from llmctl.tokenizer import Tokenizer  # noqa: E402

LLAMA_CPP = os.environ.get("LLMCTL_LLAMA_CPP_PYTHON") or (
    sys.executable if importlib.util.find_spec("llama_cpp") else None
)
TEXTS = ["the cat's hats, 1234 dogs\n\n  do nothing;", "HTTPServer don't she'll 42 naïve Ünïcode 東京", "   a  b\t\n"]
WIDE = SHAPE | {"hidden_size": 64, "intermediate_size": 96}
LONG = 256  # llama.cpp takes the factors for long texts wherever it is opened for more, and opens no file for less
NO_CAPS = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
STATES = {"hidden_size": 64, "num_hidden_layers": 3, "state_size": 16, "bos_token_id": 0, "eos_token_id": 0}
FAMILIES = {
    "llama": transformers.LlamaConfig(**WIDE),
    "llama-bias-llama3": transformers.LlamaConfig(**WIDE, attention_bias=True, mlp_bias=True, **LLAMA3),
    "llama-yarn-tied": transformers.LlamaConfig(**WIDE, tie_word_embeddings=True, **YARN),
    "mistral": transformers.MistralConfig(**WIDE, sliding_window=None),
    "mixtral": transformers.MixtralConfig(**WIDE, num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "qwen2": transformers.Qwen2Config(**WIDE),
    "qwen3": transformers.Qwen3Config(**WIDE, head_dim=32),
    "qwen3_moe": transformers.Qwen3MoeConfig(
        **WIDE, head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True
    ),
    "gemma": transformers.GemmaConfig(**WIDE, head_dim=32),
    "gemma2": GEMMA2(**WIDE, head_dim=32, sliding_window=6, query_pre_attn_scalar=32),
    "gemma3_text": GEMMA3(
        **WIDE | {"num_hidden_layers": 7}, head_dim=32, sliding_window=6, query_pre_attn_scalar=32, **NO_CAPS
    ),
    "phi3": transformers.Phi3Config(**WIDE),
    "phi3-longrope": transformers.Phi3Config(**WIDE, original_max_position_embeddings=LONG, **longrope(8)),
    "olmo2": transformers.Olmo2Config(**WIDE),
    "smollm3": transformers.SmolLM3Config(**WIDE | {"num_hidden_layers": 5}),
    "gpt2": transformers.GPT2Config(n_positions=40, n_embd=64, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=0),
    "mamba": transformers.MambaConfig(**STATES, time_step_rank=32),
    "mamba-untied": transformers.MambaConfig(**STATES, tie_word_embeddings=False, time_step_rank=7),
    "mamba2": transformers.Mamba2Config(**STATES, num_heads=8, head_dim=16, n_groups=2),
}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train_bpe(["the cat sat on a mat and saw two dogs run by his red house"] * 4, 300)


@pytest.fixture(scope="module")
def checkpoint(tokenizer, tmp_path_factory):
    """`checkpoint(name)`: the directory of a random model of a family, with a tokenizer."""
    made = {}

    def make(name: str) -> Path:
        if name not in made:
            config = copy.deepcopy(FAMILIES[name])
            config.vocab_size = tokenizer.vocab_size + 3
            config.max_position_embeddings = 2 * LONG if name == "phi3-longrope" else 40
            directory = checks.reference(config, tmp_path_factory.mktemp(name)).directory
            tokenizer.save(directory)
            made[name] = directory
        return made[name]

    return make


@pytest.fixture(scope="module")
def llama_cpp():
    """`llama_cpp(rows)`: what tests/programs/llama_cpp_greedy.py answers to each; skipped without llama-cpp-python."""
    if LLAMA_CPP is None:
        pytest.skip("no llama-cpp-python here; LLMCTL_LLAMA_CPP_PYTHON may name a Python that has it")
    program = Path(__file__).parent / "programs" / "llama_cpp_greedy.py"

    def ask(rows: list[dict]) -> list[dict]:
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        result = subprocess.run(
            [LLAMA_CPP, program], input=lines, capture_output=True, text=True, env=environment, timeout=300
        )
        assert result.returncode == 0, result.stderr[-2000:]
        return [json.loads(line) for line in result.stdout.splitlines()]

    return ask


@pytest.mark.parametrize("name", list(FAMILIES))
def test_there_and_back(name, checkpoint, tmp_path):
    """What is read from the file is the checkpoint: each parameter, and the logits."""
    base = checkpoint(name)
    found = export(base, tmp_path / "model.gguf", ExportGgufSettings(type="f32"))
    assert found.agreement.kl_divergence < 1e-6
    ours, again = load_model(base), load_model(tmp_path / "model.gguf")
    pairs = zip(ours.state_dict().items(), again.state_dict().items(), strict=True)
    for (key, tensor), (other, value) in pairs:
        assert key == other and (tensor - value).abs().max() < 1e-6, key
    text = checks.token_ids(ours.config.vocab_size, 2, 30)
    with torch.no_grad():
        assert (ours(text) - again(text)).abs().max() < 1e-4


def test_llama_cpp_computes_the_same(checkpoint, llama_cpp, tmp_path):
    """Ids of texts, and greedy tokens of every family in float32."""
    rows, expected, ids = [], [], []
    for name in FAMILIES:
        base, file = checkpoint(name), tmp_path / f"{name}.gguf"
        export(base, file, ExportGgufSettings(type="f32"))
        tokenizer, model = Tokenizer.load(base), load_model(base)
        for text in ("the cat", TEXTS[0]):
            prompt = tokenizer.encode(text)[:12]
            rows.append({"file": str(file), "ids": prompt, "count": 20, "context": LONG})
            expected.append(checks.our_greedy(model, [prompt], 20, 1)[0])
            ids.append(prompt)
    answers = llama_cpp(rows)
    wrong = {
        f"{Path(row['file']).stem} {ids_}": (answer.get("error") or answer["greedy"], tokens)
        for row, ids_, answer, tokens in zip(rows, ids, answers, expected, strict=True)
        if answer.get("greedy") != tokens
    }
    assert not wrong


def test_stories_in_llama_cpp_and_here(data, llmctl, llama_cpp, tmp_path):
    model = data / "models" / "stories260K"
    session = Session.open(model, device="cpu")
    rows = []
    for kind in ("f32", "f16", "q8_0", "q4_k"):
        result = llmctl("export-gguf", model, "-o", f"{kind}.gguf", "--type", kind)
        assert result.stdout == f"{tmp_path / kind}.gguf\n" and "same first choice" in result.stderr
        rows.append({"file": str(tmp_path / f"{kind}.gguf"), "text": "Once upon a time", "count": 60})
    greedy = session.begin("Once upon a time", Sampling(max_new_tokens=60, temperature=0.0))
    text = "".join(session.stream(greedy))
    answers = llama_cpp(rows + [{**rows[0], "text": each, "count": 1} for each in TEXTS])
    assert [answer["prompt"] for answer in answers[4:]] == [session.tokenizer.encode(each) for each in TEXTS]
    assert answers[0]["greedy"] == answers[1]["greedy"] == greedy.ids
    assert all(answer["greedy"][:8] == greedy.ids[:8] for answer in answers[2:4])
    result = llmctl("generate", "f32.gguf", "Once upon a time", "-n", 60, "--temp", 0)
    assert result.stdout == f"Once upon a time{text}\n"


def test_tokens_of_byte_level_tokenizers(data, llama_cpp, tmp_path):
    """GPT-2's own vocabulary, and the words that Qwen and Llama 3 cut."""
    from llmctl.tokenization import byte_level, training

    tokenizers = {"gpt2": Tokenizer.load(data / "tokenizers" / "gpt2")}
    trained = Tokenizer.train_bpe(TEXTS * 20, 400)
    for name, pattern in (("qwen2", None), ("llama3", byte_level.CL100K_PATTERN), ("gpt-4o", byte_level.O200K_PATTERN)):
        spec = json.loads(trained.json)
        if pattern:
            spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = pattern
        spec["model"]["ignore_merges"] = name == "llama3"
        tokenizers[name] = Tokenizer(json.dumps(spec), {**training.CONFIG, "chat_template": "{{ messages }}"})
    rows, expected = [], []
    for name, tokenizer in tokenizers.items():
        config = transformers.LlamaConfig(
            **SHAPE | {"vocab_size": tokenizer.vocab_size, "num_hidden_layers": 1, "eos_token_id": tokenizer.eos_id}
        )
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / name)
        tokenizer.save(tmp_path / name)
        export(tmp_path / name, tmp_path / f"{name}.gguf", ExportGgufSettings())
        again = Tokenizer.load(tmp_path / f"{name}.gguf")
        assert again.chat_template == tokenizer.chat_template and again.eos_id == tokenizer.eos_id
        for text in [*TEXTS, "<|endoftext|>a"]:
            rows.append({"file": str(tmp_path / f"{name}.gguf"), "text": text, "count": 1})
            expected.append(tokenizer.encode(text))
            assert again.encode(text) == expected[-1]
    assert [answer.get("prompt") for answer in llama_cpp(rows)] == expected


UNIGRAM = {
    "t5": {"normalization_rule_name": "nmt_nfkc", **T5_IDS},
    "plain": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "folded": {"normalization_rule_name": "nmt_nfkc_cf", "vocab_size": 500},
}


@pytest.fixture(scope="module")
def unigram(train, tmp_path_factory):  # noqa: F811
    """(file, tokenizer) of models whose tokenizers are SentencePiece's unigram, and one as transformers writes T5's."""
    made = {}
    for name, changes in UNIGRAM.items():
        directory = tmp_path_factory.mktemp(name)
        (directory / "tokenizer.model").write_bytes(train(model_type="unigram", **changes))
        made[name] = Tokenizer.load(directory)
    spec = json.loads(made["t5"].json)
    steps = spec["normalizer"]["normalizers"]
    table = next(step for step in steps if step["type"] == "Precompiled")
    strip = {"type": "Strip", "strip_left": False, "strip_right": True}
    spaces = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"}
    spec["normalizer"] = {"type": "Sequence", "normalizers": [table, strip, spaces]}
    spec["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    made["theirs"] = Tokenizer(json.dumps(spec), made["t5"].config)
    files = {}
    for name, tokenizer in made.items():
        directory = tmp_path_factory.mktemp(name)
        config = transformers.LlamaConfig(
            **SHAPE | {"vocab_size": tokenizer.vocab_size + 2, "num_hidden_layers": 1, "eos_token_id": tokenizer.eos_id}
        )
        transformers.LlamaForCausalLM(config).save_pretrained(directory / "base")
        tokenizer.save(directory / "base")
        export(directory / "base", directory / "m.gguf", ExportGgufSettings())
        files[name] = directory / "m.gguf", tokenizer
    return files


WORDS = [*TEXTS, "Alice was ½ ﬁne, the  cat", " two  spaces ", "Ünïcode ① が ドア Ⅳ e\u0301\u200b", "a</s>the cat"]


@pytest.mark.parametrize("name", [*UNIGRAM, "theirs"])
def test_unigram_tokenizers_there_and_back(name, unigram):
    file, tokenizer = unigram[name]
    again = Tokenizer.load(file)
    assert [again.encode(text) for text in WORDS] == [tokenizer.encode(text) for text in WORDS]
    assert again.decode(again.encode("the cat sat")) == tokenizer.decode(tokenizer.encode("the cat sat"))


def test_unigram_tokenizers_in_llama_cpp(unigram, llama_cpp):
    rows = [{"file": str(file), "text": text, "count": 1} for file, _ in unigram.values() for text in WORDS]
    expected = [tokenizer.encode(text) for _, tokenizer in unigram.values() for text in WORDS]
    assert [answer.get("prompt") for answer in llama_cpp(rows)] == expected


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"byte_fallback": True}, "falls back on bytes"),
        ({"add_dummy_prefix": False}, "trims spaces and puts none in front"),
    ],
    ids=["bytes", "no-prefix"],
)
def test_unigram_tokenizers_that_llama_cpp_takes_otherwise(changes, told, train, tmp_path):  # noqa: F811
    (tmp_path / "tokenizer.model").write_bytes(train(model_type="unigram", vocab_size=500, **changes))
    with pytest.raises(UserError, match=f"the tokenizer has no GGUF form: a unigram model that {told}"):
        vocabulary.keys(Tokenizer.load(tmp_path), 600)


SEQ2SEQ = transformers.AutoModelForSeq2SeqLM
T5 = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
T5S = {
    "relu-tied": transformers.T5Config(**T5 | {"num_layers": 3}, num_decoder_layers=2),
    "gated": transformers.T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "gated-tied": transformers.T5Config(**T5, feed_forward_proj="gated-gelu", scale_decoder_outputs=False),
}


@pytest.fixture(scope="module")
def t5(unigram, tmp_path_factory):
    """Directories of random encoder-decoders, with T5's tokenizer."""
    made, tokenizer = {}, unigram["t5"][1]
    for name, config in T5S.items():
        config, is_tied = copy.deepcopy(config), config.tie_word_embeddings
        config.vocab_size = tokenizer.vocab_size + 4
        made[name] = checks.reference(config, tmp_path_factory.mktemp(name), SEQ2SEQ, spread=0.3).directory
        if not is_tied:
            untie(load_model(made[name]), made[name])
        tokenizer.save(made[name])
    return made


@pytest.mark.parametrize("name", list(T5S))
def test_encoder_decoders(name, t5, tmp_path):
    """What is read from the file computes the same; a head's scale has become part of it."""
    found = export(t5[name], tmp_path / "m.gguf", ExportGgufSettings(type="f32"))
    assert found.agreement.kl_divergence < 1e-6
    ours, again = load_model(t5[name]), load_model(tmp_path / "m.gguf")
    source, written = (
        checks.token_ids(ours.config.vocab_size, 2, 11),
        checks.token_ids(ours.config.vocab_size, 2, 9, seed=1),
    )
    with torch.no_grad():
        assert (ours(source, input_ids_BT=written) - again(source, input_ids_BT=written)).abs().max() < 1e-4
    assert again.config.decoder_start_id == 0 and again.config.head.scale == 1.0
    export(t5[name], tmp_path / "q.gguf", ExportGgufSettings(type="q4_k", tolerance=20.0))
    assert load_model(tmp_path / "q.gguf").config == again.config


def test_encoder_decoders_in_llama_cpp(t5, llama_cpp, tmp_path):
    rows, expected = [], []
    for name, base in t5.items():
        export(base, tmp_path / f"{name}.gguf", ExportGgufSettings(type="f32"))
        tokenizer, model = Tokenizer.load(base), load_model(base)
        for text in TEXTS[:2]:
            source = tokenizer.encode(text)
            rows.append({"file": str(tmp_path / f"{name}.gguf"), "source": source, "count": 20})
            written = [model.config.decoder_start_id]
            while len(written) <= 20:
                with torch.no_grad():
                    logits_BTV = model(torch.tensor([source]), input_ids_BT=torch.tensor([written]))
                written.append(int(logits_BTV[0, -1].argmax()))
            expected.append(written[1:])
    assert [answer.get("error") or answer["greedy"] for answer in llama_cpp(rows)] == expected
    assert max(len(set(tokens)) for tokens in expected) > 3


@pytest.fixture(scope="module")
def bert(data, tmp_path_factory):
    """A random BERT with the vocabulary of the real one."""
    config = transformers.BertConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, max_position_embeddings=64
    )
    config.vocab_size = len((data / "tokenizers" / "bert" / "vocab.txt").read_text().splitlines())
    path = tmp_path_factory.mktemp("bert")
    directory = checks.reference(config, path, transformers.AutoModelForMaskedLM, spread=0.05).directory
    shutil.copy(data / "tokenizers" / "bert" / "vocab.txt", directory)
    return directory


def test_encoders(bert, tmp_path):
    """Ids, and hidden states: the head is not in the file."""
    found = export(bert, tmp_path / "bert.gguf", ExportGgufSettings(type="f32"))
    assert found.agreement.least_cosine > 0.99999
    tokenizer, text = Tokenizer.load(bert), "Ünaffable, 東京!"
    assert Tokenizer.load(tmp_path / "bert.gguf").encode(text) == tokenizer.encode(text)
    ids = torch.tensor([tokenizer.encode(text)])
    again = load_model(tmp_path / "bert.gguf")
    with torch.no_grad():
        assert (load_model(bert).hidden(ids) - again.hidden(ids)).abs().max() < 1e-5
        with pytest.raises(UserError, match="base model"):
            again(ids)


def test_encoders_in_llama_cpp(bert, llama_cpp, tmp_path):
    """Ids of texts, and mean-pooled vectors; llama.cpp's GELU is the one by tanh."""
    export(bert, tmp_path / "bert.gguf", ExportGgufSettings(type="f32"))
    tokenizer, model = Tokenizer.load(bert), load_model(bert)
    texts = ["the cat sat on the mat", "Unaffable naïve café, 42 things!"]
    answers = llama_cpp([{"file": str(tmp_path / "bert.gguf"), "embed": text} for text in texts])
    for text, answer in zip(texts, answers, strict=True):
        assert answer["prompt"] == tokenizer.encode(text)
        with torch.no_grad():
            expected = model.hidden(torch.tensor([tokenizer.encode(text)]))[0].mean(0)
        assert torch.cosine_similarity(torch.tensor(answer["vector"]), expected, dim=0) > 0.9999


@pytest.mark.parametrize(
    "kind, writer, most", [("Q4_K", k_quants.quantize_q4_k, 0.075), ("Q6_K", k_quants.quantize_q6_k, 0.019)]
)
def test_k_quants(kind, writer, most):
    """The library reads what we wrote; the error on normal values is what llama.cpp's own quantization has."""
    values = np.random.default_rng(0).standard_normal((8, 1024)).astype(np.float32)
    values[0] = 0
    values[1, 300:500] = 0
    values[2] = np.abs(values[2]) + 3
    values[3] *= 0.01
    values[4, 7] = 300
    again = gguf.quants.dequantize(writer(values), gguf.GGMLQuantizationType[kind])
    errors = np.sqrt(((again - values) ** 2).mean(1) / (values**2).mean(1).clip(1e-30))
    assert errors[0] == 0 and np.median(errors[5:]) < most and errors[1:].max() < 2 * most


def test_quantized_types(checkpoint, tmp_path):
    sizes = {}
    for kind in ("bf16", "q8_0", "q5_0", "q4_0"):
        found = export(checkpoint("qwen2"), tmp_path / f"{kind}.gguf", ExportGgufSettings(type=kind, tolerance=20.0))
        sizes[kind] = found.nbytes
        assert read_config(tmp_path / f"{kind}.gguf").family == "qwen2"
    record, *rows = inspect(tmp_path / "q4_0.gguf")
    assert record["family"] == "qwen2" and record["vocab_size"] == record["tokenizer"]["vocab_size"]
    assert record["bytes_per_dtype"].keys() == {"f32", "q8_0", "q4_0"} and len(rows) == record["tensors"]
    assert sizes["bf16"] > sizes["q8_0"] > sizes["q5_0"] > sizes["q4_0"]
    assert load_model(tmp_path / "bf16.gguf").embed_tokens.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "name, kind",
    [
        ("llama", "q8_0"),
        ("gpt2", "q4_0"),
        ("phi3", "q8_0"),
        ("phi3", "q4_0"),
        ("mixtral", "q4_0"),
        ("mamba", "q8_0"),
        ("mamba2", "q4_0"),
    ],
)
def test_packed_matrices_stay_packed(name, kind, checkpoint, tmp_path):
    """Products with them give what the dequantized ones give, and a save has these."""
    export(checkpoint(name), tmp_path / "m.gguf", ExportGgufSettings(type=kind, tolerance=20.0))
    model = load_model(tmp_path / "m.gguf")
    assert any(isinstance(module, QuantizedLinear) for module in model.modules())
    (tmp_path / "saved").mkdir()
    save_model(model, tmp_path / "saved")
    plain = load_model(tmp_path / "saved")
    assert not any(isinstance(module, QuantizedLinear) for module in plain.modules())
    text = checks.token_ids(model.config.vocab_size, 2, 20)
    with torch.no_grad():
        one, other = model(text), plain(text)
    assert (one - other).norm() < 0.05 * other.norm()


def test_quantized_checkpoints_are_exported(checkpoint, tmp_path):
    quantize(checkpoint("llama"), tmp_path / "int8", QuantizeSettings(method="rtn", tolerance=20.0))
    export(tmp_path / "int8", tmp_path / "m.gguf", ExportGgufSettings(type="f32"))
    ours, again = load_model(tmp_path / "int8", "float32"), load_model(tmp_path / "m.gguf")
    text = checks.token_ids(ours.config.vocab_size, 1, 20)
    with torch.no_grad():
        assert (ours(text) - again(text)).norm() < 0.05 * again(text).norm()


def test_the_model_is_not_replaced(checkpoint, tmp_path):
    export(checkpoint("llama"), tmp_path / "m.gguf", ExportGgufSettings(type="f32"))
    before = (tmp_path / "m.gguf").read_bytes()
    with pytest.raises(CalledWrongly, match="would replace .*m.gguf, which is read"):
        export(tmp_path / "m.gguf", tmp_path / "m.gguf", ExportGgufSettings(overwrite=True))
    assert (tmp_path / "m.gguf").read_bytes() == before


def test_all_tokens_that_end_a_text_are_kept(checkpoint, caplog, tmp_path):
    shutil.copytree(checkpoint("llama"), tmp_path / "base")
    for ends in ([5, 0, 9], [5, 0, 9, 11]):
        (tmp_path / "base" / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        export(tmp_path / "base", tmp_path / "m.gguf", ExportGgufSettings(overwrite=True))
        found = Session.open(tmp_path / "m.gguf").marks.ends
        assert found == {0, 5, 9} and ("left out: [11]" in caplog.text) == (len(ends) > 3)


def test_adapters_know_their_file(checkpoint, tmp_path):
    """An adapter that was trained over a .gguf names it, and is refused over another."""
    for name in ("llama", "qwen2"):
        export(checkpoint(name), tmp_path / f"{name}.gguf", ExportGgufSettings())
    base, other, adapter = tmp_path / "llama.gguf", tmp_path / "qwen2.gguf", tmp_path / "adapter"
    told = {"peft_type": "LORA", "base_model_name_or_path": str(base)}
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps(told))
    lineage.write(adapter, lineage.Lineage("finetune", parent_sha256=lineage.weights_sha256(base)))
    assert Assembly.find(adapter) == Assembly.find(base, [str(adapter)])
    with pytest.raises(UserError, match="trained on another base"):
        Assembly.find(other, [str(adapter)])
    moved = base.rename(tmp_path / "moved.gguf")
    assert Assembly.find(moved, [str(adapter)]).base == moved


@pytest.mark.parametrize("name, kind", [("llama", "q4_0"), ("gpt2", "q8_0")])
def test_packed_matrices_stay_packed_in_onnx(name, kind, checkpoint, monkeypatch, tmp_path):
    onnx = pytest.importorskip("onnx")
    from llmctl.export.onnx import check as check_onnx
    from llmctl.export.onnx import linear
    from llmctl.export.onnx.check import Checked
    from llmctl.export.onnx.export import export as export_onnx
    from llmctl.export.onnx.settings import OnnxSettings
    from llmctl.run_onnx.opening import open_model

    monkeypatch.setattr(linear, "FAST", 1)  # inputs are not rounded
    monkeypatch.setenv("LLMCTL_KERNELS", "reference")
    export(checkpoint(name), tmp_path / "m.gguf", ExportGgufSettings(type=kind, tolerance=20.0))
    read, packed = collections.Counter(), GgufTensors.packed
    with monkeypatch.context() as patch:
        patch.setattr(GgufTensors, "packed", lambda self, each: read.update([each]) or packed(self, each))
        patch.setattr(check_onnx, "check", lambda *_: Checked(None, 0.0, 0, 0))
        export_onnx(tmp_path / "m.gguf", tmp_path / "counted", OnnxSettings())
    assert max(read.values()) <= (
        2 if name == "llama" else 6
    )  # to see its form, and to write it: of three in one, thrice
    export_onnx(tmp_path / "m.gguf", tmp_path / "out", OnnxSettings())
    nodes = onnx.load(tmp_path / "out" / "model.onnx").graph.node
    assert sum(node.op_type == "MatMulNBits" for node in nodes) >= 3 * 4
    ids = checks.token_ids(200, 2, 12)
    with torch.no_grad():
        assert (open_model(tmp_path / "out", "cpu")(ids) - load_model(tmp_path / "m.gguf")(ids)).abs().max() < 1e-4


def test_a_file_is_a_base_like_any_other(checkpoint, tmp_path):
    """Merged, quantized and exported, with and without an adapter, it gives what its checkpoint gives."""
    base, file, adapter = checkpoint("qwen2"), tmp_path / "base.gguf", tmp_path / "adapter"
    export(base, file, ExportGgufSettings(type="f32"))
    model, ids = load_model(base), checks.token_ids(200, 2, 12)
    method = Lora(rank=3, targets=("q_proj", "down_proj"))
    attach(model, method)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.1)
    adapter.mkdir()
    save(model, method, adapter, str(file))
    with torch.no_grad():
        expected = model(ids)
    merge(file, [adapter], tmp_path / "merged", MergeSettings())
    with torch.no_grad():
        assert (load_model(tmp_path / "merged")(ids) - expected).abs().max() < 1e-4
    assert Tokenizer.load(tmp_path / "merged").encode(TEXTS[0]) == Tokenizer.load(base).encode(TEXTS[0])
    for name, path in (("of-file", file), ("of-directory", base)):
        quantize(path, tmp_path / name, QuantizeSettings(method="rtn", tolerance=20.0))
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "of-file")(ids), load_model(tmp_path / "of-directory")(ids))


def test_tensors_that_the_config_lacks_are_named_first(checkpoint, monkeypatch, tmp_path):
    shutil.copytree(checkpoint("llama"), tmp_path / "base")
    tensors = safetensors.torch.load_file(tmp_path / "base" / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(64)
    safetensors.torch.save_file(tensors, tmp_path / "base" / "model.safetensors")
    monkeypatch.setattr(check, "compiler", lambda: None)
    for write, settings in ((export, ExportGgufSettings()), (export_c, ExportCSettings())):
        with pytest.raises(UserError, match="the checkpoint has the unknown model.layers.0.self_attn.q_proj.bias"):
            write(tmp_path / "base", tmp_path / "out.gguf", settings)
        assert not (tmp_path / "out.gguf").exists()


def test_no_space(checkpoint, monkeypatch, tmp_path):
    def full(path):
        return os.statvfs_result((4096, 4096, 100, 1, 1, 10, 10, 10, 0, 255))

    monkeypatch.setattr(os, "statvfs", full)
    with pytest.raises(UserError, match="MB are needed on disk"):
        export(checkpoint("llama"), tmp_path / "m.gguf", ExportGgufSettings())
    with pytest.raises(UserError, match="MB are needed on disk"):
        export_c(checkpoint("llama"), tmp_path / "c", ExportCSettings())
    assert not list(tmp_path.iterdir())


def test_refusals(checkpoint, llmctl, tmp_path):
    def refused(config, words: str, auto=transformers.AutoModelForCausalLM):
        directory = checks.reference(config, tmp_path / "refused", auto).directory
        with pytest.raises(UserError, match=words):
            export(directory, tmp_path / "out.gguf", ExportGgufSettings())

    esm = transformers.EsmConfig(
        vocab_size=33,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        pad_token_id=1,
        mask_token_id=32,
    )
    refused(esm, "esm has no GGUF form", transformers.AutoModelForMaskedLM)
    refused(CONFIGS["gemma2"], r"gemma2 cannot be exported to GGUF: layer 0 scales its scores")
    refused(CONFIGS["smollm3-windows"], "layers without positions are not every 4th|biases")
    refused(CONFIGS["llama-one-kv-head"], "activation gelu")
    refused(transformers.MambaConfig(**STATES, vocab_size=33, expand=3), "192 wide inside, not twice 64")
    refused(
        transformers.Mamba2Config(**STATES, vocab_size=33, num_heads=8, head_dim=16, use_conv_bias=False), "no bias"
    )
    refused(transformers.T5Config(**T5, vocab_size=33, feed_forward_proj="gated-silu"), "gelu_tanh's", SEQ2SEQ)
    refused(transformers.T5Config(**T5, vocab_size=33, num_decoder_layers=3), "more layers than its encoder", SEQ2SEQ)
    refused(transformers.T5Config(**T5, vocab_size=33, relative_attention_max_distance=64), "up to 64 apart", SEQ2SEQ)
    refused(CONFIGS["llama"], "has no tokenizer")
    base = checkpoint("llama")
    with pytest.raises(UserError, match="ends in .gguf"):
        export(base, tmp_path / "out", ExportGgufSettings())
    result = llmctl("export-gguf", base, "-o", "x.gguf", "--type", "q4_0", "--tolerance", "0", code=3)
    assert "KL divergence may be 0 at most" in result.stderr and not list(tmp_path.glob("*x.gguf*"))


def test_keys_are_read_as_the_library_reads_them(checkpoint, tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "keys.gguf", "llama")
    arrays = {"bytes": bytes(range(256)), "ints": [-3, 2**31 - 1], "floats": [0.5, -1e4], "flags": [True, False]}
    for name, values in {**arrays, "texts": ["", "▁a", "x" * 70_000]}.items():
        writer.add_array(name, values)
    writer.add_tensor("token_embd.weight", np.zeros((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    export(checkpoint("llama"), tmp_path / "model.gguf", ExportGgufSettings())
    for name in ("keys", "model"):
        path = tmp_path / f"{name}.gguf"
        assert GgufFile(path).fields == {key: each.contents() for key, each in gguf.GGUFReader(path).fields.items()}
    assert GgufFile(tmp_path / "keys.gguf").fields["bytes"] == list(range(256))


def test_broken_files(checkpoint, llmctl, tmp_path):
    export(checkpoint("gpt2"), tmp_path / "whole.gguf", ExportGgufSettings())
    whole = (tmp_path / "whole.gguf").read_bytes()
    choose = random.Random(0)
    for size in [0, 3, 10, 30, *(choose.randrange(len(whole)) for _ in range(8))]:
        broken = tmp_path / f"{size}.gguf"
        broken.write_bytes(whole[:size])
        with pytest.raises(UserError, match="corrupt|lacks|ends"):
            load_model(broken)
    (tmp_path / "other.gguf").write_bytes(b"not a model at all" * 10)
    assert "corrupt GGUF" in llmctl("generate", "other.gguf", "x", code=1).stderr
    assert "no such checkpoint" in llmctl("generate", "absent.gguf", "x", code=1).stderr
