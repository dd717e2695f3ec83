"""What a training run reports, in the order in which it happens; the caller decides what to show."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Started:
    """`step` is where the run goes on; `peak_flops` per second was measured just now, over all devices."""

    step: int
    n_parameters: int
    shape: str
    train_tokens: int
    val_tokens: int
    tokens_per_step: int
    device: str
    dtype: str
    peak_flops: float


@dataclass(frozen=True)
class Planned:
    total_steps: int
    epochs: float


@dataclass(frozen=True)
class Trained:
    """Means over the steps since the last report; `loss` in nats per token, `mfu` a share of the measured peak.

    `balance_loss`, of models with experts, is minimized too, and not part of `loss`.
    """

    step: int
    total_steps: int | None
    tokens: int
    loss: float
    grad_norm: float
    lr: float
    tokens_per_second: float
    mfu: float
    seconds: float
    memory_bytes: int
    balance_loss: float | None = None

    @property
    def seconds_left(self) -> float | None:
        if self.total_steps is None:
            return None
        return (self.total_steps - self.step) * self.tokens / max(1, self.step) / self.tokens_per_second


@dataclass(frozen=True)
class Validated:
    """`loss` in `measure` per `unit` over all held-out ones; bits per byte where the rows know
    their bytes; `metrics` of the objective's own by name ("accuracy", "spearman")."""

    step: int
    loss: float
    bits_per_byte: float | None
    seconds: float
    measure: str = "nats"
    unit: str = "token"
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def numbers(self) -> dict[str, float]:
        """All that was measured, by name."""
        found = {"loss": self.loss, "bits_per_byte": self.bits_per_byte, **self.metrics}
        return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class Saved:
    step: int
    path: str


@dataclass(frozen=True)
class Compared:
    """What was measured before the first step and after the last, by name: each as (before, after), lower is better."""

    step: int
    rows: dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Finished:
    step: int
    path: str
    seconds: float


Event = Started | Planned | Trained | Validated | Saved | Compared | Finished
