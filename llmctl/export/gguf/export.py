"""`llmctl export-gguf`: a checkpoint as the one file that llama.cpp and what is built on it read.

The `gguf` library writes the file, llama.cpp's authors' own; shapes and names come first, then one tensor after the other is
read from the mapped checkpoint, turned and quantized, so that memory holds one of them. What was written is read back by the
library's other half and compared with the checkpoint before it takes its name.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import torch

from llmctl import agreement, allocator, checkpoint, files
from llmctl.errors import CheckFailed, UserError
from llmctl.export.gguf import types
from llmctl.export.gguf.settings import ExportGgufSettings
from llmctl.export.weights import Weights
from llmctl.generation.settings import eos_ids, read_generation_config
from llmctl.gguf import architectures, tensors, vocabulary
from llmctl.models.config import ModelConfig
from llmctl.models.loading import stored_config
from llmctl.models.streaming import StreamedModel
from llmctl.tokenization.files import has_tokenizer
from llmctl.tokenizer import Tokenizer

TEXTS = (*agreement.PROBES, "  Two  spaces,\n\n\ttabs;  ", "naïve Ünïcode: 東京 42,195 km — 😀 it's\n", "x")
SUFFIX = ".gguf"
log = logging.getLogger("llmctl")


@dataclass(frozen=True)
class States:
    """How near an encoder's hidden states are: the least cosine of two of them, over all positions of a few texts."""

    least_cosine: float

    def __str__(self) -> str:
        return f"hidden states with a cosine of {self.least_cosine:.5f} at least"


@dataclass(frozen=True)
class Exported:
    path: Path
    nbytes: int
    agreement: agreement.Agreement | States


@dataclass(frozen=True)
class _Tensor:
    name: str
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    load: Any


def export(base: str | Path, output: str | Path, settings: ExportGgufSettings) -> Exported:
    """Write the checkpoint `base` as the file `output`.

    Raises UserError for a model or a tokenizer that has no form in GGUF, before anything is written, and CheckFailed where
    what is read back does not compute what the checkpoint does; nothing is left under `output` then.
    """
    allocator.return_freed_memory()
    base, output = Path(base), Path(output)
    if output.suffix != SUFFIX:
        raise UserError(f"{output}: a GGUF file's name ends in {SUFFIX}", hint=f"-o {output}{SUFFIX}")
    files.refuse_existing(output, settings.overwrite)
    files.refuse_input(output, [base])
    if (base / "adapter_config.json").exists():
        raise UserError(f"{base}: an adapter, which is no whole model", hint="llmctl merge-lora makes it one")
    config = architectures.in_file(stored_config(base))
    architectures.refuse(config)
    if not has_tokenizer(base):
        raise UserError(f"{base}: has no tokenizer, and llama.cpp opens no file without one")
    tokenizer = Tokenizer.load(base)
    words = vocabulary.keys(tokenizer, config.vocab_size)
    if (longest := architectures.context(config)) < (config.max_positions or 0):
        log.info(
            "the context is stated as %d of %d tokens: beyond, llama.cpp computes otherwise",
            longest,
            config.max_positions,
        )
    if "rope_factors_long.weight" in architectures.factors(config):
        log.info("llama.cpp turns all texts as long ones when its context is set beyond the original length (-c)")
    planned = _planned(config, Weights(base, config), settings.type)
    checkpoint.check_free_space(output, sum(types.nbytes(each.shape, each.kind) for each in planned) + (1 << 20))
    with files.staged_file(output, settings.overwrite) as file:
        keys = _keys(base, config, settings) | words | _ends(base, config, tokenizer)
        _write(Path(file.name), architectures.NAMES[config.family], keys, planned)
        found = _check(base, Path(file.name), tokenizer, settings, longest)
        nbytes = Path(file.name).stat().st_size
    return Exported(output, nbytes, found)


