"""The learning rate's course, as a factor of its peak."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then `kind`: cosine and linear fall from there to the end; wsd (warm-up, stable, decay,
    arXiv:2404.06395) stays at the peak and falls linearly over the last `decay` share of the run."""

    kind: str
    warmup_steps: int
    decay: float
    floor: float

    def factor(self, step: int, total_steps: int | None) -> float:
        """For step 0, 1, … of `total_steps`; while the total is not yet known only the warm-up counts."""
        rise = min(1.0, (step + 1) / (self.warmup_steps + 1))
        if total_steps is None:
            return rise
        if self.kind == "wsd":
            fall = (total_steps - step) / max(1.0, self.decay * total_steps)
        else:
            done = max(0, step - self.warmup_steps) / max(1, total_steps - self.warmup_steps)
            fall = 1 - done if self.kind == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return min(rise, self.floor + (1 - self.floor) * max(0.0, min(1.0, fall)))
