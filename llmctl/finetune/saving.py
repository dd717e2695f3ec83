"""What a fine-tuning run leaves: an adapter or a whole checkpoint for others, and its own weights for itself to go on."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import torch

from llmctl import checkpoint
from llmctl.finetune import adapter, methods
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
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    own = {name: distributed.whole_on_first(each) for name, each in stored_tensors(model).items() if name in trained}
    distributed.on_first(checkpoint.save_tensors, directory, own, stem=STEM)
    with getattr(trainer.objective, "as_saved", contextlib.nullcontext)():
        whole = {name: distributed.whole_on_first(tensor) for name, tensor in stored_tensors(model).items()}
        distributed.on_first(_write, model, whole, tokenizer, method, base, directory)


def load(trainer: Trainer, directory: Path) -> None:
    """Put the state of `write` back, on any number of processes."""
    files = checkpoint.open_tensors(directory, stem=STEM)
    parameters = dict(trainer.objective.model.named_parameters())
    for name in files.keys():
        state.copy_into(parameters[name], files.get(name))
    state.load_optimizer(trainer, directory)


def _write(model, whole: dict[str, torch.Tensor], tokenizer, method, base: Path, directory: Path) -> None:
    tokenizer.save(directory)
    if method is not None:
        adapter.save(model, method, directory, str(base))
        return
    stored = checkpoint.open_tensors(base)
    write_config(model.config, stored.dtype(next(iter(stored))), directory)
    tensors = hf_tensors(model.config, whole)
    dtypes = {name: stored.dtype(name) if name in stored else tensor.dtype for name, tensor in tensors.items()}
    checkpoint.save_tensors(directory, {name: tensor.to(dtypes[name]) for name, tensor in tensors.items()})
    if (base / "generation_config.json").exists():
        shutil.copyfile(base / "generation_config.json", directory / "generation_config.json")
