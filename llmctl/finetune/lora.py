"""LoRA in a model: each chosen Linear or Embedding is wrapped by one that adds a product of two small matrices."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from llmctl.errors import CalledWrongly, UserError
from llmctl.finetune.methods import Lora
from llmctl.finetune.sites import Site, choose, device_for, find_sites, replace
from llmctl.ops.linear import linear


class LoraLinear(nn.Module):
    """base(x) + scaling B A dropout(x); with DoRA the sum's rows are brought to learned lengths.

    A [rank, in] and B [out, rank] are float32 whatever the base has, and are used in the dtype of x.
    """

    def __init__(self, base: nn.Module, rank: int, scaling: float, dropout: float, dora: bool):
        super().__init__()
        self.base, self.scaling, self.dropout = base, scaling, dropout
        n_in, n_out, device = base.in_features, base.out_features, device_for(base)
        self.lora_A = nn.Parameter(torch.empty(rank, n_in, device=device))
        self.lora_B = nn.Parameter(torch.zeros(n_out, rank, device=device))
        self.magnitude = nn.Parameter(torch.empty(n_out, device=device)) if dora else None
        self.taken: tuple[torch.Tensor, torch.Tensor] | None = None
        """A and B of what the base has less than its file (PiSSA)."""

    in_features = property(lambda self: self.base.in_features)
    out_features = property(lambda self: self.base.out_features)
    bias = property(lambda self: self.base.bias)

    @property
    def weight(self) -> torch.Tensor:
        """The matrix that the whole computes with, for those who multiply by it themselves (a head)."""
        merged = self.base.weight + (self.scaling * self.lora_B @ self.lora_A).to(self.base.weight.dtype)
        return merged if self.magnitude is None else merged * self._stretch()[:, None].to(merged.dtype)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        dropped_BTD = F.dropout(x_BTD, self.dropout) if self.training and self.dropout else x_BTD
        low_BTR = linear(dropped_BTD, self.lora_A.to(x_BTD.dtype))
        added_BTF = linear(low_BTR, (self.scaling * self.lora_B).to(x_BTD.dtype))
        if self.magnitude is None:
            return self.base(x_BTD) + added_BTF
        bias = 0.0 if self.base.bias is None else self.base.bias
        return (self.base(x_BTD) - bias + added_BTF) * self._stretch().to(x_BTD.dtype) + bias

    def against_file(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A [rank, in] and B [out, rank] of the change from the matrix in the base's file: twice the rank after PiSSA."""
        if self.taken is None:
            return self.lora_A, self.lora_B
        taken_A, taken_B = (tensor.to(self.lora_A.device) for tensor in self.taken)
        return torch.cat([self.lora_A, taken_A]), torch.cat([self.lora_B, -taken_B], 1)

    def _stretch(self) -> torch.Tensor:
        """Learned length over the present one of each row, [out]; the present one takes no gradient (the paper's 4.3)."""
        return self.magnitude / self.row_lengths()

    @torch.no_grad()
    def row_lengths(self) -> torch.Tensor:
        """Lengths of the rows of W + scaling B A, float32 [out], without forming it: |w|^2 + 2 s w.(bA) + s^2 |bA|^2."""
        weight = self.base.weight.float()
        scaled_B, A = self.scaling * self.lora_B.float(), self.lora_A.float()
        squares = weight.square().sum(1) + 2 * (scaled_B * (weight @ A.mT)).sum(1)
        return (squares + ((scaled_B @ (A @ A.mT)) * scaled_B).sum(1)).clamp(min=0).sqrt()


