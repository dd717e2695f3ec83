"""How good predictions are, as one number each."""

from __future__ import annotations

import numpy as np


def accuracy(predicted_N: np.ndarray, true_N: np.ndarray) -> float:
    """Share of rows that are right; of sets of labels [N, C] only those count that are right as a whole."""
    right = predicted_N == true_N
    return float((right if right.ndim == 1 else right.all(axis=1)).mean())


def macro_f1(predicted_N: np.ndarray, true_N: np.ndarray) -> float:
    """Mean of the classes' F1, over those that are predicted or true anywhere; classes [N], or sets of labels [N, C]."""
    if true_N.ndim == 1:
        classes_C = np.union1d(predicted_N, true_N)
        predicted_N, true_N = (each[:, None] == classes_C for each in (predicted_N, true_N))
    predicted_N, true_N = predicted_N.astype(bool), true_N.astype(bool)
    hits_C = (predicted_N & true_N).sum(axis=0)
    total_C = predicted_N.sum(axis=0) + true_N.sum(axis=0)
    return float((2 * hits_C[total_C > 0] / total_C[total_C > 0]).mean()) if total_C.any() else 1.0


def rmse(predicted_N: np.ndarray, true_N: np.ndarray) -> float:
    return float(np.sqrt(np.square(predicted_N - true_N).mean()))


def spearman(predicted_N: np.ndarray, true_N: np.ndarray) -> float:
    """Correlation of the ranks, equal values sharing theirs; 0 where either side is one value only."""
    first_N, second_N = (_ranks(each) - (len(each) + 1) / 2 for each in (predicted_N, true_N))
    scale = np.sqrt(np.square(first_N).sum() * np.square(second_N).sum())
    return float((first_N * second_N).sum() / scale) if scale else 0.0


def _ranks(values_N: np.ndarray) -> np.ndarray:
    """From 1; equal values have the mean of theirs."""
    _, number_N, count = np.unique(values_N, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[number_N]
