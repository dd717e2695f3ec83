"""Decides, once per run, everything that a flag left open; the result is recorded and a resumed run follows it."""

from __future__ import annotations

import logging
import os
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

from llmctl.errors import CalledWrongly, UserError
from llmctl.files import read_json
from llmctl.models import families, shapes
from llmctl.models.config import ModelConfig
from llmctl.models.initialization import new_model
from llmctl.models.loading import load_model, read_config
from llmctl.models.transformer import CausalLM
from llmctl.train import hardware
from llmctl.train.settings import PretrainSettings

log = logging.getLogger("llmctl")

DEFAULT_SECONDS = 600.0
COMPILE_PAYS_AFTER = 1800.0
"""On a CPU, compiling takes about a minute on two cores; what it gains is a share of the run."""

_FREE_TO_CHANGE = {"save_every", "keep", "log_every", "log", "validate_every", "resume", "overwrite", "dry_run"}
"""Flags that may differ when a run goes on, because they do not touch its bits."""


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
    total_steps: int | None = None
    rows_per_epoch: int = 1

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
    rates = _learning_rates(settings)
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
    )


def fixed_steps(settings: PretrainSettings, plan: Plan) -> int | None:
    """Steps where a flag fixes them; None where time decides."""
    given = [name for name in ("steps", "tokens", "epochs", "time") if getattr(settings, name) is not None]
    if len(given) > 1:
        raise CalledWrongly(f"--{given[0]} and --{given[1]} both say how long to train", "give one of them")
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
    return replace(PretrainSettings(**recorded), **now, resume=True)


def initial_model(settings: PretrainSettings, config: ModelConfig) -> CausalLM:
    """Fresh weights, or those of --init-from in float32."""
    if not settings.init_from:
        return new_model(config, settings.seed)
    model = load_model(settings.init_from, dtype=torch.float32)
    for parameter in model.parameters():  # mapped from the file, which must not change with them
        parameter.data = parameter.data.clone()
    model.config = config
    return model


def compile_blocks(model: CausalLM) -> bool:
    """torch.compile every block (they share one compilation); False, with a notice, where no compiler works."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(2, device=model.head_weight.device))
    except Exception as error:  # noqa: BLE001 - inductor fails in many ways, and eager is always right
        log.warning("torch.compile does not work here (%s); training goes on without it", str(error).splitlines()[0])
        return False
    for block in model.layers:
        block.compile()
    return True


def describe(config: ModelConfig) -> str:
    mixer, ffn = config.blocks[0].mixer, config.blocks[0].ffn
    return (
        f"{config.family}, {config.n_layers} layers, d_model {config.d_model}, {mixer.n_heads} heads "
        f"({mixer.n_kv_heads} kv), d_ff {ffn.d_ff}, vocabulary {config.vocab_size}, context {config.max_positions}"
    )


def read_plan(content: dict[str, Any]) -> Plan:
    known = {field.name for field in fields(Plan)}
    return Plan(**{key: value for key, value in content.items() if key in known})


def _model_config(settings: PretrainSettings, tokenizer, n_tokens: int, device: torch.device) -> ModelConfig:
    sources = [name for name in ("params", "preset", "model_config", "init_from") if getattr(settings, name)]
    if len(sources) > 1:
        first, second = (f"--{name.replace('_', '-')}" for name in sources[:2])
        raise CalledWrongly(f"{first} and {second} both give the model's shape", "give one of them")
    context = settings.seq_len or _default_seq_len(device)
    if settings.init_from:
        config = read_config(settings.init_from)
        _check_parent_tokenizer(settings.init_from, tokenizer)
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


def _check_parent_tokenizer(parent: str, tokenizer) -> None:
    from llmctl.tokenizer import Tokenizer

    theirs = Tokenizer.load(parent)
    if theirs.sha256 != tokenizer.sha256:
        raise UserError(
            f"the tokens were made by the tokenizer {tokenizer.sha256[:12]}, {parent} has {theirs.sha256[:12]}",
            hint=f"llmctl tokenize --tokenizer {parent}",
        )


def _default_seq_len(device: torch.device) -> int:
    return 256 if device.type == "cpu" else 1024


def _learning_rates(settings: PretrainSettings) -> tuple[float, float]:
    rate = settings.learning_rate or {"muon": 0.02, "adamw": 0.003}[settings.optimizer]
    default = 0.01 if settings.optimizer == "muon" and settings.learning_rate is None else rate
    return rate, settings.embedding_learning_rate or default


def _wants_compile(settings: PretrainSettings, device: torch.device) -> bool:
    if settings.compile != "auto":
        return settings.compile == "on"
    return device.type == "cuda" or (settings.time or 0) >= COMPILE_PAYS_AFTER
