"""The selective scan of Mamba (arXiv:2312.00752, section 3.3) in blocks that stay in the processor's cache.

With N numbers of state per channel, writing out every state costs N times the memory of the activations. Here a block of
tokens is expanded, scanned and reduced at a time; the states between blocks are kept, and the backward pass expands each
block again from them.
"""

from __future__ import annotations

import torch

TOKENS = 16
"""Per block: its states are kept once in so many tokens."""
ELEMENTS = 1 << 20
"""Of a block's expanded tensors, about: several of them (4 MB each) share the cache."""


def selective_scan(
    x_BTD: torch.Tensor,
    dt_BTD: torch.Tensor,
    a_ND: torch.Tensor,
    b_BTN: torch.Tensor,
    c_BTN: torch.Tensor,
    *,
    starts_BT: torch.Tensor | None = None,
    state_BND: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """h = exp(dt a) h + dt x b and y = h c, along T; all float32, `a_ND` negative. Returns (y_BTD, the last h_BND).

    Where `starts_BT` (bool) is true, nothing of the state before is kept. `state_BND` is the state to begin with.
    """
    if state_BND is None:
        state_BND = x_BTD.new_zeros(x_BTD.shape[0], *a_ND.shape)
    return _SelectiveScan.apply(x_BTD, dt_BTD, a_ND, b_BTN, c_BTN, starts_BT, state_BND)


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BTD, dt_BTD, a_ND, b_BTN, c_BTN, starts_BT, state_BND):
        decay_BTD = dt_BTD if starts_BT is None else dt_BTD.masked_fill(starts_BT.unsqueeze(-1), float("inf"))
        y_BTD, ends = torch.empty_like(x_BTD), torch.empty_like(state_BND)
        kept = [] if any(ctx.needs_input_grad) else None
        with torch.autocast(x_BTD.device.type, enabled=False):
            for rows in _row_blocks(x_BTD, a_ND):
                scratch, state, states = _Scratch(x_BTD, a_ND), state_BND[rows], []
                for tokens in _token_blocks(x_BTD):
                    states.append(state)
                    at = rows, tokens
                    h_KRND = scratch.scan(x_BTD[at], dt_BTD[at], decay_BTD[at], a_ND, b_BTN[at], state)
                    y_BTD[at] = (c_BTN[at].transpose(0, 1).unsqueeze(2) @ h_KRND).squeeze(2).transpose(0, 1)
                    state = h_KRND[-1].clone()
                ends[rows] = state
                if kept is not None:
                    kept.append(torch.stack(states))
        if kept is not None:
            ctx.save_for_backward(x_BTD, dt_BTD, decay_BTD, a_ND, b_BTN, c_BTN, *kept)
        return y_BTD, ends

    @staticmethod
    def backward(ctx, grad_y_BTD, grad_end_BND):
        x_BTD, dt_BTD, decay_BTD, a_ND, b_BTN, c_BTN, *kept = ctx.saved_tensors
        grads = [torch.zeros_like(t) for t in (x_BTD, dt_BTD, a_ND, b_BTN, c_BTN)]
        grad_start_BND = torch.empty_like(grad_end_BND)
        for rows, states in zip(_row_blocks(x_BTD, a_ND), kept):
            scratch, carry = _Scratch(x_BTD, a_ND), grad_end_BND[rows]
            for tokens, state in reversed(list(zip(_token_blocks(x_BTD), states))):
                at = rows, tokens
                inputs = x_BTD[at], dt_BTD[at], decay_BTD[at], a_ND, b_BTN[at]
                parts = scratch.backward(*inputs, c_BTN[at], state, grad_y_BTD[at], carry)
                carry = parts[-1]
                for i in (0, 1, 3, 4):
                    grads[i][at] = parts[i].transpose(0, 1)
                grads[2] += parts[2]
            grad_start_BND[rows] = carry
        return *grads, None, grad_start_BND


