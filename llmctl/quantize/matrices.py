"""Which matrices of a checkpoint are quantized, and how."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from llmctl.errors import CalledWrongly, UserError
from llmctl.models import families, weights
from llmctl.models.linear import Linear
from llmctl.quantize.scheme import FORMATS, Scheme
from llmctl.quantize.settings import QuantizeSettings

_ALWAYS_PLAIN = re.compile(r"(^|\.)(router|dt_proj|classifier|head_transform)(\.|$)")
"""Few weights that much depends on: who is asked, how fast a state decays, and heads that are trained whole."""
_USUAL_GROUPS = (64, 32)


@dataclass(frozen=True)
class Matrix:
    """A matrix [out, in] of the file: the module `theirs`, and the Linears of ours whose rows it has one after another."""

    theirs: str
    ours: tuple[str, ...]
    rows: tuple[int, ...]
    n_in: int
    transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        return sum(self.rows), self.n_in

    @property
    def size(self) -> int:
        return sum(self.rows) * self.n_in

    def upright(self, tensor: torch.Tensor) -> torch.Tensor:
        """The file's tensor as [out, in], float32."""
        return (tensor.mT if self.transposed else tensor).float()


def find(model: nn.Module, stored_names: Iterable[str]) -> list[Matrix]:
    """Every matrix inside the layers, and the head where it is one of its own, in the model's order."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    found: dict[str, list] = {}
    for name, source in weights.sources(families.find(model.config.family), shapes, stored_names).items():
        path = name.removesuffix(".weight")
        if path != name and isinstance(model.get_submodule(path), Linear) and not _ALWAYS_PLAIN.search(path):
            found.setdefault(source.theirs, []).append((source, path))
    matrices = []
    for theirs, pairs in found.items():
        pairs.sort(key=lambda pair: pair[0].part)
        source, paths = pairs[0][0], tuple(path for _, path in pairs)
        n_in = model.get_submodule(paths[0]).in_features
        is_transposed = source.change == "split_columns"
        matrices.append(Matrix(theirs.removesuffix(".weight"), paths, source.sizes, n_in, is_transposed))
    return matrices


def schemes(matrices: Iterable[Matrix], settings: QuantizeSettings, dtype: torch.dtype) -> dict[str, Scheme]:
    """By module, what it becomes; modules that are kept are left out. `dtype` is the checkpoint's.

    Raises CalledWrongly for names that fit nothing, bits that there are none of, and a group size that does not divide.
    """
    matrices = list(matrices)
    base = _base(settings)
    base = base if base.kind == "llm-int8" else dataclasses.replace(base, scale_bits=dtype.itemsize * 8)
    kept = {name for word in filter(None, settings.keep.split(",")) for name in _named(matrices, word, "--keep", True)}
    chosen = {matrix.theirs: base for matrix in matrices if matrix.theirs not in kept}
    for module, bits in _overrides(matrices, settings).items():
        if bits == 16:
            chosen.pop(module, None)
        else:
            chosen[module] = of_bits(base, bits)
    if not chosen:
        raise UserError(
            "there is no matrix to quantize: all are kept, or the model has none in its layers",
            hint="llmctl inspect MODEL --tensors lists what it has",
        )
    by_name = {matrix.theirs: matrix for matrix in matrices}
    return {module: _grouped(by_name[module], scheme, settings) for module, scheme in chosen.items()}


def of_bits(scheme: Scheme, bits: int) -> Scheme:
    """The same in 4 or 8 bits."""
    return dataclasses.replace(scheme, bits=bits)


def mean_bits(matrices: Iterable[Matrix], chosen: Mapping[str, Scheme]) -> float:
    """Stored bits, scales included, over weights of the matrices that are quantized."""
    some = [matrix for matrix in matrices if matrix.theirs in chosen]
    total = sum(matrix.size * chosen[matrix.theirs].bits_per_weight(matrix.n_in) for matrix in some)
    return total / sum(matrix.size for matrix in some)


def unquantized(model: nn.Module, stored_names: Iterable[str], chosen: Iterable[str]) -> list[str]:
    """Linear modules, by their Hugging Face names, that stay plain: what readers of the config must be told to leave."""
    rows = families.find(model.config.family).WEIGHTS
    heads = [
        row.theirs.removesuffix(".weight") for row in rows if row.ours[0] in ("lm_head.weight", "classifier.out.weight")
    ]
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    linear = []
    for name, source in weights.sources(families.find(model.config.family), shapes, stored_names).items():
        owner = model.get_submodule(name.rpartition(".")[0])
        if name.endswith(".weight") and isinstance(owner, nn.Linear):
            linear.append(source.theirs.removesuffix(".weight"))
    done = set(chosen)
    return [name for name in dict.fromkeys([*heads, *linear]) if name not in done]


def _base(settings: QuantizeSettings) -> Scheme:
    base = FORMATS[settings.format]
    if base.kind != "int":
        return dataclasses.replace(base, double=settings.double_quantization)
    size = base.group_size if settings.group_size is None else settings.group_size or None
    symmetric = base.symmetric if settings.symmetric is None else settings.symmetric
    return dataclasses.replace(base, group_size=size, symmetric=symmetric)


def _grouped(matrix: Matrix, scheme: Scheme, settings: QuantizeSettings) -> Scheme:
    """With a group size that divides the rows: the one asked for, else the largest usual one."""
    if scheme.kind != "int" or scheme.group_size is None or matrix.n_in % scheme.group_size == 0:
        return scheme
    if settings.group_size is not None:
        raise CalledWrongly(
            f"--group-size {scheme.group_size} does not divide the {matrix.n_in} inputs of {matrix.theirs}",
            hint="0 gives each row one scale; --bits NAME=16 keeps a module as it is",
        )
    size = next((size for size in _USUAL_GROUPS if matrix.n_in % size == 0), None)
    return dataclasses.replace(scheme, group_size=size)


def _overrides(matrices: list[Matrix], settings: QuantizeSettings) -> dict[str, int]:
    found = {}
    for word in settings.bits:
        name, _, bits = word.rpartition("=")
        if not name or bits not in ("4", "8", "16"):
            raise CalledWrongly(f"--bits {word!r}: expected a module and 4, 8 or 16, as in down_proj=8")
        if FORMATS[settings.format].kind != "int" and bits != "16":
            raise CalledWrongly(f"--bits {word!r}: {settings.format} has one width; 16 keeps a module as it is")
        found |= dict.fromkeys(_named(matrices, name, "--bits"), int(bits))
    return found


def _named(matrices: list[Matrix], word: str, flag: str, may_be_none: bool = False) -> list[str]:
    """The modules of a name, an end of a name, or a regular expression for the whole of one, theirs or ours."""
    try:
        pattern = re.compile(word)
    except re.error as error:
        raise CalledWrongly(f"{flag} {word!r}: neither a name nor a regular expression: {error}") from error
    found = [
        matrix.theirs
        for matrix in matrices
        for name in (matrix.theirs, *matrix.ours)
        if name == word or name.endswith(f".{word}") or pattern.fullmatch(name)
    ]
    if not found and not (may_be_none and re.fullmatch(r"lm_head|embed_tokens|wte|shared|word_embeddings", word)):
        leaves = sorted({matrix.theirs.rpartition(".")[2] for matrix in matrices})
        raise CalledWrongly(f"{flag}: {word!r} fits no matrix of the model", hint=f"there are {', '.join(leaves)}")
    return found
