"""Attention of inference against its definition in float64, and every row by itself."""

from __future__ import annotations

import ctypes
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from llmctl.models.cache import QuantizedKeyValues
from llmctl.ops import attention as ops
from llmctl.ops import cached_attention, native
from llmctl.ops.visibility import Visibility

pytestmark = pytest.mark.skipif(not native.path().exists(), reason="the native library is not built")
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def kernels_whatever_the_isa(monkeypatch):
    monkeypatch.setenv("LLMCTL_KERNELS", "cpu")


def sample(batch, heads, kv_heads, queries, keys, size, dtype, scale=1.0):
    generator = torch.Generator().manual_seed(heads * keys + queries)
    shapes = [(batch, heads, queries, size), (batch, kv_heads, keys, size), (batch, kv_heads, keys, size)]
    return [(torch.randn(shape, generator=generator) * scale).to(dtype) for shape in shapes]


def exact(q, k, v, visibility, **how):
    """In float64; 0 where nothing is seen."""
    q, k, v = q.double(), k.double(), v.double()
    weights = how.get("scale") or q.shape[-1] ** -0.5
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * weights
    if how.get("softcap"):
        scores = how["softcap"] * torch.tanh(scores / how["softcap"])
    if how.get("bias_HTS") is not None:
        scores = scores + how["bias_HTS"].double()
    mask = visibility.mask_BTS(q.shape[2], k.shape[2], q.device)
    scores = scores.masked_fill(~mask[:, None], float("-inf"))
    return scores.softmax(-1).nan_to_num(0.0) @ v.repeat_interleave(q.shape[1] // k.shape[1], 1)


def check(result, expected):
    tolerance = 2e-5 if result.dtype == torch.float32 else 1e-2
    torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", range(12))
def test_random_cases(isa, number, dtype):
    """Sizes that are multiples of nothing, strides, ranges, biases, caps: whatever the dice say."""
    dice = random.Random(number)
    kv_heads = dice.choice([1, 1, 2, 3])
    heads = kv_heads * dice.choice([1, 2, 5, 8, 27])
    batch, keys, size = dice.randint(1, 3), dice.choice([1, 3, 17, 255, 256, 257, 530]), dice.choice([1, 8, 20, 64, 80])
    queries = min(keys, dice.choice([1, 1, 2, 7, 30]))
    q, k, v = sample(batch, heads, kv_heads, queries, keys, size, dtype, dice.choice([0.1, 1, 4]))
    first = torch.randint(0, keys, (batch, queries)) if dice.random() < 0.5 else None
    end = torch.randint(0, keys + 1, (batch, 1)) if dice.random() < 0.3 else None
    origin = torch.randint(0, keys, (batch,)) if dice.random() < 0.5 else None
    visibility = Visibility(dice.random() < 0.7, keys - queries, first, end, origin)
    how = {
        "scale": dice.choice([None, 0.3]),
        "softcap": dice.choice([None, 5.0]),
        "bias_HTS": dice.choice([None, torch.randn(heads, queries, keys), torch.randn(1, keys, queries).mT]),
    }
    if dice.random() < 0.5:  # a part of a larger cache, and queries as a projection leaves them
        k, v = (torch.nn.functional.pad(x, (0, 0, 0, 5), value=float("nan"))[:, :, :keys] for x in (k, v))
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
    check(cached_attention.attention(q, k, v, visibility, **how), exact(q, k, v, visibility, **how))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 40, 300])
