"""From a Hugging Face directory to a model and back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from llmctl import checkpoint, files
from llmctl.errors import UserError
from llmctl.models import config_classifier, families, weights
from llmctl.models.causal_lm import CausalLM
from llmctl.models.config import Classifier, ModelConfig
from llmctl.models.laid_out import LaidOut
from llmctl.models.language_model import LanguageModel
from llmctl.models.linear import Linear
from llmctl.models.masked_lm import MaskedLM
from llmctl.models.packed import LaidOutWeight
from llmctl.models.quantized_linear import QuantizedLinear
from llmctl.models.seq2seq_lm import Seq2SeqLM
from llmctl.models.sequence_classifier import CausalClassifier, MaskedClassifier, Seq2SeqClassifier
from llmctl.quantize.stored import open_weights

SUPERSEDED = ("rope_parameters",)
"""Spellings of transformers 5 for what we write as every release reads it; both together would contradict each other."""


def read_config(path: str | Path) -> ModelConfig:
    """The model's shape from `config.json` (or a directory that holds one), or from a GGUF file's keys."""
    file = Path(path)
    if file.suffix == checkpoint.GGUF_SUFFIX and file.is_file():
        from llmctl.gguf import file as gguf_file  # its library is needed for such files only

        hf = gguf_file.read_config(file)
    else:
        file = file / "config.json" if file.is_dir() else file
        hf = files.read_json(file)
    family = families.find(hf.get("model_type"))
    try:
        config = family.config_from_hf(hf)
        if not config_classifier.is_classifier(hf):
            return config
        return config.classifying(config_classifier.from_hf(hf, usual_classifier(config)))
    except KeyError as error:
        raise UserError(f"{file}: the key {error} is missing or has a value that llmctl does not know") from error


def usual_classifier(config: ModelConfig) -> Classifier:
    """The form that the family's classifiers have, without labels. Raises UserError for a decoder without a beginning."""
    found = getattr(families.find(config.family), "CLASSIFIER", Classifier())
    found = found[config.family] if isinstance(found, Mapping) else found
    if config.kind == "seq2seq" and config.decoder_start_id is None and not found.wraps:
        raise UserError(
            "the checkpoint does not say with which token its decoder begins",
            hint='give "decoder_start_token_id" in its config.json',
        )
    return found


def stored_config(path: str | Path) -> ModelConfig:
    """`read_config` of a checkpoint, and whether it has a head and that is the embedding: the weights know better.

    A base model's config does not differ from that of the whole one. transformers 5 calls the head of every T5 tied, and
    stores beside the embedding those that are not.
    """
    config, stored = read_config(path), open_weights(path)
    if weights.lacks_head(families.find(config.family), config, stored.keys()):
        return dataclasses.replace(config, head=None)
    names = dict.fromkeys(("embed_tokens.weight", "lm_head.weight"), torch.Size([config.vocab_size, config.d_model]))
    found = weights.sources(families.find(config.family), names, stored.keys())
    if config.tie_embeddings and len(found) == 2:
        embedding, head = (stored.get(found[name].theirs) for name in names)
        return dataclasses.replace(config, tie_embeddings=torch.equal(embedding, head))
    return config


def new_empty(config: ModelConfig) -> LanguageModel:
    """A model without weights, of the class that its config's kind asks for; build it under the meta device."""
    if config.classifier is not None:
        kinds = {"causal": CausalClassifier, "masked": MaskedClassifier, "seq2seq": Seq2SeqClassifier}
        return kinds[config.kind](config)
    return {"causal": CausalLM, "masked": MaskedLM, "seq2seq": Seq2SeqLM}[config.kind](config)


def load_model(
    path: str | Path,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    classifier: Classifier | None = None,
    seed: int = 0,
) -> LanguageModel:
    """The model of a checkpoint directory or GGUF file, in eval mode; weights stay memory-mapped where neither dtype nor device changes.

    `dtype` None keeps what the file has. A file without any tensor of a head gives a base model (its config's head is
    None). With `classifier` that takes the place of the file's head, float32 and fresh for the `seed` as far as the file
    does not have it. Matrices of a quantized checkpoint stay in few bits, as `QuantizedLinear`. Raises UserError where the
    weights and config.json disagree.
    """
    stored = open_weights(path)
    config = stored_config(path)
    if classifier is not None:
        config = config.classifying(classifier)
    family = families.find(config.family)
    with torch.device("meta"):
        model = new_empty(config)
    reset_buffers(model)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    buffers = dict(model.named_buffers())
    placed = _place_quantized(model, stored, dtype, device)
    available = [name for name in stored if name not in placed]
    optional = {*buffers, *(() if classifier is None else _fresh_head(model, seed))}
    for name, tensor in weights.load_tensors(family, _shapes(model), available, stored.get, optional=optional):
        if name in buffers:
            _assign(model, name, tensor.to(device=device))
        else:
            _assign(model, name, _parameter(tensor.to(device=device, dtype=dtype)))
    return model.eval()


