"""Ratings from votes: the model of Bradley and Terry (1952) on the scale of Elo, with intervals by the bootstrap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmctl.arena.votes import Vote

MEAN, SCALE = 1000.0, 400.0 / np.log(10.0)
_PRIOR = 1e-2  # in votes: whoever won all its votes would have no finite rating without it
_STEPS, _TOLERANCE = 100, 1e-10


@dataclass(frozen=True)
class Rating:
    """`low` to `high` hold 95 % of the resamplings. A rating 400 above another wins ten times as often as it loses."""

    model: str
    rating: float
    low: float
    high: float
    votes: int
    wins: float


def rate(votes: Sequence[Vote], n_bootstrap: int = 1000, seed: int = 0) -> list[Rating]:
    """The best first; the mean of all ratings is 1000. A tie is half a win for each."""
    names = sorted({name for vote in votes for name in (vote.first, vote.second)})
    place = {name: i for i, name in enumerate(names)}
    first_V = np.array([place[vote.first] for vote in votes])
    second_V = np.array([place[vote.second] for vote in votes])
    score_V = np.array([vote.score for vote in votes])

    def fitted(counts_V: np.ndarray) -> np.ndarray:
        wins_MM = np.zeros((len(names), len(names)))
        np.add.at(wins_MM, (first_V, second_V), score_V * counts_V)
        np.add.at(wins_MM, (second_V, first_V), (1 - score_V) * counts_V)
        return bradley_terry(wins_MM) * SCALE + MEAN

    ratings_M = fitted(np.ones(len(votes)))
    draws = np.random.default_rng(seed)
    equal = np.full(len(votes), 1 / len(votes))
    resampled_RM = np.stack([fitted(draws.multinomial(len(votes), equal)) for _ in range(n_bootstrap)])
    low_M, high_M = np.percentile(resampled_RM, [2.5, 97.5], axis=0)
    rows = []
    for i, name in enumerate(names):
        of_first, of_second = first_V == i, second_V == i
        wins = float(score_V[of_first].sum() + (1 - score_V[of_second]).sum())
        n_votes = int(of_first.sum() + of_second.sum())
        rows.append(Rating(name, ratings_M[i].item(), low_M[i].item(), high_M[i].item(), n_votes, wins))
    return sorted(rows, key=lambda row: (-row.rating, row.model))


def bradley_terry(wins_MM: np.ndarray) -> np.ndarray:
    """Strengths of mean 0: the logits s that make the wins [i over j] likeliest, P(i beats j) = sigmoid(s_i - s_j).

    Newton's method on the log-likelihood less a small Gaussian prior.
    """
    n = len(wins_MM)
    strengths_M = np.zeros(n)
    games_MM = wins_MM + wins_MM.T
    for _ in range(_STEPS):
        expected_MM = 1 / (1 + np.exp(strengths_M[None, :] - strengths_M[:, None]))
        gradient_M = wins_MM.sum(1) - (games_MM * expected_MM).sum(1) - _PRIOR * strengths_M
        weight_MM = games_MM * expected_MM * (1 - expected_MM)
        curvature_MM = np.diag(weight_MM.sum(1) + _PRIOR) - weight_MM
        step_M = np.linalg.solve(curvature_MM, gradient_M)
        # Far from the solution the logits are flat, and a whole step would leap over it.
        strengths_M = strengths_M + step_M * min(1.0, 2.0 / max(np.abs(step_M).max(), 1e-300))
        if np.abs(step_M).max() < _TOLERANCE:
            break
    return strengths_M - strengths_M.mean()