@pytest.mark.parametrize("heads,kv_heads", [(4, 4), (8, 1)])
def test_a_row_knows_neither_padding_nor_batch_nor_chunks(isa, dtype, window, heads, kv_heads):
    length, size = 600, 24
    q, k, v = sample(1, heads, kv_heads, length, length, size, dtype)

    def attend(first_query, last_query, padding=0):
        """The queries of a stretch, alone or as the second of two rows, with so much garbage in front."""
        rows = 2 if padding else 1
        garbage = [torch.randn(rows, x.shape[1], padding + n, size).to(dtype) for x, n in ((q, 0), (k, 0), (v, 0))]
        parts = [q[:, :, first_query:last_query], k[:, :, :last_query], v[:, :, :last_query]]
        keys_of = [torch.cat([g, part.expand(rows, -1, -1, -1)], 2) for g, part in zip(garbage[1:], parts[1:])]
        columns = torch.arange(first_query, last_query) + padding
        starts = torch.tensor([max(0, padding - 9), padding][-rows:])
        first = starts[:, None].expand(rows, len(columns))
        if window is not None:
            first = torch.maximum(first, columns - window + 1)
        visibility = Visibility(True, padding + first_query, first, origin_B=starts)
        return cached_attention.attention(parts[0].expand(rows, -1, -1, -1), *keys_of, visibility)[-1:]

    whole = attend(0, length)
    for first_query, last_query in [(0, 1), (0, 255), (255, 258), (599, 600), (17, 400)]:
        for padding in (0, 1, 77, 256):
            result = attend(first_query, last_query, padding)
            assert torch.equal(result, whole[:, :, first_query:last_query]), (first_query, last_query, padding)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_and_sections_change_nothing(threads):
    q, k, v = sample(2, 4, 2, 1, 2000, 64, torch.bfloat16)
    visibility, before = Visibility(True, 1999), torch.get_num_threads()
    many = [x.repeat(40, 1, 1, 1) for x in (q, k, v)]  # so many that no tile is cut into sections
    expected = cached_attention.attention(*many, visibility)[:2]
    try:
        torch.set_num_threads(threads)
        assert torch.equal(cached_attention.attention(q, k, v, visibility), expected)
    finally:
        torch.set_num_threads(before)


def test_one_key_takes_all_and_scores_may_be_extreme(isa):
    q, k, v = sample(1, 2, 1, 3, 300, 16, torch.float32)
    k[:, :, 250] = q[0, 0, 0] * 1e4
    result = cached_attention.attention(q[:, :1, :1], k, v, Visibility())
    assert torch.equal(result[0, 0, 0], v[0, 0, 250])
    far = cached_attention.attention(q, k * 1e18, v, Visibility())
    assert far.isfinite().all()


def test_nothing_to_see_is_zero(isa):
    q, k, v = sample(2, 2, 1, 4, 10, 16, torch.float32)
    nothing = torch.full((2, 1), 10)
    assert not cached_attention.attention(q, k, v, Visibility(first_BT=nothing)).any()
    hidden = torch.full((2, 4, 10), float("-inf"))
    assert not cached_attention.attention(q, k, v, Visibility(), bias_HTS=hidden).any()


@pytest.mark.parametrize("sizes", [(0, 2, 1, 3, 5, 8), (2, 2, 1, 0, 5, 8), (2, 2, 1, 3, 0, 8)])
def test_empty(sizes):
    q, k, v = sample(*sizes, torch.float32)
    result = cached_attention.attention(q, k, v, Visibility())
    assert result.shape == q.shape and not result.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_seen(isa, bad):
    q, k, v = sample(2, 2, 1, 1, 300, 16, torch.float32)
    k[1, 0, 280] = bad
    result = cached_attention.attention(q, k, v, Visibility())
    assert result[0].isfinite().all() and result[1].isnan().all()


