"""How fast each pair of a head's elements turns: RoPE's frequencies and the rules that stretch them over longer texts.

The settings in `Rope.scaling` have the Hugging Face names; families/common.py has filled in those that a file may omit.
"""

from __future__ import annotations

import math

import torch

from llmctl.models.config import ModelConfig, Rope


def heeds_length(rope: Rope) -> bool:
    """Whether a token's angle depends on the length of its text, besides on its position."""
    return rope.scaling is not None and rope.scaling["rope_type"] in ("dynamic", "longrope")


def switch_length(config: ModelConfig) -> int | None:
    """The length beyond which a text's positions turn by other factors than within it (LongRoPE), if there is one."""
    ropes = (getattr(block.mixer, "rope", None) for block in config.blocks)
    found = (rope.scaling for rope in ropes if rope and rope.scaling and rope.scaling["rope_type"] == "longrope")
    return next((scaling["original_max_position_embeddings"] for scaling in found), None)


def frequencies(rope: Rope, dims: int, lengths: torch.Tensor | None = None) -> torch.Tensor:
    """Radians per position, float32 [dims / 2]: theta^(-2i/dims), rescaled as the rope's `scaling` says.

    Where the rule heeds it, `lengths` [...] of the texts so far give [..., dims / 2].
    """
    if rope.scaling is None:
        return _plain(rope.theta, dims)
    rule = _RULES[rope.scaling["rope_type"]]
    return rule(rope, dims, lengths) if heeds_length(rope) else rule(rope, dims)


def magnitude(rope: Rope) -> float:
    """What cos and sin are multiplied by: longer texts need sharper attention (arXiv:2309.00071, 3.4)."""
    scaling = rope.scaling or {}
    if scaling.get("attention_factor") is not None:
        return scaling["attention_factor"]
    if scaling.get("rope_type") == "longrope":
        factor, original = scaling["factor"], scaling["original_max_position_embeddings"]
        return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    if scaling.get("rope_type") == "yarn":
        over_all, over_one = scaling.get("mscale_all_dim"), scaling.get("mscale")
        if over_all and over_one:
            return _yarn_magnitude(scaling["factor"], over_one) / _yarn_magnitude(scaling["factor"], over_all)
        return _yarn_magnitude(scaling["factor"], 1.0)
    return 1.0


def _plain(theta: float, dims: int) -> torch.Tensor:
    return 1.0 / theta ** _exponents(dims)


def _exponents(dims: int) -> torch.Tensor:
    return torch.arange(0, dims, 2, dtype=torch.int64).float() / dims


def _linear(rope: Rope, dims: int) -> torch.Tensor:
    return _plain(rope.theta, dims) / rope.scaling["factor"]


def _llama3(rope: Rope, dims: int) -> torch.Tensor:
    """Llama 3.1's rule: long wavelengths are slowed by `factor`, short ones kept, those between interpolated."""
    scaling, plain = rope.scaling, _plain(rope.theta, dims)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * plain / (2 * math.pi)
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - share) * plain / scaling["factor"] + share * plain


def _yarn(rope: Rope, dims: int) -> torch.Tensor:
    """YaRN (arXiv:2309.00071): pairs that turn often within the trained length are kept, slow ones are interpolated."""
    scaling, plain = rope.scaling, _plain(rope.theta, dims)
    fast, slow = scaling.get("beta_fast") or 32, scaling.get("beta_slow") or 1
    low, high = (_pair_that_turns(times, rope, dims) for times in (fast, slow))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    high += 0.001 if low == high else 0.0
    slowed = ((torch.arange(dims // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return slowed * plain / scaling["factor"] + (1 - slowed) * plain


def _pair_that_turns(times: float, rope: Rope, dims: int) -> float:
    """The (fractional) number of the pair that turns so many times within the length of training."""
    wavelength = rope.scaling["original_max_position_embeddings"] / times
    return dims * math.log(wavelength / (2 * math.pi)) / (2 * math.log(rope.theta))


def _yarn_magnitude(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _dynamic(rope: Rope, dims: int, lengths: torch.Tensor) -> torch.Tensor:
    """NTK-aware scaling that grows with the text beyond the length of training (arXiv:2309.00071, 3.3).

    In a cache a key keeps the angle of the length at which its token came, as in transformers: a text written token by token
    has other angles than the same text read at once.
    """
    factor, original = rope.scaling["factor"], rope.scaling["original_max_position_embeddings"]
    stretch = factor * lengths.clamp(min=original) / original - (factor - 1)
    theta = rope.theta * stretch ** (dims / (dims - 2))
    return 1.0 / theta[..., None] ** _exponents(dims).to(lengths.device)


def _longrope(rope: Rope, dims: int, lengths: torch.Tensor) -> torch.Tensor:
    """LongRoPE (arXiv:2402.13753): searched factors, one set for texts within the length of training, one beyond it."""
    plain, scaling = _plain(rope.theta, dims), rope.scaling
    short, long = (plain / torch.tensor(scaling[name]) for name in ("short_factor", "long_factor"))
    is_long = lengths > scaling["original_max_position_embeddings"]
    return torch.where(is_long[..., None], long.to(lengths.device), short.to(lengths.device))


_RULES = {"linear": _linear, "dynamic": _dynamic, "yarn": _yarn, "longrope": _longrope, "llama3": _llama3}
