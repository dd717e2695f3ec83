"""What a person can say about fine-tuning data; each field is a flag and a recipe key. No heavy imports here."""

from __future__ import annotations

import dataclasses
from typing import Literal

DATA = "Data"
OBJECTIVES = ("sft", "causal", "mlm", "seq2seq", "classify", "regress", "dpo", "orpo", "kto", "simpo", "reward")


def _flag(default, help: str, **metadata):
    return dataclasses.field(default=default, metadata={"help": help, "group": DATA, **metadata})


@dataclasses.dataclass(frozen=True)
class FormSettings:
    """How rows become examples."""

    objective: str | None = _flag(
        None, "What is asked of the model.", type=OBJECTIVES, show_default="by the form of the first row"
    )
    columns: tuple[str, ...] = _flag(
        (), "Rename keys or columns: prompt=question,completion=answer.", metavar="NEW=OLD,…"
    )
    chat_template: str | None = _flag(
        None, "A Jinja chat template, or a file of one, instead of the model's own.", metavar="FILE|TEXT"
    )
    loss_on: Literal["assistant", "completion", "last", "all"] = _flag(
        "assistant",
        "Which tokens are learned: the assistant's turns (of prompt and completion, those of the completion), all that "
        "follows the prompt, the last answer only, or every token.",
    )
    seq_len: int | None = _flag(None, "Tokens per row.", at_least=2, show_default="the model's context, at most 1024")


@dataclasses.dataclass(frozen=True)
class DataSettings(FormSettings):
    """And which of them are used."""

    on_long: Literal["skip", "truncate", "error"] = _flag("skip", "What becomes of examples longer than --seq-len.")
    skip_bad: bool = _flag(False, "Count rows that cannot be used, and go on without them.")
    val_data: tuple[str, ...] = _flag((), "Held-out rows in a file of their own; may be repeated.", type="path")
    val_fraction: float | None = _flag(
        None,
        "Hold out this share of the rows, by their content, so that duplicates stay together.",
        at_least=0.0,
        at_most=0.99,
        show_default="0.1, but 1000 rows at most",
    )
