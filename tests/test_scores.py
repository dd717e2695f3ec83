"""Scores against scipy's and scikit-learn's definitions, on cases small enough to count."""

from __future__ import annotations

import numpy as np

from llmctl.evaluate import scores


def test_spearman_shares_ranks_of_equal_values():
    # ranks 1 2.5 2.5 4 against 1 3 2 4: Pearson's correlation of these, as scipy.stats.spearmanr gives it
    assert (
        abs(scores.spearman(np.array([0.0, 1.0, 1.0, 9.0]), np.array([5.0, 7.0, 6.0, 8.0])) - 0.9486832980505138)
        < 1e-12
    )
    assert scores.spearman(np.array([1.0, 1.0]), np.array([1.0, 2.0])) == 0.0
    values = np.random.default_rng(0).normal(size=50)
    assert (
        abs(scores.spearman(values, np.exp(values)) - 1) < 1e-12 and abs(scores.spearman(values, -values) + 1) < 1e-12
    )


def test_macro_f1_counts_each_class_once():
    # class 0: 2 hits of 3 said and 2 true (0.8); class 1: 1 of 1 and 2 (2/3); class 2: none said, none true
    predicted, true = np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1])
    assert abs(scores.macro_f1(predicted, true) - (0.8 + 2 / 3) / 2) < 1e-12
    sets = np.eye(3)[predicted], np.eye(3)[true]
    assert abs(scores.macro_f1(*sets) - (0.8 + 2 / 3) / 2) < 1e-12
    assert scores.accuracy(predicted, true) == scores.accuracy(*sets) == 0.75
    assert scores.rmse(np.array([1.0, 5.0]), np.array([1.0, 1.0])) == 8**0.5
