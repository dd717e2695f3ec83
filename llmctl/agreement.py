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

PROBE_TOKENS = 64


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


def probe_ids(tokenizer: Tokenizer | None, vocab_size: int) -> list[torch.Tensor]:
    """A few sequences [1, T] of real text; of random tokens for a model that came without a tokenizer."""
    if tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        return [torch.randint(0, vocab_size, (1, PROBE_TOKENS), generator=generator) for _ in PROBES]
    rows = (tokenizer.encode(text)[:PROBE_TOKENS] for text in PROBES)
    return [torch.tensor([ids]) for ids in rows if len(ids) > 1]


@torch.no_grad()
def measure(before: Logits, after: Logits, sequences: Sequence[torch.Tensor]) -> Agreement:
    """Compare two functions from ids [1, T] to logits [1, T, V]."""
    largest = divergence = 0.0
    same = nats_before = nats_after = 0.0
    positions = targets = 0
    for ids_1T in sequences:
        first_TV, second_TV = (model(ids_1T)[0].float() for model in (before, after))
        largest = max(largest, float((first_TV - second_TV).abs().max()))
        first_TV, second_TV = first_TV.log_softmax(-1), second_TV.log_softmax(-1)
        divergence += float((first_TV.exp() * (first_TV - second_TV)).sum())
        same += float((first_TV.argmax(-1) == second_TV.argmax(-1)).sum())
        targets_T1 = ids_1T[0, 1:, None]
        nats_before -= float(first_TV[:-1].gather(1, targets_T1).sum())
        nats_after -= float(second_TV[:-1].gather(1, targets_T1).sum())
        positions, targets = positions + len(first_TV), targets + len(targets_T1)
    perplexities = (math.exp(min(nats / max(targets, 1), 700.0)) for nats in (nats_before, nats_after))
    return Agreement(largest, divergence / positions, same / positions, *perplexities)


def require(agreement: Agreement, tolerance: float) -> None:
    """Raise CheckFailed where the KL divergence is above `tolerance`, or is no number."""
    if not agreement.kl_divergence <= tolerance:
        raise CheckFailed(
            f"the result does not compute what it should: {agreement}",
            hint=f"nothing was written; the KL divergence may be {tolerance:g} at most (--tolerance)",
        )
