"""From many dimensions to two: principal components, and t-SNE."""

from __future__ import annotations

import torch

_EXAGGERATION, _EXAGGERATED_STEPS, _STEPS = 12.0, 100, 500


def pca(points_ND: torch.Tensor) -> tuple[torch.Tensor, list[float]]:
    """Coordinates [N, 2] along the two directions of largest variance, and the share of the variance in each.

    The largest entry of each direction is positive, so that the picture does not depend on the machine.
    """
    centred_ND = points_ND.double() - points_ND.double().mean(0)
    _, sizes, directions = torch.linalg.svd(centred_ND, full_matrices=False)
    directions_2D = torch.zeros(2, points_ND.shape[1], dtype=torch.float64)
    directions_2D[: len(directions[:2])] = directions[:2]
    largest = directions_2D.abs().argmax(1, keepdim=True)
    directions_2D *= directions_2D.gather(1, largest).sign() + (directions_2D.gather(1, largest) == 0)
    shares = sizes.square() / sizes.square().sum().clamp(min=1e-300)
    return centred_ND @ directions_2D.mT, [*shares[:2].tolist(), 0.0, 0.0][:2]


def tsne(points_ND: torch.Tensor, perplexity: float = 30.0, seed: int = 0) -> torch.Tensor:
    """Coordinates [N, 2] whose neighbourhoods are those of the points (van der Maaten and Hinton 2008); N^2 time and memory.

    Begins at the principal components, so that far groups stay where they are; `perplexity`, the effective number of
    neighbours, is lowered for few points. The same for the same seed.
    """
    n = len(points_ND)
    joint_NN = _joint_similarities(points_ND.double(), min(perplexity, max(1.0, (n - 1) / 3)))
    start_N2 = pca(points_ND)[0]
    spread = start_N2.std(0).clamp(min=1e-12)
    noise_N2 = torch.randn(n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    y_N2 = 1e-2 * (start_N2 / spread[0]) + 1e-4 * noise_N2
    velocity_N2, gains_N2 = torch.zeros_like(y_N2), torch.ones_like(y_N2)
    rate = max(n / _EXAGGERATION / 4, 10.0)
    for step in range(_STEPS):
        is_early = step < _EXAGGERATED_STEPS
        gradient_N2 = _gradient(joint_NN * (_EXAGGERATION if is_early else 1.0), y_N2)
        agrees_N2 = gradient_N2.sign() == velocity_N2.sign()
        gains_N2 = torch.where(agrees_N2, gains_N2 * 0.8, gains_N2 + 0.2).clamp(min=0.01)
        velocity_N2 = (0.5 if is_early else 0.8) * velocity_N2 - rate * gains_N2 * gradient_N2
        y_N2 = y_N2 + velocity_N2
        y_N2 -= y_N2.mean(0)
    return y_N2


def _gradient(joint_NN: torch.Tensor, y_N2: torch.Tensor) -> torch.Tensor:
    closeness_NN = 1 / (1 + torch.cdist(y_N2, y_N2).square())
    closeness_NN.fill_diagonal_(0.0)
    pull_NN = (joint_NN - closeness_NN / closeness_NN.sum()) * closeness_NN
    return 4 * (pull_NN.sum(1, keepdim=True) * y_N2 - pull_NN @ y_N2)


def _joint_similarities(points_ND: torch.Tensor, perplexity: float) -> torch.Tensor:
    """Symmetric, summing to one; each row's Gaussian is as wide as gives it the perplexity, found by bisection."""
    distances_NN = torch.cdist(points_ND, points_ND).square()
    distances_NN /= distances_NN.mean().clamp(min=1e-300)
    itself = torch.eye(len(points_ND), dtype=torch.bool)
    low_N1 = torch.full((len(points_ND), 1), -20.0, dtype=torch.float64)
    high_N1 = -low_N1
    for _ in range(50):  # of the logarithm of the precision
        middle_N1 = (low_N1 + high_N1) / 2
        log_NN = (-distances_NN * middle_N1.exp()).masked_fill(itself, float("-inf")).log_softmax(1)
        entropy_N1 = -(log_NN.exp() * log_NN.masked_fill(itself, 0.0)).sum(1, keepdim=True)
        too_wide_N1 = entropy_N1 > torch.tensor(perplexity, dtype=torch.float64).log()
        low_N1 = torch.where(too_wide_N1, middle_N1, low_N1)
        high_N1 = torch.where(too_wide_N1, high_N1, middle_N1)
    conditional_NN = log_NN.exp()
    return (conditional_NN + conditional_NN.mT) / (2 * len(points_ND))
