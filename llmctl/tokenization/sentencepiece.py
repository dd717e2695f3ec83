"""SentencePiece models as tokenizer.json, with the ids that sentencepiece gives.

Every stretch of text between special tokens is encoded as sentencepiece encodes a text of its own.
"""

from __future__ import annotations

import base64
import re

from llmctl.errors import UserError
from llmctl.tokenization import added, byte_pairs, charsmap, draft, piece_model
from llmctl.tokenization.piece_model import Algorithm, Kind, PieceModel

SPACE = "▁"
T5 = frozenset(["t5", "mt5", "umt5", "longt5", "flant5"])
# Families whose ids are not the places of the pieces, or whose text is changed before sentencepiece sees it.
OTHERS = frozenset(
    ["albert", "barthez", "bigbird", "camembert", "debertav2", "fnet", "m2m100", "marian", "mbart", "mbart50", "nllb"]
    + ["pegasus", "plbart", "reformer", "rembert", "seamlessm4t", "speech2text", "xglm", "xlmroberta", "xlnet"]
)
_TURNS = ("<start_of_turn>", "<end_of_turn>")


def convert(data: bytes, config: dict, family: str) -> tuple[str, dict]:
    """tokenizer.json and its configuration; raises UserError for what no tokenizer.json could give the ids of."""
    if family in OTHERS:
        raise UserError(f"the SentencePiece model of {family} is not read", hint="give a tokenizer.json made of it")
    model = piece_model.parse(data)
    if model.suffix_whitespace or not model.escape_whitespaces or model.algorithm == Algorithm.WORD:
        raise UserError("a SentencePiece model of whole words, or with other marks for spaces, is not read")
    vocab = {piece.text: number for number, piece in enumerate(model.pieces)}
    made = draft.Draft(
        vocab,
        _unigram(model) if model.algorithm == Algorithm.UNIGRAM else _bpe(model, vocab),
        tokens=_tokens(model),
        names=_names(model),
        normalizer={"type": "Sequence", "normalizers": _normalizers(model)},
        pre_tokenizer=_pre_tokenizer(model),
        decoder=_decoder(model),
        front=("bos_token",),
    )
    if family in T5:
        made.front, made.back = (), ("eos_token",)
        _add_sentinels(made, int(config.get("extra_ids", 100)))
    return draft.finished(made, config)


def _names(model: PieceModel) -> dict[str, str]:
    ids = {"bos_token": model.bos_id, "eos_token": model.eos_id, "pad_token": model.pad_id}
    ids["unk_token"] = model.unknown_id()
    return {role: text for role, token_id in ids.items() if (text := model.text_of(token_id)) is not None}


def _tokens(model: PieceModel) -> list[dict]:
    specials = [added.token(piece.text) for piece in model.of_kind(Kind.CONTROL, Kind.UNKNOWN)]
    # Symbols are looked for after normalization, as sentencepiece does, where spaces are marks already.
    return specials + [added.token(text, text in _TURNS, normalized=text not in _TURNS) for text in _symbols(model)]


def _symbols(model: PieceModel) -> list[str]:
    """User-defined pieces that are found in a text before it is taken apart; a unigram model takes them by their score."""
    symbols = [piece.text for piece in model.of_kind(Kind.USER_DEFINED)]
    if model.algorithm != Algorithm.UNIGRAM:
        return symbols

    def is_changed(text: str) -> bool:
        return bool(model.charsmap) and any(charsmap.replacement(model.charsmap, each) is not None for each in text)

    return [text for text in symbols if text in _TURNS or is_changed(text)]


def _add_sentinels(made: draft.Draft, n_sentinels: int) -> None:
    """T5's sentinels stand behind the pieces, the last of them first."""
    first = len(made.vocab)
    names = [f"<extra_id_{number}>" for number in reversed(range(n_sentinels))]
    missing = [name for name in names if name not in made.vocab]
    made.tokens += [added.token(name) | {"id": first + number} for number, name in enumerate(missing)]


def _unigram(model: PieceModel) -> dict:
    # What sentencepiece gives a symbol, and what is less than any sum of pieces, since it never takes an unused one.
    instead = {Kind.USER_DEFINED: -0.1, Kind.UNUSED: -1e6}
    return {
        "type": "Unigram",
        "unk_id": model.unknown_id(),
        "vocab": [[piece.text, instead.get(piece.kind, piece.score)] for piece in model.pieces],
        "byte_fallback": bool(model.of_kind(Kind.BYTE)),
    }


