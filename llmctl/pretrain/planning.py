"""Everything that a flag of `llmctl pretrain` left open, decided from the data and the machine."""

from __future__ import annotations

import os
from dataclasses import asdict, replace

import torch

from llmctl import lineage
from llmctl.errors import CalledWrongly, UserError
from llmctl.files import read_json
from llmctl.models import families, shapes
from llmctl.models.config import ModelConfig
from llmctl.models.loading import stored_config
from llmctl.pretrain.settings import PretrainSettings
from llmctl.train import hardware, plan
from llmctl.train.plan import Plan

COMPILE_PAYS_AFTER = 1800.0
"""On a CPU, compiling takes about a minute on two cores; what it gains is a share of the run."""


def make_plan(settings: PretrainSettings, inputs: list[str], corpus, device: torch.device) -> Plan:
    """Fill in every default from the data and the machine."""
    n_tokens = corpus.split("train").n_tokens
    config = _model_config(settings, corpus.tokenizer, n_tokens, device)
    limit = config.max_positions
    seq_len = settings.seq_len or min(_default_seq_len(device), limit or _default_seq_len(device))
    if limit is not None and seq_len > limit:
        raise CalledWrongly(f"--seq-len {seq_len} is beyond the model's context of {limit}")
    tokens_at_once = 4096 if device.type == "cpu" else 1 << 17
    dtype = hardware.compute_dtype(settings.precision, device)
    rates = _learning_rates(settings, config)
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
    plan.refuse_contradictions(settings, (("params", "preset", "model_config", "init_from"), "give the model's shape"))
    for name in ("preset", "model_config", "init_from"):
        if getattr(settings, name) and settings.family != PretrainSettings.family:
            flag = f"--{name.replace('_', '-')}"
            raise CalledWrongly(
                f"--family {settings.family} and {flag} both give the kind of model", "give one of them"
            )


def _model_config(settings: PretrainSettings, tokenizer, n_tokens: int, device: torch.device) -> ModelConfig:
    context = settings.seq_len or _default_seq_len(device)
    names = ("bos", "eos", "pad", "mask")
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_id") for name in names}
    special = {key: value for key, value in special.items() if value is not None}
    if settings.init_from:
        config = stored_config(settings.init_from)
        if config.hf.get("quantization_config"):
            raise UserError(
                f"{settings.init_from}: quantized weights cannot be trained",
                hint="llmctl quantize MODEL --format bfloat16 takes quantization back; finetune trains adapters beside them",
            )
    elif settings.model_config:
        config = _config_file(settings.model_config, {"vocab_size": tokenizer.vocab_size, **special})
    elif settings.preset:
        config = shapes.preset(settings.preset, tokenizer.vocab_size, context)
    else:
        wanted = settings.params or _teachable_parameters(n_tokens, tokenizer.vocab_size)
        config = shapes.for_parameters(settings.family, wanted, tokenizer.vocab_size, context, special)
    if config.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"the tokens need a vocabulary of {tokenizer.vocab_size}, the model has {config.vocab_size}",
            hint="re-run `llmctl tokenize` with --tokenizer MODEL",
        )
    return replace(config, dropout=settings.dropout, hf={**config.hf, **special})


def _teachable_parameters(n_tokens: int, vocab_size: int) -> int:
    """One parameter in the blocks for every two tokens, and an embedding beside them; between 1M and 124M."""
    return min(124_000_000, max(1_000_000, n_tokens // 2 + 128 * vocab_size))


def _config_file(path: str, usual: dict) -> ModelConfig:
    """A config.json, with the `usual` values of keys that it leaves out."""
    file = os.path.join(path, "config.json") if os.path.isdir(path) else path
    hf = read_json(file)
    family = families.find(hf.get("model_type"))
    try:
        return family.config_from_hf({**usual, **hf})
    except KeyError as error:
        raise UserError(f"{file}: the key {error} is missing") from error


def _default_seq_len(device: torch.device) -> int:
    return 256 if device.type == "cpu" else 1024


def _learning_rates(settings: PretrainSettings, config: ModelConfig) -> tuple[float, float]:
    """Peak rates of the blocks and of the embeddings.

    The defaults are tuned at width 128 and fall with it as that keeps the change of a layer's output the same: with the
    root for Muon, whose updates have a fixed spectral norm per unit of sqrt(width), with the width itself for AdamW
    (arXiv:2310.17813). Where norms stand behind the sums, gradients grow with the depth (arXiv:2002.04745), and the rates
    that train best fall about as its inverse (tried at 4 and 12 layers).
    """
    shrink = 128 / config.d_model
    is_post_norm = any(block.norm_placement == "post" for block in config.blocks)
    depth = min(1.0, 2 / config.n_layers) if is_post_norm else 1.0
    if settings.optimizer == "muon":
        rate, embedding_rate = 0.02 * shrink**0.5 * depth, 0.01 * shrink**0.5 * depth
    else:
        rate = embedding_rate = 0.003 * shrink * depth
    if settings.learning_rate is not None:
        rate = embedding_rate = settings.learning_rate
    return rate, settings.embedding_learning_rate or embedding_rate


def _wants_compile(settings: PretrainSettings, device: torch.device) -> bool:
    if settings.compile != "auto":
        return settings.compile == "on"
    return device.type == "cuda" or (settings.time or 0) >= COMPILE_PAYS_AFTER
