"""What the text so far does to the scores of the next token: penalties, repeated runs, and tokens that must or must not come.

The same rules hold for a draw and for a search, so they read either logits or log-probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from llmctl.errors import UserError
from llmctl.generation.completion import Completion
from llmctl.generation.settings import NO_MARKS, Marks, Sampling
from llmctl.ops import sampling as kernel


def not_numbers() -> UserError:
    return UserError("the model's logits are not numbers (NaN)", hint="check its weights, or try --dtype float32")


@dataclass(frozen=True)
class Edges:
    """Where a text begins and ends: its marks, and how many new tokens it may have at most."""

    marks: Marks = NO_MARKS
    max_new_tokens: int = 0


class Rules:
    """The rules of each row of a batch, and what they depend on: `texts` are the tokens that the new ones follow.

    Rows begin together, so that all are at the same `position`: the number of new tokens.
    """

    def __init__(
        self,
        settings: Sequence[Sampling],
        texts: Sequence[Sequence[int]],
        vocab_size: int,
        device: torch.device | str = "cpu",
        edges: Sequence[Edges] | None = None,
    ):
        self.settings, self.device, self.position = list(settings), torch.device(device), 0
        self.vocab_size = vocab_size
        self.edges = list(edges or [Edges()] * len(self.settings))
        self._may_force_first = [len(text) == 1 for text in texts]
        shape = (len(self.settings), vocab_size)
        self._seen_BV = self._counts_BV = self._history_BN = self._ends_BV = None
        if any(row.repetition_penalty != 1 for row in settings):
            self._seen_BV = self._marked(shape, texts)
        if any(row.presence_penalty or row.frequency_penalty for row in settings):
            self._counts_BV = torch.zeros(shape, dtype=torch.float32, device=device)
        if any(row.no_repeat_ngram_size for row in settings):
            longest = max(map(len, texts))
            rows = [[-1] * (longest - len(text)) + list(text) for text in texts]
            self._history_BN = torch.tensor(rows, device=device)
        if any(row.min_new_tokens for row in settings):
            self._ends_BV = self._marked(shape, [edge.marks.ends for edge in self.edges])
        self._read_settings()

    @classmethod
    def of(cls, completions: Sequence[Completion], vocab_size: int, device: torch.device | str) -> Rules:
        edges = [Edges(completion.marks, completion.max_new_tokens) for completion in completions]
        texts = [completion.continued for completion in completions]
        return cls([completion.sampling for completion in completions], texts, vocab_size, device, edges)

    @property
    def only_penalize(self) -> bool:
        """Whether no token is ruled out or forced at this place."""
        return self._history_BN is None and self._ends_BV is None and not self._may_force

    def tell(self, settings: kernel.Settings) -> None:
        """Have a kernel apply the penalties itself."""
        if self._seen_BV is not None:
            settings.penalize(self._seen_BV, self._repetition_B1.squeeze(1))
        if self._counts_BV is not None:
            settings.count(self._counts_BV, self._presence_B1.squeeze(1), self._frequency_B1.squeeze(1))

    def apply(self, scores_BV: torch.Tensor) -> torch.Tensor:
        """The scores of the next token under all rules; -inf for one that may not come."""
        scores_BV = self.penalized(scores_BV)
        if self._history_BN is not None:
            for size in {row.no_repeat_ngram_size for row in self.settings} - {0}:
                scores_BV = scores_BV.masked_fill(self._completing_BV(size, scores_BV), -math.inf)
        if self._ends_BV is not None:
            too_early_B = [self.position < row.min_new_tokens for row in self.settings]
            banned_BV = self._ends_BV & torch.tensor(too_early_B, device=self.device)[:, None]
            scores_BV = scores_BV.masked_fill(banned_BV, -math.inf)
        return self._forced(scores_BV)

    def penalized(self, scores_BV: torch.Tensor) -> torch.Tensor:
        """Repetition as in arXiv:1909.05858, over prompt and text; presence and frequency as OpenAI's, over the text alone."""
        if self._seen_BV is not None:
            penalized_BV = torch.where(scores_BV > 0, scores_BV / self._repetition_B1, scores_BV * self._repetition_B1)
            scores_BV = torch.where(self._seen_BV, penalized_BV, scores_BV)
        if self._counts_BV is not None:
            scores_BV = scores_BV - self._frequency_B1 * self._counts_BV
            scores_BV = scores_BV - self._presence_B1 * (self._counts_BV > 0)
        return scores_BV

    def remember(self, tokens_B: torch.Tensor) -> None:
        """Each row's text goes on with this token."""
        self.position += 1
        if self._seen_BV is None and self._counts_BV is None and self._history_BN is None:
            return
        tokens_B1 = tokens_B[:, None].clamp(min=0)
        if self._seen_BV is not None:
            self._seen_BV.scatter_(1, tokens_B1, True)
        if self._counts_BV is not None:
            self._counts_BV.scatter_add_(1, tokens_B1, torch.ones_like(tokens_B1, dtype=torch.float32))
        if self._history_BN is not None:
            self._history_BN = torch.cat([self._history_BN, tokens_B1], 1)

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order; one may come several times."""
        where = torch.tensor(rows, device=self.device)
        self.settings, self.edges, self._may_force_first = (
            [values[row] for row in rows] for values in (self.settings, self.edges, self._may_force_first)
        )
        for name in ("_seen_BV", "_counts_BV", "_history_BN", "_ends_BV"):
            values = getattr(self, name)
            setattr(self, name, None if values is None else values[where])
        self._read_settings()

    def _read_settings(self) -> None:
        self._may_force = any(edge.marks.first is not None or edge.marks.last is not None for edge in self.edges)

        def column(name: str) -> torch.Tensor:
            return torch.tensor([getattr(row, name) for row in self.settings], device=self.device).float().unsqueeze(1)

        self._repetition_B1 = column("repetition_penalty")
        self._presence_B1 = column("presence_penalty")
        self._frequency_B1 = column("frequency_penalty")

    def _marked(self, shape: tuple[int, int], tokens: Sequence[Iterable[int]]) -> torch.Tensor:
        marked_BV = torch.zeros(shape, dtype=torch.bool, device=self.device)
        for i, ids in enumerate(tokens):
            marked_BV[i, torch.tensor(list(ids), dtype=torch.int64, device=self.device)] = True
        return marked_BV

    def _completing_BV(self, size: int, scores_BV: torch.Tensor) -> torch.Tensor:
        """True at tokens that would complete a run of `size` which the row's text has already."""
        banned_BV = torch.zeros_like(scores_BV, dtype=torch.bool)
        if self._history_BN.shape[1] < size:
            return banned_BV
        runs_BWN = self._history_BN.unfold(1, size, 1)
        last_B1N = self._history_BN[:, None, self._history_BN.shape[1] - size + 1 :]
        repeats_BW = (runs_BWN[..., :-1] == last_B1N).all(-1) & (runs_BWN >= 0).all(-1)
        is_asked_B1 = torch.tensor([row.no_repeat_ngram_size == size for row in self.settings], device=self.device)[
            :, None
        ]
        # A token of a run that does not repeat must not unmark the same token of one that does.
        counts_BV = banned_BV.int().scatter_add_(1, runs_BWN[..., -1].clamp(min=0), (repeats_BW & is_asked_B1).int())
        return counts_BV > 0

    def _forced(self, scores_BV: torch.Tensor) -> torch.Tensor:
        rows, ids = [], []
        for i, edge in enumerate(self.edges):
            first = edge.marks.first if self.position == 0 and self._may_force_first[i] else None
            last = edge.marks.last if self.position == edge.max_new_tokens - 1 else None
            forced = first if last is None else last
            if forced is not None:
                rows.append(i)
                ids.append(forced)
        if rows:
            scores_BV = scores_BV.clone()
            scores_BV[rows] = -math.inf
            scores_BV[rows, ids] = 0.0
        return scores_BV