class _Scratch:
    """Expanded tensors of a block, written anew for each: fresh memory costs more than the arithmetic."""

    def __init__(self, x_BTD: torch.Tensor, a_ND: torch.Tensor):
        rows, tokens = _block_sizes(x_BTD, a_ND)
        self._buffers = [x_BTD.new_empty(tokens, rows, *a_ND.shape) for _ in range(3)]

    def scan(self, x_RKD, dt_RKD, decay_RKD, a_ND, b_RKN, state_RND) -> torch.Tensor:
        """Every state of a block, time first, [K, R, N, D]; the decays stand in the first buffer."""
        decay_KRND, h_KRND = (buffer[: x_RKD.shape[1], : x_RKD.shape[0]] for buffer in self._buffers[:2])
        torch.mul(decay_RKD.transpose(0, 1).unsqueeze(2), a_ND, out=decay_KRND).exp_()
        torch.mul((dt_RKD * x_RKD).transpose(0, 1).unsqueeze(2), b_RKN.transpose(0, 1).unsqueeze(3), out=h_KRND)
        for decay_RND, h_RND in zip(decay_KRND, h_KRND):
            state_RND = h_RND.addcmul_(decay_RND, state_RND)
        return h_KRND

    def backward(self, x_RKD, dt_RKD, decay_RKD, a_ND, b_RKN, c_RKN, state_RND, grad_y_RKD, carry_RND):
        """Gradients of x, dt [K, R, D], a [N, D], b, c [K, R, N] and of the state before the block [R, N, D]."""
        h_KRND = self.scan(x_RKD, dt_RKD, decay_RKD, a_ND, b_RKN, state_RND)
        decay_KRND, grad_KRND = (buffer[: x_RKD.shape[1], : x_RKD.shape[0]] for buffer in self._buffers[::2])
        x_KRD, dt_KRD, grad_y_KRD = (t.transpose(0, 1) for t in (x_RKD, dt_RKD, grad_y_RKD))
        grad_c_KRN = (h_KRND @ grad_y_KRD.unsqueeze(3)).squeeze(3)
        torch.mul(grad_y_KRD.unsqueeze(2), c_RKN.transpose(0, 1).unsqueeze(3), out=grad_KRND)
        grad_KRND[-1] += carry_RND
        for k in range(len(grad_KRND) - 1, 0, -1):
            grad_KRND[k - 1].addcmul_(decay_KRND[k], grad_KRND[k])
        carry_RND = decay_KRND[0] * grad_KRND[0]
        grad_input_KRD = (b_RKN.transpose(0, 1).unsqueeze(2) @ grad_KRND).squeeze(2)
        grad_b_KRN = (grad_KRND @ (dt_KRD * x_KRD).unsqueeze(3)).squeeze(3)
        # of log decay = dt a: gradient of h times the decayed state before it
        decay_KRND[1:].mul_(h_KRND[:-1])
        decay_KRND[0].mul_(state_RND)
        grad_log_KRND = decay_KRND.mul_(grad_KRND)
        grad_a_ND = torch.mul(grad_log_KRND, dt_KRD.unsqueeze(2), out=h_KRND).sum((0, 1))
        grad_dt_KRD = grad_input_KRD * x_KRD + grad_log_KRND.mul_(a_ND).sum(2)
        return grad_input_KRD * dt_KRD, grad_dt_KRD, grad_a_ND, grad_b_KRN, grad_c_KRN, carry_RND


def _block_sizes(x_BTD: torch.Tensor, a_ND: torch.Tensor) -> tuple[int, int]:
    tokens = min(TOKENS, x_BTD.shape[1])
    return min(x_BTD.shape[0], max(1, ELEMENTS // (tokens * a_ND.numel()))), tokens


def _row_blocks(x_BTD: torch.Tensor, a_ND: torch.Tensor) -> list[slice]:
    size = _block_sizes(x_BTD, a_ND)[0]
    return [slice(at, at + size) for at in range(0, x_BTD.shape[0], size)]


def _token_blocks(x_BTD: torch.Tensor) -> list[slice]:
    return [slice(at, at + TOKENS) for at in range(0, x_BTD.shape[1], TOKENS)]
