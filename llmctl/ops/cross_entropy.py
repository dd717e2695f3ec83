"""Cross-entropy of a block of logits with its gradient in place: the plain torch reference and the native kernel."""

from __future__ import annotations

import torch

from llmctl.ops import native
from llmctl.ops.dispatch import DTYPES, cpu_library


def cross_entropy_(logits_NV: torch.Tensor, targets_N: torch.Tensor, z_loss: float = 0.0) -> torch.Tensor:
    """Losses [N] float32 in nats, -log p(target) + z_loss * log(Z)^2; `logits_NV` becomes the gradient of their sum.

    Targets are int64; a negative one is not learned: loss and gradient 0.
    """
    library = cpu_library() if logits_NV.device.type == "cpu" and logits_NV.dtype in DTYPES else None
    if library is None or not logits_NV.is_contiguous():
        return reference_(logits_NV, targets_N, z_loss)
    targets_N = targets_N.contiguous()
    losses_N = torch.empty(len(targets_N), dtype=torch.float32)
    native.call(
        library,
        "llmctl_cross_entropy",
        DTYPES[logits_NV.dtype],
        logits_NV.data_ptr(),
        *logits_NV.shape,
        targets_N.data_ptr(),
        z_loss,
        losses_N.data_ptr(),
    )
    return losses_N


def reference_(logits_NV: torch.Tensor, targets_N: torch.Tensor, z_loss: float = 0.0) -> torch.Tensor:
    """The specification of `cross_entropy_`, with a float32 copy of the logits in memory."""
    keep_N = targets_N >= 0
    index_N1 = targets_N.clamp(min=0)[:, None]
    values_NV = logits_NV.float()
    log_z_N = torch.logsumexp(values_NV, dim=-1)
    losses_N = log_z_N - values_NV.gather(1, index_N1).squeeze(1) + z_loss * log_z_N.square()
    gradient_NV = torch.softmax(values_NV, dim=-1)
    gradient_NV *= (keep_N * (1 + 2 * z_loss * log_z_N))[:, None]
    gradient_NV.scatter_add_(1, index_N1, -keep_N.to(gradient_NV.dtype)[:, None])
    logits_NV.copy_(gradient_NV)
    return torch.where(keep_N, losses_N, 0.0)
