"""Cross-entropy straight from the last hidden state, without ever holding all logits.

A vocabulary of 50k times 4k tokens is 0.8 GB of float32 logits, written and read several times. Here a chunk of tokens goes
through head, softmax and gradient while it is in the cache; only the gradients of the hidden state and the head remain
(the idea of Liger Kernel's fused linear cross-entropy, arXiv:2410.10989).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from llmctl.data.packing import IGNORE

CHUNK_ELEMENTS = 1 << 23


def cross_entropy(
    hidden_ND: torch.Tensor, head_VD: torch.Tensor, targets_N: torch.Tensor, z_loss: float = 0.0
) -> torch.Tensor:
    """Sum of -log p(target) in nats over all targets that are not IGNORE, float32 scalar.

    `z_loss` adds z_loss * log(Z)^2 per token (arXiv:2204.02311, 5.1) to the gradient and to the value. Matrix products run in
    autocast's dtype where it is on, sums in float32.
    """
    kind = hidden_ND.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        hidden_ND, head_VD = hidden_ND.to(dtype), head_VD.to(dtype)
    return _ChunkedCrossEntropy.apply(hidden_ND, head_VD, targets_N, z_loss)


def token_losses(hidden_ND: torch.Tensor, head_VD: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """-log p(target) of each position in nats, [N] float32, 0 where the target is IGNORE; without gradient."""
    rows = max(1, CHUNK_ELEMENTS // head_VD.shape[0])
    with torch.no_grad():
        parts = [
            F.cross_entropy((h_ND @ head_VD.mT).float(), t_N, ignore_index=IGNORE, reduction="none")
            for h_ND, t_N in zip(hidden_ND.split(rows), targets_N.split(rows))
        ]
    return torch.cat(parts)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The gradient is worked out in the forward pass, where the logits are at hand, and scaled in the backward."""

    @staticmethod
    def forward(ctx, hidden_ND, head_VD, targets_N, z_loss):
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        grad_hidden_ND = torch.empty_like(hidden_ND)
        grad_head_VD = torch.zeros_like(head_VD, dtype=torch.float32)
        rows = max(1, CHUNK_ELEMENTS // head_VD.shape[0])
        for start in range(0, hidden_ND.shape[0], rows):
            h_ND, t_N = hidden_ND[start : start + rows], targets_N[start : start + rows]
            loss, grad_NV = _loss_and_logit_gradient(h_ND @ head_VD.mT, t_N, z_loss)
            total += loss
            torch.mm(grad_NV, head_VD, out=grad_hidden_ND[start : start + rows])
            grad_head_VD += grad_NV.mT @ h_ND
        ctx.save_for_backward(grad_hidden_ND, grad_head_VD.to(head_VD.dtype))
        return total

    @staticmethod
    def backward(ctx, grad_total):
        grad_hidden_ND, grad_head_VD = ctx.saved_tensors
        return grad_hidden_ND * grad_total, grad_head_VD * grad_total, None, None


def _loss_and_logit_gradient(logits_NV, targets_N, z_loss):
    """(summed loss, gradient [N, V] in the logits' dtype) of one chunk."""
    keep_N = targets_N != IGNORE
    index_N1 = targets_N.clamp(min=0)[:, None]
    log_p_NV = logits_NV.float()
    log_z_N = torch.logsumexp(log_p_NV, dim=-1)
    chosen_N = log_p_NV.gather(1, index_N1).squeeze(1)
    loss_N = log_z_N - chosen_N + z_loss * log_z_N.square()
    grad_NV = log_p_NV.sub_(log_z_N[:, None]).exp_()
    weight_N = keep_N * (1 + 2 * z_loss * log_z_N)
    grad_NV *= weight_N[:, None]
    grad_NV.scatter_add_(1, index_N1, -keep_N.to(grad_NV.dtype)[:, None])
    return (loss_N * keep_N).sum(), grad_NV.to(logits_NV.dtype)