def _planned(config: ModelConfig, source: Weights, kind: str) -> list[_Tensor]:
    head = "token_embd" if config.tie_embeddings else "output."
    planned = []
    for name, factors in architectures.factors(config).items():
        planned.append(_Tensor(name, tuple(factors.shape), types.Type.F32, lambda factors=factors: factors))
    for entry in tensors.entries(config, source.shapes):
        empty = [torch.empty(source.shapes[name], device="meta") for name in entry.ours]
        shape = tuple(tensors.to_gguf(entry, empty, config).shape)
        stored = types.type_of(entry.name, shape, kind, config.n_layers, entry.name.startswith(head))

        def load(entry=entry):
            return tensors.to_gguf(entry, [source.get(name) for name in entry.ours], config)

        planned.append(_Tensor(entry.name, shape, stored, load))
    return planned


def _keys(base: Path, config: ModelConfig, settings: ExportGgufSettings) -> dict[str, Any]:
    name = architectures.NAMES[config.family]
    general = {
        "general.name": settings.name or base.absolute().name,
        "general.file_type": int(types.FILE_TYPES[settings.type]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
    }
    return general | {f"{name}.{key}": value for key, value in architectures.metadata(config).items()}


def _ends(base: Path, config: ModelConfig, tokenizer: Tokenizer) -> dict[str, int]:
    """The token that ends a text, and those that end a turn or a message, where the checkpoint names several."""
    ends = sorted(eos_ids(read_generation_config(base), config.hf, tokenizer.eos_id))
    first = tokenizer.eos_id if tokenizer.eos_id in ends or not ends else ends[0]
    ends = [first, *(token for token in ends if token != first)]
    roles = ("eos", "eot", "eom")
    if len(ends) > len(roles):
        log.warning("GGUF has places for three tokens that end a text; left out: %s", ends[len(roles) :])
    return {f"tokenizer.ggml.{role}_token_id": token for role, token in zip(roles, ends) if token is not None}


def _write(path: Path, architecture: str, keys: dict[str, Any], planned: list[_Tensor]) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in keys.items():
        _add(writer, key, value)
    for each in planned:
        shape, dtype = types.stored_shape(each.shape, each.kind)
        writer.add_tensor_info(each.name, shape, dtype, types.nbytes(each.shape, each.kind), raw_dtype=each.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for each in planned:
        writer.write_tensor_data(types.data_of(each.load().float(), each.kind))
    writer.close()


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _check(
    base: Path, written: Path, tokenizer: Tokenizer, settings: ExportGgufSettings, longest: int
) -> agreement.Agreement:
    """What the file holds, read back, against the checkpoint: ids of texts, and logits in float32."""
    with _named(written) as path:
        again = Tokenizer.load(path)
        for text in TEXTS:
            if again.encode(text) != tokenizer.encode(text):
                raise CheckFailed(f"the file's tokenizer gives other ids for {text[:40]!r}", hint="nothing was written")
        before, after = StreamedModel(base), StreamedModel(path)
        probes = agreement.probe_ids(tokenizer, before.config.vocab_size)[:, :longest]
        if before.config.kind == "masked":
            return _check_states(before.model.hidden(probes), after.model.hidden(probes), settings)
        found = agreement.measure(before.logits, after.logits, probes)
    agreement.require(found, settings.largest_divergence)
    return found


def _check_states(before_BTD: torch.Tensor, after_BTD: torch.Tensor, settings: ExportGgufSettings) -> States:
    found = States(float(torch.cosine_similarity(before_BTD, after_BTD, dim=-1).min()))
    if not 1 - found.least_cosine <= settings.largest_divergence:
        raise CheckFailed(
            f"the file does not compute what it should: {found}",
            hint=f"nothing was written; the cosine may be {settings.largest_divergence:g} below 1 (--tolerance)",
        )
    return found


class _named:
    """A second name that ends in .gguf for a file that has not taken its own yet."""

    def __init__(self, path: Path):
        self._path, self._name = path, path.with_name(path.name + SUFFIX)

    def __enter__(self) -> Path:
        self._name.hardlink_to(self._path)
        return self._name

    def __exit__(self, *_) -> None:
        self._name.unlink(missing_ok=True)
