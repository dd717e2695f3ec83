"""The two scans of state spaces against the recurrence as it is written in the papers, one token after another."""

from __future__ import annotations

import pytest
import torch

from llmctl.ops import selective_scan as scan
from llmctl.ops.ssd import chunked_scan

B, T, D, N, H, P, G = 3, 37, 12, 4, 6, 5, 2


def drawn(*shape: int, low: float = -1.0, high: float = 1.0) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.float64).uniform_(low, high).requires_grad_()


@pytest.fixture(params=["one text", "several texts", "going on"])
def texts(request) -> tuple[torch.Tensor | None, bool]:
    """(positions within the own text, whether a state from before matters)."""
    torch.manual_seed(0)
    if request.param == "one text":
        return None, False
    starts = torch.rand(B, T) < 0.15
    columns = torch.arange(T).expand(B, T)
    before = 10 if request.param == "going on" else 0
    first = torch.where(starts, columns, -before).cummax(1).values
    return columns - first, before > 0


def recurrence(decay_BTX, input_BTX, keeps_BT, state_BX):
    """h = decay h + input along T; every h, [B, T, ...]."""
    states = []
    for t in range(decay_BTX.shape[1]):
        keeps_B = keeps_BT[:, t].view(-1, *[1] * (state_BX.dim() - 1))
        state_BX = decay_BTX[:, t] * state_BX * keeps_B + input_BTX[:, t]
        states.append(state_BX)
    return torch.stack(states, 1)


def compare(ours, theirs, inputs) -> None:
    """Outputs and gradients of a random weighting of them."""
    weights = [torch.randn_like(part) for part in theirs]
    for part, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(part, expected)
    sums = [sum((part * weight).sum() for part, weight in zip(parts, weights)) for parts in (ours, theirs)]
    for gradient, expected in zip(*(torch.autograd.grad(total, inputs) for total in sums), strict=True):
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("elements", [1, 2000, 1 << 20], ids="blocks of {}".format)
def test_selective_scan_is_the_recurrence(texts, elements, monkeypatch):
    monkeypatch.setattr(scan, "ELEMENTS", elements)
    positions_BT, has_past = texts
    x, dt, a = drawn(B, T, D), drawn(B, T, D, low=0.01), drawn(N, D, low=-4, high=-0.1)
    b, c, past = drawn(B, T, N), drawn(B, T, N), drawn(B, N, D)
    starts_BT = None if positions_BT is None else positions_BT == 0
    keeps_BT = torch.ones(B, T) if positions_BT is None else (positions_BT > 0).double()
    ours = scan.selective_scan(x, dt, a, b, c, starts_BT=starts_BT, state_BND=past if has_past else None)
    decay = (dt.unsqueeze(2) * a).exp()
    states = recurrence(decay, (dt * x).unsqueeze(2) * b.unsqueeze(3), keeps_BT, past * has_past)
    theirs = (states * c.unsqueeze(3)).sum(2), states[:, -1]
    compare(ours, theirs, [x, dt, a, b, c, *([past] if has_past else [])])


@pytest.mark.parametrize("chunk", [1, 8, 64], ids="chunks of {}".format)
def test_chunked_scan_is_the_recurrence(texts, chunk):
    positions_BT, has_past = texts
    x, dt, a = drawn(B, T, H, P), drawn(B, T, H, low=0.01), drawn(H, low=-4, high=-0.1)
    b, c, past = drawn(B, T, G, N), drawn(B, T, G, N), drawn(B, H, P, N)
    keeps_BT = torch.ones(B, T) if positions_BT is None else (positions_BT > 0).double()
    state = past if has_past else None
    ours = chunked_scan(x, dt, a, b, c, chunk, positions_BT=positions_BT, state_BHPN=state)
    b_BTHN, c_BTHN = (t.repeat_interleave(H // G, 2) for t in (b, c))
    decay = (dt * a).exp()[..., None, None]
    input_BTHPN = (dt.unsqueeze(-1) * x).unsqueeze(-1) * b_BTHN.unsqueeze(3)
    states = recurrence(decay, input_BTHPN, keeps_BT, past * has_past)
    theirs = (states * c_BTHN.unsqueeze(3)).sum(-1), states[:, -1]
    compare(ours, theirs, [x, dt, a, b, c, *([past] if has_past else [])])


def test_decays_to_nothing_give_no_infinities():
    """Within a chunk the sums of log decays span what float32's exponent cannot hold."""
    dt = torch.full((1, 64, 2), 20.0, requires_grad=True)
    x, b = torch.ones(1, 64, 2, 3, requires_grad=True), torch.ones(1, 64, 1, 4)
    y, last = chunked_scan(x, dt, torch.tensor([-16.0, -1.0]), b, b, 64)
    (y.sum() + last.sum()).backward()
    assert y.isfinite().all() and dt.grad.isfinite().all() and x.grad.isfinite().all()
