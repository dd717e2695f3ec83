"""Where adapters attach: every matrix of a model under our name and under its Hugging Face name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from llmctl.errors import CalledWrongly
from llmctl.models import families, weights
from llmctl.models.quantized_linear import matrix_shapes

KEYWORDS = {
    "attention": r"(.*\.)?(mixer|cross)\.\w+",
    "ffn": r"(.*\.)?ffn\..+",
    "all-linear": r"(.*\.)?layers\..+",
}


@dataclass(frozen=True)
class Site:
    """A Linear [rows = out, columns = in] or Embedding [V, D] of ours. `theirs` may hold several side by side (GPT-2's
    c_attn): this is its `part`-th of `parts`, and `transposed` says that the file keeps [in, out]."""

    ours: str
    theirs: str
    rows: int
    columns: int
    part: int = 0
    parts: tuple[str, ...] = ()
    transposed: bool = False
    is_embedding: bool = False

    @property
    def input_width(self) -> int:
        return self.rows if self.is_embedding else self.columns

    @property
    def output_width(self) -> int:
        return self.columns if self.is_embedding else self.rows

    @property
    def names(self) -> tuple[str, str]:
        return self.ours, self.theirs


def plain_name(name: str) -> str:
    """A parameter's or module's name in the model without adapters: these wrap a module as their `base`."""
    return re.sub(r"\.base(?=\.|$)", "", name)


def parameter_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """By plain name, those of a quantized base included."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    return {plain_name(name): shape for name, shape in {**shapes, **matrix_shapes(model)}.items()}


def find_sites(model: nn.Module) -> list[Site]:
    """Every matrix of the model that the family's weight table names, in the model's order."""
    shapes = parameter_shapes(model)
    found = {}
    for theirs, ours, change in weights.matches(families.find(model.config.family).WEIGHTS, shapes):
        if theirs.endswith(".weight") and len(shapes[ours[0]]) == 2:
            parts = tuple(name.removesuffix(".weight") for name in ours)
            for number, part in enumerate(parts):
                transposed = change == "split_columns"
                shape = shapes[f"{part}.weight"]
                found[part] = Site(
                    part, theirs.removesuffix(".weight"), *shape, number, parts, transposed, part.startswith("embed_")
                )
    return [found[name] for name in map(lambda n: n.removesuffix(".weight"), shapes) if name in found]


def by_their_name(sites: Iterable[Site]) -> dict[str, list[Site]]:
    """The modules of ours that each matrix of the file holds, in the order of its rows."""
    groups: dict[str, list[Site]] = {}
    for site in sites:
        groups.setdefault(site.theirs, []).append(site)
    return {theirs: sorted(group, key=lambda site: site.part) for theirs, group in groups.items()}


def choose(sites: Iterable[Site], targets: Iterable[str], where: str = "--targets") -> list[Site]:
    """The sites that any target names, in their order.

    A target is the end of a module's name (`q_proj`, `mlp.down_proj`), ours or Hugging Face's; a regular expression for the
    whole name; or attention, ffn, all-linear. Raises CalledWrongly, with the nearest names, for one that fits nothing.
    """
    sites = [site for site in sites if not site.ours.startswith("classifier.")]  # a classifier's head is trained whole
    chosen = set()
    for target in targets:
        fitting = [site for site in sites if _fits(site, target)]
        if not fitting:
            leaves = sorted({name.rpartition(".")[2] for site in sites for name in site.names} | set(KEYWORDS))
            near = difflib.get_close_matches(target, leaves, n=3) or leaves
            raise CalledWrongly(f"{where}: {target!r} matches no module of the model", f"there are {', '.join(near)}")
        chosen.update(site.ours for site in fitting)
    return [site for site in sites if site.ours in chosen]


def _fits(site: Site, target: str) -> bool:
    if target in KEYWORDS:
        return re.fullmatch(KEYWORDS[target], site.ours) is not None
    try:
        pattern = re.compile(target)
    except re.error as error:
        raise CalledWrongly(f"{target!r} is neither a module's name nor a regular expression: {error}") from error
    return any(name == target or name.endswith(f".{target}") or pattern.fullmatch(name) for name in site.names)


def short_names(chosen: Iterable[Site], all_sites: Iterable[Site]) -> list[str]:
    """The chosen modules as PEFT's `target_modules`: ends of names where these say exactly the same, else whole names."""
    names = {site.theirs for site in chosen}
    leaves = {name.rpartition(".")[2] for name in names}
    meant = {site.theirs for site in all_sites if site.theirs.rpartition(".")[2] in leaves}
    return sorted(leaves if meant == names else names)


def replace(model: nn.Module, path: str, wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Put `wrap(module)` in the place of the module at our plain name `path`, and return it."""
    name = _present_name(model, path)
    owner, _, leaf = name.rpartition(".")
    wrapped = wrap(model.get_submodule(name))
    setattr(model.get_submodule(owner), leaf, wrapped)
    return wrapped


def _present_name(model: nn.Module, path: str) -> str:
    """`path` with the `base` steps that wrappers put between."""
    module, steps = model, []
    for leaf in path.split("."):
        while not hasattr(module, leaf):
            module = module.base
            steps.append("base")
        module = getattr(module, leaf)
        steps.append(leaf)
    return ".".join(steps)


def adapted(model: nn.Module, kind: type) -> Iterator[tuple[str, nn.Module]]:
    """(our plain name, wrapper) of every wrapper of a kind."""
    for name, module in model.named_modules():
        if isinstance(module, kind):
            yield plain_name(name), module


def device_for(base: nn.Module) -> torch.device:
    """Where an adapter of `base` lives: beside its weight, or on the CPU while that is still in its file."""
    while hasattr(base, "base"):
        base = base.base
    device = base.weight.device
    return torch.device("cpu") if device.type == "meta" else device