def _bpe(model: PieceModel, vocab: dict[str, int]) -> dict:
    """Any pair of pieces that joins to a piece is merged, the piece of the highest score first."""
    normal = {piece.text: piece.score for piece in model.of_kind(Kind.NORMAL)}
    merges = []
    if model.algorithm == Algorithm.BPE:
        for text in sorted(normal, key=normal.get, reverse=True):
            cuts = (i for i in range(1, len(text)) if text[:i] in normal and text[i:] in normal)
            merges += [[text[:i], text[i:]] for i in cuts]
    unknown = model.text_of(model.unknown_id())
    return byte_pairs.model(
        vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=bool(model.of_kind(Kind.BYTE))
    )


def _normalizers(model: PieceModel) -> list[dict]:
    steps = []
    if model.charsmap:
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(model.charsmap).decode()})
        if charsmap.composes(model.charsmap):
            # The library looks up single characters and few sequences; the table's sequences are mostly those of NFC.
            steps = [{"type": "NFC"}, *steps, {"type": "NFC"}]
    if model.remove_extra_whitespaces:
        steps += [_replace({"Regex": rf"\A +|[ {SPACE}]+\z"}, ""), _replace({"Regex": " {2,}"}, " ")]
    if model.add_dummy_prefix:
        symbols = [_pattern(text) for text in _symbols(model)]
        # A normalizer is given each symbol too, which has to stay what it is.
        apart = rf"(?!(?:{'|'.join(symbols)})\z)"
        prefix = _replace({"Regex": rf"\A{apart}(?=[\s\S])"}, SPACE)
        steps.append(prefix if symbols else {"type": "Prepend", "prepend": SPACE})
    return [*steps, _replace({"String": " "}, SPACE)]


def _pre_tokenizer(model: PieceModel) -> dict | None:
    """Cuts where no piece can reach across; words that were seen before are then looked up, not merged again."""
    whole = [piece.text for piece in model.of_kind(Kind.NORMAL, Kind.UNUSED, Kind.USER_DEFINED)]
    steps = []
    if SPACE in whole and not any(SPACE in text[1:] for text in whole):
        steps.append({"type": "Split", "pattern": {"String": SPACE}, "behavior": "MergedWithNext", "invert": False})
    elif SPACE in whole and not any(re.search(f"[^{SPACE}]{SPACE}", text) for text in whole):
        words = {"Regex": f"{SPACE}+[^{SPACE}]*|[^{SPACE}]+"}
        steps.append({"type": "Split", "pattern": words, "behavior": "Isolated", "invert": False})
    if model.algorithm == Algorithm.UNIGRAM:
        steps.append(_apart(model))
    return {"type": "Sequence", "pretokenizers": steps} if steps else None


def _apart(model: PieceModel) -> dict:
    """Cuts inside of what is spelled like a piece that text never becomes, "</s>" say.

    The library's unigram model knows no kinds of pieces: it would take them from the text.
    """
    normal = [piece.text for piece in model.of_kind(Kind.NORMAL)]
    pairs = {text[i : i + 2] for text in normal for i in range(len(text) - 1)}
    single = {text for text in normal if len(text) == 1}

    def cost(text: str, place: int) -> bool:
        """Whether a cut there may change how the rest is taken apart: of a piece, or of a stretch of unknowns."""
        return text[place - 1 : place + 1] in pairs or single.isdisjoint(text[place - 1 : place + 1])

    rests: dict[str, list[str]] = {}
    for piece in model.of_kind(Kind.CONTROL, Kind.UNKNOWN):
        text = piece.text
        place = min(range(1, len(text)), key=lambda place, text=text: cost(text, place), default=None)
        if place is not None:
            rests.setdefault(text[:place], []).append(_pattern(text[place:]))
    if model.of_kind(Kind.BYTE):
        rests.setdefault("<", []).append("0x[0-9A-F]{2}>")
    pattern = "|".join(f"{_pattern(first)}(?={'|'.join(rest)})" for first, rest in rests.items())
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "MergedWithPrevious", "invert": False}


def _decoder(model: PieceModel) -> dict:
    steps = [_replace({"String": SPACE}, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    if model.add_dummy_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _replace(pattern: dict, content: str) -> dict:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _pattern(text: str) -> str:
    return re.sub(r"([^\w\s])", r"\\\1", text)
