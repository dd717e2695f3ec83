"""Texts to numbers: a stack whose hidden state at one token of each text goes through a head with a row for each label."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from llmctl.models import config
from llmctl.models.causal_lm import CausalLM
from llmctl.models.linear import Linear
from llmctl.models.masked_lm import MaskedLM
from llmctl.models.seq2seq_lm import Seq2SeqLM


class ClassifierHead(nn.Module):
    """out(tanh(dense(x))), or out(x), [N, labels], in the dtype of its own weights."""

    def __init__(self, spec: config.Classifier, d_model: int, dropout: float):
        super().__init__()
        self.dropout = dropout
        self.dense = Linear(d_model, d_model) if spec.dense else None
        self.out = Linear(d_model, len(spec.labels), bias=spec.bias)

    def forward(self, x_ND: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x_ND.device.type, enabled=False):
            x_ND = self._drop(x_ND.to(self.out.weight.dtype))
            if self.dense is not None:
                x_ND = self._drop(torch.tanh(self.dense(x_ND)))
            return self.out(x_ND)

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """All labels start at the same number, so that the first steps do not undo what the model knows."""
        if self.dense is not None:
            self.dense.weight.normal_(0.0, (0.5 / self.dense.in_features) ** 0.5, generator=generator)
            self.dense.bias.zero_()
        for parameter in self.out.parameters():
            parameter.zero_()

    @torch.no_grad()
    def standardize(self, x_ND: torch.Tensor) -> None:
        """Let a fresh dense layer read what tells these texts apart: each feature less its mean, over its deviation.

        What all texts share is most of a hidden state, and would be most of what the layer says too.
        """
        if self.dense is None or len(x_ND) < 2 or self.dense.bias.any():  # a pooler that came with the model has a bias
            return
        x_ND = x_ND.to(self.dense.weight.dtype)
        least = 0.01 * x_ND.square().mean().sqrt()
        self.dense.weight.div_(x_ND.std(0).clamp(min=least))
        self.dense.bias.copy_(-self.dense.weight @ x_ND.mean(0))

    def _drop(self, x_ND: torch.Tensor) -> torch.Tensor:
        return F.dropout(x_ND, self.dropout) if self.training and self.dropout else x_ND


class SequenceClassifier:
    """Stands in front of a language model's class, whose `hidden` it reads."""

    def __init__(self, config_: config.ModelConfig):
        super().__init__(config_)
        self.classifier = ClassifierHead(config_.classifier, config_.d_model, config_.dropout)

    def forward(
        self,
        input_ids_BT: torch.Tensor,
        attention_mask_BT: torch.Tensor | None = None,
        *,
        types_BT: torch.Tensor | None = None,
        documents_BT: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Numbers [B, labels]; the arguments are those of `hidden`. Of packed documents [N, labels], in their order."""
        features_ND = self.features(input_ids_BT, attention_mask_BT, types_BT=types_BT, documents_BT=documents_BT)
        return self.classifier(features_ND)

    def features(
        self,
        input_ids_BT: torch.Tensor,
        attention_mask_BT: torch.Tensor | None = None,
        *,
        types_BT: torch.Tensor | None = None,
        documents_BT: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What the head gets of each text, [B, D] or [N, D]."""
        how = {"types_BT": types_BT, "documents_BT": documents_BT}
        if self.config.classifier.at == "mean":
            _, text_BT, is_real_BT = _texts(input_ids_BT, attention_mask_BT, documents_BT)
            return _means(self.read(input_ids_BT, attention_mask_BT, **how), text_BT, is_real_BT)
        is_last, pad_id = self.config.classifier.at == "last", self.config.classifier.pad_id
        rows_N, columns_N = _ends(input_ids_BT, attention_mask_BT, documents_BT, is_last, pad_id)
        if self._is_local:
            how["global_BT"] = _marked(input_ids_BT, rows_N, columns_N)
        return self.read(input_ids_BT, attention_mask_BT, **how)[rows_N, columns_N]

    def read(
        self, input_ids_BT: torch.Tensor, attention_mask_BT: torch.Tensor | None = None, **how: torch.Tensor | None
    ) -> torch.Tensor:
        """What the model makes of every token, [B, T, D]; `how` are further arguments of `hidden`."""
        return self.hidden(input_ids_BT, attention_mask_BT, **how)

    @property
    def _is_local(self) -> bool:
        """Where attention is local, the token that is read sees all and is seen by all (Longformer's usage)."""
        return any(isinstance(block.mixer, config.LocalAttention) for block in self.config.blocks)


def _texts(input_ids_BT, attention_mask_BT, documents_BT) -> tuple[torch.Tensor, ...]:
    """[B, T] each: whether a text begins there, the number of the text, and whether the token is none of padding."""
    starts_BT = torch.zeros_like(input_ids_BT, dtype=torch.bool)
    starts_BT[:, 0] = True
    if documents_BT is not None:
        starts_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    text_BT = starts_BT.flatten().cumsum(0).view_as(input_ids_BT) - 1
    is_real_BT = torch.ones_like(starts_BT) if attention_mask_BT is None else attention_mask_BT != 0
    return starts_BT, text_BT, is_real_BT


def _ends(
    input_ids_BT, attention_mask_BT, documents_BT, is_last: bool, pad_id: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column, [N] each, of the first token of every text, or of the last that is not `pad_id`."""
    starts_BT, text_BT, is_real_BT = _texts(input_ids_BT, attention_mask_BT, documents_BT)
    if is_last and pad_id is not None:
        is_real_BT = is_real_BT & (input_ids_BT != pad_id)
    columns_BT = torch.arange(input_ids_BT.shape[1], device=input_ids_BT.device).expand_as(input_ids_BT)
    rows_N, firsts_N = starts_BT.nonzero().unbind(1)
    # of a text of padding alone it is where that begins
    columns_N = firsts_N.scatter_reduce(
        0, text_BT[is_real_BT], columns_BT[is_real_BT], "amax" if is_last else "amin", include_self=is_last
    )
    return rows_N, columns_N


def _marked(input_ids_BT: torch.Tensor, rows_N: torch.Tensor, columns_N: torch.Tensor) -> torch.Tensor:
    marked_BT = torch.zeros_like(input_ids_BT, dtype=torch.bool)
    marked_BT[rows_N, columns_N] = True
    return marked_BT


def _means(hidden_BTD: torch.Tensor, text_BT: torch.Tensor, is_real_BT: torch.Tensor) -> torch.Tensor:
    """Of each text's hidden states, float32 [N, D]."""
    texts_M, hidden_MD = text_BT[is_real_BT], hidden_BTD[is_real_BT].float()
    n_texts = int(text_BT.max()) + 1
    sums_ND = hidden_MD.new_zeros(n_texts, hidden_MD.shape[1]).index_add(0, texts_M, hidden_MD)
    counts_N = torch.bincount(texts_M, minlength=n_texts).clamp(min=1)
    return sums_ND / counts_N[:, None]


class CausalClassifier(SequenceClassifier, CausalLM):
    """A decoder that reads a text and classifies it."""


class MaskedClassifier(SequenceClassifier, MaskedLM):
    """An encoder that classifies a text."""


class Seq2SeqClassifier(SequenceClassifier, Seq2SeqLM):
    """An encoder-decoder that reads a text, is made to write it again, and classifies it by what it makes of the end
    (arXiv:1910.13461, 3.1)."""

    def read(
        self,
        input_ids_BT: torch.Tensor,
        attention_mask_BT: torch.Tensor | None = None,
        *,
        types_BT: torch.Tensor | None = None,
        documents_BT: torch.Tensor | None = None,
    ) -> torch.Tensor:
        memory = self.encode(input_ids_BT, attention_mask_BT, documents_BS=documents_BT)
        texts = (input_ids_BT, attention_mask_BT, documents_BT)
        rows_N, firsts_N = _ends(*texts, is_last=False, pad_id=None)
        written_BT = input_ids_BT.roll(1, 1)
        if self.config.classifier.wraps:
            written_BT[rows_N, firsts_N] = input_ids_BT[
                _ends(*texts, is_last=True, pad_id=self.config.classifier.pad_id)
            ]
        else:
            written_BT[rows_N, firsts_N] = self.config.decoder_start_id
        return self.hidden(written_BT, attention_mask_BT, documents_BT=documents_BT, memory=memory)
