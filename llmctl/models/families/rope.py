"""The two spellings of RoPE settings in a config.json, and what a file may leave out of them."""

from __future__ import annotations

import math

from llmctl.errors import UserError
from llmctl.models.config import Rope

_KINDS = ("linear", "dynamic", "yarn", "longrope", "llama3")
_GROWS_WITH_FACTOR = ("linear", "dynamic")
"""Kinds whose `max_position_embeddings` is the length of training, which `factor` multiplies (as vllm reads it too)."""


def rope_from_hf(hf: dict, head_dim: int) -> Rope:
    """Reads `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (before)."""
    settings = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    return rope_of({"rope_theta": hf.get("rope_theta") or 10000.0, **settings}, hf, head_dim)


def rope_of(settings: dict, hf: dict, head_dim: int) -> Rope:
    """The same of one dictionary that has its `rope_theta`; models of several ropes have several.

    Raises UserError for a kind of scaling that llmctl does not have.
    """
    settings = {"rope_type": settings.get("type", "default"), **settings}
    settings.pop("type", None)
    theta = settings.pop("rope_theta")
    share = settings.pop("partial_rotary_factor", None) or hf.get("partial_rotary_factor") or 1.0
    dims = int(share * head_dim) if share != 1.0 else None
    kind = settings["rope_type"]
    if kind == "default":
        return Rope(theta, dims=dims)
    if kind not in _KINDS:
        raise UserError(f"rope_type {kind!r} is not supported", f"supported: default, {', '.join(_KINDS)}")
    longest = hf.get("max_position_embeddings")
    original = hf.get("original_max_position_embeddings") or settings.get("original_max_position_embeddings") or longest
    settings["original_max_position_embeddings"] = longest if kind in _GROWS_WITH_FACTOR else original
    if kind in ("yarn", "longrope") and settings.get("factor") is None:
        settings["factor"] = longest / original
    return Rope(theta, settings, dims)


def rope_to_hf(rope: Rope, head_dim: int) -> dict:
    """The older spelling, which every release of transformers and vllm reads."""
    scaling = dict(rope.scaling or {})
    if scaling.get("rope_type") in _GROWS_WITH_FACTOR:
        del scaling["original_max_position_embeddings"]
    share = {} if rope.dims is None else {"partial_rotary_factor": _share(rope.dims, head_dim)}
    return {"rope_theta": rope.theta, "rope_scaling": scaling or None, **share}


def context_from_hf(hf: dict, rope: Rope | None) -> int:
    """Positions that the model was made to read: those of training, stretched where the rope is."""
    longest, scaling = hf["max_position_embeddings"], (rope and rope.scaling) or {}
    if scaling.get("rope_type") in (*_GROWS_WITH_FACTOR, "yarn"):
        return max(longest, round(scaling["original_max_position_embeddings"] * scaling["factor"]))
    return longest


def context_to_hf(context: int, rope: Rope | None) -> int:
    """The inverse of `context_from_hf`, for `max_position_embeddings`.

    With YaRN that is the stretched length: some releases of transformers 4 take its ratio to the original for the factor.
    """
    scaling = (rope and rope.scaling) or {}
    if scaling.get("rope_type") in _GROWS_WITH_FACTOR:
        return scaling["original_max_position_embeddings"]
    return context


def _share(dims: int, head_dim: int) -> float:
    """What gives `dims` again when a reader multiplies it by `head_dim` and cuts the fraction off."""
    share = dims / head_dim
    return share if int(share * head_dim) == dims else math.nextafter(share, 1.0)
