"""Optimizers: AdamW, and Muon for the matrices inside the blocks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import nn

# Coefficients of the quintic Newton-Schulz iteration, tuned for the largest slope at zero (Jordan et al. 2024, Muon).
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrices_NRC: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Push the singular values of a stack of matrices to about 1 (0.7 to 1.2), keeping their singular vectors."""
    a, b, c = _NEWTON_SCHULZ
    tall = matrices_NRC.shape[-2] > matrices_NRC.shape[-1]
    x = matrices_NRC.mT if tall else matrices_NRC
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized (Jordan et al. 2024), with decoupled weight decay.

    The update is scaled by 0.2 sqrt(max(rows, columns)), so that its root mean square is AdamW's and one learning rate and
    weight decay serve both (arXiv:2502.16982, eq. 4). Matrices of one shape are orthogonalized in one batched product.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ):
        super().__init__(list(parameters), {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for parameters in by_shape.values():
                self._step(parameters, group["lr"], group["momentum"], group["weight_decay"])

    def _step(self, parameters: list[nn.Parameter], lr: float, momentum: float, weight_decay: float) -> None:
        gradients = [parameter.grad for parameter in parameters]
        buffers = []
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            buffers.append(state["momentum"])
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        lookahead = torch._foreach_lerp(gradients, buffers, momentum)
        updates = _orthogonalized(lookahead)
        scale = 0.2 * max(parameters[0].shape) ** 0.5
        torch._foreach_mul_(parameters, 1 - lr * weight_decay)
        torch._foreach_add_(parameters, updates, alpha=-lr * scale)


def _orthogonalized(matrices: list[torch.Tensor]) -> list[torch.Tensor]:
    """Each matrix orthogonalized in bfloat16; a sharded one is gathered whole and cut again (the product needs all of it)."""
    whole = [m.full_tensor() if hasattr(m, "full_tensor") else m for m in matrices]
    results = orthogonalize(torch.stack(whole).bfloat16()).to(whole[0].dtype).unbind()
    return [_like(result, matrix) for result, matrix in zip(results, matrices)]


def _like(whole: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    if not hasattr(matrix, "full_tensor"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, matrix.device_mesh, matrix.placements, src_data_rank=None)


def _kind(name: str, parameter: nn.Parameter) -> str:
    """What a parameter is to an optimizer; a "matrix" is what a matrix product multiplies by, and is named a weight."""
    if "layers." not in name:
        return "vector" if parameter.dim() < 2 else "embedding"
    return "matrix" if parameter.dim() == 2 and "weight" in name.rpartition(".")[2] else "vector"


def build(
    model: nn.Module, name: str, lr: float, weight_decay: float, betas: tuple[float, float], embedding_lr: float
) -> list[torch.optim.Optimizer]:
    """`adamw`, or `muon`: Muon for the blocks' matrices and AdamW for embeddings, head, norms and biases.

    Only matrices inside the blocks decay; embeddings learn at `embedding_lr`.
    """
    groups = defaultdict(list)
    for parameter_name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        groups[_kind(parameter_name, parameter)].append(parameter)
    adamw_groups = [
        {"params": groups["embedding"], "lr": embedding_lr, "weight_decay": 0.0},
        {"params": groups["vector"], "lr": lr, "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = []
    if name == "muon":
        optimizers.append(Muon(groups["matrix"], lr=lr, weight_decay=weight_decay))
    else:
        adamw_groups.append({"params": groups["matrix"], "lr": lr, "weight_decay": weight_decay})
    adamw_groups = [group for group in adamw_groups if group["params"]]
    optimizers.append(torch.optim.AdamW(adamw_groups, betas=betas, eps=1e-8, fused=True))
    return optimizers
