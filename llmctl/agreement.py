"""How far two models agree on the same tokens: what every command that changes a model measures before it is believed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

from llmctl.errors import CheckFailed
from llmctl.tokenizer import Tokenizer

PROBES = (
    "The library closes at nine, but on Thursdays the reading room stays open until midnight for students.",
    "def mean(values):\n    total = sum(values)\n    return total / len(values) if values else 0.0\n",
    "To make bread you need flour, water, salt and patience; most of all, as my grandmother said, patience.",
    "In 1869 Mendeleev left gaps in his table of the elements, and predicted what would be found to fill them.",
)
"""Texts that a model of any kind is asked about when nothing better is given."""

PROBE_TOKENS = 32


@dataclass(frozen=True)
class Agreement:
    """Over all positions: largest difference of a logit, mean KL(before || after) in nats, share of equal first choices,
    and each model's perplexity of the next token."""

    max_logit_error: float
    kl_divergence: float
    top1_agreement: float
    perplexity_before: float
    perplexity_after: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"max logit error {self.max_logit_error:.2g}, KL divergence {self.kl_divergence:.2g}, "
            f"same first choice {self.top1_agreement:.1%}, perplexity {self.perplexity_before:.4g} -> "
            f"{self.perplexity_after:.4g}"
        )


Logits = Callable[[torch.Tensor], torch.Tensor]


def probe_ids(tokenizer: Tokenizer | None, vocab_size: int) -> torch.Tensor:
    """A few rows [B, T] of real text, of one length; of random tokens for a model that came without a tokenizer."""
    if tokenizer is None:
        return torch.randint(0, vocab_size, (len(PROBES), PROBE_TOKENS), generator=torch.Generator().manual_seed(0))
    rows = [tokenizer.encode(text) for text in PROBES]
    length = min(PROBE_TOKENS, *map(len, rows))
    return torch.tensor([ids[:length] for ids in rows])


@torch.no_grad()
def measure(before: Logits, after: Logits, ids_BT: torch.Tensor) -> Agreement:
    """Compare two functions from ids [B, T] to logits [B, T, V]."""
    first_BTV, second_BTV = before(ids_BT), after(ids_BT)
    return of_rows([compare_row(*row) for row in zip(first_BTV, second_BTV, ids_BT)])


def of_rows(rows: Sequence[torch.Tensor]) -> Agreement:
    """All of what `compare_row` found of rows of one length."""
    totals = torch.stack(list(rows))
    divergence, same, nats_before, nats_after = totals[:, 1:].mean(0).tolist()
    perplexities = (math.exp(min(nats, 700.0)) for nats in (nats_before, nats_after))
    return Agreement(float(totals[:, 0].max()), max(divergence, 0.0), same, *perplexities)


def compare_row(first_TV: torch.Tensor, second_TV: torch.Tensor, ids_T: torch.Tensor) -> torch.Tensor:
    """Of one row: [largest error, KL, share of equal choices, nats of the first model, of the second], float64."""
    first_TV, second_TV = first_TV.float(), second_TV.float()
    largest = (first_TV - second_TV).abs().max()
    same = (first_TV.argmax(-1) == second_TV.argmax(-1)).double().mean()
    first_TV, second_TV = first_TV.log_softmax(-1), second_TV.log_softmax(-1)
    # a classifier's labels and the hidden states of a base model predict no tokens
    predicts = len(first_TV) == len(ids_T) and int(ids_T.max()) < first_TV.shape[-1]
    nats = (
        first_TV.new_zeros(()) if not predicts else -logprobs_TV[:-1].gather(-1, ids_T[1:, None]).mean()
        for logprobs_TV in (first_TV, second_TV)
    )
    return torch.stack([value.double() for value in (largest, _divergence(first_TV, second_TV), same, *nats)])


def _divergence(first_TV: torch.Tensor, second_TV: torch.Tensor) -> torch.Tensor:
    """Mean KL(first || second) in nats of log-probabilities."""
    return (first_TV.exp() * (first_TV - second_TV)).sum(-1).mean()


def require(agreement: Agreement, tolerance: float) -> None:
    """Raise CheckFailed where the KL divergence is above `tolerance`, or is no number."""
    if not agreement.kl_divergence <= tolerance:
        raise CheckFailed(
            f"the result does not compute what it should: {agreement}",
            hint=f"nothing was written; the KL divergence may be {tolerance:g} at most (--tolerance)",
        )
