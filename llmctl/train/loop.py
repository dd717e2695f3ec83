"""One optimizer step and one validation: the loop that every kind of training runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from llmctl.errors import UserError
from llmctl.models.ffn import balance_loss, has_experts
from llmctl.train import distributed
from llmctl.train.feed import Batch
from llmctl.train.hardware import autocast
from llmctl.train.schedule import Schedule


@dataclass(frozen=True)
class StepResult:
    """`loss` in nats per target token, `grad_norm` before clipping, `learning_rate` of the first group.

    `balance_loss` is what uneven use of experts adds to the loss that is minimized; None without experts.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    balance_loss: float | None = None


@dataclass
class Trainer:
    """Weights, optimizers and the step they are at. It neither prints nor saves. `objective` as in `train.objectives`."""

    objective: nn.Module
    optimizers: Sequence[torch.optim.Optimizer]
    schedule: Schedule
    device: torch.device
    dtype: torch.dtype
    clip: float = 1.0
    seed: int = 0
    step_number: int = 0
    total_steps: int | None = None

    def __post_init__(self):
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["peak_lr"] = group["lr"]

    def step(self, micro_batches: Sequence[Batch], n_targets: int) -> StepResult:
        """Train on this process's micro batches; `n_targets` counts the targets of all processes together.

        The loss is divided by that total once, so that cutting a batch into micro batches or ranks changes nothing; only
        the balance of experts is judged within each micro batch.
        Raises UserError when loss or gradient is not finite; the weights are then those before the step.
        """
        self.objective.train()
        self._set_learning_rate()
        totals = torch.zeros(2, device=self.device)
        for number, batch in enumerate(micro_batches):
            # of dropout and other noise
            torch.manual_seed(hash((self.seed, self.step_number, number, distributed.rank())))
            distributed.sync_gradients(self.objective, number == len(micro_batches) - 1)
            losses = self._losses(batch, n_targets)
            # sharding averages gradients over the processes; the loss is already divided by everybody's targets
            (losses.sum() * distributed.world_size()).backward()
            totals += losses.detach()
        norm = self._clip()
        mean_loss, balance = distributed.sum_over_ranks(totals).tolist()
        if not (math.isfinite(mean_loss) and math.isfinite(norm)):
            distributed.raise_once(
                UserError(
                    f"step {self.step_number + 1}: the loss is {mean_loss:g} and the gradient norm {norm:g}",
                    hint="training stopped, the last save is kept; try a lower --learning-rate or a longer --warmup-steps",
                )
            )
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step_number += 1
        learning_rate = self.optimizers[0].param_groups[0]["lr"]
        return StepResult(mean_loss, norm, learning_rate, balance if has_experts(self.objective) else None)

    def _losses(self, batch: Batch, n_targets: int) -> torch.Tensor:
        """What a micro batch adds to the mean loss, and to that of the balance of experts (0 without), [2]."""
        with autocast(self.device, self.dtype):
            loss = self.objective(*batch.tensors(self.device)) / n_targets
            balance = balance_loss(self.objective)
        balance = loss.new_zeros(()) if balance is None else balance * (batch.n_targets / n_targets)
        return torch.stack([loss, balance])

    @torch.no_grad()
    def validate(
        self, batches: Iterable[Batch], objective: nn.Module | None = None
    ) -> tuple[float, int, dict[str, float]]:
        """(sum of losses, number of scored ones, metrics by name) over all batches; ranks take turns.

        An objective with `metrics` gives rows beside the losses, and gets those of all batches. It may be another than
        the one that is trained, around the same model, where this is not sharded.
        """
        objective = objective or self.objective
        objective.eval()
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        beside = []
        for number, batch in enumerate(distributed.pad_to_ranks(batches)):
            if number % distributed.world_size() == distributed.rank():
                with autocast(self.device, self.dtype):
                    losses_N, *rows = torch.atleast_2d(objective(*batch.tensors(self.device)))
                totals += torch.tensor([losses_N.double().sum(), batch.n_targets], device=self.device)
                if rows:
                    beside.append(torch.stack(rows).double().cpu())
        nats, count = distributed.sum_over_ranks(totals).tolist()
        scored = distributed.gathered(beside)
        return nats, round(count), objective.metrics(torch.cat(scored, 1)) if scored and count else {}

    def _set_learning_rate(self) -> None:
        factor = self.schedule.factor(self.step_number, self.total_steps)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor

    def _clip(self) -> float:
        parameters = [p for p in self.objective.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        if self.clip:
            nn.utils.clip_grads_with_norm_(parameters, self.clip, norm)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
