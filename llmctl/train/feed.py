"""What a run reads: opening its token streams once and again, and the rows that each step trains on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from llmctl.data.corpus import Corpus
from llmctl.data.packing import Batch, PackedRows
from llmctl.errors import CalledWrongly, UserError
from llmctl.train import distributed
from llmctl.train.planning import Plan
from llmctl.train.settings import PretrainSettings

PIPE = "-"


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


def _spool_pipe(spool: Path, tokenizer_sha256: str | None) -> None:
    Corpus.open([PIPE], spool_to=spool, tokenizer_sha256=tokenizer_sha256)


class Feed:
    """This process's share of every step's rows, cut into micro batches, and the rows held out."""

    def __init__(self, corpus: Corpus, plan: Plan, settings: PretrainSettings):
        how = {"seed": settings.seed, "isolate_documents": settings.isolate_documents}
        self.train_view, self.val_view = corpus.split("train"), corpus.split("val")
        self._rows = PackedRows(self.train_view, plan.seq_len, corpus.tokenizer, **how)
        self.rows_per_epoch = self._rows.rows_per_epoch
        self._val_rows = None
        if self.val_view is not None and self.val_view.n_tokens > 2:
            val_len = min(plan.seq_len, self.val_view.n_tokens - 1)
            self._val_rows = PackedRows(self.val_view, val_len, corpus.tokenizer, **how)
        self._batch_size = plan.batch_size
        self._rows_per_rank, left_over = divmod(plan.batch_size, distributed.world_size())
        if left_over:
            raise CalledWrongly(
                f"--batch-size {plan.batch_size} is no multiple of the {distributed.world_size()} processes"
            )
        self._at_once = min(plan.micro_batch_size or self._rows_per_rank, self._rows_per_rank)

    def micro_batches(self, step: int) -> tuple[list[Batch], int]:
        """This rank's micro batches of a step, and the number of targets of all ranks together (at least 1)."""
        first = step * self._batch_size + distributed.rank() * self._rows_per_rank
        batches = [
            self._rows.train_batch(first + at, min(self._at_once, self._rows_per_rank - at))
            for at in range(0, self._rows_per_rank, self._at_once)
        ]
        n_targets = torch.tensor(sum(batch.n_targets for batch in batches))
        return batches, max(1, int(distributed.sum_over_ranks(n_targets)))

    @property
    def has_validation(self) -> bool:
        return self._val_rows is not None

    def validation_batches(self) -> Iterator[Batch]:
        return self._val_rows.validation_batches(self._at_once)
