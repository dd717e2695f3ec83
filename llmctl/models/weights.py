"""Reads a family's table of weight names both ways, so that load and save cannot disagree."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from llmctl.errors import UserError
from llmctl.models.config import ModelConfig
from llmctl.models.families.common import Row

_HEAD = ("lm_head.", "head_transform.", "head_bias")
"""How the names begin of parameters of ours that a base model does not have."""
_HEADS = (*_HEAD, "logits_bias", "carried.spare_head_bias", "classifier.")
"""And of those of any head: a file may hold another head than the model has."""


def to_ours(change: str, tensor: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
    """Undo `to_theirs`; `sizes` are the lengths of our parts along their first dimension."""
    if change == "rename":
        return [tensor]
    if change == "as_row":
        return [tensor.squeeze(0)]
    if change == "split_rows":
        return list(tensor.split(list(sizes), dim=0))
    assert change == "split_columns", change
    return [part.mT if part.dim() == 2 else part for part in tensor.split(list(sizes), dim=-1)]


def to_theirs(change: str, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    if change == "rename":
        return parts[0]
    if change == "as_row":
        return parts[0].unsqueeze(0)
    if change == "split_rows":
        return torch.cat(list(parts))
    assert change == "split_columns", change
    return torch.cat([part.mT if part.dim() == 2 else part for part in parts], dim=-1).contiguous()


def matches(table: Iterable[Row], shapes: Mapping[str, torch.Size]) -> Iterator[tuple[str, list[str], str]]:
    """(their name, our names, change) for every row and number that the model has parameters for."""
    for entry in table:
        pattern = re.compile(re.escape(entry.ours[0]).replace(r"\{\}", r"(\d+)"))
        for name in shapes:
            if found := pattern.fullmatch(name):
                ours = [_numbered(other, found.groups()) for other in entry.ours]
                if all(other in shapes for other in ours) and _applies(entry, found.groups(), shapes):
                    yield _numbered(entry.theirs, found.groups()), ours, entry.change


def lacks_head(family, config: ModelConfig, available: Iterable[str]) -> bool:
    """Whether a model of this config needs tensors for its head, and the file has none of them."""
    head = config.head
    if not config.predicts_tokens or (config.tie_embeddings and not head.transform and head.bias is not True):
        return False
    bare = unwrapping(family)
    names = {bare(name) for name in available}
    return not any(bare(entry.theirs) in names for entry in family.WEIGHTS if entry.ours[0].startswith(_HEAD))


def load_tensors(
    family,
    shapes: Mapping[str, torch.Size],
    available: Iterable[str],
    get: Callable[[str], torch.Tensor],
    optional: Container[str] = (),
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (our name, tensor) for every parameter in `shapes`, one file tensor at a time.

    `available` are the names in the file; a missing wrapper such as `transformer.` is tolerated. Names that match a pattern of
    the family's IGNORABLE (buffers of old checkpoints), or a second copy of a tied head, may be left over; those of ours
    in `optional` may lack. Raises UserError naming what is missing, left over or of another shape.
    """
    bare = unwrapping(family)
    names = {bare(name): name for name in available}
    wanted = list(matches(family.WEIGHTS, shapes))
    wanted = [entry for entry in wanted if bare(entry[0]) in names or entry[1][0] not in optional]
    missing = [theirs for theirs, _, _ in wanted if bare(theirs) not in names]
    used = {bare(theirs) for theirs, _, _ in wanted}
    ignorable = (*family.IGNORABLE, *_other_heads(family, shapes))
    extra = [
        name for short, name in names.items() if short not in used and not any(re.search(p, name) for p in ignorable)
    ]
    for complaint, some in (("lacks", missing), ("has the unknown", extra)):
        if some:
            shown = ", ".join(some[:3]) + (f" and {len(some) - 3} more" if len(some) > 3 else "")
            raise UserError(f"the weights do not fit config.json: the checkpoint {complaint} {shown}")
    for theirs, ours, change in wanted:
        sizes = [shapes[name][0] for name in ours]
        tensor = get(names[bare(theirs)])
        expected = to_theirs(change, [torch.empty(shapes[name], device="meta") for name in ours]).shape
        if tensor.shape != expected:
            raise UserError(f"{theirs} has shape {list(tensor.shape)}; config.json says {list(expected)}")
        yield from zip(ours, to_ours(change, tensor, sizes))


def _other_heads(family, shapes: Container[str]) -> list[str]:
    """Patterns of the file's names for heads that the model does not have."""
    rows = [entry for entry in family.WEIGHTS if entry.ours[0].startswith(_HEADS) and entry.ours[0] not in shapes]
    return [f"^{re.escape(entry.theirs)}$" for entry in rows]


def _applies(entry: Row, numbers: Sequence[str], shapes: Container[str]) -> bool:
    """Whether what must stand beside the row's parameters does, and what must not does not."""
    has_companions = all(_numbered(name, numbers) in shapes for name in entry.beside)
    return has_companions and not any(_numbered(name, numbers) in shapes for name in entry.without)


@dataclass(frozen=True)
class Source:
    """Where one parameter of ours lies: the `part`-th of those that a tensor of the file holds."""

    theirs: str
    change: str
    part: int
    sizes: tuple[int, ...]

    def cut(self, tensor: torch.Tensor) -> torch.Tensor:
        return to_ours(self.change, tensor, self.sizes)[self.part]

    def cut_packed(self, packed):
        """The same of a matrix in few bits, which lies upright whatever the family."""
        if len(self.sizes) == 1:
            return packed
        first = sum(self.sizes[: self.part])
        return packed.part(first, first + self.sizes[self.part])


def sources(family, shapes: Mapping[str, torch.Size], available: Iterable[str]) -> dict[str, Source]:
    """The source of every parameter in `shapes` that the file has, for those who read weights one at a time."""
    bare = unwrapping(family)
    names = {bare(name): name for name in available}
    found = {}
    for theirs, ours, change in matches(family.WEIGHTS, shapes):
        if bare(theirs) in names:
            sizes = tuple(shapes[name][0] for name in ours)
            for part, name in enumerate(ours):
                found[name] = Source(names[bare(theirs)], change, part, sizes)
    return found


def _numbered(name: str, numbers: Sequence[str]) -> str:
    return name.format(*numbers)


def unwrapping(family) -> Callable[[str], str]:
    """From a name in a file to that of the tensor: in the spelling of the table, and without the wrapper in which base
    models are not saved (`transformer.h.0…` and `h.0…` are one tensor).

    The wrapper is what stands in front of the module that holds the token embedding.
    """
    embedding = next(entry.theirs for entry in family.WEIGHTS if entry.ours[0] == "embed_tokens.weight")
    wrapper = f"{embedding.split('.')[0]}." if embedding.count(".") > 1 else ""
    spellings = [(re.compile(pattern), usual) for pattern, usual in getattr(family, "SPELLINGS", ())]

    def bare(name: str) -> str:
        for pattern, usual in spellings:
            name = pattern.sub(usual, name)
        return name.removeprefix(wrapper)

    return bare