class LoraEmbedding(nn.Module):
    """base(ids) + scaling B A[:, ids]; A [rank, V], B [D, rank]. A head tied to it keeps the base's matrix, as in PEFT."""

    def __init__(self, base: nn.Embedding, rank: int, scaling: float):
        super().__init__()
        self.base, self.scaling = base, scaling
        device = device_for(base)
        self.lora_A = nn.Parameter(torch.zeros(rank, base.num_embeddings, device=device))
        self.lora_B = nn.Parameter(torch.empty(base.embedding_dim, rank, device=device))

    weight = property(lambda self: self.base.weight)

    def against_file(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.lora_A, self.lora_B

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        x_BTD = self.base(ids_BT)
        low_BTR = F.embedding(ids_BT, self.lora_A.mT)
        return x_BTD + linear(low_BTR, self.scaling * self.lora_B).to(x_BTD.dtype)


def attach(model: nn.Module, lora: Lora, seed: int = 0) -> list[Site]:
    """Wrap the modules that `lora` names, with fresh weights that change nothing yet; returns their sites.

    Modules that share one matrix of the Hugging Face file (GPT-2's c_attn) share their A when all of them are wrapped.
    Raises UserError for a rank above a matrix's, CalledWrongly for a target that matches no module.
    """
    sites = choose(find_sites(model), lora.targets)
    _refuse_idle_ranks(lora, sites)
    generator = torch.Generator().manual_seed(seed)
    wrapped: dict[str, nn.Module] = {}
    for site in sites:
        rank, scaling = rank_and_scaling(lora, site)
        if rank > min(site.rows, site.columns):
            raise UserError(
                f"rank {rank} is above what {site.theirs}, {[site.rows, site.columns]}, can have",
                f"at most {min(site.rows, site.columns)}",
            )
        wrapped[site.ours] = wrap(model, site, rank, scaling, lora)
        _initialize(wrapped[site.ours], lora, generator)
    if lora.init == "default":
        _share_inputs(sites, wrapped)
    return sites


def _refuse_idle_ranks(lora: Lora, sites: Sequence[Site]) -> None:
    for key in lora.rank_pattern:
        if not any(_names(key, site.names) for site in sites):
            leaves = sorted({site.ours.rpartition(".")[2] for site in sites})
            raise CalledWrongly(f"--ranks: {key!r} is no module that gets an adapter", f"these are {', '.join(leaves)}")


def wrap(model: nn.Module, site: Site, rank: int, scaling: float, lora: Lora) -> nn.Module:
    """Wrap one module; its A and B have yet to be filled."""

    def wrapper(base: nn.Module) -> nn.Module:
        if isinstance(base, nn.Embedding):
            return LoraEmbedding(base, rank, scaling)
        return LoraLinear(base, rank, scaling, lora.dropout, lora.dora)

    return replace(model, site.ours, wrapper)


def rank_and_scaling(lora: Lora, site: Site) -> tuple[int, float]:
    rank = int(pattern_value(lora.rank_pattern, site.names, lora.rank))
    return rank, lora.scaling(rank, pattern_value(lora.alpha_pattern, site.names, lora.alpha))


@torch.no_grad()
def _initialize(module: nn.Module, lora: Lora, generator: torch.Generator) -> None:
    if isinstance(module, LoraEmbedding):
        module.lora_B.normal_(generator=generator)
        return
    if lora.init == "pissa":
        _start_at_principal_components(module)
    else:
        bound = 1 / math.sqrt(module.in_features)
        module.lora_A.uniform_(-bound, bound, generator=generator)
    if module.magnitude is not None:
        module.magnitude.copy_(module.row_lengths())


def _start_at_principal_components(module: LoraLinear) -> None:
    """PiSSA: the adapter takes the base's largest singular directions, the base keeps the rest."""
    weight, rank = module.base.weight, module.lora_A.shape[0]
    u, s, vh = torch.linalg.svd(weight.float(), full_matrices=False)
    root = (s[:rank] / module.scaling).sqrt()
    module.lora_A.copy_(root[:, None] * vh[:rank])
    module.lora_B.copy_(u[:, :rank] * root)
    module.taken = module.lora_A.clone(), module.lora_B.clone()
    module.base.weight = nn.Parameter(
        (weight.float() - module.scaling * module.lora_B @ module.lora_A).to(weight.dtype), requires_grad=False
    )


def _share_inputs(sites: Iterable[Site], wrapped: Mapping[str, nn.Module]) -> None:
    for site in sites:
        modules = [wrapped.get(part) for part in site.parts]
        if site.part == 0 and len(modules) > 1 and all(modules) and len({len(m.lora_A) for m in modules}) == 1:
            for module in modules[1:]:
                module.lora_A = modules[0].lora_A


def pattern_value(pattern: Mapping[str, float], names: Iterable[str], default: float) -> float:
    """PEFT's rule: a pattern's key fits the end of a module's name, as a regular expression."""
    for key, value in pattern.items():
        if _names(key, names):
            return value
    return default


def _names(key: str, names: Iterable[str]) -> bool:
    return any(re.fullmatch(rf"(.*\.)?({key})", name) for name in names)
