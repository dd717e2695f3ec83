"""The CUDA kernels against the references in torch: emulated on the CPU wherever there is a C++ compiler; tests/gpu runs them
on a device."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import math
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

from llmctl.generation.rules import Rules
from llmctl.generation.sampling import Sampler
from llmctl.generation.settings import Sampling, resolve
from llmctl.ops import activation, cached_attention, native, norm, quantized_linear, rotary, sampling
from llmctl.ops.attention import attention_weights
from llmctl.ops.dispatch import cuda_stream
from llmctl.ops.visibility import Visibility

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def library():
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None or not CSRC.is_dir():
        pytest.skip("no C++ compiler, or no csrc/ beside the tests")
    return emulated(compiler)


@functools.cache
def emulated(compiler):
    """The library, compiled once for whoever asks."""
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-w", "-DLLMCTL_WITH_CUDA"]
    folders = [f"-I{ROOT / 'tests' / 'programs' / 'cuda_emulation'}", f"-I{CSRC}"]
    sources = [*sorted(map(str, CSRC.glob("cuda/*.cu"))), str(CSRC / "library.cpp")]
    with tempfile.TemporaryDirectory() as directory:
        built = Path(directory) / "libemulated.so"
        subprocess.run([compiler, *flags, *folders, "-o", built, "-x", "c++", *sources], check=True)
        loaded = ctypes.CDLL(str(built))
    for name, (result, *arguments) in native.SIGNATURES.items():
        if name.startswith("llmctl_cuda") or name == "llmctl_last_error":
            function = getattr(loaded, name)
            function.restype, function.argtypes = result, arguments
    return loaded


@pytest.fixture
def device():
    return "cpu"


@pytest.fixture(autouse=True)
def _made_on(device):
    with torch.device(device):
        yield


def close(found, expected, dtype, atol=2e-5):
    if dtype == torch.bfloat16:
        torch.testing.assert_close(found.float(), expected.float(), rtol=1.6e-2, atol=1e-2)
    else:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 31, 256, 1000])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(library, dtype, width, offset):
    x = torch.randn(3, 2, width + 5).to(dtype)[..., :width]
    weight = torch.randn(width).to(dtype)
    found = norm.on_cuda(library, x, weight, 1e-5, offset)
    close(found, norm.reference(x.float(), weight.float(), 1e-5, offset).to(dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim, dims", [(64, 64), (10, 6), (2, 2), (7, 0)])
@pytest.mark.parametrize("per_row", [False, True])
def test_rotate(library, dtype, head_dim, dims, per_row):
    x = torch.randn(2, 5, 3, head_dim).to(dtype).transpose(1, 2)
    angles = torch.rand(2, 1, 5, dims) if per_row else torch.rand(5, dims)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    expected = rotary.reference(x.float(), cos.float(), sin.float()) if dims else x.float()
    close(rotary.on_cuda(library, x, cos, sin), expected.to(dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", activation.KINDS)
@pytest.mark.parametrize("gated", [False, True])
def test_activation(library, dtype, kind, gated):
    x = torch.cat([torch.randn(1000) * 5, torch.tensor([0.0, -0.0, 1e30, -1e30, math.nan])]).to(dtype)
    up = torch.randn_like(x) if gated else None
    expected = activation.reference(kind, x.float(), None if up is None else up.float()).to(dtype)
    found = activation.on_cuda(library, kind, x, up)
    torch.testing.assert_close(found.float(), expected.float(), rtol=1.6e-2, atol=1e-5, equal_nan=True)


def attended(library, q, k, v, visibility, scale=None, softcap=None, bias=None, scales=()):
    batch, heads, queries, head_dim = q.shape
    out = q.new_full((batch, queries, heads, head_dim), 7.0)
    limits = [None if x is None else x.expand(batch, queries) for x in (visibility.first_BT, visibility.end_BT)]
    bias = None if bias is None else bias.expand(batch, heads, queries, k.shape[2])
    args = cached_attention.arguments(
        *(q, k, v, out, *limits, None, bias),
        visibility.offset if visibility.causal else -1,
        head_dim**-0.5 if scale is None else scale,
        softcap or 0.0,
        *scales,
    )
    cached_attention.on_cuda(library, q, args)
    return out.transpose(1, 2)


def weighted(q, k, v, visibility, **how):
    weights = attention_weights(q.float(), k.float(), visibility, **how).nan_to_num(0.0)
    return weights @ v.float().repeat_interleave(q.shape[1] // v.shape[1], 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [8, 33, 64, 80, 128, 192, 256])
@pytest.mark.parametrize(
    "heads, kv_heads, queries, keys", [(8, 1, 1, 700), (4, 4, 1, 33), (3, 1, 8, 17), (40, 2, 1, 1)]
)
def test_attention(library, dtype, head_dim, heads, kv_heads, queries, keys):
    torch.manual_seed(head_dim)
    q = torch.randn(2, queries, heads, head_dim).to(dtype).transpose(1, 2)
    k, v = (torch.randn(2, kv_heads, keys + 3, head_dim).to(dtype)[:, :, :keys] for _ in range(2))
    seen = Visibility(True, keys - queries)
    close(attended(library, q, k, v, seen), weighted(q, k, v, seen).to(dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [8, 33, 80, 128, 192, 256])
@pytest.mark.parametrize("heads, kv_heads, queries, keys", [(8, 2, 1, 400), (3, 1, 6, 17), (2, 2, 1, 1)])
def test_attention_to_bytes(library, dtype, head_dim, heads, kv_heads, queries, keys):
    torch.manual_seed(head_dim)
    q = torch.randn(2, queries, heads, head_dim).to(dtype).transpose(1, 2)
    codes = torch.randint(0, 256, (2, 2, kv_heads, keys + 3, head_dim), dtype=torch.uint8)[:, :, :, :keys]
    scales = torch.rand(2, 2, kv_heads, keys + 3)[..., :keys] / 64
    k, v = (cached_attention.InBytes(*pair) for pair in zip(codes, scales))
    first = torch.tensor([[0], [min(keys - 1, 5)]])
    seen = Visibility(True, keys - queries, torch.minimum(first, torch.arange(keys - queries, keys)))
    found = attended(library, q, *codes, seen, softcap=20.0, scales=scales)
    expected = weighted(q, k.decoded(torch.float32), v.decoded(torch.float32), seen, softcap=20.0)
    close(found, expected.to(dtype), dtype)
    scales[1, :, :, keys - 1] = math.nan  # values
    assert attended(library, q, *codes, seen, scales=scales)[:, :, -1].isnan().all()
    if keys > queries:  # the last key is hidden from the first query of several
        assert attended(library, q, *codes, seen, scales=scales)[:, :, 0].isnan().all() == (queries == 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_with_windows_padding_softcap_and_bias(library, dtype):
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, heads, n, 40).to(dtype) for heads, n in [(6, 3), (2, 600), (2, 600)])
    first, end = torch.tensor([[500, 501, 502], [0, 40, 599]]), torch.tensor([[590], [300]]).expand(2, 3)
    seen = Visibility(True, 597, first, end)
    bias = torch.randn(6, 3, 600)
    expected = weighted(q, k, v, seen, scale=0.3, softcap=5.0, bias_HTS=bias)
    found = attended(library, q, k, v, seen, 0.3, 5.0, bias)
    close(found, expected.to(dtype), dtype)
    assert (found[1, :, 2] == 0).all()  # which sees nothing


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_extreme_scores(library, dtype):
    q, k = torch.full((1, 1, 1, 16), 100.0).to(dtype), torch.randn(1, 1, 40, 16).to(dtype) * 100
    v = torch.randn(1, 1, 40, 16).to(dtype)
    seen = Visibility()
    close(attended(library, q, k, v, seen), weighted(q, k, v, seen).to(dtype), dtype)
    k[0, 0, 3, 0] = math.nan
    assert attended(library, q, k, v, seen).isnan().all()


def random_weight(bits, n_out, n_in, group_size, with_zeros, scale_dtype):
    codes = torch.randint(0, 1 << bits, (n_out, n_in), dtype=torch.uint8)
    shape = n_out, -(-n_in // group_size)
    # float32 scales are none of 16 bits, and float16 ones none of bfloat16
    scales = ((torch.rand(shape) + 0.5) * 0.02).to(scale_dtype).float()
    zeros = torch.randint(0, (1 << bits) - (bits == 8) + 1, shape, dtype=torch.uint8) if with_zeros else None
    weight = quantized_linear.quantized_weight(codes, scales, zeros, bits, group_size)
    assert weight.scales_PBU16.dtype == scale_dtype or scales.numel() < 5
    return weight


def check_product(library, x, weight, bias=None):
    found = quantized_linear.on_cuda(library, x, weight, bias)
    exact_weight = quantized_linear.dequantized(weight, torch.float64)
    expected = torch.nn.functional.linear(x.double(), exact_weight, None if bias is None else bias.double())
    size = x.double().abs() @ exact_weight.abs().T + (0.0 if bias is None else bias.double().abs())
    rounding = 2.0**-8 if x.dtype == torch.bfloat16 else 2.0**-23
    if x.numel() // weight.n_in > quantized_linear.FEW_ROWS:  # with weights that have been rounded
        size = size * (2.0**-8 if x.dtype == torch.bfloat16 else 1e-6)
    else:
        size = size * 2e-6
    assert found.dtype == x.dtype and found.shape == expected.shape
    assert ((found.double() - expected).abs() <= rounding * expected.abs() + size).all()


SCALES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [32, 64, 128, 1000])
@pytest.mark.parametrize("rows, n_out, n_in", [(1, 1, 1), (1, 33, 303), (3, 50, 131), (9, 16, 517), (35, 20, 260)])
def test_quantized_linear(library, bits, dtype, group_size, rows, n_out, n_in):
    torch.manual_seed(rows + group_size)
    for case, (with_zeros, scale_dtype) in enumerate([(False, SCALES[n_out % 3]), (True, SCALES[rows % 3])]):
        weight = random_weight(bits, n_out, n_in, group_size, with_zeros, scale_dtype)
        width = -(-n_in // 4) * 4 + 4
        x = torch.randn(rows, width).to(dtype)[:, case : case + n_in]  # aligned and not, with other numbers behind
        check_product(library, x, weight, torch.randn(n_out).to(dtype) if case else None)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_linear_of_long_rows_in_pieces(library, bits):
    weight = random_weight(bits, 40, 4400, 128, True, torch.float16)
    size = ctypes.c_int64()
    native.call(library, "llmctl_cuda_quantized_linear_scratch", ctypes.byref(weight.args()), 2, ctypes.byref(size))
    assert size.value >= 2 * 2 * 40 * 4
    check_product(library, torch.randn(2, 1, 4400).bfloat16(), weight, torch.randn(40).bfloat16())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_and_zero_is_exact(library, bits, dtype):
    """Row i of x picks weight i: what comes out is that weight, and nothing else."""
    count = 1 << bits
    codes = torch.arange(count, dtype=torch.uint8)[None].expand(count, count)
    zeros = torch.arange(count)[:, None].to(torch.uint8).expand(count, -(-count // 32))
    weight = quantized_linear.quantized_weight(codes, torch.full(zeros.shape, 0.5), zeros, bits, 32)
    found = torch.cat(
        [quantized_linear.on_cuda(library, part, weight) for part in torch.eye(count).to(dtype).split(32)]
    )
    assert torch.equal(found, quantized_linear.dequantized(weight, dtype).T)
    assert torch.equal(
        quantized_linear.dequantized_on_cuda(library, weight, dtype), quantized_linear.dequantized(weight, dtype)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantized_linear_of_extreme_inputs(library, dtype):
    weight = random_weight(4, 24, 200, 32, False, torch.float32)
    x = torch.randn(6, 200).to(dtype)
    x[0], x[1, 3], x[2, 190], x[3] = 0.0, math.nan, math.inf, torch.finfo(dtype).tiny / 8
    x[4] *= 1e30
    found = quantized_linear.on_cuda(library, x, weight)
    assert (found[0] == 0).all() and found[1].isnan().all() and not found[2].isfinite().any()
    check_product(library, x[4:5], weight)
    assert found[3].isfinite().all() and torch.equal(found[5:], quantized_linear.on_cuda(library, x[5:], weight))


@pytest.mark.parametrize("scale_dtype", SCALES)
@pytest.mark.parametrize("bits", [4, 8])
def test_dequantize(library, bits, scale_dtype):
    for n_out, n_in, group_size in [(1, 1, 32), (37, 300, 64), (16, 128, 128)]:
        weight = random_weight(bits, n_out, n_in, group_size, n_out == 37, scale_dtype)
        for dtype in DTYPES:
            found = quantized_linear.dequantized_on_cuda(library, weight, dtype)
            assert torch.equal(found, quantized_linear.dequantized(weight, dtype))


def drawn(library, rows, logits, position=0):
    settings = [resolve(row) for row in rows]
    rules = Rules(settings, [[0]] * len(rows), logits.shape[1], logits.device)
    sampler = Sampler(settings, range(len(rows)), rules, logits.device)
    names = ("temperature_B1", "top_k_B1", "top_p_B1", "log_min_p_B1", "is_greedy_B", "seeds_B", "sequences_B")
    values = [getattr(sampler, f"_{name}").reshape(-1).contiguous() for name in names]
    tokens = torch.full((len(rows),), -7)
    args = sampling.Args(logits.data_ptr(), *logits.shape, logits.stride(0), *(v.data_ptr() for v in values), position)
    native.call(library, "llmctl_cuda_sample", ctypes.byref(args), tokens.data_ptr(), cuda_stream(logits))
    return tokens, sampler


SETTINGS = [
    Sampling(seed=1),
    Sampling(seed=2, temperature=0.0),
    Sampling(seed=3, top_k=1),
    Sampling(seed=2**63 + 5, top_k=40, temperature=0.7),
    Sampling(seed=5, top_p=0.9),
    Sampling(seed=6, top_p=1e-6),
    Sampling(seed=7, top_k=50, top_p=0.5, temperature=3.0),
    Sampling(seed=8, min_p=0.1),
    Sampling(seed=9, top_k=10**6, top_p=0.9999, min_p=0.01),
]


@pytest.mark.parametrize("vocab_size", [1, 50, 3001])
@pytest.mark.parametrize("scale", [0.01, 3.0, 40.0])
def test_sample(library, monkeypatch, vocab_size, scale):
    monkeypatch.setenv("LLMCTL_KERNELS", "reference")
    torch.manual_seed(vocab_size)
    for ties in (False, True):
        logits = scale * torch.randn(len(SETTINGS), vocab_size)
        logits = logits.bfloat16().float() if ties else logits
        tokens, sampler = drawn(library, SETTINGS, logits)
        assert tokens.tolist() == sampler.draw(logits).tokens_B.tolist()


def test_sample_of_what_is_not_finite(library, monkeypatch):
    monkeypatch.setenv("LLMCTL_KERNELS", "reference")
    logits = torch.randn(4, 100)
    logits[0, 7], logits[1, 9], logits[2] = math.nan, math.inf, -math.inf
    tokens, sampler = drawn(library, SETTINGS[4:8], logits)
    assert tokens.tolist() == sampler.draw(logits).tokens_B.tolist()
    assert tokens.tolist()[:2] == [-1, 9]


@pytest.mark.parametrize(
    "row", [Sampling(top_k=3), Sampling(top_p=0.5), Sampling(min_p=0.999), Sampling(top_k=4, top_p=0.5)]
)
def test_exactly_what_a_filter_keeps_is_drawn(library, monkeypatch, row):
    """Among tokens that are nearly alike, so that the last one kept is drawn as often as the first."""
    monkeypatch.setenv("LLMCTL_KERNELS", "reference")
    rows = [dataclasses.replace(row, seed=seed) for seed in range(8)]
    logits = (0.001 * torch.rand(1, 10)).expand(8, 10).contiguous()
    _, sampler = drawn(library, rows, logits)
    for position in range(12):
        tokens, _ = drawn(library, rows, logits, position)
        assert tokens.tolist() == sampler.draw(logits).tokens_B.tolist()
