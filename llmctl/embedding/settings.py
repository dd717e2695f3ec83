"""What `llmctl embed` can be asked to do. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


def _setting(default, help: str, **metadata):
    return field(default=default, metadata={"help": help, **metadata})


@dataclass(frozen=True)
class EmbedSettings:
    pooling: Literal["auto", "mean", "cls", "last"] = _setting(
        "auto",
        "What of a text's tokens: their mean, the first, or the last. auto: as the checkpoint says "
        "(1_Pooling/config.json of sentence-transformers), else last for a decoder and mean for the others.",
    )
    normalize: bool = _setting(False, "Scale every vector to length 1.")
    layer: int | None = _setting(
        None, "Take the output of this layer: 0 is the embedding, -1 the last with the final norm.", show_default="-1"
    )
    on_long: Literal["error", "truncate"] = _setting("error", "What becomes of a text longer than the context.")
    global_tokens: int = _setting(
        0, "So many tokens from the first on see all and are seen by all (Longformer).", at_least=0
    )
    field: str = _setting("text", "The key that holds the text of JSON Lines.")
    batch_size: int = _setting(32, "Texts at a time.", at_least=1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _setting(
        "auto", "To compute in; auto is the dtype of the checkpoint."
    )
    device: str | None = _setting(None, "cpu, cuda, cuda:1; by default a GPU where there is one.")
    overwrite: bool = _setting(False, "Replace an output that exists.")
