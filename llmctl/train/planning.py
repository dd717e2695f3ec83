"""Decides, once per run, everything that a flag left open; the result is recorded and a resumed run follows it."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

from llmctl import lineage
from llmctl.errors import CalledWrongly, UserError
from llmctl.files import read_json
from llmctl.models import families, shapes
from llmctl.models.config import ModelConfig
from llmctl.models.loading import read_config
from llmctl.train import hardware
from llmctl.train.settings import PretrainSettings

DEFAULT_SECONDS = 600.0
TIMED_EPOCHS, TIMED_STEPS = 4, 200
"""A time budget ends no later than after so many passes over the corpus, or so many steps where a pass is short: beyond
four passes repeated data is worth little (arXiv:2305.16264), and a small model soon learns it by heart."""
COMPILE_PAYS_AFTER = 1800.0
"""On a CPU, compiling takes about a minute on two cores; what it gains is a share of the run."""

_FREE_TO_CHANGE = {"save_every", "keep", "log_every", "log", "validate_every", "resume", "dry_run", "threads"}
"""Flags that may differ when a run goes on, because they do not touch what it computes."""


@dataclass
class Plan:
    """The resolved run; `hf_config` is the model's config.json, `total_steps` None until a time budget is turned into steps."""

    settings: dict[str, Any]
    inputs: list[str]
    data_sha256: str
    tokenizer_sha256: str
    hf_config: dict[str, Any]
    seq_len: int
    batch_size: int
    micro_batch_size: int | None
    precision: str
    compile: bool
    learning_rate: float
    embedding_learning_rate: float
    threads: int
    parent_sha256: str | None = None
    rows_per_epoch: int = 1
    total_steps: int | None = None
    length_fixed_at: int = 0
    """The step from which on the schedule knows `total_steps`: a time budget is turned into steps after a few of them."""

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.seq_len

    @property
    def epochs(self) -> float:
        return (self.total_steps or 0) * self.batch_size / self.rows_per_epoch


