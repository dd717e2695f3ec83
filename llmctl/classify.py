"""What a classifier says of texts."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch

from llmctl.data.text_batches import TextBatches
from llmctl.data.text_rows import TextRow
from llmctl.devices import choose_device
from llmctl.errors import UserError
from llmctl.finetune.assembly import Assembly
from llmctl.finetune.data.encoding import DraftEncoder
from llmctl.finetune.data.rendering import Draft
from llmctl.models.language_model import LanguageModel
from llmctl.tokenizer import Tokenizer


class TextClassifier:
    """A classifier and its tokenizer, which reads texts as in training: special tokens written in them stay text."""

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        batch_size: int = 32,
        on_long: Literal["error", "truncate"] = "error",
        name: str = "the model",
        literal: bool = True,
    ):
        """`literal` False is for chats as a template renders them, with their special tokens and BOS in the text.

        Raises UserError for a model that is no classifier.
        """
        config = model.config
        if config.classifier is None:
            raise UserError(
                f"{name}: a language model, not a classifier",
                hint="llmctl finetune MODEL rows.jsonl --objective classify makes one of it",
            )
        self.model, self._device = model, model.device
        encoder = DraftEncoder(tokenizer)

        def encode(text: str) -> list[int]:
            return encoder.encode([Draft(text, [], edges=literal, literal=literal)])[0].ids.tolist()

        self._batches = TextBatches(tokenizer, encode, config.max_positions, batch_size, on_long)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike,
        dtype: str | None = None,
        device: str | None = None,
        adapters: Sequence[str] = (),
        force: bool = False,
        **how: Any,
    ) -> TextClassifier:
        """Of a checkpoint or adapter directory; `adapters` and `force` are those of `Assembly.find`."""
        assembly = Assembly.find(path, adapters, force)
        return cls(assembly.load(dtype, choose_device(device)), assembly.tokenizer(), name=str(path), **how)

    def classify(self, rows: Iterable[TextRow]) -> Iterator[tuple[TextRow, dict[str, Any]]]:
        """Each row, in order, with `predicted`: a label, a list of labels, or a number; and `probabilities` of labels."""
        for row, scores in self._batches.results(rows, self._scores):
            yield row, self._said(scores)

    @torch.inference_mode()
    def _scores(self, ids: list[list[int]]) -> list[torch.Tensor]:
        return list(self.model(*self._batches.padded(ids, self._device)).float().cpu())

    def _said(self, scores_C: torch.Tensor) -> dict[str, Any]:
        spec = self.model.config.classifier
        if spec.kind == "regression":
            values = scores_C.tolist()
            return {"predicted": values[0] if len(values) == 1 else dict(zip(spec.labels, values))}
        is_single = spec.kind == "single_label_classification"
        probabilities = scores_C.softmax(0) if is_single else scores_C.sigmoid()
        chosen = [spec.labels[i] for i in (scores_C > 0).nonzero().flatten()]
        predicted = spec.labels[int(scores_C.argmax())] if is_single else chosen
        return {"predicted": predicted, "probabilities": dict(zip(spec.labels, probabilities.tolist()))}
