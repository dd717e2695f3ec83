"""Masked-language modelling: what is hidden, and models trained so."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from llmctl.data.corpus import Corpus
from llmctl.data.masking import MaskedRows, Masking, row_bounds, word_starts
from llmctl.data.masking_settings import MaskingSettings
from llmctl.data.packing import IGNORE
from llmctl.errors import CalledWrongly, UserError
from llmctl.models import shapes
from llmctl.models.loading import load_model
from llmctl.pretrain import objectives
from llmctl.pretrain.settings import PretrainSettings
from llmctl.tokenizer import Tokenizer

SHAPE = ("--params", "60k", "--seq-len", "32", "--batch-size", "8", "--precision", "fp32")


@pytest.fixture(scope="module")
def tokenizer(some_texts) -> Tokenizer:
    return Tokenizer.train_bpe([*some_texts, "Unquestionably, unbelievably."], 320, special_tokens="encoder")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory, write_tokens, some_texts, tokenizer):
    path = tmp_path_factory.mktemp("tokens") / "corpus.arrow"
    return write_tokens(path, some_texts, held_out=20, tokenizer=tokenizer)


def hidden(tokenizer, ids, **changes):
    masking = Masking(tokenizer, MaskingSettings(**changes))
    return masking.hide(ids, np.ones(len(ids), bool), np.random.default_rng(0))


def ordinary(tokenizer, n: int) -> np.ndarray:
    return np.random.default_rng(7).integers(4, tokenizer.vocab_size, n)


# --- what is hidden ---


def test_shares_of_masked_random_and_kept_tokens(tokenizer):
    ids = ordinary(tokenizer, 100_000)
    inputs, targets = hidden(tokenizer, ids)
    chosen = targets != IGNORE
    assert chosen.sum() == 15_000 and (targets[chosen] == ids[chosen]).all() and (inputs[~chosen] == ids[~chosen]).all()
    is_mask, is_kept = inputs[chosen] == tokenizer.mask_id, inputs[chosen] == ids[chosen]
    assert abs(is_mask.mean() - 0.8) < 0.02 and abs(is_kept.mean() - 0.1) < 0.02
    replaced = inputs[chosen][~is_mask & ~is_kept]
    assert not set(replaced.tolist()) & tokenizer.special_ids and len(set(replaced.tolist())) > 200


def test_special_tokens_are_never_chosen(tokenizer):
    ids = np.array(sorted(tokenizer.special_ids) * 50)
    inputs, targets = hidden(tokenizer, ids, mask_probability=1.0)
    assert (targets == IGNORE).all() and (inputs == ids).all()


def test_whole_words_are_hidden_together(tokenizer):
    text = " Unquestionably the cat sat on a mat and saw two dogs." * 40
    ids = np.array(tokenizer.encode(text))
    _, targets = hidden(tokenizer, ids, whole_words=True)
    chosen, begins = targets != IGNORE, word_starts(tokenizer)[ids]
    n_ordinary = len(ids) - 2
    assert 0.15 * n_ordinary <= chosen.sum() <= 0.15 * n_ordinary + 12
    words = np.cumsum(begins)[1:-1]
    parts = [set(chosen[1:-1][words == word].tolist()) for word in set(words.tolist())]
    assert all(len(part) == 1 for part in parts) and (chosen & ~begins).any()


def test_word_pieces_say_where_words_begin(data):
    bert = Tokenizer.load(data / "tokenizers" / "bert")
    ids = bert.encode("Unquestionably so.", add_special_tokens=False)
    assert len(ids) > 3 and word_starts(bert)[ids].tolist() == [True] + [False] * (len(ids) - 3) + [True, True]


def test_a_tokenizer_without_words_is_refused_whole_ones(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(["<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERT", "<mask>"]))
    with pytest.raises(UserError, match="does not mark where words begin"):
        word_starts(Tokenizer.load(tmp_path / "vocab.txt"))


@pytest.mark.parametrize("length", [5, 12, 40])
def test_documents_that_fit_into_a_row_are_not_cut(length):
    sizes = np.random.default_rng(0).integers(1, 30, 200)
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    bounds = row_bounds(starts, int(sizes.sum()), length)
    assert bounds[0] == 0 and bounds[-1] == sizes.sum()
    assert (np.diff(bounds) > 0).all() and (np.diff(bounds) <= length).all()
    cut = set(bounds.tolist()) - set(starts.tolist()) - {int(sizes.sum())}
    for place in cut:
        document = np.searchsorted(starts, place, side="right") - 1
        assert sizes[document] > length


def test_rows_are_a_function_of_seed_and_number(tokens, tokenizer):
    view = Corpus.open([tokens]).split("train")

    def rows(seed=0):
        return MaskedRows(view, 32, tokenizer, masking=Masking(tokenizer, MaskingSettings()), seed=seed)

    whole = rows().train_batch(5, 8)
    parts = [rows().train_batch(5, 3), rows().train_batch(8, 5)]
    for name in ("inputs", "targets", "documents"):
        assert (getattr(whole, name) == np.concatenate([getattr(part, name) for part in parts])).all()
    n = rows().rows_per_epoch
    first, second = rows().train_batch(0, n), rows().train_batch(n, n)
    assert sorted((first.targets != IGNORE).sum(1)) == sorted((second.targets != IGNORE).sum(1))
    assert (first.inputs != second.inputs).any() and (rows(1).train_batch(5, 8).inputs != whole.inputs).any()
    for one, other in zip(rows().validation_batches(4), rows().validation_batches(4), strict=True):
        assert (one.inputs == other.inputs).all() and (one.targets == other.targets).all()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mask_token_share": 0.8, "random_token_share": 0.3}, "more than 1 together"),
        ({"mask_probability": 0.0}, "nothing to learn"),
    ],
)
def test_shares_that_make_no_sense(tokenizer, changes, message):
    with pytest.raises(CalledWrongly, match=message):
        Masking(tokenizer, replace(MaskingSettings(), **changes))


def test_the_tokenizer_of_an_encoder_in_transformers(tokenizer, in_transformers):
    theirs, text = in_transformers(tokenizer), "The cat<mask> on a mat <mask>."
    assert theirs(text).input_ids == tokenizer.encode(text)
    assert theirs.mask_token_id == tokenizer.mask_id == 3 and theirs.pad_token_id == tokenizer.pad_id == 1
    assert theirs(text).input_ids[0] == theirs.cls_token_id == 0 and theirs(text).input_ids[-1] == theirs.sep_token_id


# --- models trained so ---


def their_loss(directory, tokens, tokenizer) -> float:
    """transformers' loss of the validation rows, nats per masked token; each document alone in a row."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForMaskedLM.from_pretrained(directory).eval()
    rows = MaskedRows(
        Corpus.open([tokens]).split("val"), 32, tokenizer, masking=Masking(tokenizer, MaskingSettings()), seed=0
    )
    total = count = 0
    for batch in rows.validation_batches(1):
        documents = batch.documents[0] if batch.documents is not None else np.zeros(32, int)
        for document in np.unique(documents):
            place = documents == document
            labels = torch.from_numpy(batch.targets[0][place])[None]
            if (labels >= 0).any():
                with torch.no_grad():
                    logits = model(torch.from_numpy(batch.inputs[0][place])[None]).logits
                total += torch.nn.functional.cross_entropy(logits[0], labels[0], reduction="sum").item()
                count += int((labels >= 0).sum())
    return total / count


