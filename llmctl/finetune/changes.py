"""What an adapter does to the base's own tensors: the adapter's file turned into changes of single matrices."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from llmctl import checkpoint
from llmctl.errors import UserError
from llmctl.finetune import adapter, methods
from llmctl.finetune.lora import pattern_value
from llmctl.finetune.lora_files import refuse_incomplete
from llmctl.models import families, weights


class AdapterChanges:
    """The changes of one PEFT directory, by the base's tensor names, in float32, one tensor at a time."""

    def __init__(self, directory: str | Path, family: str, base_names: Iterable[str]):
        """`base_names` are the base's tensors, which may lack the wrapper that the adapter's names have."""
        self.path = Path(directory)
        self.method = methods.from_peft(adapter.read_config(directory))
        if not isinstance(self.method, (methods.Lora, methods.Ia3)):
            name = type(self.method).__name__
            raise UserError(
                f"{directory}: a {name} adapter adds to the model and cannot become part of its matrices",
                hint="use it with --adapter",
            )
        stored = checkpoint.open_tensors(directory, stem=adapter.STEM)
        spelled = _as_in_base(family, base_names)
        self._tensors = {spelled(name.removeprefix(adapter.PREFIX)): stored.get(name) for name in stored.keys()}
        self._transposed = _transposed_names(family)
        self.whole = {name for name in self._tensors if not adapter.is_adapters(name) and ".base_layer." not in name}
        names = (name for name in self._tensors if adapter.is_adapters(name))
        self.modules = {_parted(name)[0] for name in names}
        if isinstance(self.method, methods.Lora):
            try:
                refuse_incomplete(self._tensors, self.method)
            except UserError as error:
                raise UserError(f"{directory}: {error.message}", error.hint) from error

    def touches(self, name: str) -> bool:
        return name in self.whole or name.rpartition(".")[0] in self.modules

    @property
    def can_be_undone(self) -> bool:
        return not self.whole and not (isinstance(self.method, methods.Lora) and self.method.dora)

    @property
    def is_plain_sum(self) -> bool:
        """Whether base(x) + weight * adapter(x) says all of it, for any weight."""
        return isinstance(self.method, methods.Lora) and self.can_be_undone

    def tensor(self, name: str) -> torch.Tensor:
        """One that the adapter brings whole."""
        return self._tensors[name]

    def of(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """What is to be added to the base's `tensor` (float32, in the file's own orientation)."""
        module, _, kind = name.rpartition(".")
        if name in self.whole:
            return self._tensors[name].float() - tensor
        if f"{module}.ia3_l" in self._tensors:
            return self._scaled(module, kind, tensor) - tensor
        if kind != "weight":
            return torch.zeros_like(tensor)
        if f"{module}.lora_embedding_A" in self._tensors:
            product = self._product(module, "lora_embedding_A", "lora_embedding_B").mT
        else:
            product = self._product(module, "lora_A.weight", "lora_B.weight")
        magnitude = self._tensors.get(f"{module}.lora_magnitude_vector")
        is_transposed = self._is_transposed(module)
        if magnitude is None:
            return self._fitted(name, product.mT if is_transposed else product, tensor)
        rows = tensor.mT if is_transposed else tensor
        moved = rows + self._fitted(name, product, rows)
        stretched = moved * (magnitude.float() / moved.norm(dim=1))[:, None]
        return (stretched.mT if is_transposed else stretched) - tensor

    def undone(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The base's tensor of a merged one (both float32)."""
        module, _, kind = name.rpartition(".")
        if f"{module}.ia3_l" not in self._tensors:
            return tensor - self.of(name, tensor)
        factors = self._factors(module, kind, tensor)
        if (factors == 0).any():
            raise UserError(f"{self.path}: multiplies rows of {name} by zero, which cannot be undone")
        return tensor / factors

    def _scaled(self, module: str, kind: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor * self._factors(module, kind, tensor)

    def _factors(self, module: str, kind: str, tensor: torch.Tensor) -> torch.Tensor:
        factors = self._tensors[f"{module}.ia3_l"].float()
        scales_input = factors.shape[0] == 1
        if kind == "bias":
            return torch.ones_like(tensor) if scales_input else factors.flatten()
        return factors.mT if self._is_transposed(module) else factors

    def _product(self, module: str, a: str, b: str) -> torch.Tensor:
        A, B = (self._tensors[f"{module}.{part}"].float() for part in (a, b))
        rank = pattern_value(self.method.rank_pattern, (module,), self.method.rank)
        if rank != len(A):
            raise UserError(f"{self.path}: its {module} has rank {len(A)}; adapter_config.json says {rank}")
        alpha = pattern_value(self.method.alpha_pattern, (module,), self.method.alpha)
        return self.method.scaling(rank, alpha) * (B @ A)

    def _is_transposed(self, module: str) -> bool:
        return any(pattern in module for pattern in self._transposed)

    def _fitted(self, name: str, change: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        if change.shape != tensor.shape:
            raise UserError(
                f"{self.path}: its change of {name} is for {list(change.shape)}; the base has {list(tensor.shape)}",
                hint="the adapter was trained on another base",
            )
        return change


def _parted(name: str) -> tuple[str, str]:
    """The module of a tensor of the adapter's own, and the rest of its name."""
    found = re.search(r"\.(lora_|ia3_l)", name)
    return (name[: found.start()], name[found.start() :]) if found else (name, "")


def _as_in_base(family: str, base_names: Iterable[str]) -> Callable[[str], str]:
    """From a name in the adapter's file to one with the base's own name of the tensor or module, where it has that."""
    bare = weights.unwrapping(families.find(family))
    known = {bare(name): name for name in base_names}
    known |= {short.rpartition(".")[0]: name.rpartition(".")[0] for short, name in known.items()}

    def spelled(name: str) -> str:
        front, rest = _parted(name)
        return known.get(bare(front), front) + rest

    return spelled


def _transposed_names(family: str) -> set[str]:
    """Ends of the module names whose matrices the family's files keep as [in, out]."""
    rows = families.find(family).WEIGHTS
    names = {row.theirs.rpartition("{}")[2].removesuffix(".weight") for row in rows if row.change == "split_columns"}
    return {name for name in names if not name.endswith(".bias")}


def refuse_strangers(changes: AdapterChanges, names: Iterable[str]) -> None:
    """Raise UserError for a module of the adapter that the base does not have."""
    modules = {name.rpartition(".")[0] for name in names}
    for module in sorted(changes.modules):
        if module not in modules:
            raise UserError(
                f"{changes.path}: changes {module}, which the base does not have",
                hint="the adapter was trained on another base",
            )
