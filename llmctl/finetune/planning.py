"""Everything that a flag of `llmctl finetune` left open, decided from the model, the data and the machine."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import torch
from torch import nn

from llmctl import lineage
from llmctl.errors import CalledWrongly, UserError
from llmctl.finetune import methods
from llmctl.finetune.data.prepare import default_seq_len
from llmctl.finetune.data.store import ExampleSet
from llmctl.finetune.heads import HEADED
from llmctl.finetune.objectives import RULES
from llmctl.finetune.settings import SOFT, FinetuneSettings
from llmctl.models import families
from llmctl.models.config import ModelConfig
from llmctl.models.loading import usual_classifier
from llmctl.models.quantized_linear import matrix_shapes
from llmctl.quantities import format_count, format_size
from llmctl.train import distributed, hardware, plan

EPOCHS = 3.0
STEPS_PER_EPOCH = 32
"""As many as the default batch leaves of a small set: fewer teach little, however good each is."""

RATES = {"full": 1.28e-3, "freeze": 1.28e-3, "feature": 3e-3, "lora": 3e-3, "qlora": 3e-3, "adapter": 1e-3}
"""Peak rates at width 128; they fall with the width, to 2e-5 (full) and 2e-4 (lora) at 2048."""
STEEP = ("full", "freeze")
"""Methods whose rates fall with the width to the power of 1.5, not 1: small models forgive, and need, much larger ones."""
FIXED_RATES = {"ia3": 3e-3, "prompt": 3e-2, "prefix": 3e-2}
"""Of factors around one, and of what stands among activations: the width does not matter."""
HEAD_RATE = 3e-3
"""At width 128, where nothing but a classifier's head learns."""
LABEL_SHARE = 0.25
"""Of the rate of `STEEP` methods under the head of a classifier, where it falls with the width itself: what tells texts apart
is a small part of what a model says of them."""
COMPARISON_SHARE = 0.1
"""Of the rate: answers are compared in whole sequences, and steps as large as those of tokens undo what the model knows."""


@dataclass(kw_only=True)
class FinetunePlan(plan.Plan):
    """`model` is the base's path."""

    model: str


def with_length(settings: FinetuneSettings) -> FinetuneSettings:
    """The settings with a length: by default three passes over the data."""
    if settings.resume or any((settings.steps, settings.tokens, settings.epochs, settings.time)):
        return settings
    return replace(settings, epochs=EPOCHS)


def make_plan(
    settings: FinetuneSettings,
    model: str,
    config: ModelConfig,
    inputs: list[str],
    examples: ExampleSet,
    seq_len: int,
    device: torch.device,
) -> FinetunePlan:
    dtype = hardware.compute_dtype(settings.precision, device)
    if examples.objective in HEADED:  # whose rows hold one text each
        seq_len = min(seq_len, examples.longest)
    rate = settings.learning_rate or learning_rate(settings, examples.objective, config.d_model)
    return FinetunePlan(
        model=model,
        settings=asdict(settings),
        inputs=inputs,
        data_sha256=examples.sha256,
        tokenizer_sha256=examples.tokenizer.sha256,
        hf_config={**config.hf, **families.find(config.family).config_to_hf(config)},
        seq_len=seq_len,
        batch_size=settings.batch_size or 1,
        micro_batch_size=settings.micro_batch_size,
        precision="bf16" if dtype == torch.bfloat16 else "fp32",
        compile=settings.compile == "on",
        learning_rate=rate,
        embedding_learning_rate=settings.embedding_learning_rate or rate,
        threads=torch.get_num_threads(),
        parent_sha256=lineage.weights_sha256(model),
    )