@pytest.mark.parametrize(
    "family", ["roberta", "esm", *(pytest.param(name, marks=pytest.mark.slow) for name in ("bert", "longformer"))]
)
def test_a_model_trained_here_scores_the_same_in_transformers(llmctl, tokens, tokenizer, tmp_path, family):
    run = llmctl("pretrain", tokens, "--family", family, *SHAPE, "--steps", 30, "-o", "run")
    assert "nats per masked token" in run.stderr and "per byte" not in run.stderr
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["event"] == "validation" and record["unit"] == "masked token" and record["loss"] < 5.3
    assert abs(their_loss(tmp_path / "run", tokens, tokenizer) - record["loss"]) < 1e-4
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["pad_token_id"] == tokenizer.pad_id and load_model(tmp_path / "run").config.max_positions >= 32


def test_a_resumed_run_ends_with_the_same_bits(llmctl, tokens, tmp_path):
    flags = ("pretrain", tokens, "--family", "roberta", *SHAPE, "--steps", 12, "--whole-words", "--threads", 1)
    llmctl(*flags, "-o", "whole")
    llmctl(*flags, "-o", "parts", "--save-every", 5)
    latest = tmp_path / "parts" / "trainer"
    for save in sorted(latest.glob("step-*"))[1:]:  # as if the process had been killed after the first save
        save.rename(tmp_path / save.name)
    (tmp_path / "parts" / "llmctl.json").unlink()
    llmctl("pretrain", "--resume", "-o", "parts")
    assert (tmp_path / "parts/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def test_an_esm_checkpoint_trains_on(llmctl, tokens, tmp_path):
    """What a checkpoint carries beside its parameters survives."""
    llmctl("pretrain", tokens, "--family", "esm", *SHAPE, "--steps", 2, "-o", "first")
    llmctl("pretrain", tokens, "--init-from", "first", "--seq-len", 32, "--steps", 2, "-o", "second")
    first, second = (load_model(tmp_path / name).state_dict() for name in ("first", "second"))
    assert torch.equal(first["rotaries.0.frequencies"], second["rotaries.0.frequencies"])
    assert not torch.equal(first["embed_tokens.weight"], second["embed_tokens.weight"])


@pytest.mark.parametrize(
    "family, settings, message",
    [
        ("bert", {"objective": "causal"}, "--objective causal: bert is an encoder"),
        ("llama", {"objective": "mlm"}, "--objective mlm: llama is a decoder"),
        ("llama", {"whole_words": True}, "--whole-words belongs to --objective mlm"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(family, settings, message):
    config = shapes.for_parameters(family, 60_000, 300, 32)
    with pytest.raises(CalledWrongly, match=message):
        objectives.choose(PretrainSettings(**settings), config)
    assert objectives.choose(PretrainSettings(), config).name == {"bert": "mlm", "llama": "causal"}[family]


def test_a_refused_run_leaves_nothing(llmctl, tokens, tmp_path):
    refused = llmctl("pretrain", tokens, "--family", "bert", "--objective", "causal", *SHAPE, "-o", "run", code=2)
    assert "bert is an encoder" in refused.stderr and not (tmp_path / "run").exists()


def test_a_tokenizer_without_a_mask_token_is_refused(llmctl, write_tokens, some_texts, tmp_path):
    tokens = write_tokens(tmp_path / "plain.arrow", some_texts)
    refused = llmctl("pretrain", tokens, "--family", "roberta", *SHAPE, "--steps", 2, "-o", "run", code=1)
    assert "no mask token" in refused.stderr and "--special-tokens encoder" in refused.stderr


def test_from_text_to_a_filled_gap(llmctl, some_texts, tmp_path):
    """The pipe of a person: tokenize, pretrain, fill-mask."""
    stream = llmctl(
        "tokenize",
        "--split",
        "line",
        "--vocab-size",
        300,
        "--special-tokens",
        "encoder",
        input="\n".join(some_texts).encode(),
    ).stdout
    path = llmctl("pretrain", "--family", "bert", *SHAPE, "--steps", 5, input=stream).stdout
    filled = llmctl("fill-mask", "-", "the cat <mask> on", "--top-k", 2, input=path.decode())
    assert len(filled.stdout.splitlines()) == 2
