"""What every layout asks of the tensors of one packed module."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch

from llmctl.checkpoint import TensorFiles
from llmctl.errors import UserError


def modules_with(files: TensorFiles, mark: str, endings: Collection[str]) -> dict[str, list[str]]:
    """By module, the endings that it has of these; a module is what has a tensor ending in `mark`."""
    found = {name.removesuffix(f".{mark}"): [] for name in files if name.endswith(f".{mark}")}
    for name in files:
        for ending in endings:
            if name.endswith(f".{ending}") and (module := name.removesuffix(f".{ending}")) in found:
                found[module].append(ending)
    return found


def tensor(
    files: TensorFiles,
    module: str,
    ending: str,
    shape: Sequence[int | None] | None = None,
    dtypes: Collection[torch.dtype] = (),
) -> torch.Tensor:
    """One tensor of a module, of this shape (None: any size) and one of these dtypes. Raises UserError for another."""
    name = f"{module}.{ending}"
    if name not in files:
        raise UserError(f"{files.path}: the quantized {module} has no {ending}", hint="the checkpoint is incomplete")
    found = files.get(name)
    fits = shape is None or (
        len(found.shape) == len(shape) and all(want in (None, size) for want, size in zip(shape, found.shape))
    )
    if not fits:
        wanted = [size if size is not None else "any" for size in shape]
        raise UserError(f"{files.path}: {name} has shape {list(found.shape)}; the layout says {wanted}")
    if dtypes and found.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        seen = str(found.dtype).removeprefix("torch.")
        raise UserError(f"{files.path}: {name} has dtype {seen}; the layout says {names}")
    return found


def matrix_shape(files: TensorFiles, module: str, ending: str) -> tuple[int, int]:
    """Of one tensor of a module. Raises UserError where it is no matrix."""
    shape = files.shape(f"{module}.{ending}")
    if len(shape) != 2:
        raise UserError(f"{files.path}: {module}.{ending} has shape {list(shape)}; the layout says a matrix")
    return shape


def number(files: TensorFiles, said: Mapping, key: str) -> int | None:
    """A whole number of `quantization_config`; None where it has none. Raises UserError for anything else."""
    value = said.get(key)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise UserError(f"{files.path}: quantization_config says {key} {value!r}; expected a whole number")
    return value


def is_finite(files: TensorFiles, name: str, values: torch.Tensor) -> torch.Tensor:
    """The values. Raises UserError where one is NaN or infinite."""
    if not torch.isfinite(values.float()).all():
        raise UserError(f"{files.path}: {name} has values that are no numbers", hint="the checkpoint is damaged")
    return values
