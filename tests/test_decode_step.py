"""The model in one call against the same model module by module: the same bits, and the modules wherever it does not apply."""

from __future__ import annotations

import pytest
import torch

from llmctl.errors import UserError
from llmctl.finetune.lora import LoraLinear
from llmctl.generation.records import Row
from llmctl.generation.session import Session
from llmctl.generation.settings import Sampling
from llmctl.models import families
from llmctl.models.decode_step import DecodeStep
from llmctl.models.initialization import new_model
from llmctl.models.loading import save_model
from llmctl.models.packed import AffineWeight
from llmctl.models.quantized_linear import QuantizedLinear
from llmctl.ops import native
from llmctl.tokenizer import Tokenizer

pytestmark = pytest.mark.skipif(not native.path().exists(), reason="the native library is not built")

V = 97
SHAPE = {
    "vocab_size": V,
    "hidden_size": 36,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 60,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
WINDOWED = {"head_dim": 10, "sliding_window": 6, "hidden_activation": "gelu_pytorch_tanh"}
CONFIGS = {
    "llama": {**SHAPE, "model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": {**SHAPE, "model_type": "mistral", "sliding_window": 6},
    "qwen2": {**SHAPE, "model_type": "qwen2"},
    "qwen3": {**SHAPE, "model_type": "qwen3", "head_dim": 10},
    "gemma": {**SHAPE, "model_type": "gemma", "head_dim": 10},
    "gemma2": {**SHAPE, "model_type": "gemma2", "query_pre_attn_scalar": 24, **WINDOWED},
    "gemma3_text": {**SHAPE, "model_type": "gemma3_text", "query_pre_attn_scalar": 24, **WINDOWED},
    "phi3": {**SHAPE, "model_type": "phi3", "partial_rotary_factor": 0.5, "hidden_size": 48},
    "olmo2": {**SHAPE, "model_type": "olmo2"},
    "smollm3": {**SHAPE, "model_type": "smollm3", "num_hidden_layers": 4},
    "gpt2": {"model_type": "gpt2", "vocab_size": V, "n_embd": 36, "n_layer": 2, "n_head": 3, "n_positions": 60},
}
NOT_COVERED = {
    "mixtral": {**SHAPE, "model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2},
    "dynamic positions": {
        **SHAPE,
        "model_type": "llama",
        "rope_scaling": {"rope_type": "dynamic", "factor": 2.0},
    },
}
PROMPTS = [[3, 14, 15, 9, 2, 6, 5], [1], [50, 60, 70]]


@pytest.fixture(autouse=True)
def kernels_whatever_the_isa(monkeypatch):
    monkeypatch.setenv("LLMCTL_KERNELS", "cpu")


def model_of(hf: dict, dtype=torch.float32):
    model = new_model(families.find(hf["model_type"]).config_from_hf(hf), seed=0).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    return model.to(dtype)


def begin(model, prompts, with_step: bool):
    cache, ids_BT = model.begin(prompts, prompts, 20)
    if not with_step:
        cache.step = None
    return cache, ids_BT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", CONFIGS)
@torch.inference_mode()
def test_the_bits_are_those_of_the_modules(family, dtype):
    model = model_of(CONFIGS[family], dtype)
    for prompts in (PROMPTS[:1], PROMPTS):
        one_call, ids_BT = begin(model, prompts, True)
        modules, _ = begin(model, prompts, False)
        assert isinstance(one_call.step, DecodeStep)
        for step in range(18):
            expected = model.next_logits(ids_BT, modules)
            assert torch.equal(model.next_logits(ids_BT, one_call), expected), step
            assert expected.isfinite().all() and expected.std() > 0.1
            ids_BT = expected.argmax(-1, keepdim=True)
            if step == 9 and len(prompts) > 1:
                for cache in (one_call, modules):
                    cache.select(torch.tensor([2, 0]))
                ids_BT = ids_BT[[2, 0]]


def quantize(module, bits: int, with_zeros: bool):
    n_out, n_in = module.weight.shape
    codes, scales = torch.randint(0, 1 << bits, (n_out, n_in), dtype=torch.uint8), torch.rand(n_out, -(-n_in // 32)) / 8
    zeros = torch.randint(0, 1 << bits, scales.shape, dtype=torch.uint8) if with_zeros else None
    return QuantizedLinear(AffineWeight(codes, scales, zeros, bits, 32), module.bias, module.weight.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_any_mix_of_plain_and_quantized_weights(dtype):
    model = model_of({**CONFIGS["llama"], "tie_word_embeddings": False}, dtype)
    model.lm_head = quantize(model.lm_head, 8, False)
    model.layers[0].mixer.q_proj = quantize(model.layers[0].mixer.q_proj, 4, True)
    model.layers[1].ffn.down_proj = quantize(model.layers[1].ffn.down_proj, 8, True)
    model.layers[2].ffn.gate_proj = quantize(model.layers[2].ffn.gate_proj, 4, False)
    one_call, ids_BT = begin(model, PROMPTS, True)
    modules, _ = begin(model, PROMPTS, False)
    for _ in range(6):
        assert torch.equal(found := model.next_logits(ids_BT, one_call), model.next_logits(ids_BT, modules))
        ids_BT = found.argmax(-1, keepdim=True)


@pytest.mark.parametrize("kv_dtype", [torch.int8, torch.bfloat16])
@torch.inference_mode()
def test_narrower_caches(kv_dtype):
    """Step and modules read the same numbers back, in other roundings; rows do not know each other; rows leave."""
    model = model_of(CONFIGS["gemma2"])
    model.cache_dtype = kv_dtype
    one_call, ids_BT = begin(model, PROMPTS, True)
    modules, _ = begin(model, PROMPTS, False)
    alone, one_BT = begin(model, PROMPTS[2:], True)
    assert one_call.layers[0].keys.dtype == (torch.uint8 if kv_dtype == torch.int8 else kv_dtype)
    for step in range(12):
        found = model.next_logits(ids_BT, one_call)
        torch.testing.assert_close(found, model.next_logits(ids_BT, modules), rtol=1e-3, atol=1e-3)
        assert torch.equal(model.next_logits(one_BT, alone), found[-1:])
        ids_BT = found.argmax(-1, keepdim=True)
        if step == 5:
            for cache in (one_call, modules):
                cache.select(torch.tensor([1, 2]))
                assert cache.cut(cache.length, cache.capacity + 9)
            ids_BT = ids_BT[[1, 2]]
        one_BT = ids_BT[-1:]


@torch.inference_mode()
def test_a_long_prompt_goes_in_pieces(monkeypatch):
    model = model_of(CONFIGS["llama"])
    whole, ids_BT = begin(model, PROMPTS, True)
    pieces, _ = begin(model, PROMPTS, True)
    expected = model.next_logits(ids_BT, whole)
    monkeypatch.setattr("llmctl.models.decode_step.MAX_TOKENS", 7)
    assert torch.equal(model.next_logits(ids_BT, pieces), expected)


@torch.inference_mode()
def test_every_instruction_set(isa):
    model = model_of(CONFIGS["qwen3"])
    one_call, ids_BT = begin(model, PROMPTS, True)
    modules, _ = begin(model, PROMPTS, False)
    for _ in range(3):
        assert torch.equal(found := model.next_logits(ids_BT, one_call), model.next_logits(ids_BT, modules))
        ids_BT = found.argmax(-1, keepdim=True)


@torch.inference_mode()
def test_chunks_of_a_prompt_give_its_logits():
    model = model_of(CONFIGS["mistral"])
    whole, ids_BT = begin(model, PROMPTS[:1], True)
    parts, _ = begin(model, PROMPTS[:1], True)
    expected = model.next_logits(ids_BT, whole)
    for chunk_BT in ids_BT.split([2, 4, 1], 1):
        found = model.next_logits(chunk_BT, parts)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", NOT_COVERED)
def test_other_models_go_by_their_modules(name):
    assert DecodeStep.of(model_of(NOT_COVERED[name])) is None


def adapted(linear):
    return LoraLinear(linear, 2, 1.0, dropout=0.0, dora=False)


def test_whoever_has_a_hand_in_the_modules_is_heeded():
    changes = {
        "a hook": lambda m: m.layers[1].ffn.up_proj.register_forward_hook(lambda *_: None),
        "an adapter": lambda m: setattr(m.layers[0].mixer, "q_proj", adapted(m.layers[0].mixer.q_proj)),
        "another dtype": lambda m: m.layers[0].ffn.to(torch.bfloat16),
        "a hook in front": lambda m: m.layers[2].register_forward_pre_hook(lambda *_: None),
    }
    for name, change in changes.items():
        model = model_of(CONFIGS["llama"])
        assert DecodeStep.of(model) is not None
        change(model)
        assert DecodeStep.of(model) is None, name


def test_the_reference_goes_by_modules(monkeypatch):
    monkeypatch.setenv("LLMCTL_KERNELS", "reference")
    assert DecodeStep.of(model_of(CONFIGS["llama"])) is None


def test_a_gradient_goes_by_modules():
    model = model_of(CONFIGS["llama"])
    cache, ids_BT = begin(model, PROMPTS[:1], True)
    assert model.next_logits(ids_BT, cache).requires_grad


@torch.inference_mode()
def test_bad_input_is_refused():
    model = model_of(CONFIGS["gpt2"])
    cache, ids_BT = begin(model, PROMPTS[:1], True)
    with pytest.raises(RuntimeError, match="a token is beyond the table"):
        model.next_logits(ids_BT + V, cache)
    with pytest.raises(ValueError, match="holds 26 positions; 27"):
        model.next_logits(torch.ones(1, 27, dtype=torch.int64), cache)
    assert cache.length == 0


SETTINGS = [
    {"temperature": 0},
    {"temperature": 1, "top_k": 20, "repetition_penalty": 1.2, "presence_penalty": 0.1, "logprobs": 2},
    {"temperature": 1, "no_repeat_ngram_size": 2},
    {"num_beams": 3},
]


@pytest.mark.parametrize("sampling", SETTINGS)
def test_generation_uses_it_and_writes_the_same_text(sampling, tmp_path, monkeypatch):
    model = model_of({**CONFIGS["llama"], "vocab_size": 257})
    save_model(model, tmp_path)
    Tokenizer.bytes().save(tmp_path)
    session = Session.open(tmp_path, "float32", "cpu")
    rows = [Row(prompt, Sampling(max_new_tokens=9 + i)) for i, prompt in enumerate(["abc", "d", "The quick"])]
    calls, run = [], DecodeStep._run
    monkeypatch.setattr(DecodeStep, "_run", lambda *args: calls.append(1) or run(*args))

    def texts():
        found = [answer.completion for answer in session.answer(rows, Sampling(seed=3, **sampling))]
        return [(one.ids, [entry.top for entry in one.logprobs]) for one in found]

    with_step = texts()
    assert calls
    monkeypatch.setattr(DecodeStep, "of", classmethod(lambda *_: None))
    assert texts() == with_step


def test_what_was_drawn_ahead_of_an_end_is_forgotten(tmp_path, monkeypatch):
    """Rows end at their own lengths or at a stop text, whatever was drawn behind it, and the cache holds what it would."""
    save_model(model_of({**CONFIGS["llama"], "vocab_size": 257}), tmp_path)
    Tokenizer.bytes().save(tmp_path)
    session = Session.open(tmp_path, "float32", "cpu")
    settings = Sampling(seed=5, temperature=1.0, ignore_eos=True)
    caches, begin_texts = [], session.model.begin
    session.model.begin = lambda *args: caches.append(begin_texts(*args)) or caches[-1]

    def answers(most: int, *rows: Row):
        monkeypatch.setattr("llmctl.generation.drawing.BURST", 60.0)
        monkeypatch.setattr("llmctl.generation.drawing.MAX_AHEAD", most)
        found = [answer.completion for answer in session.answer(rows, settings)]
        return [(one.ids, one.text) for one in found], caches[-1][0].length

    rows = Row("abc", Sampling(max_new_tokens=4)), Row("de", Sampling(max_new_tokens=17))
    one_by_one = answers(1, *rows)
    assert one_by_one[1] == 3 + 16
    for most in (3, 32):
        assert answers(most, *rows) == one_by_one
    text = answers(1, Row("f", Sampling(max_new_tokens=25)))[0][0][1]
    stopped = Row("f", Sampling(max_new_tokens=25, stop=(text[6:8],)))
    assert answers(32, stopped) == answers(1, stopped)


def test_logits_that_are_no_numbers_are_told(tmp_path):
    model = model_of({**CONFIGS["llama"], "vocab_size": 257})
    with torch.no_grad():
        model.layers[0].mixer_norm.weight[0] = float("nan")
    save_model(model, tmp_path)
    Tokenizer.bytes().save(tmp_path)
    with pytest.raises(UserError, match="not numbers"):
        list(Session.open(tmp_path, "float32", "cpu").answer([Row("a", Sampling())], Sampling(seed=0)))
