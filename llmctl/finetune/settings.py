"""What `llmctl finetune` can be told beside its data and the settings of every run. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmctl.data.masking_settings import MaskingSettings
from llmctl.finetune.data.settings import DataSettings
from llmctl.train.settings import OPTIMIZER, REGULARIZATION, RunSettings, flag

METHOD, LABELS, PREFERENCE, EARLIER = "Method", "Labels", "Preferences", "Earlier task and teacher"
SOFT = ("prompt", "prefix")
"""Methods of virtual tokens in front of each text."""


@dataclass(frozen=True)
class MethodSettings:
    method: Literal["full", "freeze", "feature", "lora", "qlora", "adapter", "ia3", "prompt", "prefix"] = flag(
        "lora",
        "What is trained: every weight; some of them (freeze, with --train-layers and --train-modules); the head alone, on "
        "what the rest makes of each row once and for all (feature); low-rank matrices "
        "beside them, over a base in few bits with qlora; bottleneck adapters; (IA)3's factors; or virtual tokens in front "
        "of every text, by their embeddings (prompt) or their keys and values (prefix).",
        METHOD,
    )
    lora_rank: int = flag(16, "Rank of the added matrices.", METHOD, flags=["--lora-r"], at_least=1)
    lora_alpha: float | None = flag(
        None, "They count alpha / rank times; by default twice the rank.", METHOD, above=0, show_default="2 x rank"
    )
    lora_dropout: float = flag(0.0, "Of what enters them.", METHOD, at_least=0, at_most=0.99)
    targets: tuple[str, ...] = flag(
        (),
        "Modules to adapt, by the end of their name, a regular expression, or attention, ffn, all-linear; may be repeated.",
        METHOD,
        show_default="attention (lora); k_proj, v_proj and down_proj's input (ia3)",
    )
    ranks: tuple[str, ...] = flag(
        (), "Another rank for some modules: q_proj=32; may be repeated.", METHOD, metavar="NAME=R"
    )
    rslora: bool = flag(False, "Scale by alpha / sqrt(rank), which lets large ranks learn.", METHOD)
    dora: bool = flag(False, "Learn the lengths of the rows apart from their directions.", METHOD)
    lora_init: Literal["default", "pissa"] = flag(
        "default", "pissa starts at the largest singular directions of each matrix.", METHOD
    )
    modules_to_save: tuple[str, ...] = flag((), "Modules to train whole beside the adapter; may be repeated.", METHOD)
    quantize_base: Literal["nf4", "int8"] = flag(
        "nf4",
        "For qlora: 4 bits of normal float, or 8-bit integers, for the frozen matrices inside the blocks.",
        METHOD,
    )
    double_quantization: bool = flag(True, "For nf4: its scales in 8 bits, too.", METHOD)
    adapter_width: int = flag(64, "Width of bottleneck adapters.", METHOD, at_least=1)
    adapter_places: tuple[Literal["attention", "ffn"], ...] = flag(
        ("attention", "ffn"), "Which branches of a block get one; may be repeated.", METHOD
    )
    adapter_parallel: bool = flag(False, "Beside attention and ffn instead of behind them.", METHOD)
    virtual_tokens: int = flag(20, "How many of them, for prompt and prefix.", METHOD, at_least=1)
    train_layers: str | None = flag(
        None, "For freeze: layers to train, as a slice: -4: (the last four), 0:2.", METHOD, metavar="FROM:TO"
    )
    train_modules: str | None = flag(
        None,
        "For freeze: parameters to train, a regular expression: 'lm_head|norm', '.*bias'.",
        METHOD,
        metavar="REGEX",
    )


@dataclass(frozen=True)
class LabelSettings:
    pooling: Literal["first", "last", "mean"] | None = flag(
        None,
        "What a fresh head for labels, measures or rewards reads of a text: its first token, its last, or the mean of all.",
        LABELS,
        show_default="as transformers does: first in encoders, last in decoders",
    )


@dataclass(frozen=True)
class PreferenceSettings:
    beta: float | None = flag(
        None,
        "How strongly a preference counts against staying near the reference.",
        PREFERENCE,
        above=0,
        show_default="0.1; 2 for simpo",
    )
    simpo_gamma: float = flag(1.0, "The margin that simpo asks for.", PREFERENCE, at_least=0)
    kto_desirable: float = flag(1.0, "Weight of good answers in kto.", PREFERENCE, at_least=0)
    kto_undesirable: float = flag(1.0, "Weight of bad answers in kto.", PREFERENCE, at_least=0)


@dataclass(frozen=True)
class EarlierSettings:
    retain: str | None = flag(
        None,
        "Text or a token stream of an earlier task: scored before and after, to show what is forgotten.",
        EARLIER,
        type="path",
        metavar="CORPUS",
    )
    replay: str | None = flag(
        None,
        "Mix this share of rows of an earlier task's text or token stream in, so that less is forgotten.",
        EARLIER,
        metavar="CORPUS:SHARE",
    )
    teacher: str | None = flag(
        None, "A checkpoint of the same vocabulary, whose probabilities are learned too.", EARLIER, type="path"
    )
    teacher_weight: float = flag(1.0, "Of the teacher beside the data.", EARLIER, above=0)
    teacher_temperature: float = flag(1.0, "At which both models' probabilities are compared.", EARLIER, above=0)


@dataclass(frozen=True)
class FinetuneSettings(
    RunSettings, MaskingSettings, EarlierSettings, PreferenceSettings, LabelSettings, MethodSettings, DataSettings
):
    optimizer: Literal["adamw", "muon"] = flag("adamw", "muon is for the matrices, with AdamW for the rest.", OPTIMIZER)
    schedule: Literal["cosine", "linear", "wsd"] = flag(
        "cosine",
        "How the rate falls after the warm-up; wsd holds it, then falls over the last --decay part.",
        OPTIMIZER,
    )
    learning_rate: float | None = flag(
        None,
        "Peak rate; by default what suits the method and the model's width (2e-5 full, 2e-4 lora at width 2048; a tenth of "
        "it where answers are compared).",
        OPTIMIZER,
        flags=["--lr"],
        above=0,
    )
    neftune: float | None = flag(
        None, "Noise on embeddings, of this size before it is divided by sqrt(tokens x width).", REGULARIZATION, above=0
    )
    weight_decay: float = flag(0.0, "Of the matrices inside the blocks.", OPTIMIZER, at_least=0)
