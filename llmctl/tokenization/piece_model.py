"""What a SentencePiece model file holds: pieces with scores, and how text is normalized.

The fields are those of sentencepiece_model.proto (https://github.com/google/sentencepiece).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

from llmctl.errors import UserError
from llmctl.tokenization import protobuf


class Kind(IntEnum):
    """How a piece comes about."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Algorithm(IntEnum):
    UNIGRAM = 1
    BPE = 2
    WORD = 3
    CHAR = 4


@dataclass
class Piece:
    text: str = ""
    score: float = 0.0
    kind: int = Kind.NORMAL


@dataclass
class PieceModel:
    """A model as sentencepiece would read it, unset fields at the format's own defaults; ids are places in `pieces`."""

    pieces: list[Piece] = field(default_factory=list)
    algorithm: int = Algorithm.UNIGRAM
    bos_id: int = 1
    eos_id: int = 2
    pad_id: int = -1
    suffix_whitespace: bool = False
    charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True

    def of_kind(self, *kinds: Kind) -> list[Piece]:
        return [piece for piece in self.pieces if piece.kind in kinds]

    def unknown_id(self) -> int:
        return next(number for number, piece in enumerate(self.pieces) if piece.kind == Kind.UNKNOWN)

    def text_of(self, token_id: int) -> str | None:
        return self.pieces[token_id].text if 0 <= token_id < len(self.pieces) else None


def parse(data: bytes) -> PieceModel:
    """Raises UserError for bytes that are no whole model, and for pieces that make no vocabulary."""
    try:
        model = _model(data)
    except (ValueError, TypeError, AttributeError) as error:  # of a message cut short, or of other fields
        raise UserError(
            f"not a SentencePiece model: {error}", hint="the file may be cut short; fetch it again"
        ) from error
    if sum(piece.kind == Kind.UNKNOWN for piece in model.pieces) != 1:
        raise UserError("not a SentencePiece model: it needs exactly one piece for the unknown")
    if len({piece.text for piece in model.pieces}) != len(model.pieces):
        raise UserError("a SentencePiece model with a piece that stands twice in it")
    return model


def _model(data: bytes) -> PieceModel:
    model = PieceModel()
    found = set()
    for number, value in protobuf.fields(data):
        found.add(number)
        if number == 1:
            model.pieces.append(_piece(value))
        elif number == 2:
            _trainer(model, value)
        elif number == 3:
            _normalizer(model, value)
    if not found >= {1, 2, 3}:  # they stand in this order, so a file that was cut short lacks the last
        raise ValueError("it lacks the pieces, the trainer's settings or the normalizer's")
    return model


def _piece(data: bytes) -> Piece:
    piece = Piece()
    for number, value in protobuf.fields(data):
        if number == 1:
            piece.text = value.decode()
        elif number == 2:
            piece.score = float(value)
        elif number == 3:
            piece.kind = Kind(value)
    return piece


def _trainer(model: PieceModel, data: bytes) -> None:
    ids = {41: "bos_id", 42: "eos_id", 43: "pad_id"}
    for number, value in protobuf.fields(data):
        if number == 3:
            model.algorithm = Algorithm(value)
        elif number == 24:
            model.suffix_whitespace = bool(value)
        elif number in ids:
            setattr(model, ids[number], value if value < 1 << 63 else value - (1 << 64))


def _normalizer(model: PieceModel, data: bytes) -> None:
    flags = {3: "add_dummy_prefix", 4: "remove_extra_whitespaces", 5: "escape_whitespaces"}
    for number, value in protobuf.fields(data):
        if number == 2:
            model.charsmap = bytes(value)
        elif number in flags:
            setattr(model, flags[number], bool(value))
