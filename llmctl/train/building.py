"""From a plan to a trainer: weights, sharding, compilation, optimizers."""

from __future__ import annotations

import dataclasses
import logging

import torch

from llmctl.errors import UserError
from llmctl.models import families
from llmctl.models.causal_lm import CausalLM
from llmctl.models.config import ModelConfig, parameter_count
from llmctl.models.initialization import new_model
from llmctl.quantities import format_count, format_size
from llmctl.train import distributed, hardware, optim, state
from llmctl.train.loop import Objective, Trainer
from llmctl.train.planning import Plan
from llmctl.train.schedule import Schedule
from llmctl.train.settings import PretrainSettings

log = logging.getLogger("llmctl")


def model_config(plan: Plan, settings: PretrainSettings) -> ModelConfig:
    config = families.find(plan.hf_config["model_type"]).config_from_hf(plan.hf_config)
    return dataclasses.replace(config, dropout=settings.dropout)


def build_trainer(
    plan: Plan, settings: PretrainSettings, config: ModelConfig, device: torch.device, parent: str | None
) -> Trainer:
    """A trainer at step 0, with fresh weights or the `parent` checkpoint's. The plan learns whether it is compiled."""
    _check_memory(config, settings.optimizer, device)
    model = new_model(config, settings.seed)
    if parent:
        state.load_weights(model, parent)
    model.to(device)
    model.activation_checkpointing = settings.activation_checkpointing
    objective = Objective(model, settings.z_loss)
    distributed.shard(objective, device)
    if plan.compile:
        plan.compile = _compile_blocks(model)
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
    mixer, ffn = config.blocks[0].mixer, config.blocks[0].ffn
    return (
        f"{config.family}, {config.n_layers} layers, d_model {config.d_model}, {mixer.n_heads} heads "
        f"({mixer.n_kv_heads} kv), d_ff {ffn.d_ff}, vocabulary {config.vocab_size}, context {config.max_positions}"
    )


def _check_memory(config: ModelConfig, optimizer: str, device: torch.device) -> None:
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


def _compile_blocks(model: CausalLM) -> bool:
    """torch.compile every block (they share one compilation); False, with a notice, where no compiler works."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(2, device=model.head_weight.device))
    except Exception as error:  # noqa: BLE001 - inductor fails in many ways, and eager is always right
        log.warning("torch.compile does not work here (%s); training goes on without it", str(error).splitlines()[0])
        return False
    for block in model.layers:
        block.compile()
    return True
