"""The device that a command computes on."""

from __future__ import annotations

import torch

from llmctl.errors import CalledWrongly


def choose_device(name: str | None) -> torch.device:
    """The named device, or by default the first GPU, or the CPU. Raises `CalledWrongly` for one that is not here."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise CalledWrongly(f"device {name!r} cannot be used: {reason}", hint="--device cpu always can") from error
    return device
