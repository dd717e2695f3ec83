"""How much each token attends to each other in a real model: the numbers behind the picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llmctl.devices import choose_device
from llmctl.errors import CalledWrongly, UserError
from llmctl.generation.complete import encode_prompt
from llmctl.generation.session import Session
from llmctl.generation.settings import Sampling
from llmctl.models.config import Attention, LocalAttention, ModelConfig
from llmctl.models.loading import load_model, read_config
from llmctl.pictures.labels import token_labels
from llmctl.pictures.settings import AttentionSettings
from llmctl.tokenizer import Tokenizer

MOST_TOKENS = 512
"""Of a map: nobody can read a larger one."""
_TARGET_TOKENS = 64


@dataclass(frozen=True)
class Panel:
    """One map: `weights_TS` [queries, keys], rows sum to one; `layer` or `head` None is the mean over them."""

    layer: int | None
    head: int | None
    weights_TS: torch.Tensor

    @property
    def title(self) -> str:
        layer = "all layers" if self.layer is None else f"layer {self.layer}"
        return f"{layer}, {'mean of heads' if self.head is None else f'head {self.head}'}"


@dataclass(frozen=True)
class AttentionMap:
    """Maps over the same tokens, `queries` down and `keys` across; `part` is where in the model, "" where there is one."""

    panels: list[Panel]
    queries: list[str]
    keys: list[str]
    part: str = ""


def attention_map(path: str | os.PathLike, settings: AttentionSettings) -> AttentionMap:
    """Run the checkpoint on the text. Raises UserError for a model without attention, CalledWrongly for a layer or head
    that it does not have."""
    config = read_config(path)
    layers = _attending_layers(config, settings.part)
    _refuse_absent(config, layers, settings)
    recorder = _Recorder(layers, settings)
    tokenizer = Tokenizer.load(path)
    ids = encode_prompt(tokenizer, settings.attention)
    _refuse_long(ids, config)
    if config.encoder is None:
        _run(load_model(path, device=choose_device(None)).hidden, ids, recorder)
        queries, keys, part = ids, ids, ""
    else:
        queries, keys = _run_pair(Session.open(path), ids, settings, recorder)
        part = settings.part
    queries, keys = (token_labels(tokenizer, some) for some in (queries, keys))
    return AttentionMap(recorder.panels(), queries, keys, part)


class _Recorder(list):
    """Takes each layer's weights [B, H, T, S] as the model works them out, and keeps what was asked for."""

    def __init__(self, layers: Sequence[int], settings: AttentionSettings, every: int = 1, first: int = 0):
        super().__init__()
        self._layers, self._settings = iter(layers), settings
        self.every, self.first, self._n_seen = every, first, 0

    def append(self, weights_BHTS: torch.Tensor) -> None:
        """Of every `every`-th call, from the `first` on."""
        number, self._n_seen = self._n_seen, self._n_seen + 1
        if number % self.every != self.first:
            return
        layer, wanted = next(self._layers), self._settings
        if wanted.layer not in (None, layer):
            return
        weights_HTS = weights_BHTS[0].float().cpu()
        if wanted.head is not None:
            super().append(Panel(layer, wanted.head, weights_HTS[wanted.head]))
        elif wanted.layer is not None and not wanted.mean:
            self.extend(Panel(layer, head, weights_TS) for head, weights_TS in enumerate(weights_HTS))
        else:
            super().append(Panel(layer, None, weights_HTS.mean(0)))

    def panels(self) -> list[Panel]:
        if not self._settings.mean or len(self) == 1:
            return list(self)
        return [Panel(None, self._settings.head, torch.stack([panel.weights_TS for panel in self]).mean(0))]


@torch.inference_mode()
def _run(read, ids: Sequence[int], recorder: _Recorder | None, **more):
    return read(torch.tensor([ids], device=_device(read)), recorded_weights=recorder, **more)


def _run_pair(session: Session, ids: list[int], settings: AttentionSettings, recorder: _Recorder):
    """An encoder-decoder on a source and its target: the ids along both sides of the map."""
    model = session.model
    if settings.part == "encoder":
        _run(model.encode, ids, recorder)
        return ids, ids
    read = model.continued(ids, session.marks.start)
    target = [*read, *_target_ids(session, settings)]
    _refuse_long(target, model.config)
    # a decoder's layer attends to what it wrote, then to the source
    recorder.every, recorder.first = 2, int(settings.part == "cross")
    _run(model.hidden, target, recorder, memory=_run(model.encode, ids, None))
    return target, ids if settings.part == "cross" else target


def _target_ids(session: Session, settings: AttentionSettings) -> list[int]:
    if settings.target is not None:
        ids = session.tokenizer.encode(settings.target)
    else:
        completion = session.begin(settings.attention, Sampling(max_new_tokens=_TARGET_TOKENS, temperature=0.0, seed=0))
        for _ in session.stream(completion):
            pass
        ids = completion.ids
    return ids[:-1] if ids and ids[-1] == session.tokenizer.eos_id else ids


def _attending_layers(config: ModelConfig, part: str) -> list[int]:
    stack = config.encoder if part == "encoder" and config.encoder else config
    return [i for i in range(stack.n_layers) if isinstance(stack.block(i).mixer, (Attention, LocalAttention))]


def _refuse_absent(config: ModelConfig, layers: list[int], settings: AttentionSettings) -> None:
    if not layers:
        raise UserError(f"{config.family} models have no attention: they carry a state along the text instead")
    if settings.layer is not None and settings.layer not in layers:
        raise CalledWrongly(f"--layer {settings.layer}: the layers with attention are {layers[0]} to {layers[-1]}")
    n_heads = config.block(layers[0]).mixer.n_heads
    if settings.head is not None and settings.head >= n_heads:
        raise CalledWrongly(f"--head {settings.head}: the heads are 0 to {n_heads - 1}")
    if config.encoder is None and settings.target is not None:
        raise CalledWrongly(f"--target: {config.family} models have no decoder beside an encoder")


def _refuse_long(ids: Sequence[int], config: ModelConfig) -> None:
    limit = min(MOST_TOKENS, config.max_positions or MOST_TOKENS)
    if len(ids) > limit:
        raise UserError(f"the text has {len(ids)} tokens; a map shows {limit} at most", hint="shorten it")


def _device(read) -> torch.device:
    return read.__self__.embed_tokens.weight.device
