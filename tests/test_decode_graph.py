"""The decode step that a CUDA device replays, against the modules: on a CPU, with a recorder that does what a graph does. It
runs the same operations, and the same kernels on an emulation of CUDA's threads, again with the addresses and numbers that they
had."""

from __future__ import annotations

import logging

import pytest
import torch
from test_cuda_kernels import library  # noqa: F401
from test_decode_step import CONFIGS, NOT_COVERED, PROMPTS, adapted, model_of, quantize
from torch.utils._python_dispatch import TorchDispatchMode

from llmctl.generation.completion import Completion
from llmctl.generation.decode import decode
from llmctl.generation.settings import Sampling, resolve
from llmctl.models import decode_graph
from llmctl.models.decode_graph import DecodeGraph
from llmctl.models.decode_step import NotCovered
from llmctl.ops import activation, cached_attention, native, norm, quantized_linear, rotary


class Recording(TorchDispatchMode):
    """Calls of torch's operations and of the library's kernels."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __enter__(self):
        self._call = native.call
        native.call = self._kernel
        return super().__enter__()

    def __exit__(self, *error):
        native.call = self._call
        return super().__exit__(*error)

    def _kernel(self, *args):
        self._call(*args)
        self.calls.append((self._call, args, {}, ()))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default):
            raise RuntimeError("operation not permitted when stream is capturing\n(a number was asked for)")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for to, new in zip(_tensors(out), _tensors(again), strict=True):
                if to.data_ptr() != new.data_ptr():
                    to.copy_(new)


def _tensors(out):
    return [out] if isinstance(out, torch.Tensor) else list(out or ())


KERNELS = (
    "llmctl_cuda_rms_norm llmctl_cuda_rotate llmctl_cuda_activation llmctl_cuda_attention llmctl_cuda_quantized_linear"
)


class Recorder:
    """Counts what it records; what recording itself has computed is no result."""

    def __init__(self):
        self.count = 0

    def __call__(self, forward):
        self.count += 1
        with Recording() as recording:
            output = forward()
        output.fill_(torch.nan)
        return recording.replay, output


@pytest.fixture(autouse=True)
def plain_torch(monkeypatch):
    monkeypatch.setenv("LLMCTL_KERNELS", "reference")
    monkeypatch.setattr(decode_graph, "FIRST_REACH", 4)


def begin(model, prompts, record=None, room=20):
    cache, ids_BT = model.begin(prompts, prompts, room)
    assert cache.step is None
    cache.step = None if record is None else DecodeGraph(model, record)
    return cache, ids_BT


def check_step(model, ids_BT, graph, modules):
    expected = model.next_logits(ids_BT, modules)
    torch.testing.assert_close(model.next_logits(ids_BT, graph), expected, rtol=1e-4, atol=1e-4)
    assert expected.isfinite().all() and graph.length == modules.length
    return expected.argmax(-1, keepdim=True)


@pytest.mark.parametrize("family", CONFIGS)
@torch.inference_mode()
def test_the_logits_are_those_of_the_modules(family):
    model = model_of(CONFIGS[family])
    for prompts, recorded in ((PROMPTS[1:2], 4), (PROMPTS, 2)):
        recorder = Recorder()
        graph, ids_BT = begin(model, prompts, recorder)
        modules, _ = begin(model, prompts)
        for step in range(18):
            ids_BT = check_step(model, ids_BT, graph, modules)
            if step == 9 and len(prompts) > 1:
                for cache in (graph, modules):
                    cache.select(torch.tensor([2, 0]))
                ids_BT = ids_BT[[2, 0]]
        assert recorder.count == recorded  # reaching 4, 8, 16 and 20 keys; or 16, and 26 with the rows that stay


@pytest.mark.parametrize("kv_dtype", [torch.int8, torch.bfloat16])
@torch.inference_mode()
def test_narrower_caches(kv_dtype):
    model = model_of(CONFIGS["gemma2"])
    model.cache_dtype = kv_dtype
    graph, ids_BT = begin(model, PROMPTS, Recorder())
    modules, _ = begin(model, PROMPTS)
    for _ in range(12):
        ids_BT = check_step(model, ids_BT, graph, modules)


@torch.inference_mode()
def test_quantized_matrices():
    model = model_of({**CONFIGS["llama"], "tie_word_embeddings": False})
    model.lm_head = quantize(model.lm_head, 8, False)
    model.layers[1].ffn.down_proj = quantize(model.layers[1].ffn.down_proj, 4, True)
    recorder = Recorder()
    graph, ids_BT = begin(model, PROMPTS, recorder)
    modules, _ = begin(model, PROMPTS)
    for _ in range(6):
        ids_BT = check_step(model, ids_BT, graph, modules)
    assert recorder.count


@pytest.mark.parametrize("family, kv_dtype", [("llama", None), ("gemma3_text", None), ("gemma3_text", torch.int8)])
@torch.inference_mode()
def test_the_kernels_of_the_library_are_replayed(family, kv_dtype, library, monkeypatch):  # noqa: F811
    """As on a device: what is written in Python around each kernel, with windows, padding and norms of heads."""
    model = model_of({**CONFIGS[family], "hidden_size": 64, "intermediate_size": 80})
    model.cache_dtype = kv_dtype
    for layer in model.layers:
        layer.ffn.down_proj = quantize(layer.ffn.down_proj, 4, True)
        layer.mixer.o_proj = quantize(layer.mixer.o_proj, 8, False)
    recorder, called = Recorder(), set()
    graph, ids_BT = begin(model, PROMPTS, recorder)
    modules, _ = begin(model, PROMPTS)
    call = native.call
    monkeypatch.setattr(native, "call", lambda library, name, *args: (called.add(name), call(library, name, *args))[1])
    expected = model.next_logits(ids_BT, modules)
    model.next_logits(ids_BT, graph)
    for _ in range(12):
        ids_BT = expected.argmax(-1, keepdim=True)
        expected = model.next_logits(ids_BT, modules)
        with monkeypatch.context() as kernels:
            for module in (activation, cached_attention, norm, quantized_linear, rotary):
                kernels.setattr(module, "cuda_library", lambda *_: library)
            found = model.next_logits(ids_BT, graph)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert recorder.count == 2 and called >= set(KERNELS.split())


@torch.inference_mode()
def test_a_cache_that_is_cut_grown_or_branched():
    model, recorder = model_of(CONFIGS["mistral"]), Recorder()
    graph, ids_BT = begin(model, PROMPTS[:1], recorder)
    modules, _ = begin(model, PROMPTS[:1])
    for step in range(9):
        ids_BT = check_step(model, ids_BT, graph, modules)
        if step == 4:  # a turn of a chat goes on behind another one
            assert graph.cut(6, graph.capacity) and modules.cut(6, graph.capacity)
    count = recorder.count
    assert graph.cut(9, 60) and modules.cut(9, 60)
    for _ in range(12):
        ids_BT = check_step(model, ids_BT, graph, modules)
    assert recorder.count == count + 2
    rows = torch.tensor([0, 0])
    others = graph.branch(rows), modules.branch(rows)
    for _ in range(3):  # both go on by the same step
        check_step(model, torch.tensor([[5], [6]]), *others)
        ids_BT = check_step(model, ids_BT, graph, modules)


@torch.inference_mode()
def test_results_stay_and_a_full_cache_is_refused():
    model = model_of(CONFIGS["gpt2"])
    graph, ids_BT = begin(model, PROMPTS[1:2], Recorder(), room=6)
    made = [model.next_logits(ids_BT, graph) for _ in range(4)]
    copies = [logits_BV.clone() for logits_BV in made]
    made += [model.next_logits(ids_BT, graph) for _ in range(2)]
    assert all(map(torch.equal, made, copies)) and not torch.equal(made[2], made[3])
    with pytest.raises(ValueError, match="the cache holds 6 positions; 7 were asked of it"):
        model.next_logits(ids_BT, graph)


@torch.inference_mode()
def test_what_cannot_be_recorded_goes_by_the_modules_with_one_notice(caplog):
    model = model_of(CONFIGS["llama"])
    up = model.layers[1].ffn.up_proj
    plain = type(up).forward
    up.__class__ = type(
        "Asking", (type(up),), {"forward": lambda self, x: plain(self, x) * float((x[0, 0, 0] == 0) + 1)}
    )
    graph, ids_BT = begin(model, PROMPTS, Recorder())
    modules, _ = begin(model, PROMPTS)
    with caplog.at_level(logging.INFO, logger="llmctl"):
        for _ in range(8):
            ids_BT = check_step(model, ids_BT, graph, modules)
    assert [record.message for record in caplog.records] == [
        "decoding goes on module by module: it cannot be captured in a CUDA graph "
        "(operation not permitted when stream is capturing)"
    ]


@pytest.mark.parametrize("num_beams", [1, 3])
def test_texts_are_the_same(num_beams, monkeypatch):
    model, recorder = model_of(CONFIGS["gemma2"]), Recorder()

    def texts():
        rows = [Sampling(seed=i, temperature=0.7, max_new_tokens=5 + 4 * i) for i in range(3)]
        if num_beams > 1:
            rows = [Sampling(num_beams=num_beams, max_new_tokens=9)] * 3
        made = [Completion(ids, resolve(row), i, row.max_new_tokens) for i, (ids, row) in enumerate(zip(PROMPTS, rows))]
        for _ in decode(model, made):
            pass
        return [completion.ids for completion in made]

    expected = texts()
    monkeypatch.setattr(DecodeGraph, "of", classmethod(lambda cls, model: cls(model, recorder)))
    assert texts() == expected
    assert recorder.count or num_beams > 1


def test_who_is_taken(monkeypatch):
    for name in NOT_COVERED:
        with pytest.raises(NotCovered):
            DecodeGraph(model_of(NOT_COVERED[name]))
    model = model_of(CONFIGS["llama"])
    monkeypatch.setenv("LLMCTL_KERNELS", "cuda")
    assert DecodeGraph.of(model) is None  # it is on the CPU
    model.layers[0].mixer.q_proj = adapted(model.layers[0].mixer.q_proj)
    step = DecodeGraph(model)
    with torch.inference_mode():
        assert step.takes(torch.tensor([[1], [2]])) and not step.takes(torch.tensor([[1, 2]]))
    assert not step.takes(torch.tensor([[1]]))  # a gradient may be wanted
    model.layers[1].ffn.up_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(NotCovered):
        DecodeGraph(model)