def _place_quantized(model: LanguageModel, stored, dtype: torch.dtype | None, device) -> set[str]:
    """Put `QuantizedLinear`s in the place of those whose matrices are stored in few bits; the names of these in the file."""
    packed = getattr(stored, "packed", None)
    if packed is None:
        return set()
    placed, last = set(), (None, None)
    device = torch.device(device or "cpu")
    kept = LaidOut(stored.path) if device.type == "cpu" else None
    made: dict[str, LaidOutWeight] = {}
    for name, source in weights.sources(families.find(model.config.family), _shapes(model), stored.keys()).items():
        owner, _, leaf = name.rpartition(".")
        linear = model.get_submodule(owner)
        if leaf != "weight" or not isinstance(linear, Linear):
            continue
        matrix = kept and kept.find(owner)
        if matrix is None or matrix.shape != tuple(linear.weight.shape):
            if source.theirs != last[0]:  # several of ours may be parts of one
                last = source.theirs, packed(source.theirs)
            if last[1] is None:
                continue
            expected = (sum(source.sizes), linear.in_features)
            if last[1].shape != expected:
                raise UserError(f"{source.theirs} has shape {list(last[1].shape)}; config.json says {list(expected)}")
            matrix = source.cut_packed(last[1]).to(device)
        layer = QuantizedLinear(matrix, linear.bias, dtype or stored.dtype(source.theirs))
        if layer.laid_out is not None:
            made[owner] = layer.laid_out
        _assign(model, owner, layer)
        placed.add(source.theirs)
    if kept:
        kept.keep(made)
    if placed:
        model.quantized_tensors = stored.parts()
    return placed


def _fresh_head(model: LanguageModel, seed: int) -> list[str]:
    """Give the classifier its first weights; the names of its parameters."""
    model.classifier.to_empty(device="cpu")
    model.classifier.initialize(torch.Generator().manual_seed(seed))
    return [f"classifier.{name}" for name, _ in model.classifier.named_parameters()]


def stored_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """What a checkpoint holds of a model: its parameters, and the buffers that belong to its weights."""
    return model.state_dict(keep_vars=True)


def reset_buffers(model: nn.Module) -> None:
    """Give every buffer the value that it has where a checkpoint brings none."""
    for module in model.modules():
        if hasattr(module, "reset_buffers"):
            module.reset_buffers()


def hf_tensors(config: ModelConfig, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our parameters under the family's Hugging Face names; tensors that need no change are shared, not copied."""
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    table = families.find(config.family).WEIGHTS
    return {
        theirs: weights.to_theirs(change, [tensors[name].detach() for name in ours])
        for theirs, ours, change in weights.matches(table, shapes)
    }


def hf_config(config: ModelConfig, dtype: torch.dtype) -> dict:
    """The content of config.json: what the model was read with, under what it is now."""
    name = str(dtype).removeprefix("torch.")
    ours = families.find(config.family).config_to_hf(config)
    if config.classifier is not None:
        ours |= config_classifier.to_hf(config.classifier, ours["architectures"])
    merged = {**config.hf, **ours, "torch_dtype": name, "dtype": name}
    return {key: value for key, value in merged.items() if key not in SUPERSEDED}


def save_model(model: LanguageModel, directory: str | Path) -> None:
    """Write config.json and the weights into an existing directory."""
    tensors = stored_tensors(model)
    dtype = next(model.parameters()).dtype
    write_config(model.config, dtype, directory)
    checkpoint.save_tensors(directory, {**hf_tensors(model.config, tensors), **model.quantized_tensors})


def write_config(config: ModelConfig, dtype: torch.dtype, directory: str | Path) -> None:
    text = json.dumps(hf_config(config, dtype), indent=2, ensure_ascii=False)
    files.write_atomic(Path(directory) / "config.json", f"{text}\n".encode())


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in stored_tensors(model).items()}


def _parameter(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.contiguous(), requires_grad=tensor.is_floating_point())


def _assign(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, tensor)
