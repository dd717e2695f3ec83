"""From an objective to a trainer: memory, sharding, compilation, optimizers."""

from __future__ import annotations

import logging

import torch
from torch import nn

from llmctl.errors import UserError
from llmctl.models.config import ModelConfig, parameter_count, sizes
from llmctl.quantities import format_count, format_size
from llmctl.train import distributed, hardware, optim
from llmctl.train.loop import Trainer
from llmctl.train.plan import Plan
from llmctl.train.schedule import Schedule
from llmctl.train.settings import RunSettings

log = logging.getLogger("llmctl")


def build_trainer(objective: nn.Module, plan: Plan, settings: RunSettings, device: torch.device) -> Trainer:
    """A trainer at step 0 of this process's share of the objective. The plan learns whether it is compiled."""
    model = objective.model
    for stack in model.stacks():
        stack.activation_checkpointing = settings.activation_checkpointing
    distributed.shard(objective, device)
    if plan.compile:
        plan.compile = _compile_blocks(model, device)
    betas = (settings.beta1, settings.beta2)
    rates = (plan.learning_rate, plan.embedding_learning_rate)
    return Trainer(
        objective=objective,
        optimizers=optim.build(model, settings.optimizer, rates[0], settings.weight_decay, betas, rates[1]),
        schedule=Schedule(settings.schedule, settings.warmup_steps, settings.decay, settings.min_lr),
        device=device,
        dtype=hardware.compute_dtype(plan.precision, device),
        clip=settings.clip,
        seed=settings.seed,
    )


def describe(config: ModelConfig) -> str:
    """One line: the sizes that tell one model of a family from another."""
    layers = f"{config.encoder.n_layers} + {config.n_layers}" if config.encoder else config.n_layers
    parts = [config.family, f"{layers} layers", f"d_model {config.d_model}"]
    parts += [f"{name} {value}" for name, value in sizes(config).items()]
    return ", ".join([*parts, f"vocabulary {config.vocab_size}", f"context {config.max_positions or 'unlimited'}"])


def check_memory(config: ModelConfig, optimizer: str, device: torch.device) -> None:
    """Refuse a model that cannot fit, before the system kills this process or another for it."""
    n = parameter_count(config)
    # float32 weights, gradients, and one (Muon) or two (AdamW) moments
    needed = n * 4 * (3 if optimizer == "muon" else 4) // distributed.world_size()
    free = hardware.free_memory(device)
    if free is not None and needed > free:
        raise UserError(
            f"out of memory: {format_count(n)} parameters with gradients and optimizer need {format_size(needed)}, "
            f"{format_size(free)} are free",
            hint="choose a smaller model (--params)",
        )


def check_micro_batch(config: ModelConfig, plan: Plan, settings: RunSettings, device: torch.device) -> None:
    """Refuse what cannot be held at once: of every token at least what its gradient needs of each block's input."""
    rows = min(plan.micro_batch_size or plan.batch_size, plan.batch_size // distributed.world_size())
    bytes_per_value = 4 if settings.activation_checkpointing else 16
    needed = rows * plan.seq_len * config.n_layers * config.d_model * bytes_per_value
    free = hardware.free_memory(device)
    if free is not None and needed > free:
        raise UserError(
            f"out of memory: {rows} sequences at once need more than {format_size(needed)}, {format_size(free)} are free",
            hint="choose a smaller --micro-batch-size, or --activation-checkpointing",
        )


def _compile_blocks(model: nn.Module, device: torch.device) -> bool:
    """torch.compile every block (they share one compilation); False, with a notice, where no compiler works."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(2, device=device))
    except Exception as error:  # noqa: BLE001 - inductor fails in many ways, and eager is always right
        log.warning("torch.compile does not work here (%s); training goes on without it", str(error).splitlines()[0])
        return False
    for module in model.modules():
        # Marked, not decorated: torch's decorator imports the compiler, which a first token need not wait for.
        if not getattr(module, "compiles", True):
            module.forward = torch.compiler.disable(module.forward)
    for stack in model.stacks():
        for block in stack.layers:
            block.compile()
    return True
