"""Random numbers against Random123's vectors, filters against transformers' logits processors, draws against chance."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmctl.errors import CalledWrongly, UserError
from llmctl.generation import philox
from llmctl.generation.rules import Rules
from llmctl.generation.sampling import Sampler
from llmctl.generation.settings import DEFAULTS, Sampling, eos_ids, resolve, sampling_from

VOCAB = 50


def sampler(*rows: Sampling, prompts=None, sequences=None, vocab_size=VOCAB) -> Sampler:
    prompts = prompts or [[0]] * len(rows)
    settings = [resolve(row) for row in rows]
    return Sampler(settings, sequences or range(len(rows)), Rules(settings, prompts, vocab_size))


def some_logits(rows: int = 1, vocab_size: int = VOCAB, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed))


# Random123's kat_vectors file, https://github.com/DEShawResearch/random123, rows "philox4x32 10": counter, key, result
VECTORS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> torch.Tensor:
    return torch.tensor([int(word, 16) for word in text.split()])


@pytest.mark.parametrize("counter, key, result", VECTORS)
def test_philox_gives_the_published_words(counter, key, result):
    assert torch.equal(philox.philox4x32(words(counter), words(key)), words(result))


def test_a_number_belongs_to_its_seed_sequence_position_and_token():
    seeds, sequences = torch.tensor([5, 5, 6, -1]), torch.tensor([0, 1, 0, 0])
    together = philox.uniform(seeds, sequences, 3, 10)
    for i in range(4):
        alone = philox.uniform(seeds[i : i + 1], sequences[i : i + 1], 3, 7)
        assert torch.equal(alone[0], together[i, :7])
    assert len({tuple(row.tolist()) for row in together}) == 4
    assert not torch.equal(together, philox.uniform(seeds, sequences, 4, 10))
    counter = torch.tensor([1, 3, 1, 0])  # token 5 is word 1 of block 1
    word = philox.philox4x32(counter, torch.tensor([5, 0]))[1].item()
    assert together[1, 5].item() == pytest.approx((word + 0.5) / 2**32, rel=1e-6)


def test_splitting_the_work_changes_no_number(monkeypatch):
    seeds, sequences = torch.arange(9), torch.arange(9)
    whole = philox.uniform(seeds, sequences, 0, 33)
    monkeypatch.setattr(philox, "CACHED_BLOCKS", 20)
    assert torch.equal(philox.uniform(seeds, sequences, 0, 33), whole)


def test_uniform_numbers_are_uniform_and_never_0_or_1():
    numbers = philox.uniform(torch.arange(20), torch.arange(20), 1, 50_000).double()
    assert 0 < numbers.min() and numbers.max() < 1
    counts = torch.histc(numbers, bins=100, min=0, max=1)
    chi_square = ((counts - 10_000) ** 2 / 10_000).sum()
    assert chi_square < 99 + 5 * math.sqrt(2 * 99)
    assert philox.gumbel(torch.arange(20), torch.arange(20), 1, 50_000).isfinite().all()


def reference_logits(logits, ids, row: Sampling):
    """transformers' processors in the order in which its `generate` builds them."""
    processors = pytest.importorskip("transformers.generation.logits_process")
    chain = [processors.RepetitionPenaltyLogitsProcessor(row.repetition_penalty)]
    chain.append(processors.TemperatureLogitsWarper(row.temperature))
    if row.top_k:
        chain.append(processors.TopKLogitsWarper(row.top_k))
    chain.append(processors.TopPLogitsWarper(row.top_p))
    chain.append(processors.MinPLogitsWarper(row.min_p))
    for processor in chain:
        logits = processor(ids, logits)
    return logits


SETTINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 2, 10, 49, 80]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.4, 0.7]),
)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(SETTINGS, min_size=1, max_size=4), seed=st.integers(0, 1000))
def test_filters_agree_with_transformers_row_by_row(rows, seed):
    logits = some_logits(len(rows), seed=seed)
    prompts = [[3, 7, 7, 20 + i] for i in range(len(rows))]
    ours = sampler(*rows, prompts=prompts)
    processed = ours.filtered(ours.rules.apply(logits))
    for i, row in enumerate(rows):
        expected = reference_logits(logits[i : i + 1], torch.tensor(prompts[i : i + 1]), resolve(row))
        torch.testing.assert_close(processed[i : i + 1], expected)


def test_top_p_is_taken_of_what_top_k_left():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    both = sampler(Sampling(temperature=1.0, top_k=2, top_p=0.55), vocab_size=4)
    # 0.4 is 0.57 of the two that top-k leaves, so it alone reaches 0.55; of all four it would take two.
    assert both.filtered(logits).isfinite().tolist() == [[True, False, False, False]]
    alone = sampler(Sampling(temperature=1.0, top_p=0.55), vocab_size=4)
    assert alone.filtered(logits).isfinite().tolist() == [[True, True, False, False]]


def test_ties_with_the_last_one_kept_are_kept():
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]])
    for row in (Sampling(temperature=1.0, top_k=2), Sampling(temperature=1.0, top_k=3, top_p=0.7)):
        assert sampler(row, vocab_size=5).filtered(logits).isfinite().tolist() == [[True, True, True, True, False]]


def test_presence_and_frequency_count_the_generated_text_only():
    ours = sampler(Sampling(temperature=0.0, presence_penalty=0.5, frequency_penalty=0.25), prompts=[[1, 1, 2]])
    logits = torch.zeros(1, VOCAB)
    logits[0, 4] = 10.0
    assert torch.equal(ours.rules.apply(logits), logits)
    for _ in range(3):
        assert ours.draw(logits).tokens_B.tolist() == [4]
    expected = logits.clone()
    expected[0, 4] -= 0.5 + 3 * 0.25
    assert torch.equal(ours.rules.apply(logits), expected)


def test_repetition_counts_prompt_and_text_and_only_the_row_of_its_own():
    ours = sampler(Sampling(repetition_penalty=2.0), Sampling(), prompts=[[1], [2]])
    logits = torch.full((2, VOCAB), -1.0)
    logits[:, 1] = 4.0
    assert ours.rules.apply(logits)[0, 1] == 2.0 and torch.equal(ours.rules.apply(logits)[1], logits[1])
    first = ours.draw(logits).tokens_B[0].item()
    assert ours.rules.apply(logits)[0, first] == (2.0 if first == 1 else -2.0)


@pytest.mark.parametrize("row", [Sampling(temperature=0.0), Sampling(top_k=1), Sampling(temperature=0.0, top_p=0.1)])
def test_greedy_takes_the_likeliest(row):
    logits = some_logits(1)
    assert all(sampler(row, sequences=[i]).draw(logits).tokens_B == logits.argmax() for i in range(20))


def test_frequencies_are_the_probabilities():
    logits = some_logits(1, 12)
    n_rows, n_steps = 2000, 20
    row = Sampling(temperature=1.3, top_k=8, top_p=0.95, seed=11)
    ours = sampler(*[row] * n_rows, vocab_size=12)
    drawn = torch.cat([ours.draw(logits.expand(n_rows, -1)).tokens_B for _ in range(n_steps)])
    probabilities = ours.filtered(logits.expand(n_rows, -1))[0].softmax(-1)
    counts = drawn.bincount(minlength=12)
    allowed = probabilities > 0
    assert counts[~allowed].sum() == 0 and 3 <= allowed.sum() < 12
    expected = probabilities[allowed] * n_rows * n_steps
    chi_square = ((counts[allowed] - expected) ** 2 / expected).sum().item()
    degrees = int(allowed.sum()) - 1
    assert chi_square < degrees + 5 * math.sqrt(2 * degrees)


