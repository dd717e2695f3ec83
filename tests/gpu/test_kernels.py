"""The checks of tests/test_cuda_kernels.py on a CUDA device, and what only a device shows."""

from __future__ import annotations

import pytest
import torch
from test_cuda_kernels import *  # noqa: F403
from test_cuda_kernels import SETTINGS, random_weight
from test_decode_step import CONFIGS, PROMPTS, model_of, quantize

from llmctl.generation.completion import Completion
from llmctl.generation.decode import decode
from llmctl.generation.rules import Rules
from llmctl.generation.sampling import Sampler
from llmctl.generation.settings import Sampling, resolve
from llmctl.models import decode_graph
from llmctl.models.decode_graph import DecodeGraph
from llmctl.ops import native, quantized_linear
from llmctl.ops.attention import attention
from llmctl.ops.visibility import Visibility

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(scope="module")
def library():
    loaded = native.load()
    if not loaded.llmctl_built_with_cuda():
        pytest.skip("the native library was built without CUDA")
    return loaded


@pytest.fixture
def device():
    return "cuda"


@pytest.fixture
def chosen(library, monkeypatch):
    monkeypatch.setenv("LLMCTL_KERNELS", "cuda")


def test_operations_take_the_kernels_and_agree_with_torch(chosen, monkeypatch):
    q, k, v = (torch.randn(2, heads, n, 128).bfloat16() for heads, n in [(32, 1), (4, 4096), (4, 4096)])
    with torch.inference_mode():
        ours = attention(q, k, v, Visibility(True, 4095))
        monkeypatch.setenv("LLMCTL_KERNELS", "reference")
        theirs = attention(q, k, v, Visibility(True, 4095))
    torch.testing.assert_close(ours, theirs, rtol=1.6e-2, atol=5e-3)


def test_a_kernel_can_be_captured_in_a_graph(chosen):
    x, weight = torch.randn(64, 2048).bfloat16(), torch.randn(2048).bfloat16()
    from llmctl.ops.norm import reference, rms_norm

    with torch.inference_mode():
        rms_norm(x, weight, 1e-6)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = rms_norm(x, weight, 1e-6)
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.testing.assert_close(y.float(), reference(x.float(), weight.float(), 1e-6), rtol=1.6e-2, atol=1e-2)


def test_the_sampler_draws_the_tokens_that_the_cpu_draws(chosen):
    settings = [resolve(row) for row in SETTINGS]
    logits = torch.randn(len(settings), 128_256) * 3
    tokens = []
    for where in ("cuda", "cpu"):
        rules = Rules(settings, [[0]] * len(settings), logits.shape[1], torch.device(where))
        tokens.append(Sampler(settings, range(len(settings)), rules, where).draw(logits.to(where)).tokens_B.tolist())
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("rows", [1, 9, 100])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_products_of_few_bits_can_be_captured(chosen, bits, rows):
    weight = random_weight(bits, 4096, 2048, 128, True, torch.float16)
    x = torch.randn(rows, 2048).bfloat16()
    with torch.inference_mode():
        quantized_linear.quantized_linear(x, weight)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = quantized_linear.quantized_linear(x, weight)
        x.copy_(torch.randn_like(x))
        graph.replay()
        exact = x.double() @ quantized_linear.dequantized(weight, torch.float64).T
    torch.testing.assert_close(y.double(), exact, rtol=1.6e-2, atol=1e-2)


def on_device(hf, dtype, change=lambda model: None):
    with torch.device("cpu"):
        model = model_of(hf, dtype)
        change(model)
    return model.to("cuda")


def few_bits(model):
    model.layers[0].mixer.q_proj = quantize(model.layers[0].mixer.q_proj, 4, True)
    model.layers[1].ffn.down_proj = quantize(model.layers[1].ffn.down_proj, 8, False)


def replayed_and_not(model, n_steps):
    """Pairs of logits: by the step, and by the modules, of the tokens that the modules predict."""
    graph, ids_BT = model.begin(PROMPTS, PROMPTS, 40)
    modules, _ = model.begin(PROMPTS, PROMPTS, 40)
    assert isinstance(graph.step, DecodeGraph)
    modules.step = None
    n_replayed = 0
    for step in range(n_steps):
        expected = model.next_logits(ids_BT, modules)
        n_replayed += graph.step.is_recorded
        yield model.next_logits(ids_BT, graph), expected
        ids_BT = expected.argmax(-1, keepdim=True)
        if step == 9:
            for cache in (graph, modules):
                cache.select(torch.tensor([2, 0]))
            ids_BT = ids_BT[[2, 0]]
    assert n_replayed >= n_steps // 2


@pytest.mark.parametrize("kv_dtype", [None, torch.int8])
@pytest.mark.parametrize("change", [lambda model: None, few_bits], ids=["plain", "few bits"])
@pytest.mark.parametrize("family", CONFIGS)
def test_the_decode_step_is_replayed(chosen, monkeypatch, family, change, kv_dtype):
    if change is few_bits and family == "gpt2":
        pytest.skip("its feed-forward part has other names")
    monkeypatch.setattr(decode_graph, "FIRST_REACH", 8)
    model = on_device(CONFIGS[family], torch.float32, change)
    model.cache_dtype = kv_dtype
    with torch.inference_mode():
        for found, expected in replayed_and_not(model, 24):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_texts_are_those_of_the_modules(chosen, monkeypatch):
    model = on_device(CONFIGS["llama"], torch.float32)

    def texts():
        rows = [Sampling(seed=i, temperature=0.7, max_new_tokens=20 + 5 * i) for i in range(3)]
        made = [Completion(ids, resolve(row), i, row.max_new_tokens) for i, (ids, row) in enumerate(zip(PROMPTS, rows))]
        for _ in decode(model, made):
            pass
        return [completion.ids for completion in made]

    replayed = texts()
    monkeypatch.setattr(DecodeGraph, "of", classmethod(lambda cls, model: None))
    assert texts() == replayed


def test_a_number_asked_for_in_the_middle_is_no_failure(chosen, caplog):
    model = on_device(CONFIGS["llama"], torch.float32)
    up = model.layers[1].ffn.up_proj
    plain = type(up).forward
    up.__class__ = type(
        "Asking", (type(up),), {"forward": lambda self, x: plain(self, x) * (1 + (x.sum().item() == 0))}
    )
    with torch.inference_mode(), caplog.at_level("INFO", logger="llmctl"):
        graph, ids_BT = model.begin(PROMPTS, PROMPTS, 20)
        for _ in range(6):
            ids_BT = model.next_logits(ids_BT, graph).argmax(-1, keepdim=True)
    assert [record for record in caplog.records if "cannot be captured" in record.message]
    assert len(caplog.records) == 1 and torch.cuda.current_stream() == torch.cuda.default_stream()