def make_plan(settings: PretrainSettings, inputs: list[str], corpus, device: torch.device) -> Plan:
    """Fill in every default from the data and the machine."""
    n_tokens = corpus.split("train").n_tokens
    config = _model_config(settings, corpus.tokenizer, n_tokens, device)
    seq_len = settings.seq_len or min(_default_seq_len(device), config.max_positions)
    if seq_len > config.max_positions:
        raise CalledWrongly(f"--seq-len {seq_len} is beyond the model's context of {config.max_positions}")
    tokens_at_once = 4096 if device.type == "cpu" else 1 << 17
    dtype = hardware.compute_dtype(settings.precision, device)
    rates = _learning_rates(settings, config.d_model)
    return Plan(
        settings=asdict(settings),
        inputs=inputs,
        data_sha256=corpus.sha256,
        tokenizer_sha256=corpus.metadata.tokenizer_sha256,
        hf_config={**config.hf, **families.find(config.family).config_to_hf(config)},
        seq_len=seq_len,
        batch_size=settings.batch_size or max(1, tokens_at_once // seq_len),
        micro_batch_size=settings.micro_batch_size,
        precision="bf16" if dtype == torch.bfloat16 else "fp32",
        compile=_wants_compile(settings, device),
        learning_rate=rates[0],
        embedding_learning_rate=rates[1],
        threads=torch.get_num_threads(),
        parent_sha256=lineage.weights_sha256(settings.init_from) if settings.init_from else None,
    )


def refuse_contradictions(settings: PretrainSettings) -> None:
    """Raise CalledWrongly for flags that exclude each other, before anything is read."""
    for names, purpose in (
        (("steps", "tokens", "epochs", "time"), "say how long to train"),
        (("params", "preset", "model_config", "init_from"), "give the model's shape"),
        (("resume", "overwrite"), "say what becomes of the output"),
    ):
        given = [f"--{name.replace('_', '-')}" for name in names if getattr(settings, name)]
        if len(given) > 1:
            raise CalledWrongly(f"{given[0]} and {given[1]} both {purpose}", "give one of them")
    for name in ("preset", "model_config", "init_from"):
        if getattr(settings, name) and settings.family != PretrainSettings.family:
            flag = f"--{name.replace('_', '-')}"
            raise CalledWrongly(
                f"--family {settings.family} and {flag} both give the kind of model", "give one of them"
            )


def fixed_steps(settings: PretrainSettings, plan: Plan) -> int | None:
    """Steps where a flag fixes them; None where time decides."""
    if settings.steps is not None:
        return settings.steps
    if settings.tokens is not None:
        return max(1, round(settings.tokens / plan.tokens_per_step))
    if settings.epochs is not None:
        return max(1, round(settings.epochs * plan.rows_per_epoch / plan.batch_size))
    return None


def resumed_settings(settings: PretrainSettings, plan: Plan, given: frozenset[str]) -> PretrainSettings:
    """The recorded settings. Raises CalledWrongly for a flag given now that would change what the run computes."""
    known = {field.name for field in fields(PretrainSettings)}
    recorded = {key: tuple(v) if isinstance(v, list) else v for key, v in plan.settings.items() if key in known}
    for name in sorted(given & known - _FREE_TO_CHANGE):
        if getattr(settings, name) != recorded[name]:
            flag = "--" + name.replace("_", "-")
            raise CalledWrongly(
                f"{flag} {getattr(settings, name)}: the run to resume has {recorded[name]}",
                hint="leave the flag out to go on, or start anew with --overwrite",
            )
    now = {name: getattr(settings, name) for name in given & _FREE_TO_CHANGE}
    return replace(PretrainSettings(**recorded), **{**now, "resume": True, "overwrite": False})


def refuse_other_data(plan: Plan, corpus, inputs: list[str]) -> None:
    """Raise UserError where a run to go on with would read other tokens than it began with."""
    if plan.data_sha256 != corpus.sha256:
        raise UserError(
            f"the run began with the tokens {plan.data_sha256[:12]}; {' '.join(inputs)} holds {corpus.sha256[:12]}",
            hint="put the old file back, or start anew with --overwrite",
        )


def read_plan(content: dict[str, Any]) -> Plan:
    known = {field.name for field in fields(Plan)}
    return Plan(**{key: value for key, value in content.items() if key in known})


def _model_config(settings: PretrainSettings, tokenizer, n_tokens: int, device: torch.device) -> ModelConfig:
    context = settings.seq_len or _default_seq_len(device)
    if settings.init_from:
        config = read_config(settings.init_from)
    elif settings.model_config:
        config = _config_file(settings.model_config, tokenizer.vocab_size)
    elif settings.preset:
        config = shapes.preset(settings.preset, tokenizer.vocab_size, context)
    else:
        wanted = settings.params or _teachable_parameters(n_tokens, tokenizer.vocab_size)
        config = shapes.for_parameters(settings.family, wanted, tokenizer.vocab_size, context)
    if config.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"the tokens need a vocabulary of {tokenizer.vocab_size}, the model has {config.vocab_size}",
            hint="re-run `llmctl tokenize` with --tokenizer MODEL",
        )
    special = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    return replace(config, dropout=settings.dropout, hf={**config.hf, **special})


def _teachable_parameters(n_tokens: int, vocab_size: int) -> int:
    """One parameter in the blocks for every two tokens, and an embedding beside them; between 1M and 124M."""
    return min(124_000_000, max(1_000_000, n_tokens // 2 + 128 * vocab_size))


def _config_file(path: str, vocab_size: int) -> ModelConfig:
    file = os.path.join(path, "config.json") if os.path.isdir(path) else path
    hf = read_json(file)
    family = families.find(hf.get("model_type"))
    try:
        return family.config_from_hf({"vocab_size": vocab_size, **hf})
    except KeyError as error:
        raise UserError(f"{file}: the key {error} is missing") from error


def _default_seq_len(device: torch.device) -> int:
    return 256 if device.type == "cpu" else 1024


def _learning_rates(settings: PretrainSettings, d_model: int) -> tuple[float, float]:
    """Peak rates of the blocks and of the embeddings.

    The defaults are tuned at width 128 and fall with it as that keeps the change of a layer's output the same: with the
    root for Muon, whose updates have a fixed spectral norm per unit of sqrt(width), with the width itself for AdamW
    (arXiv:2310.17813).
    """
    if settings.optimizer == "muon":
        shrink = (128 / d_model) ** 0.5
        rate, embedding_rate = 0.02 * shrink, 0.01 * shrink
    else:
        rate = embedding_rate = 0.003 * 128 / d_model
    if settings.learning_rate is not None:
        rate = embedding_rate = settings.learning_rate
    return rate, settings.embedding_learning_rate or embedding_rate


def _wants_compile(settings: PretrainSettings, device: torch.device) -> bool:
    if settings.compile != "auto":
        return settings.compile == "on"
    return device.type == "cuda" or (settings.time or 0) >= COMPILE_PAYS_AFTER
