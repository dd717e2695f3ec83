"""Several processes, started by torchrun: sharding with FSDP2, and the few collectives that the loop needs.

Every function is right with one process too, where no process group exists.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from llmctl.errors import UserError

if TYPE_CHECKING:
    from llmctl.train.feed import Batch

T = TypeVar("T")


def is_launched() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[torch.device]:
    """Join the group that torchrun's environment describes, if any; yields this rank's device.

    It is left in any case, so that no rank waits for one that failed.
    """
    if not is_launched():
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    except BaseException as error:
        _forget_frames(error)
        if isinstance(error, RuntimeError) and ("gloo" in str(error) or "Connection closed by peer" in str(error)):
            raise UserError("lost the connection to another process of this run, which has failed") from error
        raise
    finally:
        dist.destroy_process_group()
        # Sharded modules are cycles that hold the group. Its threads must end before the interpreter does: one that
        # frees a tensor later than that aborts the process.
        gc.collect()


def _forget_frames(error: BaseException | None) -> None:
    """The frames of a traceback hold modules, and these the process group."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def shard(objective: nn.Module, device: torch.device) -> None:
    """Cut all parameters over the ranks in place (FSDP2): each block gathers its own around its forward and backward.

    The values are rank 0's; the others may bring a model on the meta device, and never hold more of one than their share
    and a tensor.
    """
    if world_size() == 1:
        objective.to(device)
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    values = {**dict(objective.named_parameters()), **dict(objective.named_buffers())} if rank() == 0 else {}
    places = _places_of_shared(objective)
    objective.to("meta")
    _share(places)
    mesh = init_device_mesh(device.type, (world_size(),))
    for stack in objective.model.stacks():
        for block in stack.layers:
            fully_shard(block, mesh=mesh)
    fully_shard(objective, mesh=mesh)
    objective.to_empty(device=device)
    _share(places)
    _fill(objective, values)


def _places_of_shared(module: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    """(module, name) of every place of each parameter that stands in several: a change of device makes each its own."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for each in module.modules():
        for name, parameter in each.named_parameters(recurse=False):
            places.setdefault(id(parameter), []).append((each, name))
    return [found for found in places.values() if len(found) > 1]


def _share(places: list[list[tuple[nn.Module, str]]]) -> None:
    for (first, name), *others in places:
        for module, other in others:
            setattr(module, other, getattr(first, name))


@torch.no_grad()
def _fill(objective: nn.Module, values: dict[str, torch.Tensor]) -> None:
    """Give every rank its part of what rank 0 has, one tensor after another."""
    from torch.distributed.tensor import distribute_tensor

    for name, parameter in objective.named_parameters():
        whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
        if rank() == 0:
            whole.copy_(values.pop(name))
        parameter.copy_(distribute_tensor(whole, parameter.device_mesh, parameter.placements))
    for name, buffer in objective.named_buffers():
        if rank() == 0:
            buffer.copy_(values.pop(name))
        dist.broadcast(buffer, src=0)


def sync_gradients(objective: nn.Module, is_last: bool) -> None:
    """Exchange gradients only after the last micro batch of a step."""
    if world_size() > 1:
        objective.set_requires_gradient_sync(is_last)


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def gathered(values: list[T]) -> list[T]:
    """The lists of all ranks, joined."""
    if not dist.is_initialized():
        return values
    parts: list[list[T]] = [[] for _ in range(world_size())]
    dist.all_gather_object(parts, values)
    return [value for part in parts for value in part]


def any_rank(flag: bool) -> bool:
    """Whether it is true on any rank: all must stop together."""
    return bool(sum_over_ranks(torch.tensor(int(flag)))) if dist.is_initialized() else flag


def from_first(value: T) -> T:
    """Rank 0's value, on all ranks."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_first(function: Callable[..., T], *arguments, **keywords) -> T:
    """What the function returns on rank 0, which alone calls it, on all ranks; where it raises, all ranks end."""
    value, error = None, None
    if rank() == 0:
        try:
            value = function(*arguments, **keywords)
        except Exception as caught:  # noqa: BLE001 - it is raised again below, after the others know
            error = caught
    value, has_failed = from_first((value, error is not None))
    if has_failed:
        raise_once(error)
    return value


@contextlib.contextmanager
def entered_on_first(context: contextlib.AbstractContextManager[T]) -> Iterator[T]:
    """A context that only rank 0 enters and leaves; where either fails, all ranks end."""
    value = on_first(context.__enter__)
    try:
        yield value
    except BaseException:
        if rank() == 0:
            context.__exit__(*sys.exc_info())
        raise
    on_first(context.__exit__, None, None, None)


def raise_once(error: Exception | None) -> NoReturn:
    """End all ranks for a reason that all have met: rank 0 reports it, the others leave without a word."""
    if rank() == 0:
        raise error
    sys.exit(getattr(error, "exit_code", 1))


def whole_on_first(tensor: torch.Tensor) -> torch.Tensor | None:
    """A parameter's full value on rank 0's CPU, None elsewhere; every rank must ask for it."""
    tensor = tensor.detach()
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return tensor.cpu() if rank() == 0 else None


def pad_to_ranks(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches, then empty ones until every rank has had as many: a sharded forward needs all ranks."""
    count, last = 0, None
    for last in batches:
        count += 1
        yield last
    for _ in range(-count % world_size()):
        yield last.without_targets()