def test_attention_chooses_the_kernel_for_inference_alone(monkeypatch):
    q, k, v = sample(1, 4, 2, 5, 9, 16, torch.float32)
    visibility = Visibility(True, 4)
    ours = cached_attention.attention(q, k, v, visibility)
    assert torch.equal(ops.attention(q, k, v, visibility), ours)
    assert not cached_attention.applies(q.clone().requires_grad_(), k, v)
    assert not cached_attention.applies(q.half(), k.half(), v.half())
    wide = torch.zeros(1, 1, 1, 300)
    assert not cached_attention.applies(wide, wide, wide)
    monkeypatch.setenv("LLMCTL_KERNELS", "reference")
    assert not cached_attention.applies(q, k, v)
    torch.testing.assert_close(ops.attention(q, k, v, visibility), ours)
    capped = replace(visibility, first_BT=torch.ones(1, 1, dtype=torch.int64))
    monkeypatch.setenv("LLMCTL_KERNELS", "cpu")
    ours = ops.attention(q, k, v, capped, softcap=3.0, scale=0.7)
    monkeypatch.setenv("LLMCTL_KERNELS", "reference")
    torch.testing.assert_close(ops.attention(q, k, v, capped, softcap=3.0, scale=0.7), ours)


def test_wrong_sizes_are_refused():
    q, k, v = sample(1, 3, 2, 1, 4, 8, torch.float32)
    with pytest.raises(RuntimeError, match="no multiple of the kv heads"):
        cached_attention.attention(q, k, v, Visibility())


def test_the_operator_keeps_torchs_contract():
    tensors = [*sample(2, 4, 2, 3, 5, 8, torch.float32), torch.zeros(2, 3, dtype=torch.int64), None, None, None]
    torch.library.opcheck(
        torch.ops.llmctl.cached_attention, (*tensors, 2, 0.5, 0.0), test_utils=("test_schema", "test_faketensor")
    )


def by_kernel(q, k, v, stored, scales, dtype_number, visibility, softcap):
    """Attention to keys and values stored in another type than the queries'."""
    batch, heads, queries, size = q.shape
    out = q.new_empty(batch, queries, heads, size)
    args = cached_attention.arguments(
        q, *stored, out, None, None, None, None, visibility.offset, size**-0.5, softcap or 0.0
    )
    args.kv_dtype = dtype_number
    if scales:
        args.k_scales, args.v_scales = (each.data_ptr() for each in scales)
        args.scale_strides[:] = scales[0].stride()[:2]
    native.call(native.library(), "llmctl_attention", DTYPES_OF_C[q.dtype], ctypes.byref(args))
    return out.transpose(1, 2)


DTYPES_OF_C = {torch.float32: 0, torch.bfloat16: 1}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", range(8))
def test_caches_of_other_types(isa, number, dtype):
    dice = random.Random(number)
    kv_heads, keys = dice.choice([1, 2, 3]), dice.choice([1, 5, 31, 255, 256, 300, 700])
    heads, size = kv_heads * dice.choice([1, 4, 8, 20]), dice.choice([1, 8, 20, 64, 80, 128, 256])
    queries = min(keys, dice.choice([1, 1, 3, 12]))
    q, k, v = sample(2, heads, kv_heads, queries, keys, size, dtype, dice.choice([0.3, 1.0, 3.0]))
    visibility, softcap = Visibility(True, keys - queries), dice.choice([None, 20.0])
    room = QuantizedKeyValues(SimpleNamespace(n_kv_heads=kv_heads, head_dim=size), 2, keys, torch.int8, "cpu")
    decoded = [kept.decoded(torch.float32) for kept in room.append(0, k.float(), v.float())]
    torch.testing.assert_close(decoded[0], k.float(), rtol=0, atol=float(k.abs().max()) / 127)
    scales = [room.key_scales, room.value_scales]
    found = by_kernel(q, k, v, [room.keys, room.values], scales, 3, visibility, softcap)
    check(found, exact(q, *decoded, visibility, softcap=softcap))
    if dtype == torch.float32:
        halves = k.bfloat16(), v.bfloat16()
        found = by_kernel(q, k, v, halves, None, 1, visibility, softcap)
        check(found, exact(q, *halves, visibility, softcap=softcap))


def test_bytes_without_scales_are_refused():
    q, k, v = sample(1, 1, 1, 1, 4, 8, torch.float32)
    with pytest.raises(RuntimeError, match="bytes without scales"):
        by_kernel(q, k, v, [k.to(torch.uint8), v.to(torch.uint8)], None, 3, Visibility(True, 3), None)
