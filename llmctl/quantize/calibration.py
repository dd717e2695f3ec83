"""Text to calibrate on, and its held-out end to check by."""

from __future__ import annotations

import codecs
import hashlib
import sys
from dataclasses import dataclass

import torch

from llmctl import agreement
from llmctl.errors import UserError
from llmctl.models.config import ModelConfig
from llmctl.streams import read_stream
from llmctl.tokenizer import Tokenizer

STREAM_START = b"\xff"
MOST_BYTES = 64 << 20
"""Of a text; what is beyond is not read."""
FEWEST_TOKENS = 256
HELD_OUT_SHARE, HELD_OUT_ROWS = 0.1, 16


@dataclass(frozen=True)
class Rows:
    """Token ids [rows, tokens] to calibrate on (None: there is no text) and to check by."""

    calibration_BT: torch.Tensor | None
    held_out_BT: torch.Tensor

    @property
    def sha256(self) -> str | None:
        """Of the ids that were calibrated on."""
        ids_BT = self.calibration_BT
        return None if ids_BT is None else hashlib.sha256(ids_BT.numpy().tobytes()).hexdigest()


def read(path: str | None, tokenizer: Tokenizer | None, config: ModelConfig, samples: int, length: int) -> Rows:
    """Rows of the text or token stream at `path` (- is standard input), spread over all of it.

    Raises UserError for text that is too short, or that another tokenizer made.
    """
    if path is None:
        return Rows(None, agreement.probe_ids(tokenizer, config.vocab_size))
    if tokenizer is None:
        raise UserError("the checkpoint has no tokenizer, so calibration text says nothing to it")
    ids = _ids(path, tokenizer, (samples + HELD_OUT_ROWS) * length)
    length = min(length, config.max_positions or length)
    n_held_out = max(int(len(ids) * HELD_OUT_SHARE), FEWEST_TOKENS // 4)
    if len(ids) < FEWEST_TOKENS:
        raise UserError(
            f"{_named(path)}: {len(ids)} tokens to calibrate on; expected at least {FEWEST_TOKENS}",
            hint="a few hundred kilobytes of text like what the model will read are enough",
        )
    train, held_out = ids[:-n_held_out], ids[-n_held_out:]
    return Rows(_spread(train, samples, length), _spread(held_out, HELD_OUT_ROWS, length))


def _spread(ids: torch.Tensor, rows: int, length: int) -> torch.Tensor:
    """As many rows as there are without overlap, at equal distances; shorter ones of a short text."""
    length = min(length, len(ids))
    rows = min(rows, len(ids) // length)
    starts = torch.linspace(0, len(ids) - length, rows).long()
    return torch.stack([ids[start : start + length] for start in starts.tolist()])


def _ids(path: str, tokenizer: Tokenizer, wanted: int) -> torch.Tensor:
    source = sys.stdin.buffer if path == "-" else _open(path)
    name = _named(path)
    with source:
        if source.peek(1)[:1] == STREAM_START:
            return _of_stream(source, name, tokenizer, wanted)
        text = source.read(MOST_BYTES)
    return torch.tensor(tokenizer.encode(_decoded(text, name)), dtype=torch.long)


def _named(path: str) -> str:
    return "standard input" if path == "-" else path


def _decoded(text: bytes, name: str) -> str:
    # A character that the limit cut in two must not spoil the rest.
    is_whole = len(text) < MOST_BYTES
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(text, is_whole)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name}: not UTF-8: byte {text[error.start]:#04x} at offset {error.start}",
            hint="calibration takes text or a token stream; llmctl tokenize reads other files",
        ) from error


def _open(path: str):
    try:
        return open(path, "rb")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error


def _of_stream(source, name: str, tokenizer: Tokenizer, wanted: int) -> torch.Tensor:
    """The documents one after another, until there are enough."""
    stream = read_stream(source)
    found = stream.tokenizer().sha256
    if found != tokenizer.sha256:
        raise UserError(
            f"{name}: made by another tokenizer ({found[:12]}; the model's is {tokenizer.sha256[:12]})",
            hint="tokenize the text with --tokenizer MODEL",
        )
    parts, count = [], 0
    for batch in stream:
        if count >= wanted and len(parts) > 0:
            continue  # to its end, which tells whether it is whole
        parts.append(torch.from_numpy(batch.ids.astype("int64")))
        count += len(parts[-1])
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.long)
