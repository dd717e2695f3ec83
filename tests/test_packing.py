"""Rows packed from documents: every token exactly where it belongs, once, and never seen by a neighbour."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from llmctl.data.packing import IGNORE, PackedRows, permuted
from llmctl.errors import UserError
from llmctl.models.initialization import new_model
from llmctl.models.shapes import for_parameters
from llmctl.train.objectives import NextToken

EOS, BOS, VOCAB = 0, 1, 64


@dataclass
class Special:
    """As much of a tokenizer as packing asks for."""

    eos_id: int | None
    adds_bos: bool = False


KINDS = {"eos": Special(EOS), "bos and eos": Special(EOS, adds_bos=True), "neither": Special(None)}


class View:
    """A split in memory: `documents` of plain tokens, closed and opened as the tokenizer would."""

    def __init__(self, documents, special, masks=None):
        self.documents = [np.array([*[BOS] * special.adds_bos, *text, *[EOS] * (special.eos_id is not None)], np.int64)
                          for text in documents]  # fmt: skip
        lengths = [len(document) for document in self.documents]
        self.starts = np.cumsum([0, *lengths[:-1]])
        self.ids = np.concatenate(self.documents)
        self.n_tokens = len(self.ids)
        self.mask = None if masks is None else np.concatenate(masks)

    def read(self, start, stop):
        assert 0 <= start <= stop <= self.n_tokens
        return self.ids[start:stop].copy()

    def loss_mask(self, start, stop):
        return None if self.mask is None else self.mask[start:stop]


def random_documents(n, longest, seed=0):
    random = np.random.default_rng(seed)
    return [random.integers(2, VOCAB, random.integers(0, longest + 1)) for _ in range(n)]


def rows_of(batches):
    for batch in batches:
        n_rows = len(batch.inputs)
        documents = np.zeros_like(batch.inputs) if batch.documents is None else batch.documents
        for row in range(n_rows):
            yield batch.inputs[row], batch.targets[row], documents[row]


# --- the order of the rows ---


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 17, 64, 65, 1000])
def test_permuted_is_a_bijection(n):
    for seed, epoch in ((0, 0), (0, 1), (7, 0), (2**40, 3)):
        assert sorted(permuted(index, n, seed, epoch) for index in range(n)) == list(range(n))


def test_permutations_differ_between_epochs_and_seeds_and_have_no_pattern():
    def order(seed, epoch):
        return [permuted(index, 1000, seed, epoch) for index in range(1000)]

    orders = [order(0, 0), order(0, 1), order(1, 0)]
    assert len({tuple(each) for each in orders}) == 3
    for each in orders:
        assert abs(np.corrcoef(each, range(1000))[0, 1]) < 0.1
        assert sum(b - a == 1 for a, b in zip(each, each[1:])) < 10


@pytest.mark.parametrize("n_tokens", [9, 16, 17, 100, 1001])
def test_an_epoch_visits_every_window_once(n_tokens):
    view = View([np.arange(n_tokens - 1)], KINDS["eos"])
    rows = PackedRows(view, 8, KINDS["eos"], seed=3)
    offsets = set()
    for epoch in range(4):
        first = epoch * rows.rows_per_epoch
        batch = rows.train_batch(first, rows.rows_per_epoch)
        starts = sorted(batch.inputs[:, 0])
        assert [b - a for a, b in zip(starts, starts[1:])] == [8] * (len(starts) - 1)
        assert (batch.inputs[:, 1:] - batch.inputs[:, :-1] == 1).all()
        assert n_tokens - 8 * len(starts) < 16 and batch.n_targets == 8 * len(starts)
        offsets.add(starts[0])
    assert len(offsets) > 1 or n_tokens == 9


def test_a_row_is_the_same_whoever_reads_it():
    view = View(random_documents(50, 30), KINDS["eos"])
    together = PackedRows(view, 16, KINDS["eos"], seed=1).train_batch(5, 90)
    again = PackedRows(view, 16, KINDS["eos"], seed=1)
    for number in (5, 40, 94):
        alone = again.train_batch(number, 1)
        assert np.array_equal(alone.inputs[0], together.inputs[number - 5])
        assert np.array_equal(alone.targets[0], together.targets[number - 5])
    other = PackedRows(view, 16, KINDS["eos"], seed=2).train_batch(5, 90)
    assert not np.array_equal(other.inputs, together.inputs)


# --- what is predicted from what ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("documents", [random_documents(60, 40), random_documents(3000, 3), random_documents(1, 300),
                                       [[]] * 40, [[5]] * 40], ids=["mixed", "short", "one", "empty", "one token"])  # fmt: skip
def test_validation_scores_every_token_once_within_its_document(kind, documents):
    special = KINDS[kind]
    view = View(documents, special)
    if view.n_tokens == 0:
        with pytest.raises(UserError, match="0 tokens"):
            PackedRows(view, 32, special)
        return
    scored = []
    for inputs, targets, numbers in rows_of(PackedRows(view, 32, special).validation_batches(3)):
        kept = targets != IGNORE
        scored += targets[kept].tolist()
        # within one document the next input is the target: nothing is predicted across a border
        same = (numbers[1:] == numbers[:-1]) & kept[1:] & kept[:-1]
        assert np.array_equal(inputs[1:][same], targets[:-1][same])
    # a document's first token has nothing to be predicted from, except where an end token stands in front of it
    first = 0 if kind == "eos" else 1
    assert scored == [token for document in view.documents for token in document[first:].tolist()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("longest", [2, 25])
def test_packed_loss_and_gradient_are_those_of_each_document_alone(kind, longest):
    special = KINDS[kind]
    documents = random_documents(12, longest, seed=4)
    view = View(documents, special)
    model = tiny_model()
    packed = PackedRows(view, view.n_tokens - 1, special).train_batch(0, 1)
    got = loss_and_gradients(model, [(packed.inputs, packed.targets, packed.documents)])
    alone = []
    for number, document in enumerate(view.documents):
        # the end token of the document before is the first input
        ids = np.concatenate([[EOS], document]) if kind == "eos" and number else document
        if len(ids) > 1:
            alone.append((ids[None, :-1], ids[None, 1:], None))
    expected = loss_and_gradients(model, alone)
    assert got[0] == pytest.approx(expected[0], rel=1e-6)
    for mine, theirs in zip(got[1], expected[1]):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_without_isolation_neighbours_are_seen():
    view = View(random_documents(12, 10, seed=4), KINDS["eos"])
    isolated, open_ = (PackedRows(view, 32, KINDS["eos"], isolate_documents=i).train_batch(0, 2) for i in (True, False))
    assert isolated.documents is not None and open_.documents is None
    assert np.array_equal(isolated.targets, open_.targets)


def test_a_row_inside_one_document_needs_no_mask():
    view = View([np.arange(2, 60), [3]], KINDS["eos"])
    assert PackedRows(view, 8, KINDS["eos"]).train_batch(0, 1).documents is None


def test_only_tokens_of_the_loss_mask_are_targets():
    documents = random_documents(40, 20, seed=2)
    special = KINDS["eos"]
    random = np.random.default_rng(1)
    masks = [random.random(len(document) + 1) < 0.3 for document in documents]
    view = View(documents, special, masks)
    wanted = view.ids[view.mask].tolist()
    rows = PackedRows(view, 16, special)
    scored = [t for _, targets, _ in rows_of(rows.validation_batches(4)) for t in targets[targets != IGNORE].tolist()]
    assert scored == wanted and 0 < len(wanted) < view.n_tokens


def test_a_corpus_below_one_sequence_says_how_long_a_sequence_may_be():
    view = View([np.arange(2, 10)], KINDS["eos"])
    with pytest.raises(UserError, match="9 tokens, one sequence needs 17") as caught:
        PackedRows(view, 16, KINDS["eos"])
    assert "--seq-len 8" in caught.value.hint
    assert PackedRows(view, 8, KINDS["eos"]).train_batch(0, 3).n_targets == 24


def tiny_model():
    config = for_parameters("llama", 30_000, VOCAB, 1024)
    model = new_model(dataclasses.replace(config, tie_embeddings=False), seed=0)
    with torch.no_grad():
        for parameter in model.parameters():  # those that start at zero would hide what flows through them
            parameter.normal_(0, 0.2) if parameter.dim() == 2 else None
    return model


def loss_and_gradients(model, rows):
    objective = NextToken(model, z_loss=0.0).train()
    model.zero_grad()
    total = 0.0
    for arrays in rows:
        loss = objective(*(None if array is None else torch.from_numpy(array) for array in arrays))
        loss.backward()
        total += loss.item()
    return total, [parameter.grad.clone() for parameter in model.parameters()]