def default_batch_size(rows_per_epoch: int, seq_len: int, device: torch.device) -> int:
    """Rows of a step: what the machine takes at once, and no more than leaves a pass some steps."""
    at_once = max(1, (4096 if device.type == "cpu" else 1 << 16) // seq_len)
    return max(1, min(at_once, rows_per_epoch // STEPS_PER_EPOCH))


def learning_rate(settings: FinetuneSettings, objective: str, d_model: int) -> float:
    method = settings.method
    if method == "freeze" and not (settings.train_layers or settings.train_modules):
        return HEAD_RATE * 128 / d_model * (COMPARISON_SHARE if objective in RULES else 1.0)
    is_steep = method in STEEP and objective not in HEADED
    narrowness = (128 / d_model) ** (1.5 if is_steep else 1.0)
    rate = FIXED_RATES[method] if method in FIXED_RATES else RATES[method] * narrowness
    if method in STEEP and objective in HEADED:
        rate *= LABEL_SHARE
    return rate * (COMPARISON_SHARE if objective in RULES else 1.0)


def seq_len(settings: FinetuneSettings, config: ModelConfig) -> int:
    """Tokens of a row, without the virtual ones. Raises CalledWrongly for more than the model reads."""
    stacks = (config, *filter(None, [config.encoder]))
    limit = min((stack.max_positions for stack in stacks if stack.max_positions), default=None)
    if limit is not None and settings.method in SOFT:
        limit -= settings.virtual_tokens
        if limit < 2:
            raise CalledWrongly(f"--virtual-tokens {settings.virtual_tokens} fill the model's context")
    if limit is not None and (settings.seq_len or 0) > limit:
        raise CalledWrongly(f"--seq-len {settings.seq_len} is beyond the model's context, which leaves {limit}")
    return settings.seq_len or default_seq_len(limit)


def adapter_method(settings: FinetuneSettings) -> methods.Method | None:
    """What the method adds to the model; None where it trains the model's own weights.

    Raises CalledWrongly for a flag of another method, or one that cannot be read.
    """
    if settings.method in ("lora", "qlora"):
        return methods.Lora(
            rank=settings.lora_rank,
            alpha=settings.lora_alpha or 2.0 * settings.lora_rank,
            dropout=settings.lora_dropout,
            targets=settings.targets or methods.Lora.targets,
            rslora=settings.rslora,
            dora=settings.dora,
            init=settings.lora_init,
            rank_pattern=_ranks(settings.ranks),
            modules_to_save=settings.modules_to_save,
        )
    if settings.method == "ia3":
        return methods.Ia3(targets=settings.targets, inputs=()) if settings.targets else methods.Ia3()
    if settings.method == "adapter":
        places = tuple({"attention": "mixer"}.get(place, place) for place in dict.fromkeys(settings.adapter_places))
        return methods.Bottleneck(
            settings.adapter_width, places or methods.Bottleneck.places, settings.adapter_parallel
        )
    if settings.method in SOFT:
        return {"prompt": methods.SoftPrompt, "prefix": methods.Prefix}[settings.method](settings.virtual_tokens)
    return None


def refuse_contradictions(settings: FinetuneSettings) -> None:
    """Raise CalledWrongly for flags that exclude each other or belong to another method, before anything is read."""
    plan.refuse_contradictions(settings)
    for methods_, names in _OWN_FLAGS.items():
        for name in names:
            if getattr(settings, name) != getattr(FinetuneSettings, name) and settings.method not in methods_:
                flag, whose = f"--{name.replace('_', '-')}", " and ".join(methods_)
                raise CalledWrongly(f"{flag} belongs to --method {whose}, not {settings.method}")
    if settings.dora and settings.lora_init == "pissa":
        raise CalledWrongly("--dora and --lora-init pissa exclude each other")
    adapter_method(settings)


_OWN_FLAGS = {
    ("lora", "qlora"): (
        "lora_rank",
        "lora_alpha",
        "lora_dropout",
        "ranks",
        "rslora",
        "dora",
        "lora_init",
        "modules_to_save",
    ),
    ("qlora",): ("quantize_base", "double_quantization"),
    ("adapter",): ("adapter_width", "adapter_places", "adapter_parallel"),
    ("freeze",): ("train_layers", "train_modules"),
    SOFT: ("virtual_tokens",),
}
"""Flags that say something of these methods only."""


def describe_trained(model: nn.Module) -> str:
    """What a person should know before the first step."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    packed = sum(shape.numel() for shape in matrix_shapes(model).values())
    total = packed + sum(parameter.numel() for parameter in model.parameters())
    saved = (total - trained) * 4 * 3
    share = f"{trained / total:.2%}" if trained < total else "all"
    more = f"; gradients and AdamW's moments of the others would take {format_size(saved)}" if saved else ""
    return f"training {format_count(trained)} parameters, {share} of the model{more}"


def refuse_kind(objective: str, config: ModelConfig) -> None:
    """Raise UserError where the data ask for what the model cannot do."""
    wanted = {"seq2seq": "seq2seq", "mlm": "masked"}.get(objective, "causal")
    if objective in HEADED:
        usual_classifier(config)
    elif config.kind != wanted:
        does = {"causal": "continues texts", "masked": "fills gaps", "seq2seq": "turns one text into another"}
        raise UserError(
            f"--objective {objective} needs a model that {does[wanted]}; {config.family} {does[config.kind]}"
        )


def refuse_quantized(settings: FinetuneSettings, config: ModelConfig) -> None:
    """Raise CalledWrongly where weights in few bits would have to change."""
    if not config.hf.get("quantization_config"):
        return
    if settings.method in ("full", "freeze", "feature") or settings.lora_init == "pissa":
        how = "--lora-init pissa" if settings.lora_init == "pissa" else f"--method {settings.method}"
        raise CalledWrongly(
            f"{how} changes or saves the base's own weights, and this base is quantized",
            hint="--method lora leaves them as they are; llmctl quantize MODEL --format bfloat16 takes quantization back",
        )


def refuse_no_features(settings: FinetuneSettings, objective: str) -> None:
    """Raise CalledWrongly where a head cannot be trained on what the backbone makes of each row once."""
    if settings.method != "feature":
        return
    if objective in RULES:
        raise CalledWrongly(
            f"--method feature cannot compare answers as {objective} does",
            hint="--method freeze --train-modules lm_head",
        )
    if distributed.world_size() > 1:
        raise CalledWrongly("--method feature trains a head alone, which is work for one process")
    for name in ("teacher", "neftune"):
        if getattr(settings, name):
            raise CalledWrongly(f"--{name} and --method feature exclude each other: the backbone runs once, in front")
    if settings.retain:
        raise CalledWrongly("--retain and --method feature exclude each other")


def refuse_extras(settings: FinetuneSettings, objective: str, config: ModelConfig) -> None:
    """Raise CalledWrongly for an earlier task where the objective or the kind of model has no place for it."""
    if settings.retain and (objective in HEADED or config.kind == "seq2seq"):
        raise CalledWrongly(
            f"--retain scores a model that predicts the tokens of a text, which {config.family} here does not"
        )
    if settings.retain and distributed.world_size() > 1 and objective not in ("sft", "causal", "mlm"):
        raise CalledWrongly(f"--retain with several processes is for sft, causal and mlm, not {objective}")


def _ranks(words: tuple[str, ...]) -> dict[str, int]:
    pattern = {}
    for word in words:
        name, _, rank = word.partition("=")
        if not rank.isdigit() or int(rank) < 1:
            raise CalledWrongly(f"--ranks {word!r}: expected a module's name and a rank, as in q_proj=32")
        pattern[name] = int(rank)
    return pattern
