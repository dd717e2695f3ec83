"""What makes a model a classifier: a number for each label in place of a head over the vocabulary. No torch here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

Problem = Literal["single_label_classification", "multi_label_classification", "regression"]
ARCHITECTURE = "ForSequenceClassification"


@dataclass(frozen=True)
class Classifier:
    """From the hidden state of a text's first or last token, or the mean over all of them, to one number for each label:
    x -> tanh(dense(x)) -> out.

    The last token is the last that is not `pad_id`, as in transformers; its key for the mean is ModernBERT's. `problem`
    None: regression for one label, else one of the labels. `wraps`: an encoder-decoder's decoder begins with the text's
    last token, not with the one that it always begins with.
    """

    labels: tuple[str, ...] = ()
    problem: Problem | None = None
    at: Literal["first", "last", "mean"] = "last"
    dense: bool = False
    bias: bool = False
    pad_id: int | None = None
    wraps: bool = False

    def parameters(self, d_model: int) -> int:
        return len(self.labels) * (d_model + self.bias) + (d_model + 1) * d_model * self.dense

    @property
    def kind(self) -> Problem:
        return self.problem or ("regression" if len(self.labels) == 1 else "single_label_classification")

    @property
    def in_words(self) -> str:
        what = {
            "single_label_classification": "one of",
            "multi_label_classification": "any of",
            "regression": "value of",
        }
        shown = ", ".join(self.labels[:10]) + (", …" if len(self.labels) > 10 else "")
        return f"{what[self.kind]} {shown} ({len(self.labels)})"


def is_classifier(hf: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a classifier."""
    return any(name.endswith(ARCHITECTURE) for name in hf.get("architectures") or ())


def from_hf(hf: Mapping[str, Any], usual: Classifier) -> Classifier:
    """`usual` with the labels of a config.json; transformers' default are two."""
    names = {int(number): name for number, name in (hf.get("id2label") or {}).items()}
    count = len(names) or hf.get("num_labels", 2)
    labels = tuple(str(names.get(i, f"LABEL_{i}")) for i in range(count))
    at = "mean" if hf.get("classifier_pooling") == "mean" else usual.at
    pad_id = hf.get("pad_token_id")
    if hf.get("is_encoder_decoder") and pad_id == hf.get("eos_token_id"):  # at EOS these are read
        pad_id = None
    return replace(usual, labels=labels, problem=hf.get("problem_type"), pad_id=pad_id, at=at)


def to_hf(classifier: Classifier, architectures: Sequence[str]) -> dict[str, Any]:
    """The keys of config.json; `architectures` are those of the language model."""
    lm = re.compile(r"(ForCausalLM|LMHeadModel|ForMaskedLM|ForConditionalGeneration|Model)$")
    return {"architectures": [lm.sub("", name) + ARCHITECTURE for name in architectures], **labels_to_hf(classifier)}


def labels_to_hf(classifier: Classifier) -> dict[str, Any]:
    """Of these keys, those that say nothing of the model."""
    return {
        "num_labels": len(classifier.labels),
        "id2label": {str(number): name for number, name in enumerate(classifier.labels)},
        "label2id": {name: number for number, name in enumerate(classifier.labels)},
        "problem_type": classifier.problem,
        **({"classifier_pooling": "mean"} if classifier.at == "mean" else {}),
        **({} if classifier.pad_id is None else {"pad_token_id": classifier.pad_id}),
    }
