"""Several processes, started by torchrun: sharding with FSDP2, and the few collectives that the loop needs.

Every function is right with one process too, where no process group exists.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from llmctl.data.packing import IGNORE, Batch


def is_launched() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def start(device: torch.device) -> torch.device:
    """Join the process group that torchrun's environment describes, if any; returns this rank's device."""
    if not is_launched():
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def shard(objective: nn.Module, device: torch.device) -> None:
    """Cut all parameters over the ranks in place (FSDP2): each block gathers its own around its forward and backward."""
    if world_size() == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world_size(),))
    for block in objective.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(objective, mesh=mesh)


def sync_gradients(objective: nn.Module, is_last: bool) -> None:
    """Exchange gradients only after the last micro batch of a step."""
    if world_size() > 1:
        objective.set_requires_gradient_sync(is_last)


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def any_rank(flag: bool) -> bool:
    """Whether it is true on any rank: all must stop together."""
    return bool(sum_over_ranks(torch.tensor(int(flag)))) if dist.is_initialized() else flag


def from_first(value):
    """Rank 0's value, on all ranks."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A parameter's full value on the CPU; every rank must ask for it."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).cpu()


def pad_to_ranks(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches, then empty ones until every rank has had as many: a sharded forward needs all ranks."""
    count, last = 0, None
    for last in batches:
        count += 1
        yield last
    for _ in range(-count % world_size()):
        yield Batch(last.inputs, np.full_like(last.targets, IGNORE), last.documents)
