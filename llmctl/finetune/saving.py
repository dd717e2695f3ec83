"""What a fine-tuning run leaves: an adapter or a whole checkpoint for others, and its own weights for itself to go on."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from llmctl import checkpoint
from llmctl.finetune import adapter, methods
from llmctl.models.config import ModelConfig
from llmctl.models.loading import hf_tensors, stored_tensors, write_config
from llmctl.tokenizer import Tokenizer
from llmctl.train import distributed, state
from llmctl.train.loop import Trainer

STEM = "optimizer-weights"
"""The trained parameters in float32: files of that name stay in the run's own directory."""


def write(
    trainer: Trainer, tokenizer: Tokenizer, method: methods.Method | None, base: Path, directory: Path | None
) -> None:
    """Write a save of the run; with several processes all must call, rank 0 with the directory.

    Without an adapter the checkpoint has the dtypes of the base.
    """
    model = trainer.objective.model
    directory = distributed.from_first(directory)
    state.write_optimizer(trainer, directory)
    distributed.on_first(checkpoint.save_tensors, directory, _trained(model), stem=STEM)
    with getattr(trainer.objective, "as_saved", contextlib.nullcontext)():
        if method is not None:
            whole = _trained(model)
            distributed.on_first(_write_adapter, model, whole, tokenizer, method, base, directory)
        else:
            whole = {name: distributed.whole_on_first(tensor) for name, tensor in stored_tensors(model).items()}
            distributed.on_first(_write_checkpoint, model.config, whole, tokenizer, base, directory)


def load(trainer: Trainer, directory: Path) -> None:
    """Put the state of `write` back, on any number of processes."""
    files = checkpoint.open_tensors(directory, stem=STEM)
    parameters = dict(trainer.objective.model.named_parameters())
    for name in files.keys():
        state.copy_into(parameters[name], files.get(name))
    state.load_optimizer(trainer, directory)


def _trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """What learns, whole, on the first process; every process must ask for it."""
    found = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: distributed.whole_on_first(parameter) for name, parameter in found.items()}


def _write_adapter(model: nn.Module, whole: dict[str, torch.Tensor], tokenizer, method, base: Path, directory: Path):
    tokenizer.save(directory)
    with _holding(model, whole):
        adapter.save(model, method, directory, str(base))


@contextlib.contextmanager
def _holding(model: nn.Module, whole: dict[str, torch.Tensor]) -> Iterator[None]:
    """The model with these tensors in the place of its parameters, of which a process may hold a part only."""
    parameters = dict(model.named_parameters())
    shown = {id(parameters[name]): nn.Parameter(tensor) for name, tensor in whole.items()}
    places = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
        if id(parameter) in shown
    ]
    for module, name, parameter in places:
        module._parameters[name] = shown[id(parameter)]
    try:
        yield
    finally:
        for module, name, parameter in places:
            module._parameters[name] = parameter


def _write_checkpoint(config: ModelConfig, whole: dict[str, torch.Tensor], tokenizer, base: Path, directory: Path):
    tokenizer.save(directory)
    stored = checkpoint.open_tensors(base)
    write_config(config, stored.dtype(next(iter(stored))), directory)
    tensors = hf_tensors(config, whole)
    dtypes = {name: stored.dtype(name) if name in stored else tensor.dtype for name, tensor in tensors.items()}
    checkpoint.save_tensors(directory, {name: tensor.to(dtypes[name]) for name, tensor in tensors.items()})
    if (base / "generation_config.json").exists():
        shutil.copyfile(base / "generation_config.json", directory / "generation_config.json")
