"""What a fine-tuning method adds to a model or trains of it, as plain values; each knows its PEFT form where PEFT has one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from llmctl.errors import UserError


@dataclass(frozen=True)
class Lora:
    """LoRA (arXiv:2106.09685): W x + scaling B A x, with rsLoRA's scaling (arXiv:2312.03732), DoRA's magnitudes
    (arXiv:2402.09353) or PiSSA's start (arXiv:2404.02948). The patterns give single modules another rank or alpha."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("attention",)
    rslora: bool = False
    dora: bool = False
    init: Literal["default", "pissa"] = "default"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()

    def scaling(self, rank: int, alpha: float) -> float:
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def to_peft(self) -> dict[str, Any]:
        return {
            "peft_type": "LORA",
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": list(self.targets),
            "use_rslora": self.rslora,
            "use_dora": self.dora,
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": dict(self.alpha_pattern),
            "modules_to_save": list(self.modules_to_save) or None,
            "bias": "none",
            "init_lora_weights": True,
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Lora:
        for key in ("alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora", "target_parameters"):
            if config.get(key):
                raise UserError(f"the adapter uses PEFT's {key}, which llmctl does not have")
        if config.get("bias", "none") != "none":
            raise UserError(f"the adapter trains biases (bias={config['bias']!r}), which llmctl does not load")
        return cls(
            rank=config["r"],
            alpha=config["lora_alpha"],
            dropout=config.get("lora_dropout", 0.0),
            targets=_targets(config),
            rslora=bool(config.get("use_rslora")),
            dora=bool(config.get("use_dora")),
            rank_pattern=config.get("rank_pattern") or {},
            alpha_pattern=config.get("alpha_pattern") or {},
            modules_to_save=tuple(config.get("modules_to_save") or ()),
        )


@dataclass(frozen=True)
class Ia3:
    """(IA)3 (arXiv:2205.05638): learned factors on keys, values and the inside of the feed-forward layer.

    Those of `inputs` multiply what enters a module, those of `targets` what leaves it.
    """

    targets: tuple[str, ...] = ("k_proj", "v_proj")
    inputs: tuple[str, ...] = ("down_proj",)

    def to_peft(self) -> dict[str, Any]:
        return {
            "peft_type": "IA3",
            "target_modules": [*self.targets, *self.inputs],
            "feedforward_modules": list(self.inputs),
            "modules_to_save": None,
            "init_ia3_weights": True,
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Ia3:
        inputs = _targets(config, "feedforward_modules")
        return cls(tuple(name for name in _targets(config) if name not in inputs), inputs)


_ONE_STACK = {"num_transformer_submodules": 1}


@dataclass(frozen=True)
class SoftPrompt:
    """Prompt tuning (arXiv:2104.08691): `length` trained embeddings in front of every text."""

    length: int = 20

    def to_peft(self) -> dict[str, Any]:
        return {
            "peft_type": "PROMPT_TUNING",
            "num_virtual_tokens": self.length,
            "prompt_tuning_init": "RANDOM",
            **_ONE_STACK,
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> SoftPrompt:
        return cls(_virtual_tokens(config))


@dataclass(frozen=True)
class Prefix:
    """Prefix tuning (arXiv:2101.00190) without its reparameterization: `length` trained keys and values in every layer."""

    length: int = 20

    def to_peft(self) -> dict[str, Any]:
        return {
            "peft_type": "PREFIX_TUNING",
            "num_virtual_tokens": self.length,
            "prefix_projection": False,
            **_ONE_STACK,
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Prefix:
        if config.get("prefix_projection"):
            raise UserError("the adapter is a prefix with a projection, which llmctl does not load")
        return cls(_virtual_tokens(config))


@dataclass(frozen=True)
class Bottleneck:
    """Bottleneck adapters (arXiv:1902.00751): x + up(activation(down(x))) on the output of attention, ffn or both;
    `parallel` (arXiv:2110.04366) feeds them the branch's input instead."""

    width: int = 64
    places: tuple[str, ...] = ("mixer", "ffn")
    parallel: bool = False
    scale: float = 1.0

    def to_peft(self) -> dict[str, Any]:
        # PEFT has no such method: a reader that is not llmctl refuses the type by name.
        return {
            "peft_type": "LLMCTL_BOTTLENECK",
            "width": self.width,
            "places": list(self.places),
            "parallel": self.parallel,
            "scale": self.scale,
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Bottleneck:
        return cls(config["width"], tuple(config["places"]), config["parallel"], config["scale"])


Method = Lora | Ia3 | SoftPrompt | Prefix | Bottleneck
KINDS = {kind().to_peft()["peft_type"]: kind for kind in (Lora, Ia3, SoftPrompt, Prefix, Bottleneck)}


def from_peft(config: Mapping[str, Any]) -> Method:
    """The method of an adapter_config.json. Raises UserError for one that llmctl does not have."""
    kind = KINDS.get(config.get("peft_type"))
    if kind is None:
        raise UserError(
            f"the adapter's peft_type is {config.get('peft_type')!r}", f"llmctl loads {', '.join(sorted(KINDS))}"
        )
    return kind.from_peft(config)


def _virtual_tokens(config: Mapping[str, Any]) -> int:
    if (config.get("num_transformer_submodules") or 1) != 1:
        raise UserError(
            "the adapter has virtual tokens in both stacks of an encoder-decoder, which llmctl does not load"
        )
    return config["num_virtual_tokens"]


def _targets(config: Mapping[str, Any], key: str = "target_modules") -> tuple[str, ...]:
    value = config.get(key) or ()
    return (value,) if isinstance(value, str) else tuple(value)
