"""Which head a fine-tuned model has: that of its base, or for labels, measures and rewards a classifier's."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np

from llmctl.errors import CalledWrongly, UserError
from llmctl.finetune.data.examples import LABELLED
from llmctl.finetune.data.store import ExampleSet
from llmctl.models.config import Classifier, ModelConfig
from llmctl.models.loading import usual_classifier
from llmctl.tokenizer import Tokenizer

log = logging.getLogger("llmctl")

HEADED = (*LABELLED, "reward")
"""Objectives of a classifier."""
_ONLY = {"regress": "value", "reward": "reward"}


def classifier_for(examples: ExampleSet, config: ModelConfig, pooling: str | None = None) -> Classifier | None:
    """The classifier that the examples ask for: the base's own if it is one; None where tokens are predicted.

    A fresh one reads the family's usual token, or by `pooling` the first, the last, or the mean of all. Raises UserError
    where base and examples do not fit each other, CalledWrongly for a `pooling` that has no place.
    """
    objective, base = examples.objective, config.classifier
    if pooling is not None and (objective not in HEADED or base is not None):
        what = "the model is a classifier already" if base is not None else f"the objective is {objective}"
        raise CalledWrongly(f"--pooling is for the fresh head of a classifier, and {what}")
    if objective not in HEADED:
        if base is not None:
            raise UserError(
                f"--objective {objective} predicts tokens, and the model is a classifier ({base.in_words})",
                hint="start from the language model, or use classify, regress or reward",
            )
        return None
    problem = _problem(examples)
    if base is not None:
        is_single = problem == "single_label_classification" and base.kind == "multi_label_classification"
        if base.kind != problem and not is_single:
            raise UserError(f"the model gives {base.in_words}; the rows are for {problem.replace('_', ' ')}")
        return base
    labels = tuple(examples.label_names or (_ONLY[objective],))
    if problem == "single_label_classification" and len(labels) == 1:
        raise UserError(f"all rows have the label {labels[0]!r}: nothing to tell apart")
    pad_id = _pad_id(examples.tokenizer, config)
    usual = usual_classifier(config)
    if pooling not in (None, usual.at):
        log.warning(
            "transformers reads a classifier of this family at the %s token: what it makes of the result is something else",
            usual.at,
        )
    if config.kind == "seq2seq" and examples.tokenizer.eos_id not in examples.tokenizer.text_edges[1]:
        log.warning(
            "transformers reads a classifier of this family at EOS, which the tokenizer does not put behind texts"
        )
    return replace(usual, labels=labels, problem=problem, pad_id=pad_id, at=pooling or usual.at)


def known_labels(config: ModelConfig) -> tuple[str, ...] | None:
    """The classes that a base has already, which rows must keep to."""
    is_of_classes = config.classifier is not None and config.classifier.kind != "regression"
    return config.classifier.labels if is_of_classes else None


def with_padding(tokenizer: Tokenizer, classifier: Classifier) -> Tokenizer:
    """The tokenizer with a padding token of the classifier's id, which transformers needs for a batch."""
    if tokenizer.pad_id is not None or classifier.pad_id is None:
        return tokenizer
    roles = {tokenizer.unk_id: "unk_token", tokenizer.eos_id: "eos_token"}
    if classifier.pad_id not in roles:
        return tokenizer
    return Tokenizer.from_json(
        tokenizer.json, {**tokenizer.config, "pad_token": tokenizer.config[roles[classifier.pad_id]]}
    )


def training_values(examples: ExampleSet) -> np.ndarray:
    """The measures of all examples to train on."""
    return examples.labels[np.concatenate(examples.train)]


def _problem(examples: ExampleSet) -> str:
    if examples.objective != "classify":
        return "regression"
    return "single_label_classification" if examples.labels.ndim == 1 else "multi_label_classification"


def _pad_id(tokenizer: Tokenizer, config: ModelConfig) -> int | None:
    """The config's or the tokenizer's, else a token that no text ends with: texts are read at their last other token.

    Encoder-decoders are read at EOS, which must not count as padding.
    """
    found = config.hf.get("pad_token_id")
    candidates = [found if found is not None and 0 <= found < config.vocab_size else None, tokenizer.pad_id]
    candidates += [tokenizer.unk_id, tokenizer.eos_id]
    last = config.hf.get("eos_token_id", tokenizer.eos_id) if config.kind == "seq2seq" else None
    return next((token for token in candidates if token is not None and token != last), None)
