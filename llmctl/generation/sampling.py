"""From logits to tokens, each row by its own settings: the plain definition that any faster kernel must agree with.

Order: rules, temperature, top-k, top-p on what top-k left, min-p, and the draw. Each filter is a threshold on the
logit, so a tie with the last token kept is kept, whatever the order of the vocabulary. The draw is the exponential race
(Gumbel-max): the token with the largest logit + noise wins. It needs no normalised probabilities and no sum, so it is one
maximum over the vocabulary, exact in any order and any split of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llmctl.generation import philox
from llmctl.generation.rules import Rules
from llmctl.generation.settings import Sampling
from llmctl.ops import sampling


@dataclass
class Draw:
    """One new token per row; -1 where the logits were not numbers. Log-probabilities are the model's own, before any setting."""

    tokens_B: torch.Tensor
    logprobs_B: torch.Tensor | None = None
    top_ids_BN: torch.Tensor | None = None
    top_logprobs_BN: torch.Tensor | None = None


class Sampler:
    """Draws the next token of each row of a batch under its rules.

    `sequences` (int, below 2^32) tells rows of the same seed apart. Everything that a step needs is on the device from
    the start: a step never waits for the host.
    """

    def __init__(
        self,
        settings: Sequence[Sampling],
        sequences: Sequence[int],
        rules: Rules,
        device: torch.device | str = "cpu",
    ):
        self.settings, self.rules, self.device = list(settings), rules, torch.device(device)
        self._sequences_B = torch.tensor(sequences, dtype=torch.int64, device=device)
        signed = [row.seed - (1 << 64) if row.seed >> 63 else row.seed for row in settings]
        self._seeds_B = torch.tensor(signed, dtype=torch.int64, device=device)
        self._read_settings()

    def draw(self, logits_BV: torch.Tensor) -> Draw:
        """The next token of each row from its logits (any float dtype)."""
        logits_BV = logits_BV.float()
        if (settings := self.for_kernel(logits_BV)) is not None:
            return self.taken(sampling.sample(logits_BV, settings, self.rules.position), settings)
        scores_BV = self.rules.apply(logits_BV)
        if sampling.applies(scores_BV):
            drawn_B = sampling.sample(scores_BV, self._new_settings(), self.rules.position)
        else:
            drawn_B = self._drawn(scores_BV)
        tokens_B = drawn_B.clamp(min=0)
        self.rules.remember(tokens_B)
        draw = self._with_logprobs(tokens_B, logits_BV)
        draw.tokens_B = drawn_B
        return draw

    def for_kernel(self, logits_BV: torch.Tensor | None = None) -> sampling.Settings | None:
        """What the kernel needs to do all of a draw itself; None where it cannot, for these logits or those of a CPU."""
        if self.device.type != "cpu" or not self.rules.only_penalize:
            return None
        if self._settings is None:
            self._settings = self._new_settings()
            self.rules.tell(self._settings)
            if self._n_top is not None:
                self._settings.report(min(self._n_top, self.rules.vocab_size))
        return self._settings if logits_BV is None or sampling.applies(logits_BV) else None

    def taken(self, tokens_B: torch.Tensor, settings: sampling.Settings) -> Draw:
        """What a kernel has drawn by the settings for it."""
        self.rules.remember(tokens_B)
        if settings.logprobs_B is None:
            return Draw(tokens_B)
        # the kernel writes the next ones in the same place
        return Draw(
            tokens_B, settings.logprobs_B.clone(), settings.top_ids_BN.clone(), settings.top_logprobs_BN.clone()
        )

    def _new_settings(self) -> sampling.Settings:
        return sampling.Settings(
            temperature_B=self._temperature_B1.squeeze(1),
            top_k_B=self._top_k_B1.squeeze(1),
            top_p_B=self._top_p_B1.squeeze(1),
            log_min_p_B=self._log_min_p_B1.squeeze(1),
            is_greedy_B=self._is_greedy_B,
            seeds_B=self._seeds_B,
            sequences_B=self._sequences_B,
        )

    def _drawn(self, scores_BV: torch.Tensor) -> torch.Tensor:
        """The tokens, -1 where scores are NaN."""
        tokens_B = scores_BV.argmax(-1)
        if self._any_random:
            tokens_B = torch.where(self._is_greedy_B, tokens_B, self._race(self.filtered(scores_BV)))
        # argmax settles on a NaN where there is one
        return torch.where(scores_BV.gather(1, tokens_B[:, None]).squeeze(1).isnan(), -1, tokens_B)

    def filtered(self, logits_BV: torch.Tensor) -> torch.Tensor:
        """Logits over temperature, and -inf for every token that top-k, top-p or min-p rules out."""
        logits_BV = logits_BV / self._temperature_B1
        best_BN = None
        if any(self._top_k):
            n_best = min(max(self._top_k), logits_BV.shape[1])
            best_BN = logits_BV.topk(n_best).values
            kth_B1 = best_BN.gather(1, (self._top_k_B1 - 1).clamp(0, n_best - 1))
            kth_B1 = torch.where(self._top_k_B1 > 0, kth_B1, -math.inf)
            logits_BV = logits_BV.masked_fill(logits_BV < kth_B1, -math.inf)
            best_BN = best_BN.masked_fill(best_BN < kth_B1, -math.inf)
        if any(p < 1 for p in self._top_p):
            every_row_has_top_k = best_BN is not None and all(self._top_k)
            ordered_BN = best_BN if every_row_has_top_k else logits_BV.sort(descending=True).values
            lowest_B1 = _nucleus_threshold(ordered_BN, logits_BV.logsumexp(1, keepdim=True), self._top_p_B1)
            logits_BV = logits_BV.masked_fill(logits_BV < lowest_B1, -math.inf)
        if self._any_min_p:
            lowest_B1 = logits_BV.amax(1, keepdim=True) + self._log_min_p_B1
            logits_BV = logits_BV.masked_fill(logits_BV < lowest_B1, -math.inf)
        return logits_BV

    def select(self, rows: list[int]) -> None:
        """Keep only these rows."""
        where = torch.tensor(rows, device=self.device)
        self.settings = [self.settings[row] for row in rows]
        self._sequences_B, self._seeds_B = self._sequences_B[where], self._seeds_B[where]
        self.rules.select(rows)
        self._read_settings()

    def _read_settings(self) -> None:
        self._settings: sampling.Settings | None = None
        rows = self.settings
        self._is_greedy_B = torch.tensor([row.is_greedy for row in rows], device=self.device)
        self._any_random = not all(row.is_greedy for row in rows)
        self._temperature_B1 = self._column([1.0 if row.is_greedy else row.temperature for row in rows])
        self._top_k = [row.top_k for row in rows]
        self._top_p = [row.top_p for row in rows]
        self._top_k_B1 = torch.tensor(self._top_k, device=self.device).unsqueeze(1)
        self._top_p_B1 = self._column(self._top_p, torch.float64)
        log_min_p = [math.log(row.min_p) if row.min_p else -math.inf for row in rows]
        self._log_min_p_B1 = self._column(log_min_p)
        self._any_min_p = any(row.min_p for row in rows)
        self._n_top = max((row.logprobs for row in rows if row.logprobs is not None), default=None)

    def _column(self, values: list[float], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device).unsqueeze(1)

    def _race(self, logits_BV: torch.Tensor) -> torch.Tensor:
        noise_BV = philox.gumbel(self._seeds_B, self._sequences_B, self.rules.position, logits_BV.shape[1])
        return (logits_BV + noise_BV).argmax(-1)

    def _with_logprobs(self, tokens_B: torch.Tensor, logits_BV: torch.Tensor) -> Draw:
        if self._n_top is None:
            return Draw(tokens_B)
        logprobs_BV = logits_BV.log_softmax(-1)
        top = logprobs_BV.topk(min(self._n_top, logits_BV.shape[1]))
        return Draw(tokens_B, logprobs_BV.gather(1, tokens_B[:, None]).squeeze(1), top.indices, top.values)


def _nucleus_threshold(ordered_BN: torch.Tensor, total_B1: torch.Tensor, top_p_B1: torch.Tensor) -> torch.Tensor:
    """The logit of the last token of the smallest set of likeliest tokens with probability `top_p` (arXiv:1904.09751).

    `ordered_BN` falls along N and `total_B1` is the logsumexp of all that remain. A token stays while those before it
    hold less than `top_p`.
    """
    probabilities_BN = (ordered_BN.double() - total_B1.double()).exp()
    before_BN = probabilities_BN.cumsum(1) - probabilities_BN
    lowest_B1 = ordered_BN.masked_fill(before_BN >= top_p_B1, math.inf).amin(1, keepdim=True)
    return torch.where(top_p_B1 < 1, lowest_B1, -math.inf)
