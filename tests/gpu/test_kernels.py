"""The checks of tests/test_cuda_kernels.py on a CUDA device, and what only a device shows."""

from __future__ import annotations

import pytest
import torch
from test_cuda_kernels import *  # noqa: F403
from test_cuda_kernels import SETTINGS

from llmctl.generation.rules import Rules
from llmctl.generation.sampling import Sampler
from llmctl.generation.settings import resolve
from llmctl.ops import native
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
