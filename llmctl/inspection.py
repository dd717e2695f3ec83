"""What a checkpoint or a token stream says about itself, as records: for a person, or one JSON line each."""

from __future__ import annotations

import collections
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from llmctl import lineage
from llmctl.checkpoint import GGUF_SUFFIX, TensorFiles, open_tensors
from llmctl.data.corpus import SHARDS, shards_of
from llmctl.data.summary import describe_tokenizer, summarize
from llmctl.errors import UserError
from llmctl.files import read_json
from llmctl.models import description
from llmctl.models.config import parameter_count, sizes
from llmctl.models.ffn import has_experts
from llmctl.models.loading import new_empty, stored_config
from llmctl.quantities import format_count, format_size
from llmctl.quantize.stored import open_weights
from llmctl.streams import read_stream
from llmctl.tokenizer import Tokenizer

ARROW_START = b"\xff"  # of the mark before an IPC message; no path begins with it


def inspect(path: str | os.PathLike, *, n_documents: int = 0, check_files: bool = True) -> Iterator[dict[str, Any]]:
    """Records about a checkpoint or adapter directory or GGUF file, a token file or a directory of shards; "kind" tells which.

    Raises `UserError` for anything else and for what is damaged, where the sha256 of a checkpoint's files differ after
    its records.
    """
    path = Path(path)
    if (path / "config.json").exists():
        about = {**_describe_model(path), "quantization": _describe_quantization(path)}
        return _inspect_directory("checkpoint", path, open_tensors(path), about, check_files)
    if (path / "adapter_config.json").exists():
        stored = open_tensors(path, stem="adapter_model")
        return _inspect_directory("adapter", path, stored, _describe_adapter(path, stored), check_files)
    if path.suffix == GGUF_SUFFIX and path.is_file():
        return _inspect_gguf(path)
    if path.is_file() or (path.is_dir() and any(path.glob(SHARDS))):
        return summarize((read_stream(shard) for shard in shards_of(path)), str(path), n_documents)
    if not path.exists():
        raise UserError(f"{path}: no such file or directory")
    raise UserError(f"{path}: neither a checkpoint (no config.json), an adapter nor a token stream (no {SHARDS})")


def inspect_pipe(source: BinaryIO, n_documents: int = 0) -> Iterator[dict[str, Any]]:
    """The same for a token stream that is read as it comes."""
    return summarize([read_stream(source)], "standard input", n_documents)


def begins_token_stream(source: BinaryIO) -> bool:
    """Whether a pipe, unread so far, brings a token stream rather than the path of a checkpoint."""
    return source.peek(1)[:1] == ARROW_START


def facts(record: dict[str, Any], prefix: str = "") -> Iterator[list[Any]]:
    """Rows of a table for a person: one per value, however deep it lies."""
    for key, value in record.items():
        name = f"{prefix}{key.replace('_', ' ')}"
        if isinstance(value, dict):
            yield from facts(value, f"{name}: ")
        elif key not in ("kind", "path") and value not in (None, [], ()):
            yield [name, _in_words(key, value)]


def _in_words(key: str, value: Any) -> Any:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if key in ("parameters", "active_parameters"):
        return f"{value:,} ({format_count(value)})"
    if key == "bytes":
        return f"{value:,} ({format_size(value)})"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) and not key.endswith(("seed", "id")) else value


def _inspect_directory(
    kind: str, path: Path, stored: TensorFiles, about: dict[str, Any], check_files: bool
) -> Iterator[dict[str, Any]]:
    """A record of this kind, then a record "tensor" for each that is stored."""
    history = lineage.read(path)
    wrong = lineage.verify(path) if check_files else []
    yield {
        "kind": kind,
        "path": str(path.resolve()),
        **about,
        **_describe_storage(stored),
        "tokenizer": _describe_tokenizer(path),
        "lineage": history and {key: value for key, value in vars(history).items() if key != "files"},
        "files_checked": len(history.files) if history and check_files else None,
        "files_wrong": wrong,
    }
    for name in stored:
        yield {"kind": "tensor", "name": name, "shape": list(stored.shape(name)), "dtype": stored.dtype_name(name)}
    if wrong:
        raise UserError(f"{path}: {'; '.join(wrong)}", hint="these are not the files that were saved")


