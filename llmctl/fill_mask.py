"""What may stand where a text has a mask."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch

from llmctl.data.text_rows import TextRow
from llmctl.devices import choose_device
from llmctl.errors import UserError
from llmctl.finetune.assembly import Assembly
from llmctl.models.masked_lm import MaskedLM
from llmctl.tokenization.special import content
from llmctl.tokenizer import Tokenizer


@dataclass(frozen=True)
class Candidate:
    token: str
    id: int
    probability: float


@dataclass(frozen=True)
class Filled:
    """A row, and for each of its masks, in order, the likeliest tokens."""

    row: TextRow
    masks: list[list[Candidate]]


class MaskFiller:
    def __init__(self, model: MaskedLM, tokenizer: Tokenizer, name: str = "the model"):
        """Raises UserError for a model or a tokenizer that knows no masks."""
        if model.config.kind != "masked":
            raise UserError(
                f"{name}: {model.config.family} is no encoder, so it fills no masks", hint="use llmctl generate"
            )
        if model.config.head is None:
            raise UserError(
                f"{name}: a base model without a language-model head, so it predicts no tokens",
                hint="llmctl embed works with it",
            )
        if tokenizer.mask_id is None:
            raise UserError(f"{name}: its tokenizer has no mask token")
        self.model, self.tokenizer = model, tokenizer

    @classmethod
    def open(cls, path: str | os.PathLike, dtype: str | None = None, device: str | None = None) -> MaskFiller:
        """The model and tokenizer of a checkpoint directory."""
        return cls(Assembly.find(path).load(dtype, choose_device(device)), Tokenizer.load(path), str(path))

    @property
    def mask_token(self) -> str:
        return content(self.tokenizer.config["mask_token"])

    def fill(self, rows: Iterable[TextRow], top_k: int = 5, batch_size: int = 32) -> Iterator[Filled]:
        """In the order of the rows. Raises UserError for a row without a mask, or longer than the context."""
        rows = iter(rows)
        while batch := list(islice(rows, batch_size)):
            yield from self._fill(batch, min(top_k, self.tokenizer.vocab_size))

    @torch.inference_mode()
    def _fill(self, batch: list[TextRow], top_k: int) -> Iterator[Filled]:
        device = self.model.device
        ids = [torch.tensor(self._encoded(row)) for row in batch]
        inputs_BT = torch.nn.utils.rnn.pad_sequence(ids, True, self.tokenizer.pad_id or 0).to(device)
        lengths_B = torch.tensor([len(row) for row in ids], device=device)
        is_real_BT = torch.arange(inputs_BT.shape[1], device=device) < lengths_B[:, None]
        is_mask_BT = (inputs_BT == self.tokenizer.mask_id) & is_real_BT
        logits_MV = self.model.logits_at(is_mask_BT, inputs_BT, is_real_BT)
        # ids that the vocabulary is padded with stand for nothing
        top = logits_MV.float().softmax(-1)[:, : self.tokenizer.vocab_size].topk(top_k)
        masks = [
            [Candidate(self._spelled(token), token, p) for p, token in zip(*lists)]
            for lists in zip(top.values.tolist(), top.indices.tolist())
        ]
        for row, n_masks in zip(batch, is_mask_BT.sum(1).tolist()):
            yield Filled(row, masks[:n_masks])
            del masks[:n_masks]

    def _encoded(self, row: TextRow) -> list[int]:
        ids = self.tokenizer.encode(row.text)
        limit = self.model.config.max_positions
        if limit is not None and len(ids) > limit:
            raise UserError(f"{row.name}: {len(ids)} tokens, the model's context is {limit}")
        if self.tokenizer.mask_id not in ids:
            raise UserError(f"{row.name}: nothing to fill", hint=f"write {self.mask_token} for each missing token")
        return ids

    def _spelled(self, token: int) -> str:
        return self.tokenizer.token_bytes(token).decode("utf-8", "replace")
