"""What is taken out of texts for an encoder-decoder to restore, and the rows made of it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmctl.data import span_corruption
from llmctl.data.corpus import Corpus
from llmctl.data.corruption_settings import CorruptionSettings
from llmctl.data.packing import IGNORE
from llmctl.data.pairs import CorruptedRows, pack
from llmctl.errors import CalledWrongly, UserError
from llmctl.tokenizer import Tokenizer

SENTINELS = np.arange(1000, 1300)
MASK = 999


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


class WithMask:
    mask_id, vocab_size, special_ids = MASK, 1000, frozenset([MASK])

    def encode(self, text, add_special_tokens=True):
        return [1, 2]

    def token_bytes(self, token):
        return b"end. " if token % 10 == 0 else b"word"


def spans(**changes) -> span_corruption.SpanCorruption:
    return span_corruption.SpanCorruption(CorruptionSettings(**changes), SENTINELS)


def infilling(**changes) -> span_corruption.TextInfilling:
    return span_corruption.TextInfilling(CorruptionSettings(**changes), WithMask())


def restored(source: np.ndarray, target: np.ndarray) -> list[int]:
    """The text, from the target's tokens in the places of the source's sentinels."""
    fill, name = {}, None
    for token in target.tolist():
        if token >= SENTINELS[0]:
            name = token
            fill[name] = []
        else:
            fill[name].append(token)
    return [part for token in source.tolist() for part in fill.pop(token, [token])]


@settings(max_examples=200, deadline=None)
@given(
    length=st.integers(2, 300),
    density=st.floats(0.01, 0.9),
    mean=st.floats(1, 20),
    seed=st.integers(0, 1000),
)
def test_what_spans_take_out_stands_in_the_target(length, density, mean, seed):
    corruption = spans(noise_density=density, mean_span_length=mean)
    text = np.arange(length)
    source, target = corruption.pair(text, generator(seed))
    assert restored(source, target) == text.tolist()
    n_noise, n_spans = corruption.n_noise(length), corruption.n_spans(length)
    assert len(source) == length - n_noise + n_spans <= length and len(target) == n_noise + n_spans
    sentinels = [token for token in source.tolist() if token >= SENTINELS[0]]
    assert sentinels == SENTINELS[:n_spans].tolist() == [token for token in target if token >= SENTINELS[0]]
    assert source[0] == 0 and source[-1] == sentinels[-1]


def test_spans_take_their_share_in_pieces_of_the_mean_length():
    corruption = spans()
    assert (corruption.n_noise(512), corruption.n_spans(512)) == (77, 26)
    lengths = []
    for seed in range(200):
        target = corruption.pair(np.arange(512), generator(seed))[1]
        starts = np.flatnonzero(target >= SENTINELS[0])
        lengths += (np.diff(starts, append=len(target)) - 1).tolist()
    assert np.mean(lengths) == pytest.approx(77 / 26)
    assert min(lengths) == 1 and max(lengths) > 8


def test_every_way_to_share_is_equally_likely():
    drawn = [tuple(span_corruption.random_shares(5, 3, generator(seed))) for seed in range(3000)]
    assert len(set(drawn)) == 6 and all(sum(shares) == 5 and min(shares) >= 1 for shares in drawn)
    assert all(400 < drawn.count(shares) < 600 for shares in set(drawn))


@settings(max_examples=200, deadline=None)
@given(length=st.integers(1, 300), density=st.floats(0.01, 0.9), mean=st.floats(1, 8), seed=st.integers(0, 1000))
def test_infilling_leaves_a_mask_for_each_span(length, density, mean, seed):
    text = np.arange(length)
    source, target = infilling(noise_density=density, mean_span_length=mean).pair(text, generator(seed))
    assert target.tolist() == text.tolist() and len(source) <= length
    kept = [token for token in source.tolist() if token != MASK]
    assert kept == sorted(set(kept)), "what stays keeps its order"
    n_noise = max(1, int(np.ceil(length * density)))
    assert len(kept) == length - n_noise and (source == MASK).sum() >= 1


def test_lengths_of_infilled_spans_are_poisson():
    n_masks = [int((infilling().pair(np.arange(1000), generator(seed))[0] == MASK).sum()) for seed in range(50)]
    # 300 tokens in spans of 3 on average, those of length 0 among them
    assert np.mean(n_masks) == pytest.approx(100, rel=0.05)


def test_sentences_are_shuffled_whole():
    text = np.arange(1, 101)  # every tenth ends a sentence
    source, target = infilling(permute_sentences=True, noise_density=0.02).pair(text, generator(3))
    assert target.tolist() == text.tolist()
    tens = [(token - 1) // 10 for token in source.tolist() if token != MASK]
    order = [ten for i, ten in enumerate(tens) if not i or tens[i - 1] != ten]
    assert sorted(order) == list(range(10)) and order != sorted(order)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [f"Text number {i} is {'very ' * (i % 9)}short. It ends here!" for i in range(120)]


@pytest.fixture(scope="module")
def tokenizers(texts) -> dict[str, Tokenizer]:
    return {name: Tokenizer.train_bpe(texts, 420, name) for name in ("sentinels", "encoder", "text")}


def test_our_tokenizer_has_sentinels_that_stay_whole(tokenizers, in_transformers):
    ours = tokenizers["sentinels"]
    assert span_corruption.sentinel_ids(ours) == list(range(2, 102))
    assert (ours.pad_id, ours.eos_id, ours.bos_id) == (0, 1, None)
    text = "Text <extra_id_0> is<extra_id_99>."
    ids = ours.encode(text)
    assert ids[-1] == ours.eos_id and {2, 101} < set(ids)
    theirs = in_transformers(ours)
    assert theirs(text).input_ids == ids
    assert theirs.pad_token_id == 0 and theirs.eos_token_id == 1


def test_auto_takes_what_the_tokenizer_has_and_says_what_it_lacks(tokenizers):
    def built(name, longest=64, **changes):
        return span_corruption.build(CorruptionSettings(**changes), tokenizers[name], longest)

    assert isinstance(built("sentinels"), span_corruption.SpanCorruption)
    assert isinstance(built("encoder"), span_corruption.TextInfilling)
    with pytest.raises(UserError, match="neither sentinels.*nor a mask token") as caught:
        built("text")
    assert "--special-tokens sentinels" in caught.value.hint
    with pytest.raises(UserError, match="need 205 sentinel tokens.*has 100"):
        built("sentinels", longest=4096)
    with pytest.raises(UserError, match="need 3 sentinel tokens.*has 0"):
        built("encoder", corruption="spans")
    with pytest.raises(CalledWrongly, match="--permute-sentences"):
        built("sentinels", permute_sentences=True)


def rows_of(path, tokenizer, write_tokens, texts, seq_len=48, start_id=0, **changes) -> CorruptedRows:
    view = Corpus.open([write_tokens(path, texts, tokenizer=tokenizer)]).split("train")
    corruption = span_corruption.build(CorruptionSettings(), tokenizer, seq_len)
    return CorruptedRows(view, seq_len, tokenizer, corruption=corruption, start_id=start_id, **changes)


@pytest.mark.parametrize("name", ["sentinels", "encoder"])
def test_an_epoch_restores_every_text_once(tmp_path, write_tokens, texts, tokenizers, name):
    tokenizer = tokenizers[name]
    rows = rows_of(tmp_path / "a.arrow", tokenizer, write_tokens, texts)
    front, back = tokenizer.document_edges
    seen = []
    for number in range(rows.rows_per_epoch):
        batch = rows.train_batch(number, 1)
        for pair in [0] if batch.documents is None else np.unique(batch.documents[batch.targets != IGNORE]):
            here = slice(None) if batch.documents is None else batch.documents[0] == pair
            target = batch.targets[0][here]
            assert batch.inputs[0][here].tolist() == [0, *target[:-1].tolist()]
            source = batch.sources[0][slice(None) if batch.documents is None else batch.source_documents[0] == pair]
            assert source[: len(front)].tolist() == front == target[: len(front)].tolist()
            assert source[-len(back) :].tolist() == back == target[-len(back) :].tolist()
            inner = [side[len(front) : -len(back)] for side in (source, target)]
            seen.append(tokenizer.decode(inner[1]) if name == "encoder" else restored_text(tokenizer, *inner))
    assert sorted(seen) == sorted(texts)


def restored_text(tokenizer, source, target) -> str:
    shift = {token: 1000 + i for i, token in enumerate(span_corruption.sentinel_ids(tokenizer))}
    source, target = (np.array([shift.get(token, token) for token in side.tolist()]) for side in (source, target))
    return tokenizer.decode(restored(source, target))


def test_rows_depend_on_seed_and_number_alone(tmp_path, write_tokens, texts, tokenizers):
    make = lambda n, seed: rows_of(tmp_path / f"{n}.arrow", tokenizers["sentinels"], write_tokens, texts, seed=seed)  # noqa: E731
    rows, again, other = make(1, 5), make(2, 5), make(3, 6)
    whole = rows.train_batch(3, 4)
    for i in range(4):
        alone = again.train_batch(3 + i, 1)
        width = alone.sources.shape[1]
        assert whole.sources[i, :width].tolist() == alone.sources[0].tolist()
    assert other.train_batch(3, 4).sources.tolist() != whole.sources.tolist()
    epoch = rows.rows_per_epoch
    assert rows.train_batch(0, epoch).sources.tolist() != rows.train_batch(epoch, epoch).sources.tolist()
    held_out = [batch.sources.tolist() for batch in rows.validation_batches(4)]
    assert held_out == [batch.sources.tolist() for batch in again.validation_batches(4)]


def test_padding_is_numbered_apart_and_never_a_target():
    first = [(np.array([5, 6, 7]), np.array([8, 9])), (np.array([4]), np.array([3, 2, 1]))]
    batch = pack([first, [], [(np.array([5, 6]), np.array([7]))]], start_id=0, pad_id=99, longest=64)
    assert batch.sources[0, :5].tolist() == [5, 6, 7, 4, 99] and batch.inputs[0, :6].tolist() == [0, 8, 0, 3, 2, 99]
    assert batch.targets[0, :6].tolist() == [8, 9, 3, 2, 1, IGNORE]
    assert batch.source_documents[0, :5].tolist() == [0, 0, 0, 1, 2]
    assert batch.documents[0, :6].tolist() == [0, 0, 1, 1, 1, 2]
    assert batch.n_targets == 6 and batch.without_targets().n_targets == 0
    equal = pack([first[:1], first[:1]], start_id=0, pad_id=99, longest=64)
    assert equal.documents is None and equal.sources.shape == (2, 3)