def _inspect_gguf(path: Path) -> Iterator[dict[str, Any]]:
    """The same of a GGUF file, whose tensors have their own names and types."""
    from llmctl.gguf.file import opened  # its library is needed for such files only

    file, dtypes = opened(path), collections.Counter()
    rows = [{"kind": "tensor", **row} for row in file.describe()]
    for row in rows:
        dtypes[row["dtype"]] += row["bytes"]
    storage = {"tensors": len(rows), "bytes": sum(dtypes.values()), "bytes_per_dtype": dict(dtypes)}
    model = _describe_model(path, file.fields.get("general.architecture"))
    tokenizer = _describe_tokenizer(path)
    yield {"kind": "checkpoint", "path": str(path.resolve()), **model, **storage, "tokenizer": tokenizer}
    yield from rows


_SAID_BY_PEFT = {
    "method": "peft_type",
    "base": "base_model_name_or_path",
    "task": "task_type",
    "rank": "r",
    "alpha": "lora_alpha",
    "virtual_tokens": "num_virtual_tokens",
    "width": "width",
    "targets": "target_modules",
    "modules_to_save": "modules_to_save",
}


def _describe_adapter(path: Path, stored: TensorFiles) -> dict[str, Any]:
    said = read_json(path / "adapter_config.json")
    sizes_ = (math.prod(stored.shape(name)) for name in stored)
    return {**{ours: said.get(theirs) for ours, theirs in _SAID_BY_PEFT.items()}, "parameters": sum(sizes_)}


def _describe_model(path: Path, family: str | None = None) -> dict[str, Any]:
    """`family` is what the file calls it, where that is not in config.json."""
    family = family or read_json(path / "config.json").get("model_type")
    try:
        config = stored_config(path)
    except UserError as error:
        return {"family": family, "unsupported": error.message}
    with torch.device("meta"):
        model = new_empty(config)
    parts, mixer = collections.Counter(), type(config.block(0).mixer).__name__.lower()
    for name, parameter in model.named_parameters():
        parts[_part_of(name, mixer)] += parameter.numel()
    return {
        "family": config.family,
        "parameters": sum(parts.values()),
        "active_parameters": parameter_count(config, active=True) if has_experts(model) else None,
        "parameters_per_part": dict(parts),
        "n_layers": config.n_layers,
        "d_model": config.d_model,
        **sizes(config),
        "layers": description.blocks(config),
        "n_encoder_layers": config.encoder and config.encoder.n_layers,
        "encoder_layers": config.encoder and description.blocks(config.encoder),
        "head": description.head(config),
        "vocab_size": config.vocab_size,
        "context": config.max_positions,
        "tied": config.tie_embeddings,
    }


def _part_of(name: str, mixer: str) -> str:
    inner = name.removeprefix("encoder.").split(".")
    if inner[0] == "layers":
        return {"mixer": mixer, "cross": "cross-attention", "ffn": "feed-forward"}.get(inner[2], "norms")
    outer = {"embed_tokens": "embedding", "embed_types": "embedding"}
    outer |= dict.fromkeys(("embed_positions", "relative_bias"), "positions")
    outer |= dict.fromkeys(("lm_head", "head_transform", "head_bias", "classifier"), "head")
    return outer.get(inner[0], "norms")


def _describe_storage(stored: TensorFiles) -> dict[str, Any]:
    dtypes = collections.Counter()
    for name in stored:
        dtypes[stored.dtype_name(name)] += stored.nbytes(name)
    return {"tensors": len(stored), "bytes": sum(dtypes.values()), "bytes_per_dtype": dict(dtypes)}


def _describe_quantization(path: Path) -> dict[str, Any] | None:
    """Who packed how many matrices, in how many bits; None for an ordinary checkpoint."""
    said = read_json(path / "config.json").get("quantization_config")
    if not said:
        return None
    try:
        stored = open_weights(path)
        bits = [bits for name in stored if (bits := stored.bits(name)) is not None]
    except UserError as error:
        return {"method": said.get("quant_method"), "unsupported": error.message}
    return {"method": said.get("quant_method"), "matrices": len(bits), "bits": sorted(set(bits))}


def _describe_tokenizer(path: Path) -> dict[str, Any] | None:
    try:
        return describe_tokenizer(Tokenizer.load(path))
    except UserError as error:
        return {"unsupported": error.message}
