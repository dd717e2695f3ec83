"""Soft prompts and prefixes in a model: trained virtual tokens in front of every text, read and written as PEFT has them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from llmctl.errors import UserError
from llmctl.finetune.methods import Prefix, SoftPrompt
from llmctl.models.config import Attention
from llmctl.models.context import Context
from llmctl.models.language_model import LanguageModel
from llmctl.models.transformer import Stack
from llmctl.models.virtual_tokens import VirtualPrefix, VirtualPrompt

NAME = "prompt_embeddings"


def attach(model: LanguageModel, method: SoftPrompt | Prefix, seed: int = 0) -> None:
    """Give the model fresh virtual tokens, which do at first what as many random tokens of its vocabulary do.

    An encoder-decoder's prompts stand in front of its sources, its prefixes in its decoder.
    """
    generator = torch.Generator().manual_seed(seed)
    ids_1N = torch.randint(model.config.vocab_size, (1, method.length), generator=generator)
    ids_1N = ids_1N.to(model.embed_tokens.weight.device)
    with torch.no_grad():
        if isinstance(method, SoftPrompt):
            _put(model, method, VirtualPrompt(model.embed(ids_1N)[0].float().clone()))
        else:
            _put(model, method, VirtualPrefix(_keys_and_values(model, ids_1N)))


def to_peft(model: LanguageModel, method: SoftPrompt | Prefix) -> dict[str, torch.Tensor]:
    """[N, D], or of a prefix [N, layers * 2 * G * K]."""
    return {NAME: _stack(model, method).virtual.weight.detach().flatten(1)}


def from_peft(model: LanguageModel, method: SoftPrompt | Prefix, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put PEFT's tensor in. Raises UserError where it does not fit the model."""
    if NAME not in tensors:
        raise UserError(f"the adapter lacks {NAME}")
    weight = tensors[NAME].float().clone()
    shape = (method.length, model.config.d_model)
    if isinstance(method, Prefix):
        shape = (method.length, model.config.n_layers, 2, *_kv_shape(model))
    if weight.numel() != torch.Size(shape).numel() or len(weight) != method.length:
        raise UserError(
            f"the adapter's {NAME} has {list(weight.shape)}; {method.length} virtual tokens of this model take "
            f"{list(shape)}",
            hint="it was trained on another base, or on both stacks of an encoder-decoder",
        )
    kind = VirtualPrompt if isinstance(method, SoftPrompt) else VirtualPrefix
    _put(model, method, kind(weight.view(shape).to(model.embed_tokens.weight.device)))


def _stack(model: LanguageModel, method: SoftPrompt | Prefix) -> Stack:
    return model.encoder if isinstance(method, SoftPrompt) and model.config.encoder is not None else model


def _put(model: LanguageModel, method: SoftPrompt | Prefix, virtual: VirtualPrompt | VirtualPrefix) -> None:
    stack = _stack(model, method)
    if stack.virtual is not None:
        raise UserError("the model has virtual tokens already, and can have one adapter's only")
    if stack.config.max_positions is not None and virtual.count >= stack.config.max_positions:
        raise UserError(f"{virtual.count} virtual tokens fill the model's context of {stack.config.max_positions}")
    stack.virtual = virtual


def _kv_shape(model: LanguageModel) -> tuple[int, int]:
    """Heads and their width, of keys and values in every layer. Raises UserError where these are not the same."""
    mixers = [model.config.block(i).mixer for i in range(model.config.n_layers)]
    for mixer in mixers:
        if not isinstance(mixer, Attention):
            raise UserError(
                f"a prefix is keys and values of attention, and {model.config.family} has {type(mixer).__name__} layers",
                hint="--method prompt works with every model",
            )
    shapes = {(mixer.n_kv_heads, mixer.head_dim) for mixer in mixers}
    if len(shapes) > 1:
        raise UserError(f"a prefix needs heads of one shape in all layers; {model.config.family} has {sorted(shapes)}")
    return shapes.pop()


def _keys_and_values(model: LanguageModel, ids_1N: torch.Tensor) -> torch.Tensor:
    """What every layer makes of these tokens, [N, layers, 2, G, K] float32."""
    _kv_shape(model)
    context = Context(ids_1N.shape[1], ids_1N.device)
    if model.config.encoder is not None:
        context.memory = model.encode(ids_1N)
    context.recorded_keys = []
    model.run(model.embed(ids_1N), context)
    return torch.stack(context.recorded_keys).permute(3, 0, 1, 2, 4).float().contiguous()
