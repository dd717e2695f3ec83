"""Pretraining of encoder-decoders: the same loss in transformers, and the same bits after every interruption."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")

from llmctl.checkpoint import open_tensors  # noqa: E402
from llmctl.data import span_corruption  # noqa: E402
from llmctl.data.corpus import Corpus  # noqa: E402
from llmctl.data.corruption_settings import CorruptionSettings  # noqa: E402
from llmctl.data.packing import IGNORE  # noqa: E402
from llmctl.data.pairs import CorruptedRows  # noqa: E402
from llmctl.errors import CalledWrongly, Interrupted, UserError  # noqa: E402
from llmctl.generation.session import Session  # noqa: E402
from llmctl.generation.settings import Sampling  # noqa: E402
from llmctl.models.config import parameter_count  # noqa: E402
from llmctl.models.initialization import new_model  # noqa: E402
from llmctl.models.loading import load_model, read_config  # noqa: E402
from llmctl.models.shapes import for_parameters  # noqa: E402
from llmctl.pretrain.settings import PretrainSettings  # noqa: E402
from llmctl.pretrain.task import pretraining  # noqa: E402
from llmctl.tokenizer import Tokenizer  # noqa: E402
from llmctl.train.events import Saved, Started, Trained, Validated  # noqa: E402
from llmctl.train.objectives import TargetToken  # noqa: E402

SEQ_LEN, SEED = 48, 3
TINY = dict(
    **dict(params=80_000, seq_len=SEQ_LEN, batch_size=6, steps=8, precision="fp32", log_every=2, save_every=4),
    **dict(validate_every=4, warmup_steps=2, seed=SEED),
)
SPECIAL = {"t5": "sentinels", "bart": "encoder"}


@pytest.fixture(scope="module", params=list(SPECIAL))
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def tokens(family, tmp_path_factory, write_tokens, some_texts):
    tokenizer = Tokenizer.train_bpe(some_texts, 400, SPECIAL[family])
    return write_tokens(tmp_path_factory.mktemp(family) / "corpus.arrow", some_texts, held_out=20, tokenizer=tokenizer)


def run(output, *inputs, resume=False, at_event=None, **changes):
    settings = PretrainSettings(**({} if resume else TINY) | changes, resume=resume)
    events = []
    with pretraining(settings, [str(path) for path in inputs], output, frozenset(changes)) as prepared:
        for event in prepared.run():
            events.append(event)
            if at_event:
                at_event(event)
    return events


@pytest.fixture(scope="module")
def trained(family, tokens, tmp_path_factory):
    output = tmp_path_factory.mktemp("out") / "run"
    return output, run(output, tokens, family=family)


def validation_pairs(tokens) -> list[tuple[np.ndarray, np.ndarray]]:
    """Source and target of every held-out text, as the validation has them."""
    corpus = Corpus.open([tokens])
    view, tokenizer = corpus.split("val"), corpus.tokenizer
    corruption = span_corruption.build(CorruptionSettings(), tokenizer, SEQ_LEN)
    rows = CorruptedRows(view, SEQ_LEN, tokenizer, corruption=corruption, start_id=0, seed=SEED)
    return [
        pair for row in range(rows.rows_per_epoch) for pair in rows._pairs(row, np.random.default_rng([SEED, 1, row]))
    ]


def test_training_learns_and_transformers_finds_the_same_loss(trained, tokens, family):
    output, events = trained
    losses = [event.loss for event in events if isinstance(event, Trained)]
    validated = [event for event in events if isinstance(event, Validated)]
    assert losses[-1] < 0.9 * losses[0] and validated[-1].unit == "target token"
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(output).eval()
    nats = n_targets = 0
    with torch.no_grad():
        for source, target in validation_pairs(tokens):
            given = {"input_ids": torch.tensor(source)[None], "labels": torch.tensor(target)[None]}
            nats += theirs(**given).loss.item() * len(target)
            n_targets += len(target)
    assert nats / n_targets == pytest.approx(validated[-1].loss, abs=1e-4)


def test_packed_rows_give_the_loss_of_each_pair_alone(trained, tokens):
    corpus = Corpus.open([tokens])
    corruption = span_corruption.build(CorruptionSettings(), corpus.tokenizer, SEQ_LEN)
    model = load_model(trained[0])
    rows = CorruptedRows(
        *(corpus.split("train"), SEQ_LEN, corpus.tokenizer),
        **dict(corruption=corruption, start_id=model.config.decoder_start_id, seed=1),
    )
    batch = rows.train_batch(0, 8)
    assert batch.documents.max() > 1, "several texts should share a row"
    objective = TargetToken(model, 0.0).eval()
    packed = objective(*batch.tensors(torch.device("cpu"))).view(batch.targets.shape)
    for i, number in np.argwhere(np.diff(batch.documents, axis=1, prepend=-1)).tolist()[:12]:
        pair = batch.documents[i, number]
        here, there = batch.documents[i] == pair, batch.source_documents[i] == pair
        if batch.targets[i, number] == IGNORE:
            continue
        sides = (batch.sources[i][there], batch.inputs[i][here], batch.targets[i][here])
        alone = objective(*(torch.from_numpy(side)[None] for side in sides))
        assert (packed[i][torch.from_numpy(here)] - alone).abs().max() < 1e-4


def test_a_run_stopped_and_resumed_is_the_run_never_stopped(trained, tokens, family, tmp_path):
    def stop(event):
        if isinstance(event, Saved) and event.step == 4:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        run(tmp_path / "run", tokens, family=family, at_event=stop)
    run(tmp_path / "run", resume=True)
    ours, expected = open_tensors(tmp_path / "run"), open_tensors(trained[0])
    assert list(ours) == list(expected)
    assert all(torch.equal(ours.get(name), expected.get(name)) for name in ours)


@pytest.mark.slow
def test_micro_batches_and_checkpointing_change_nothing(trained, tokens, family, tmp_path):
    events = run(tmp_path / "run", tokens, family=family, micro_batch_size=2, activation_checkpointing=True)
    losses = [[event.loss for event in each if isinstance(event, Trained)] for each in (trained[1], events)]
    # Muon works in bfloat16, which makes more of how a sum is rounded
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)


def test_the_checkpoint_generates_here_and_in_transformers(trained, family):
    output, _ = trained
    session = Session.open(output)
    written = json.loads((output / "generation_config.json").read_text())
    start = session.tokenizer.pad_id if family == "t5" else session.tokenizer.eos_id
    assert written["decoder_start_token_id"] == session.marks.start == start
    completion = session.begin("the cat sat", Sampling(max_new_tokens=8))
    list(session.stream(completion))
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(output)
    ids = theirs.generate(torch.tensor([completion.prompt_ids]), max_new_tokens=8, do_sample=False)[0, 1:].tolist()
    assert completion.sampling.is_greedy and completion.ids == ids[: len(completion.ids)]


def test_a_fresh_model_is_near_chance(family):
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "mask_token_id": 3}
    config = for_parameters(family, 1_000_000, 500, 64, special)
    assert abs(parameter_count(config) - 1_000_000) < 100_000 and config.decoder_start_id is not None
    model = new_model(config, 0).eval()
    ids = torch.randint(4, 500, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(
            model(ids, input_ids_BT=ids[:, :20]).flatten(0, 1), ids[:, 20:].flatten()
        )
    assert abs(loss.item() - np.log(500)) < 0.3


def test_training_goes_on_from_a_checkpoint(trained, tokens, tmp_path):
    events = run(tmp_path / "more", tokens, init_from=str(trained[0]), params=None, steps=2)
    first = next(event.loss for event in events if isinstance(event, Trained))
    assert first < next(event.loss for event in trained[1] if isinstance(event, Trained))
    assert read_config(tmp_path / "more") == read_config(trained[0])


def test_the_wrong_tokenizer_or_objective_is_told(tmp_path, write_tokens, some_texts):
    plain = write_tokens(tmp_path / "plain.arrow", some_texts, tokenizer=Tokenizer.train_bpe(some_texts, 400))
    with pytest.raises(UserError, match="with which token its decoder begins|neither sentinels"):
        run(tmp_path / "a", plain, family="t5")
    with pytest.raises(CalledWrongly, match="--objective mlm: t5 is an encoder-decoder"):
        run(tmp_path / "b", plain, family="t5", objective="mlm")
    with pytest.raises(CalledWrongly, match="--noise-density belongs to --objective seq2seq"):
        run(tmp_path / "c", plain, noise_density=0.2)


def test_the_shape_names_both_depths(trained):
    started = next(event for event in trained[1] if isinstance(event, Started))
    assert "2 + 2 layers" in started.shape
