"""Beam search: of all texts that were begun, go on with those of the highest probability.

The order of events is that of transformers, so that the texts are the same: of a prompt's continuations the best few are
looked at; one that ends is complete if it is among the first `num_beams`, and is dropped otherwise; the best that do not
end go on.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llmctl.generation.completion import Completion, TokenLogprob
from llmctl.generation.rules import Rules, not_numbers
from llmctl.models.cache import Cache
from llmctl.models.causal_lm import CausalLM


@dataclass(frozen=True)
class Beam:
    """A text: the one before its last token, and that token. `score` is the sum of log-probabilities under the rules."""

    score: float
    before: Beam | None = None
    token: TokenLogprob | None = None
    row: int = 0
    """Of the last step, from which it went on."""

    def tokens(self) -> list[TokenLogprob]:
        beam, tokens = self, []
        while beam.before is not None:
            tokens.append(beam.token)
            beam = beam.before
        return tokens[::-1]


class BeamSearch:
    """The searches of a batch, one for each completion, all with the same number of beams.

    In the first step a prompt has one row; in each that follows it has one for every beam.
    """

    def __init__(self, completions: Sequence[Completion], vocab_size: int, device: torch.device):
        self.searches = [Search(completion) for completion in completions]
        self.rules = Rules.of(completions, vocab_size, device)
        self._scores_B = torch.zeros(len(completions), device=device)
        self._n_top = max(completion.sampling.logprobs or 0 for completion in completions)

    def step(self, model: CausalLM, ids_BT: torch.Tensor, cache: Cache) -> tuple[torch.Tensor, list[int]]:
        return self._chosen(model.next_logits(ids_BT, cache))

    def _chosen(self, logits_BV: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
        logprobs_BV = logits_BV.float().log_softmax(-1)
        scores_BV = self.rules.apply(logprobs_BV) + self._scores_B[:, None]
        candidates = self._best(scores_BV, logprobs_BV)
        going_on = []
        for search, of_search in zip(self.searches, candidates, strict=True):
            going_on += search.advance(of_search)
        self.searches = [search for search in self.searches if not search.is_over]
        rows = [beam.row for beam in going_on]
        device = logits_BV.device
        tokens_B = torch.tensor([beam.token.token for beam in going_on], dtype=torch.int64, device=device)
        self._scores_B = torch.tensor([beam.score for beam in going_on], device=device)
        if rows:
            self.rules.select(rows)
            self.rules.remember(tokens_B)
        return tokens_B, rows

    def _best(self, scores_BV: torch.Tensor, logprobs_BV: torch.Tensor) -> list[list[Beam]]:
        """For each search its best continuations, the best first: the one place in a step that waits for the device."""
        n_searches, vocab_size = len(self.searches), scores_BV.shape[1]
        scores_PN = scores_BV.reshape(n_searches, -1)
        best_PN = scores_PN.topk(min(max(search.n_candidates for search in self.searches), scores_PN.shape[1]))
        first_P1 = torch.arange(0, len(scores_BV), len(scores_BV) // n_searches, device=scores_BV.device)[:, None]
        rows_PN, tokens_PN = first_P1 + best_PN.indices // vocab_size, best_PN.indices % vocab_size
        logprobs = logprobs_BV[rows_PN, tokens_PN].tolist()
        tops = self._tops(logprobs_BV)
        columns = zip(best_PN.values.tolist(), rows_PN.tolist(), tokens_PN.tolist(), logprobs, strict=True)
        result = []
        for search, (scores, rows, tokens, own) in zip(self.searches, columns, strict=True):
            if any(map(math.isnan, scores)):
                raise not_numbers()
            result.append(
                [
                    Beam(score, search.beams[row % len(search.beams)], TokenLogprob(token, logprob, tops[row]), row)
                    for score, row, token, logprob in zip(scores, rows, tokens, own, strict=True)
                ][: search.n_candidates]
            )
        return result

    def _tops(self, logprobs_BV: torch.Tensor) -> list[tuple[tuple[int, float], ...]]:
        if not self._n_top:
            return [()] * len(logprobs_BV)
        top = logprobs_BV.topk(min(self._n_top, logprobs_BV.shape[1]))
        return [tuple(zip(ids, values)) for ids, values in zip(top.indices.tolist(), top.values.tolist())]


class Search:
    """One prompt's beams, and the texts that are complete, as (score, beam): the best first, no more than beams."""

    def __init__(self, completion: Completion):
        self.completion, self.is_over = completion, False
        self.n_beams, self.length = completion.sampling.num_beams, 0
        self.beams = [Beam(0.0)]
        self.complete: list[tuple[float, Beam]] = []
        # So many that as many as there are beams go on even if each of them may end in every way.
        self.n_candidates = max(2, 1 + len(completion.marks.ends)) * self.n_beams

    def advance(self, candidates: Sequence[Beam]) -> list[Beam]:
        """Take up the next tokens, the likeliest first; gives the beams that go on, which are none at the end."""
        self.length += 1
        going_on, is_full = [], self.length == self.completion.max_new_tokens
        for place, beam in enumerate(candidates):
            if not is_full and beam.token.token not in self.completion.marks.ends:
                going_on.append(beam)
            elif place < self.n_beams:
                self.complete.append((self._scored(beam), beam))
        self.complete = sorted(self.complete, key=lambda scored: -scored[0])[: self.n_beams]
        # Where a vocabulary is too small to fill the beams, the rest have no probability.
        spare = dataclasses.replace(candidates[-1], score=-math.inf)
        self.beams = [*going_on, *[spare] * self.n_beams][: self.n_beams]
        self.is_over = is_full or not self._may_improve()
        if self.is_over:
            self._hand_out()
        return [] if self.is_over else self.beams

    def _scored(self, beam: Beam) -> float:
        return beam.score / self.length**self.completion.sampling.length_penalty

    def _may_improve(self) -> bool:
        """Whether the best beam could still displace a complete text, if it ended now."""
        if len(self.complete) < self.n_beams:
            return True
        return not self.completion.sampling.early_stopping and self._scored(self.beams[0]) > self.complete[-1][0]

    def _hand_out(self) -> None:
        """Give the completion its text, and as runners-up the next best that were asked for."""
        completion = self.completion
        completion.runners_up = [completion.another() for _ in self.complete[1 : completion.n_best]]
        for target, (score, beam) in zip([completion, *completion.runners_up], self.complete):
            target.score = score
            for token in beam.tokens():
                target.push(token.token, None if completion.sampling.logprobs is None else token)
                if target.finish_reason is not None:  # a stop text, which the search did not look for
                    break
