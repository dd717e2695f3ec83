"""AWQ (arXiv:2306.00978): input channels that matter are scaled up before rounding, and what feeds them is scaled down.

The scale of a channel is (root mean square of its activations)^a; for each place `a` is the one of a grid whose rounding
changes the outputs least, by the activations' second moments. Rounding is to the nearest then.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from llmctl.models import families, norm, weights
from llmctl.models.attention import Attention
from llmctl.models.ffn import GatedMlp, Mlp, Moe
from llmctl.models.linear import Linear
from llmctl.quantize import rounding, storage
from llmctl.quantize.hessian import Hessians
from llmctl.quantize.layerwise import Layer, Layerwise
from llmctl.quantize.layouts import compressed_tensors
from llmctl.quantize.method import Method
from llmctl.quantize.spool import Spool

EXPONENTS = tuple(i / 20 for i in range(20))
ROWS_TRIED = 512
"""Rows of a matrix, evenly spread, by which exponents are compared."""


@dataclass(frozen=True)
class _Place:
    """Linears (by path) that read one thing, and what makes it: a norm, or a Linear of which `heads` tells the grouping."""

    source: str
    readers: tuple[str, ...]
    plain_readers: tuple[str, ...] = ()
    heads: tuple[int, int, int] | None = None


class Awq(Method):
    """The method over a whole checkpoint, layer by layer."""

    def __init__(self, *job):
        super().__init__(*job)
        self._changed: dict[str, torch.Tensor] = {}
        self._importance: dict[str, torch.Tensor] = {}

    def run(self, ids_BT: torch.Tensor, spool: Spool, progress) -> dict[str, torch.Tensor]:
        """Spool every matrix; norms and what else had to be scaled down, by their names in the file."""
        layerwise = Layerwise(self._path, ids_BT, torch.float32)
        for number, name in enumerate(layerwise.run(self._visit)):
            progress("awq, layer", number + 1, layerwise.n_layers)
            self._round(f"{name}.", layerwise, spool)
        self._round("", layerwise, spool)
        return self._in_the_file(layerwise)

    def _visit(self, layer: Layer) -> None:
        groups = [group for stage in layer.stages() for group in stage]
        hessians = Hessians.of(layer, [group[0] for group in groups])
        moments = {name: hessians[group[0]] for group in groups for name in group if group[0] in hessians}
        for place in places(layer.name, layer.module):
            readers = [name for name in place.readers if name in self._scheme_of and name in moments]
            if readers and len(readers) == len(place.readers):
                of_readers = {id(moments[name]): moments[name] for name in readers}  # most read one and the same
                scales_K = self._search(layer, place, sum(of_readers.values()) / len(of_readers))
                self._scale(layer, place, scales_K)
                scaled = {key: one / scales_K / scales_K[:, None] for key, one in of_readers.items()}
                moments |= {name: scaled[id(moments[name])] for name in readers}
        for name, linear in layer.linears().items():
            if name in self._scheme_of:
                self._changed[f"{name}.weight"] = linear.weight.detach().clone()
                if name in moments:
                    self._importance[name] = moments[name].diagonal().clone()

    def _search(self, layer: Layer, place: _Place, moments_KK: torch.Tensor) -> torch.Tensor:
        """The channels' scales [K] of the best exponent."""
        linears = layer.linears()
        rows = [linears[name].weight.detach() for name in place.readers]
        rows = [weight[:: max(1, len(weight) * len(rows) // ROWS_TRIED)] for weight in rows]
        size_K = _shared(moments_KK.diagonal().sqrt().clamp(min=1e-6), place)
        best, least = torch.ones_like(size_K), torch.inf
        for exponent in EXPONENTS:
            scales_K = size_K**exponent
            scales_K = scales_K / (scales_K.max() * scales_K.min()).sqrt()
            error = 0.0
            for name, weight_NK in zip(place.readers, rows):
                scheme = self._scheme_of[name]
                scaled = rounding.affine(weight_NK * scales_K, scheme, self._dtype, searches=False)
                change_NK = scaled.dequantized(torch.float32) / scales_K - weight_NK
                error += float(((change_NK @ moments_KK) * change_NK).sum())
            if error < least:
                best, least = scales_K, error
        return best

    def _scale(self, layer: Layer, place: _Place, scales_K: torch.Tensor) -> None:
        """Readers times the scales, what they read over them: together they compute what they did."""
        linears, inside = layer.linears(), layer.name
        source = layer.module.get_submodule(place.source.removeprefix(f"{inside}."))
        for name in (*place.readers, *place.plain_readers):
            linears[name].weight.data.mul_(scales_K)
            if name not in self._scheme_of:
                self._changed[f"{name}.weight"] = linears[name].weight.detach().clone()
        if place.heads is not None:  # one head of keys and values serves several of queries
            n_kv, repeats, head_dim = place.heads
            scales_K = scales_K.view(n_kv, repeats, head_dim)[:, 0].flatten()
        offset = getattr(source, "offset", 0.0)
        if isinstance(source, Linear):
            source.weight.data.div_(scales_K[:, None])
        else:
            source.weight.data = (source.weight.data + offset) / scales_K - offset
        if getattr(source, "bias", None) is not None:
            source.bias.data.div_(scales_K)
            self._changed[f"{place.source}.bias"] = source.bias.detach().clone()
        self._changed[f"{place.source}.weight"] = source.weight.detach().clone()

    def _round(self, prefix: str, layerwise: Layerwise, spool: Spool) -> None:
        """Matrices whose parts have been through, or with prefix "" those outside the layers."""
        for matrix in self._matrices:
            is_inside = any("layers." in ours for ours in matrix.ours)
            if not (matrix.ours[0].startswith(prefix) if prefix else not is_inside):
                continue
            scheme, parts = self._schemes[matrix.theirs], []
            for ours in matrix.ours:
                weight = self._changed.pop(f"{ours}.weight", None)
                weight = layerwise.streamed.read(f"{ours}.weight") if weight is None else weight
                importance_K = self._importance.pop(ours, None)
                parts.append(rounding.affine(weight.float(), scheme, self._dtype, importance_K))
            spool.add(matrix.theirs, compressed_tensors.stored(storage.joined(parts)))

    def _in_the_file(self, layerwise: Layerwise) -> dict[str, torch.Tensor]:
        model = layerwise.streamed.model
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        found = {}
        for name, source in weights.sources(
            families.find(model.config.family), shapes, layerwise.streamed.names()
        ).items():
            if name in self._changed and source.theirs not in found:
                _, ours, change = _row_of(model.config.family, shapes, name)
                parts = [self._changed.get(part) for part in ours]
                parts = [layerwise.streamed.read(o) if part is None else part for o, part in zip(ours, parts)]
                found[source.theirs] = weights.to_theirs(change, parts)
        return found


def _row_of(family: str, shapes, name: str) -> tuple[str, list[str], str]:
    return next(row for row in weights.matches(families.find(family).WEIGHTS, shapes) if name in row[1])


def _shared(size_K: torch.Tensor, place: _Place) -> torch.Tensor:
    """The mean over the heads that share their values, for each of them."""
    if place.heads is None:
        return size_K
    n_kv, repeats, head_dim = place.heads
    return size_K.view(n_kv, repeats, head_dim).mean(1, keepdim=True).expand(-1, repeats, -1).reshape(-1)


def places(prefix: str, block: nn.Module) -> Iterator[_Place]:
    """Where scales can move between what is multiplied and what makes it, in the order of the forward pass."""
    mixer, ffn = block.mixer, block.ffn
    if type(mixer) is Attention:
        if _scales(block.mixer_norm):
            names = ("q_proj", "k_proj", "v_proj")
            yield _Place(f"{prefix}.mixer_norm", tuple(f"{prefix}.mixer.{name}" for name in names))
        spec = mixer.spec
        heads = (spec.n_kv_heads, spec.n_heads // spec.n_kv_heads, spec.head_dim)
        yield _Place(f"{prefix}.mixer.v_proj", (f"{prefix}.mixer.o_proj",), heads=heads)
    inside = f"{prefix}.ffn"
    if isinstance(ffn, (GatedMlp, Mlp)) and _scales(block.ffn_norm):
        names = ("gate_proj", "up_proj") if isinstance(ffn, GatedMlp) else ("up_proj",)
        yield _Place(f"{prefix}.ffn_norm", tuple(f"{inside}.{name}" for name in names))
    if isinstance(ffn, Moe) and _scales(block.ffn_norm):
        names = tuple(
            f"{inside}.experts.{e}.{name}" for e in range(len(ffn.experts)) for name in ("gate_proj", "up_proj")
        )
        yield _Place(f"{prefix}.ffn_norm", names, plain_readers=(f"{inside}.router",))
    if isinstance(ffn, GatedMlp):
        yield _Place(f"{inside}.up_proj", (f"{inside}.down_proj",))


def _scales(layer: nn.Module) -> bool:
    """Whether a norm multiplies by weights of its own, into which other factors can go."""
    return isinstance(layer, (norm.RMSNorm, norm.OffsetRMSNorm, norm.CastingRMSNorm, nn.LayerNorm))
