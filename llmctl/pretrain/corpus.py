"""The token streams that pretraining reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llmctl.data.corpus import Corpus
from llmctl.errors import CalledWrongly, UserError
from llmctl.models.config import ModelConfig
from llmctl.pretrain import objectives
from llmctl.pretrain.settings import PretrainSettings
from llmctl.train import distributed
from llmctl.train.feed import Feed
from llmctl.train.plan import Plan
from llmctl.train.task import PIPE


def open_corpus(paths: Sequence[str], spool: Path | None, use_spooled: bool, tokenizer_sha256: str | None) -> Corpus:
    """Open token streams; standard input is read once, by rank 0, into the file `spool`.

    With `use_spooled` a complete `spool` stands for standard input; without a `spool` nothing stays on disk.
    """
    if not paths:
        raise CalledWrongly("no token stream to train on", hint="llmctl tokenize FILE | llmctl pretrain")
    if PIPE in paths and spool is None and distributed.world_size() > 1:
        raise CalledWrongly("several processes cannot share standard input in a dry run", "give the tokens as a file")
    if PIPE in paths and spool is not None:
        if not (use_spooled and distributed.on_first(spool.exists)):
            distributed.on_first(_spool_pipe, spool, tokenizer_sha256)
        paths = [str(spool) if path == PIPE else path for path in paths]
    corpus = Corpus.open(paths, tokenizer_sha256=tokenizer_sha256)
    if corpus.split("train") is None:
        raise UserError("the token stream holds no training tokens", hint="is its text empty, or --val-fraction 1?")
    return corpus


def open_feed(corpus: Corpus, plan: Plan, settings: PretrainSettings, config: ModelConfig) -> Feed:
    """Rows of `plan.seq_len` tokens of both splits, as the model's objective takes them."""
    objective = objectives.choose(settings, config)
    how = (corpus.tokenizer, settings, config)
    train = objective.rows(corpus.split("train"), plan.seq_len, *how)
    view, val = corpus.split("val"), None
    if view is not None and view.n_tokens > 2:
        val = objective.rows(view, min(plan.seq_len, view.n_tokens - 1), *how)
    return Feed(train, val, plan)


def _spool_pipe(spool: Path, tokenizer_sha256: str | None) -> None:
    Corpus.open([PIPE], spool_to=spool, tokenizer_sha256=tokenizer_sha256)
