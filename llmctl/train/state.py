"""A training state as files: weights in the Hugging Face layout, optimizer state by parameter name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from llmctl import checkpoint
from llmctl.models import families, weights
from llmctl.models.loading import hf_tensors, stored_tensors, write_config
from llmctl.train import distributed

if TYPE_CHECKING:
    from llmctl.tokenizer import Tokenizer
    from llmctl.train.loop import Trainer

_SHARDED = "optimizer-sharded"


def write(trainer: Trainer, tokenizer: Tokenizer, directory: Path | None) -> None:
    """Write everything of `trainer` into `directory`; with several processes all must call, rank 0 with the directory.

    Raises UserError or OSError, on all ranks, where there is no room.
    """
    model = trainer.objective.model
    directory = distributed.from_first(directory)
    write_optimizer(trainer, directory)
    tensors = {name: distributed.whole_on_first(tensor) for name, tensor in stored_tensors(model).items()}
    distributed.on_first(write_model, model.config, tensors, tokenizer, directory)


def write_optimizer(trainer: Trainer, directory: Path) -> None:
    """The optimizers' state alone, where there is room for the parameters too; each process writes its part."""
    optimizer = optimizer_tensors(trainer)
    n_bytes = sum(tensor.nbytes for tensor in [*trainer.objective.model.parameters(), *optimizer.values()])
    distributed.on_first(checkpoint.check_free_space, directory, n_bytes)
    if distributed.world_size() > 1:
        _save_sharded(optimizer, directory / _SHARDED)
    else:
        checkpoint.save_tensors(directory, optimizer, stem="optimizer")


def write_model(config, tensors: dict[str, torch.Tensor], tokenizer: Tokenizer, directory: Path) -> None:
    """A complete checkpoint of these weights."""
    write_config(config, tensors["embed_tokens.weight"].dtype, directory)
    tokenizer.save(directory)
    defaults = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    defaults["decoder_start_token_id"] = config.decoder_start_id
    text = json.dumps({key: value for key, value in defaults.items() if value is not None}, indent=2)
    checkpoint.write_atomic(directory / "generation_config.json", f"{text}\n".encode())
    checkpoint.save_tensors(directory, hf_tensors(config, tensors))


def load(trainer: Trainer, directory: Path) -> None:
    """Put the state of `write` back, on any number of processes."""
    load_weights(trainer.objective.model, directory)
    load_optimizer(trainer, directory)


def load_optimizer(trainer: Trainer, directory: Path) -> None:
    stored = optimizer_tensors(trainer, empty=True)
    if (directory / _SHARDED).exists():
        _load_sharded(stored, directory / _SHARDED)
    else:
        files = checkpoint.open_tensors(directory, stem="optimizer")
        for name, tensor in stored.items():
            copy_into(tensor, files.get(name))


def load_weights(model, directory: str | Path) -> None:
    """Copy a checkpoint's weights into an existing model, sharded or not."""
    files = checkpoint.open_tensors(directory)
    tensors, buffers = stored_tensors(model), dict(model.named_buffers())
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    family = families.find(model.config.family)
    for name, tensor in weights.load_tensors(family, shapes, files.keys(), files.get, optional=buffers):
        copy_into(tensors[name], tensor)


def optimizer_tensors(trainer: Trainer, empty: bool = False) -> dict[str, torch.Tensor]:
    """Every tensor of the optimizers' state as `parameter.key`; `empty` creates the state that a first step would."""
    names = {id(parameter): name for name, parameter in trainer.objective.model.named_parameters()}
    tensors = {}
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if empty:
                    optimizer.state[parameter] = _first_state(optimizer, parameter)
                for key, value in optimizer.state[parameter].items():
                    tensors[f"{names[id(parameter)]}.{key}"] = value
    return tensors


def _first_state(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    if isinstance(optimizer, torch.optim.AdamW):
        moments = {key: torch.zeros_like(parameter, requires_grad=False) for key in ("exp_avg", "exp_avg_sq")}
        return {"step": torch.zeros((), dtype=torch.float32, device=parameter.device), **moments}
    return {"momentum": torch.zeros_like(parameter, requires_grad=False)}


@torch.no_grad()
def copy_into(target: torch.Tensor, value: torch.Tensor) -> None:
    """Fill a parameter or state tensor, of which this process may hold a shard, from the whole value."""
    if hasattr(target, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        value = value.to(target.device).contiguous()
        value = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(value)


def _save_sharded(tensors: dict[str, torch.Tensor], directory: Path) -> None:
    """Each rank writes its own part, in torch.distributed.checkpoint's safetensors layout: no pickle, any world size."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    writer = dcp.HuggingFaceStorageWriter(str(directory), save_distributed=True)
    try:
        dcp.save(tensors, storage_writer=writer)
    except CheckpointException as error:  # raised on every rank when any has failed
        cause, _ = next(iter(error.failures.values()))
        distributed.raise_once(cause)


def _load_sharded(tensors: dict[str, torch.Tensor], directory: Path) -> None:
    import torch.distributed.checkpoint as dcp

    dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(directory)))
