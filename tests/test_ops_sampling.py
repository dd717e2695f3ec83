"""The sampling kernel against the sampler in torch: the same tokens from the same logits and seeds."""

from __future__ import annotations

import math
import random

import pytest
import torch

from llmctl.generation.rules import Rules
from llmctl.generation.sampling import Sampler
from llmctl.generation.settings import Sampling, resolve
from llmctl.ops import native, sampling

pytestmark = pytest.mark.skipif(not native.path().exists(), reason="the native library is not built")


def draws(rows: list[Sampling], logits: torch.Tensor, steps: int = 1) -> torch.Tensor:
    """[steps, B] tokens, each step from the same logits."""
    settings = [resolve(row) for row in rows]
    sampler = Sampler(settings, range(len(rows)), Rules(settings, [[0]] * len(rows), logits.shape[1]))
    return torch.stack([sampler.draw(logits).tokens_B for _ in range(steps)])


def both(monkeypatch, rows, logits, steps=1):
    monkeypatch.setenv("LLMCTL_KERNELS", "cpu")
    assert sampling.applies(logits)
    ours = draws(rows, logits, steps)
    monkeypatch.setenv("LLMCTL_KERNELS", "reference")
    assert not sampling.applies(logits)
    return ours, draws(rows, logits, steps)


def some_settings(dice: random.Random, vocab_size: int) -> Sampling:
    return Sampling(
        temperature=dice.choice([0.0, 0.3, 0.8, 1.0, 5.0]),
        top_k=dice.choice([0, 0, 1, 2, 50, vocab_size - 1, vocab_size, 10 * vocab_size]),
        top_p=dice.choice([1.0, 1.0, 0.9, 0.5, 1e-6, 0.9999]),
        min_p=dice.choice([0.0, 0.0, 0.05, 0.9, 1.0]),
        seed=dice.randrange(2**64),
    )


@pytest.mark.parametrize("vocab_size", [1, 3, 50, 257, 1000, 30_011])
@pytest.mark.parametrize("scale", [0.01, 3.0, 40.0])
def test_the_same_tokens_as_the_reference(isa, monkeypatch, vocab_size, scale):
    dice = random.Random(vocab_size)
    generator = torch.Generator().manual_seed(vocab_size)
    for number in range(4):
        logits = scale * torch.randn(9, vocab_size, generator=generator)
        if number % 2:
            logits = logits.bfloat16().float()  # many ties
        ours, theirs = both(monkeypatch, [some_settings(dice, vocab_size) for _ in range(9)], logits, steps=3)
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite(isa, monkeypatch, value):
    rows = [Sampling(seed=1), Sampling(seed=1, top_k=5), Sampling(temperature=0.0), Sampling(seed=1)]
    logits = torch.randn(4, 100)
    logits[:3, 77] = value
    ours, theirs = both(monkeypatch, rows, logits)
    assert torch.equal(ours, theirs)
    if not math.isfinite(value) and value > 0:
        assert ours[0].tolist()[:3] == [77] * 3
    if math.isnan(value):
        assert ours[0].tolist()[:3] == [-1] * 3


def test_nothing_but_minus_infinity_and_all_alike(isa, monkeypatch):
    rows = [
        Sampling(seed=1),
        Sampling(seed=1, top_k=5, top_p=0.5),
        Sampling(seed=3, top_p=0.5),
        Sampling(temperature=0),
    ]
    for logits in (torch.full((4, 9000), -math.inf), torch.zeros(4, 9000)):
        ours, theirs = both(monkeypatch, rows, logits)
        assert torch.equal(ours, theirs)


def test_one_token_left_of_many_ruled_out(isa, monkeypatch):
    logits = torch.full((3, 40_000), -math.inf)
    logits[:, 39_999] = -1e30
    rows = [Sampling(seed=1), Sampling(seed=1, top_k=7, top_p=0.3), Sampling(seed=5, top_p=0.3, min_p=0.5)]
    ours, theirs = both(monkeypatch, rows, logits)
    assert ours[0].tolist() == [39_999] * 3 and torch.equal(ours, theirs)


