"""What `tokenize` can be asked to do."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class TokenizeSettings:
    tokenizer: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "A tokenizer's file (tokenizer.json, vocab.json, vocab.txt, .model, .tiktoken), a checkpoint, or the word "
            "bytes; without it a byte-level BPE is trained on the input.",
            "metavar": "PATH|bytes",
        },
    )
    vocab_size: int = dataclasses.field(
        default=8192,
        metadata={
            "type": "count",
            "at_least": 1,
            "show_default": "8192",
            "help": "Size of a trained tokenizer's vocabulary.",
        },
    )
    train_sample: int = dataclasses.field(
        default=64_000_000,
        metadata={"type": "size", "at_least": 1, "help": "How much text, from the start, a tokenizer is trained on."},
    )
    special_tokens: str = dataclasses.field(
        default="text",
        metadata={
            "type": ("text", "encoder", "sentinels"),
            "help": "Those of a trained tokenizer. text: <|endoftext|> behind each text. encoder: <s> and </s> around it, "
            "and <pad> and <mask>, as masked-language modelling and BART need them. sentinels: </s> behind it, <pad>, and "
            "<extra_id_0> to <extra_id_99>, as T5 needs them.",
        },
    )
    save_tokenizer: str | None = dataclasses.field(
        default=None,
        metadata={"type": "path", "metavar": "DIR", "help": "Write the tokenizer to this new directory too."},
    )
    split: str = dataclasses.field(
        default="auto",
        metadata={
            "type": ("auto", "file", "blank-line", "line", "jsonl"),
            "help": "What is one document. auto: a line of .jsonl or of standard input that is JSON with the field, a "
            "row of parquet, else a file.",
        },
    )
    field: str = dataclasses.field(
        default="text", metadata={"help": "The key or column that holds the text of jsonl and parquet."}
    )
    errors: str = dataclasses.field(
        default="strict",
        metadata={"type": ("strict", "replace", "ignore"), "help": "What becomes of bytes that are not UTF-8."},
    )
    val_fraction: float = dataclasses.field(
        default=0.0,
        metadata={
            "at_least": 0.0,
            "at_most": 0.99,
            "help": "Hold out this share of the text, from the end, for validation.",
        },
    )
    shard_tokens: int | None = dataclasses.field(
        default=None,
        metadata={
            "type": "count",
            "at_least": 1,
            "show_default": "100M",
            "help": "Tokens per file where --output is a directory.",
        },
    )
    workers: int | None = dataclasses.field(
        default=None,
        metadata={"at_least": 1, "show_default": "all cores", "help": "Threads that encode."},
    )
    overwrite: bool = dataclasses.field(default=False, metadata={"help": "Replace an output that exists."})


def is_one_file(output: str | os.PathLike) -> bool:
    """Whether an output's name is that of one file, rather than of a directory of shards."""
    return Path(output).suffix == ".arrow"
