"""State space duality, Mamba-2's scan as matrix products (arXiv:2405.21060, section 6), in plain torch.

Within a chunk of Q tokens the scan is a masked product like attention's; from chunk to chunk a state [P, N] per head goes on.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def chunked_scan(
    x_BTHP: torch.Tensor,
    dt_BTH: torch.Tensor,
    a_H: torch.Tensor,
    b_BTGN: torch.Tensor,
    c_BTGN: torch.Tensor,
    chunk: int,
    *,
    positions_BT: torch.Tensor | None = None,
    state_BHPN: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """h = exp(dt a) h + dt x b^T and y = h c along T for every head; a group g of G serves H / G heads.

    Float32 in and out, `a_H` negative: (y [B, T, H, P], the last h [B, H, P, N]). A token at position p of `positions_BT` keeps
    the p tokens in front of it and nothing before them. `state_BHPN` is the state to begin with.
    """
    n_tokens, n_heads = x_BTHP.shape[1:3]
    chunk = min(chunk, n_tokens)
    x_BTHP = x_BTHP * dt_BTH.unsqueeze(-1)
    log_decay_BTH = dt_BTH * a_H
    missing = -n_tokens % chunk  # tokens with decay 1 and input 0 leave the state as it is
    # [B, C, heads or groups, Q, ...]
    x_BCHQP, b_BCGQN, c_BCGQN = (_chunks(t, chunk, missing).transpose(2, 3) for t in (x_BTHP, b_BTGN, c_BTGN))
    sums_BCHQ = _chunks(log_decay_BTH, chunk, missing).transpose(2, 3).cumsum(-1)
    own_BCHQQ, kept_BCHQ, entering_BCHQ = _masks(positions_BT, chunk, missing, x_BCHQP.device)
    heads_per_group = n_heads // b_BTGN.shape[2]

    weights_BCHQQ = (sums_BCHQ.unsqueeze(-1) - sums_BCHQ.unsqueeze(-2)).masked_fill(~own_BCHQQ, float("-inf")).exp()
    scores_BCGQQ = (c_BCGQN @ b_BCGQN.mT).to(weights_BCHQQ.dtype)
    weights_BCHQQ = weights_BCHQQ * scores_BCGQQ.repeat_interleave(heads_per_group, 2)
    y_BCHQP = weights_BCHQQ @ x_BCHQP

    to_end_BCHQ = (sums_BCHQ[..., -1:] - sums_BCHQ).exp()
    from_start_BCHQ = sums_BCHQ.exp()
    if positions_BT is not None:
        to_end_BCHQ, from_start_BCHQ = to_end_BCHQ * kept_BCHQ, from_start_BCHQ * entering_BCHQ
    b_BCHQN, c_BCHQN = (t.repeat_interleave(heads_per_group, 2) for t in (b_BCGQN, c_BCGQN))
    added_BCHPN = (x_BCHQP * to_end_BCHQ.unsqueeze(-1)).mT @ b_BCHQN
    entering_BCHPN, last_BHPN = _states(added_BCHPN, from_start_BCHQ[..., -1], state_BHPN)
    y_BCHQP = y_BCHQP + (c_BCHQN @ entering_BCHPN.mT) * from_start_BCHQ.unsqueeze(-1)
    y_BTHP = y_BCHQP.transpose(2, 3).flatten(1, 2)[:, :n_tokens]
    return y_BTHP.to(x_BTHP.dtype), last_BHPN


def _states(added_BCHPN, decay_BCH, state_BHPN) -> tuple[torch.Tensor, torch.Tensor]:
    """The state in front of every chunk, and that after the last."""
    state_BHPN = torch.zeros_like(added_BCHPN[:, 0]) if state_BHPN is None else state_BHPN
    states = []
    for added_BHPN, decay_BH in zip(added_BCHPN.unbind(1), decay_BCH.unbind(1)):
        states.append(state_BHPN)
        state_BHPN = torch.addcmul(added_BHPN, decay_BH[..., None, None], state_BHPN)
    return torch.stack(states, 1), state_BHPN


def _masks(positions_BT, chunk: int, missing: int, device):
    """Which earlier tokens of its chunk a token keeps (itself too), which of them are kept at the chunk's end, and whether a
    token keeps the state that enters the chunk; the last two None where all do."""
    steps_Q = torch.arange(chunk, device=device)
    own_QQ = steps_Q[:, None] >= steps_Q
    if positions_BT is None:
        return own_QQ, None, None
    if missing:  # what fills the last chunk belongs to the last text
        more = positions_BT[:, -1:] + torch.arange(1, missing + 1, device=device)
        positions_BT = torch.cat([positions_BT, more], 1)
    first_BCQ = steps_Q - positions_BT.unflatten(1, (-1, chunk))  # negative: from a chunk before
    own_BCHQQ = (own_QQ & (steps_Q >= first_BCQ.unsqueeze(-1))).unsqueeze(2)
    return own_BCHQQ, own_BCHQQ[..., -1, :], (first_BCQ < 0).unsqueeze(2)


def _chunks(tensor_BTX: torch.Tensor, chunk: int, missing: int) -> torch.Tensor:
    padding = (0, 0) * (tensor_BTX.dim() - 2) + (0, missing)
    return F.pad(tensor_BTX, padding).unflatten(1, (-1, chunk))
