"""Matrices that a process before this one laid out for the kernels: the same numbers, and never those of other files."""

from __future__ import annotations

import os

import pytest
import torch

from llmctl.models import laid_out
from llmctl.models.initialization import new_model
from llmctl.models.loading import load_model, save_model
from llmctl.models.packed import AffineWeight, LaidOutWeight
from llmctl.models.shapes import for_parameters
from llmctl.ops import quantized_linear as ops
from llmctl.quantize.run import quantize
from llmctl.quantize.settings import QuantizeSettings

IDS = torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(1))


def quantized(folder, seed, **how):
    plain = folder / f"plain-{seed}"
    save_model(new_model(for_parameters("llama", 200_000, 96, 64), seed=seed), plain)
    quantize(plain, folder / "model", QuantizeSettings(format="int4", tolerance=9, overwrite=True, **how))
    return folder / "model"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMCTL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(laid_out, "MIN_BYTES", 1)
    return tmp_path / "cache" / "laid-out"


@pytest.fixture
def layings(monkeypatch):
    """How many matrices have been laid out, as one number in a list."""
    count, original = [0], AffineWeight.kernel_weight

    def counted(self):
        count[0] += 1
        return original(self)

    monkeypatch.setattr(AffineWeight, "kernel_weight", counted)
    return count


def logits(path):
    with torch.inference_mode():
        return load_model(path)(IDS)


@pytest.mark.parametrize("how", [{}, {"symmetric": False}])
def test_the_second_process_reads_what_the_first_laid_out(tmp_path, cache, layings, how):
    path = quantized(tmp_path, 0, **how)
    layings[0] = 0
    expected = logits(path)
    first = layings[0]
    assert first > 0 and len(list(cache.glob("*/*.safetensors"))) == 1
    assert torch.equal(logits(path), expected) and layings[0] == first


def test_the_order_of_columns_is_kept(tmp_path, cache):
    codes_NK = torch.randint(0, 16, (40, 96), dtype=torch.uint8)
    zeros_NJ = torch.randint(0, 17, (40, 3), dtype=torch.uint8)
    weight = AffineWeight(codes_NK, torch.rand(40, 3), zeros_NJ, 4, 32, torch.randperm(96))
    layer = LaidOutWeight(weight.kernel_weight(), weight.columns_K)
    laid_out.LaidOut(tmp_path).keep({"layer": layer})
    kept = laid_out.LaidOut(tmp_path).find("layer")
    assert torch.equal(kept.columns_K, layer.columns_K)
    assert torch.equal(ops.dequantized(kept.quantized, torch.float32), ops.dequantized(layer.quantized, torch.float32))
    assert laid_out.LaidOut(tmp_path).find("another") is None


def test_a_checkpoint_that_changed_is_laid_out_anew(tmp_path, cache, layings):
    before = logits(quantized(tmp_path, 0))
    after = logits(quantized(tmp_path, 1))
    assert not torch.equal(before, after) and len(list(cache.iterdir())) == 2
    layings[0] = 0
    assert torch.equal(logits(tmp_path / "model"), after) and layings[0] == 0
    config = tmp_path / "model" / "config.json"
    os.utime(config, ns=(1, 1))
    logits(tmp_path / "model")
    assert layings[0] > 0


@pytest.mark.parametrize("damage", [b"", b"\0" * 100, None])
def test_a_damaged_file_is_as_good_as_none(tmp_path, cache, layings, damage):
    path = quantized(tmp_path, 0)
    expected = logits(path)
    (kept,) = cache.glob("*/*.safetensors")
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-1] if damage is None else damage)
    layings[0] = 0
    assert torch.equal(logits(path), expected) and layings[0] > 0
    assert kept.read_bytes() == whole


def test_nothing_is_kept_where_that_is_not_wanted_or_not_possible(tmp_path, cache, monkeypatch):
    path = quantized(tmp_path, 0)
    monkeypatch.setattr(laid_out, "MIN_BYTES", 1 << 30)
    expected = logits(path)
    monkeypatch.setattr(laid_out, "MIN_BYTES", 1)
    monkeypatch.setenv("RANK", "1")
    assert torch.equal(logits(path), expected)
    monkeypatch.delenv("RANK")
    for place in ("none", "/proc/nowhere", str(path / "config.json")):
        monkeypatch.setenv("LLMCTL_CACHE", place)
        assert torch.equal(logits(path), expected)
    assert not cache.exists()


def test_the_ones_used_last_stay(tmp_path, cache, monkeypatch):
    path = quantized(tmp_path, 0)
    logits(path)
    (first,) = cache.iterdir()
    size = (first / laid_out.FILE).stat().st_size
    monkeypatch.setattr(laid_out, "MAX_BYTES", size * 5 // 2)
    kept = [first]
    for seed in (1, 2):
        os.utime(kept[0], (seed, seed))
        logits(quantized(tmp_path, seed))
        kept += [place for place in cache.iterdir() if place not in kept]
    assert set(cache.iterdir()) == set(kept[1:])
