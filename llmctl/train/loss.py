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
    hidden_ND: torch.Tensor,
    head_VD: torch.Tensor,
    targets_N: torch.Tensor,
    z_loss: float = 0.0,
    *,
    bias_V: torch.Tensor | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Sum of -log p(target) in nats over all targets that are not negative, float32 scalar.

    The logits are softcap * tanh((hidden @ head.T + bias) / softcap), without what is None. `z_loss` adds
    z_loss * log(Z)^2 per token (arXiv:2204.02311, 5.1). Matrix products run in autocast's dtype where it is on.
    """
    kind = hidden_ND.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        hidden_ND, head_VD = hidden_ND.to(dtype), head_VD.to(dtype)
        bias_V = None if bias_V is None else bias_V.to(dtype)
    return _ChunkedCrossEntropy.apply(hidden_ND, head_VD, bias_V, targets_N, z_loss, softcap)


def token_losses(
    hidden_ND: torch.Tensor,
    head_VD: torch.Tensor,
    targets_N: torch.Tensor,
    *,
    bias_V: torch.Tensor | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """-log p(target) of each position in nats, [N] float32, 0 where the target is negative; without gradient."""
    rows = _rows_at_once(head_VD)
    with torch.no_grad():
        parts = [
            cross_entropy_(_logits(h_ND, head_VD, bias_V, softcap), t_N)
            for h_ND, t_N in zip(hidden_ND.split(rows), targets_N.split(rows))
        ]
    return torch.cat(parts)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The gradient is worked out in the forward pass, where the logits are at hand, and scaled in the backward.

    A frozen head gets none, which saves a third of the head's time.
    """

    @staticmethod
    def forward(ctx, hidden_ND, head_VD, bias_V, targets_N, z_loss, softcap):
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        grad_hidden, grad_head_VD = [], None
        grad_bias_V = None if bias_V is None else torch.zeros_like(bias_V, dtype=torch.float32)
        rows = _rows_at_once(head_VD)
        for h_ND, t_N in zip(hidden_ND.split(rows), targets_N.split(rows)):
            logits_NV = _logits(h_ND, head_VD, bias_V, softcap)
            slope_NV = None if softcap is None else 1 - (logits_NV / softcap).square_()
            total += cross_entropy_(logits_NV, t_N, z_loss).sum()  # now they hold the gradient
            if slope_NV is not None:
                logits_NV *= slope_NV
            grad_hidden.append(logits_NV @ head_VD)
            if ctx.needs_input_grad[1]:
                part_VD = logits_NV.mT @ h_ND
                # the only chunk's gradient is rounded once; those of several are summed in float32
                if len(h_ND) < len(hidden_ND):
                    part_VD = part_VD.float()
                grad_head_VD = part_VD if grad_head_VD is None else grad_head_VD.add_(part_VD)
            if grad_bias_V is not None:
                grad_bias_V += logits_NV.sum(0, dtype=torch.float32)
        grad_bias_V = None if bias_V is None else grad_bias_V.to(bias_V.dtype)
        grad_head_VD = None if grad_head_VD is None else grad_head_VD.to(head_VD.dtype)
        ctx.save_for_backward(torch.cat(grad_hidden), grad_head_VD, grad_bias_V)
        return total

    @staticmethod
    def backward(ctx, grad_total):
        hidden_head_bias = [None if grad is None else grad * grad_total for grad in ctx.saved_tensors]
        return *hidden_head_bias, None, None, None


def _logits(hidden_ND, head_VD, bias_V, softcap) -> torch.Tensor:
    logits_NV = F.linear(hidden_ND, head_VD, bias_V)
    return logits_NV if softcap is None else logits_NV.div_(softcap).tanh_().mul_(softcap)


def _rows_at_once(head_VD: torch.Tensor) -> int:
    return max(1, CHUNK_ELEMENTS // head_VD.shape[0])