def test_a_row_draws_the_same_in_any_company():
    rows = [Sampling(seed=3, top_p=0.9), Sampling(seed=3), Sampling(seed=4, temperature=0.0), Sampling(seed=2**64 - 1)]
    logits = some_logits(4)
    together = sampler(*rows)
    drawn = torch.stack([together.draw(logits).tokens_B for _ in range(10)], dim=1)
    for i, row in enumerate(rows):
        alone = sampler(row, sequences=[i])
        assert [alone.draw(logits[i : i + 1]).tokens_B.item() for _ in range(10)] == drawn[i].tolist()
    assert drawn[0].tolist() != drawn[1].tolist()


def test_rows_that_stay_go_on_as_if_nobody_had_left():
    rows = [Sampling(seed=i, repetition_penalty=1.3, frequency_penalty=0.5) for i in range(4)]
    logits = some_logits(4)
    whole, parted = sampler(*rows), sampler(*rows)
    whole.draw(logits), parted.draw(logits)
    parted.select([1, 3])
    for _ in range(5):
        assert whole.draw(logits).tokens_B[[1, 3]].tolist() == parted.draw(logits[[1, 3]]).tokens_B.tolist()


def test_log_probabilities_are_the_models_own():
    logits = some_logits(2)
    drawn = sampler(Sampling(temperature=0.1, top_k=3, logprobs=4), Sampling(logprobs=0)).draw(logits)
    expected = logits.log_softmax(-1)
    torch.testing.assert_close(drawn.logprobs_B, expected.gather(1, drawn.tokens_B[:, None])[:, 0])
    assert torch.equal(drawn.top_ids_BN, expected.topk(4).indices) and drawn.top_logprobs_BN.shape == (2, 4)
    assert sampler(Sampling()).draw(logits[:1]).logprobs_B is None


@pytest.mark.parametrize("row", [Sampling(temperature=0.0), Sampling(top_k=5, top_p=0.9, min_p=0.1)])
def test_logits_that_are_no_numbers_are_told(row):
    logits = some_logits(2)
    logits[1, 9] = math.nan
    tokens = sampler(row, row).draw(logits).tokens_B
    assert tokens[0] >= 0 and tokens[1] == -1


def test_extreme_logits_and_temperatures_stay_finite():
    logits = torch.tensor([[1e30, -1e30, 0.0, -math.inf]])
    for temperature in (1e-4, 1.0, 1e4):
        assert sampler(Sampling(temperature=temperature, top_p=0.9), vocab_size=4).draw(logits).tokens_B.tolist() == [0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": 2.5},
        {"top_k": True},
        {"min_p": "0.1"},
        {"repetition_penalty": 0},
        {"max_new_tokens": 0},
        {"seed": -1},
        {"stop": ""},
        {"stop": ["a", 3]},
        {"stop": 3},
        {"temperature": float("inf")},
        {"presence_penalty": float("nan")},
        {"ignore_eos": 1},
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(wrong):
    with pytest.raises(CalledWrongly, match=next(iter(wrong)).replace("_", "-")):
        Sampling(**wrong)


def test_the_first_layer_that_says_something_wins():
    found = resolve(Sampling(top_k=0), Sampling(top_k=5, seed=1), Sampling(seed=2, top_p=0.5))
    assert (found.top_k, found.seed, found.top_p, found.temperature) == (0, 1, 0.5, DEFAULTS.temperature)


def test_a_checkpoint_recommends_settings_and_names_what_ends_a_text():
    config = {"do_sample": False, "top_k": 40, "transformers_version": "5", "eos_token_id": [7, 9], "seed": 5}
    found = sampling_from(config)
    assert (found.temperature, found.top_k, found.seed) == (0.0, 40, None)
    with pytest.raises(UserError, match="generation_config.json: top-p is 0"):
        sampling_from({"top_p": 0})
    assert eos_ids(config, {"eos_token_id": 2}, 1) == {7, 9}
    assert eos_ids({}, {"eos_token_id": 2}, 1) == {2} and eos_ids({}, {}, 1) == {1} and eos_ids({}, {}, None) == set()
