"""Vectors of texts: a model's hidden states, pooled."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from llmctl.data.text_batches import TextBatches
from llmctl.data.text_rows import TextRow
from llmctl.devices import choose_device
from llmctl.embedding.settings import EmbedSettings
from llmctl.errors import CalledWrongly
from llmctl.files import read_json
from llmctl.finetune.assembly import Assembly
from llmctl.models.config import LocalAttention, ModelConfig
from llmctl.models.language_model import LanguageModel
from llmctl.tokenizer import Tokenizer

_THEIR_POOLING = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_lasttoken": "last"}


class Embedder:
    """A model that gives one vector, float32 [D], for each text."""

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, settings: EmbedSettings, pooling: str):
        self.model, self.tokenizer, self.settings, self.pooling = model, tokenizer, settings, pooling
        stack = model.config.encoder or model.config
        self._n_states = stack.n_layers + 1
        self._batches = TextBatches(
            tokenizer, tokenizer.encode, stack.max_positions, settings.batch_size, settings.on_long
        )
        layer = settings.layer
        if layer is not None and not -self._n_states <= layer < self._n_states:
            raise CalledWrongly(f"--layer {layer}: the model has the layers 0 to {self._n_states - 1}")
        if settings.global_tokens and not any(isinstance(block.mixer, LocalAttention) for block in stack.blocks):
            raise CalledWrongly(f"--global-tokens: in {stack.family} every token sees all already")

    @classmethod
    def open(cls, path: str | os.PathLike, settings: EmbedSettings) -> Embedder:
        """The model and tokenizer of a checkpoint directory."""
        tokenizer = Tokenizer.load(path)
        dtype = None if settings.dtype == "auto" else settings.dtype
        model = Assembly.find(path).load(dtype, choose_device(settings.device))
        pooling = settings.pooling if settings.pooling != "auto" else usual_pooling(path, model.config)
        return cls(model, tokenizer, settings, pooling)

    @property
    def width(self) -> int:
        return self.model.config.d_model

    @property
    def n_cut(self) -> int:
        """How many texts so far were cut to what the model reads."""
        return self._batches.n_cut

    def embed(self, rows: Iterable[TextRow]) -> Iterator[tuple[TextRow, np.ndarray]]:
        """Each row and its vector, in the order of the rows. Raises UserError for a text that does not fit."""
        return self._batches.results(rows, self._vectors)

    @torch.inference_mode()
    def _vectors(self, ids: Sequence[list[int]]) -> np.ndarray:
        device = self.model.device
        inputs_BT, is_real_BT = self._batches.padded(ids, device)
        states_BTD = self._states(inputs_BT, is_real_BT).float()
        vectors_BD = pool(states_BTD, is_real_BT, self.pooling)
        if self.settings.normalize:
            vectors_BD = F.normalize(vectors_BD, dim=-1)
        return vectors_BD.cpu().numpy()

    def _states(self, inputs_BT: torch.Tensor, is_real_BT: torch.Tensor) -> torch.Tensor:
        """The chosen layer's output of the encoder, or of the only stack, [B, T, D]."""
        recorded = None if self.settings.layer is None else []
        more = {"recorded_hidden": recorded}
        if self.settings.global_tokens:
            places_T = torch.arange(inputs_BT.shape[1], device=inputs_BT.device)
            more["global_BT"] = is_real_BT & (places_T < self.settings.global_tokens)
        if self.model.config.encoder is not None:
            states_BTD = self.model.encode(inputs_BT, is_real_BT, **more).hidden_BSD
        else:
            states_BTD = self.model.hidden(inputs_BT, is_real_BT, **more)
        return states_BTD if recorded is None else recorded[self.settings.layer]


def pool(states_BTD: torch.Tensor, is_real_BT: torch.Tensor, how: str) -> torch.Tensor:
    """One vector [B, D] of the real tokens, which padding follows: "mean", "cls" (the first) or "last"."""
    if how == "cls":
        return states_BTD[:, 0]
    if how == "last":
        return states_BTD[torch.arange(len(states_BTD)), is_real_BT.sum(1) - 1]
    weights_BT1 = is_real_BT.to(states_BTD.dtype).unsqueeze(-1)
    return (states_BTD * weights_BT1).sum(1) / weights_BT1.sum(1)


def usual_pooling(path: str | os.PathLike, config: ModelConfig) -> str:
    """What sentence-transformers saved with the checkpoint, else what suits the kind of model."""
    file = Path(path) / "1_Pooling" / "config.json"
    if file.exists():
        saved = read_json(file)
        for key, pooling in _THEIR_POOLING.items():
            if saved.get(key):
                return pooling
    return "last" if config.kind == "causal" else "mean"