def test_frequencies_are_the_probabilities(isa, monkeypatch):
    monkeypatch.setenv("LLMCTL_KERNELS", "cpu")
    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(draws([Sampling(seed=7, temperature=1.0)], logits, 6000).flatten(), minlength=300)
    expected = logits[0].softmax(-1) * 6000
    assert ((counts - expected).square() / expected).sum() < 300 + 4 * math.sqrt(600)


def penalized(rows, logits, prompts, steps=6):
    """Tokens [steps, B], and of each step the log-probabilities and the likeliest, of one sampler."""
    settings = [resolve(row) for row in rows]
    sampler = Sampler(settings, range(len(rows)), Rules(settings, prompts, logits.shape[1]))
    found = [sampler.draw(logits) for _ in range(steps)]
    return torch.stack([draw.tokens_B for draw in found]), found


@pytest.mark.parametrize("vocab_size", [5, 97, 20_000])
def test_penalties_and_log_probabilities(isa, monkeypatch, vocab_size):
    dice = random.Random(vocab_size)
    logits = 4 * torch.randn(8, vocab_size, generator=torch.Generator().manual_seed(vocab_size))
    logits[2] = logits[2].round()  # ties
    prompts = [[dice.randrange(vocab_size) for _ in range(1 + 3 * i)] for i in range(8)]

    def settings(i: int) -> Sampling:
        return Sampling(
            temperature=dice.choice([0.0, 0.7, 1.0]),
            top_k=dice.choice([0, 3]),
            repetition_penalty=dice.choice([1.0, 1.3, 0.8]),
            presence_penalty=dice.choice([0.0, 0.7, -0.2]),
            frequency_penalty=dice.choice([0.0, 0.3]),
            seed=i,
            logprobs=i % 4,
        )

    rows = [settings(i) for i in range(8)]
    monkeypatch.setenv("LLMCTL_KERNELS", "cpu")
    ours, our_draws = penalized(rows, logits, prompts)
    monkeypatch.setenv("LLMCTL_KERNELS", "reference")
    theirs, their_draws = penalized(rows, logits, prompts)
    assert torch.equal(ours, theirs)
    for a, b in zip(our_draws, their_draws, strict=True):
        torch.testing.assert_close(a.logprobs_B, b.logprobs_B, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(a.top_logprobs_BN, b.top_logprobs_BN, rtol=2e-6, atol=2e-6)
        strict = [i for i in range(8) if i != 2]
        assert torch.equal(a.top_ids_BN[strict], b.top_ids_BN[strict])
        assert (a.top_ids_BN[2].diff()[a.top_logprobs_BN[2].diff() == 0] > 0).all(), "of equals the first"


def test_log_probabilities_of_what_is_not_finite(monkeypatch):
    monkeypatch.setenv("LLMCTL_KERNELS", "cpu")
    logits = torch.randn(3, 40)
    logits[0, 7], logits[1, 3:] = float("nan"), -math.inf
    tokens, (draw, *_) = penalized([Sampling(seed=1, logprobs=5)] * 3, logits, [[0]] * 3, steps=1)
    assert tokens[0, 0] == -1 and draw.logprobs_B[0].isnan()
    torch.testing.assert_close(draw.top_logprobs_BN[1:], logits[1:].log_softmax(-1).topk(5).values)


def test_rows_do_not_know_each_other(monkeypatch):
    monkeypatch.setenv("LLMCTL_KERNELS", "cpu")
    logits = 4 * torch.randn(20, 5000)
    row = Sampling(seed=3, top_p=0.9)
    together = draws([row] * 20, logits)[0]
    wide = torch.full((20, 5003), math.inf)
    wide[:, :5000] = logits
    assert torch.equal(draws([row] * 20, wide[:, :5000])[0], together)
    assert draws([row], logits[:1])[0, 0] == together[0]


def test_settings_of_another_kind_are_refused(monkeypatch):
    monkeypatch.setenv("LLMCTL_KERNELS", "cpu")
    column = torch.ones(2)
    names = ("temperature_B", "top_k_B", "top_p_B", "log_min_p_B", "is_greedy_B", "seeds_B", "sequences_B")
    with pytest.raises(ValueError, match="expected torch.int64 \\(2,\\), got torch.float32"):
        sampling.Settings(**dict.fromkeys(names, column))
