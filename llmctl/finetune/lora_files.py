"""LoRA weights between our modules and PEFT's names, where one matrix of a file may be several modules of ours."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace as changed

import torch
from torch import nn

from llmctl.errors import UserError
from llmctl.finetune.lora import LoraEmbedding, LoraLinear, rank_and_scaling, wrap
from llmctl.finetune.methods import Lora
from llmctl.finetune.sites import adapted, by_their_name, find_sites, short_names

Tensors = dict[str, torch.Tensor]
_PARTNERS = {"A.weight": "B.weight", "B.weight": "A.weight", "embedding_A": "embedding_B", "embedding_B": "embedding_A"}


def to_peft(model: nn.Module, lora: Lora) -> tuple[Tensors, Lora]:
    """(tensors by Hugging Face module name, what adapter_config.json must say) of all wrapped modules.

    Where modules of ours are one matrix of the file, their products become one: a shared A stays, otherwise ranks add up,
    each with its own rows of B and zeros elsewhere. Raises UserError for what PEFT has no form for.
    """
    sites = find_sites(model)
    modules = dict([*adapted(model, LoraLinear), *adapted(model, LoraEmbedding)])
    tensors: Tensors = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for theirs, group in by_their_name(sites).items():
        parts = [modules.get(site.ours) for site in group]
        present = [part for part in parts if part is not None]
        if not present:
            continue
        A, B = _join(theirs, parts, [site.output_width for site in group])
        kind = "embedding" if isinstance(present[0], LoraEmbedding) else "linear"
        names = {"embedding": ("lora_embedding_A", "lora_embedding_B"), "linear": ("lora_A.weight", "lora_B.weight")}
        tensors |= {f"{theirs}.{name}": tensor.detach() for name, tensor in zip(names[kind], (A, B), strict=True)}
        if lora.dora and kind == "linear":
            tensors[f"{theirs}.lora_magnitude_vector"] = _joined_magnitudes(theirs, parts)
        ranks[theirs] = len(A)
        alphas[theirs] = present[0].scaling * (math.sqrt(len(A)) if lora.rslora else len(A))
    chosen = [site for site in sites if site.theirs in ranks]
    return tensors, _as_said(lora, ranks, alphas, short_names(chosen, sites))


def from_peft(model: nn.Module, lora: Lora, tensors: Mapping[str, torch.Tensor], weight: float = 1.0) -> None:
    """Wrap the modules that `tensors` (by Hugging Face module name) speak of, with their weights; they count `weight` times.

    Parts of a joined matrix get the components that reach their rows. Raises UserError for a tensor that fits no module.
    """
    refuse_incomplete(tensors, lora)
    groups = by_their_name(find_sites(model))
    for name, A in tensors.items():
        theirs, _, kind = name.partition(".lora_")
        if kind not in ("A.weight", "embedding_A"):
            continue
        if theirs not in groups:
            raise UserError(f"the adapter changes {theirs}, which this model does not have")
        group = groups[theirs]
        B = tensors[f"{theirs}.lora_{kind.replace('A', 'B')}"]
        magnitude = tensors.get(f"{theirs}.lora_magnitude_vector")
        rows, columns = [site.output_width for site in group], group[0].input_width
        if len(B) != sum(rows) or A.shape[1] != columns:
            raise UserError(
                f"the adapter's {theirs} is for a matrix of {[len(B), A.shape[1]]}; the model's is "
                f"{[sum(rows), columns]}",
                hint="it was trained on another base",
            )
        rank, scaling = rank_and_scaling(lora, group[0])
        if rank != len(A):
            raise UserError(f"its {theirs} has rank {len(A)}; adapter_config.json says {rank}")
        splits = [None] * len(rows) if magnitude is None else magnitude.split(rows)
        for site, part_B, part_magnitude in zip(group, B.split(rows), splits, strict=True):
            _fill(model, site, A, part_B, part_magnitude, weight * scaling, lora)


def refuse_incomplete(names: Collection[str], lora: Lora) -> None:
    """Raise UserError where a module (by its name in PEFT's file) lacks one of its tensors."""
    for name in names:
        theirs, _, kind = name.partition(".lora_")
        wanted = [_PARTNERS[kind]] if kind in _PARTNERS else []
        if lora.dora and kind == "A.weight":
            wanted.append("magnitude_vector")
        for other in wanted:
            if f"{theirs}.lora_{other}" not in names:
                raise UserError(f"the adapter has {name} and lacks {theirs}.lora_{other}", "copy or download it again")


@torch.no_grad()
def _fill(model, site, A, B, magnitude, scaling, lora) -> None:
    used = B.any(0)
    if magnitude is None and not used.any() and len(site.parts) > 1:
        return
    if used.any() and len(site.parts) > 1:
        A, B = A[used], B[:, used]
    module = wrap(model, site, len(A), scaling, lora)
    module.lora_A.copy_(A)
    module.lora_B.copy_(B)
    if magnitude is not None:
        module.magnitude.copy_(magnitude)


def _join(theirs: str, parts: Sequence, row_counts: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    present = [part for part in parts if part is not None]
    if len({part.scaling for part in present}) > 1:
        raise UserError(f"the parts of {theirs} have different scalings, which PEFT has no form for")
    if len(present) == len(parts) and all(part.lora_A is present[0].lora_A for part in present):
        pairs = [part.against_file() for part in present]
        return pairs[0][0], torch.cat([B for _, B in pairs])
    pairs = [None if part is None else part.against_file() for part in parts]
    A = torch.cat([pair[0] for pair in pairs if pair is not None])
    B = A.new_zeros(sum(row_counts), len(A))
    row = column = 0
    for pair, count in zip(pairs, row_counts, strict=True):
        if pair is not None:
            rank = len(pair[0])
            B[row : row + count, column : column + rank] = pair[1].detach()
            column += rank
        row += count
    return A, B


def _joined_magnitudes(theirs: str, parts: Sequence) -> torch.Tensor:
    if None in parts:
        raise UserError(f"DoRA on only a part of {theirs} has no form in PEFT", hint="target all of its parts")
    return torch.cat([part.magnitude.detach() for part in parts])


def _as_said(lora: Lora, ranks: dict[str, int], alphas: dict[str, float], targets: list[str]) -> Lora:
    """One rank and alpha for most modules, patterns for the others."""
    if not ranks:
        return changed(lora, targets=tuple(targets))
    rank = max(set(ranks.values()), key=list(ranks.values()).count)
    alpha = max(set(alphas.values()), key=list(alphas.values()).count)
    return changed(
        lora,
        rank=rank,
        alpha=alpha,
        targets=tuple(targets),
        rank_pattern={name: value for name, value in ranks.items() if value != rank},
        alpha_pattern={name: value for name, value in alphas.items() if value != alpha},
    )
