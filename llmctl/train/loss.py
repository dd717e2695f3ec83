"""Cross-entropy straight from the last hidden state, holding few logits at a time.

A vocabulary of 50k times 4k tokens is 0.8 GB of float32 logits, written and read several times. Here a chunk of tokens goes
through head, softmax and gradient at once, in the dtype of the matrix products, and only the gradients of the hidden state
and the head remain (the idea of Liger Kernel's fused linear cross-entropy, arXiv:2410.10989).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from llmctl.ops.cross_entropy import cross_entropy_

CHUNK_ELEMENTS = 1 << 28
"""Logits in memory at a time: 0.5 GB in bfloat16. Fewer, longer chunks make the sums of the head's gradient cheaper."""


def cross_entropy(
    hidden_ND: torch.Tensor, head_VD: torch.Tensor, targets_N: torch.Tensor, z_loss: float = 0.0
) -> torch.Tensor:
    """Sum of -log p(target) in nats over all targets that are not negative, float32 scalar.

    `z_loss` adds z_loss * log(Z)^2 per token (arXiv:2204.02311, 5.1). Matrix products run in autocast's dtype where it
    is on.
    """
    kind = hidden_ND.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        hidden_ND, head_VD = hidden_ND.to(dtype), head_VD.to(dtype)
    return _ChunkedCrossEntropy.apply(hidden_ND, head_VD, targets_N, z_loss)


def token_losses(hidden_ND: torch.Tensor, head_VD: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """-log p(target) of each position in nats, [N] float32, 0 where the target is negative; without gradient."""
    rows = _rows_at_once(head_VD)
    with torch.no_grad():
        parts = [
            cross_entropy_(F.linear(h_ND, head_VD), t_N)
            for h_ND, t_N in zip(hidden_ND.split(rows), targets_N.split(rows))
        ]
    return torch.cat(parts)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The gradient is worked out in the forward pass, where the logits are at hand, and scaled in the backward."""

    @staticmethod
    def forward(ctx, hidden_ND, head_VD, targets_N, z_loss):
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        grad_hidden, grad_head_VD = [], None
        rows = _rows_at_once(head_VD)
        for h_ND, t_N in zip(hidden_ND.split(rows), targets_N.split(rows)):
            logits_NV = h_ND @ head_VD.mT
            total += cross_entropy_(logits_NV, t_N, z_loss).sum()
            grad_hidden.append(logits_NV @ head_VD)
            part_VD = logits_NV.mT @ h_ND
            # the only chunk's gradient is rounded once; those of several are summed in float32
            if len(h_ND) < len(hidden_ND):
                part_VD = part_VD.float()
            grad_head_VD = part_VD if grad_head_VD is None else grad_head_VD.add_(part_VD)
        ctx.save_for_backward(torch.cat(grad_hidden), grad_head_VD.to(head_VD.dtype))
        return total

    @staticmethod
    def backward(ctx, grad_total):
        grad_hidden_ND, grad_head_VD = ctx.saved_tensors
        return grad_hidden_ND * grad_total, grad_head_VD * grad_total, None, None


def _rows_at_once(head_VD: torch.Tensor) -> int:
    return max(1, CHUNK_ELEMENTS // head_VD.shape[0])
