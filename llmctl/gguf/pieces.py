"""SentencePiece's tokenizers as the keys of a GGUF file, and back: BPE, which llama.cpp calls llama, and unigram, its t5."""

from __future__ import annotations

import base64
import json
from typing import Any

from llmctl.gguf.tokens import named_and_kinds, refusal
from llmctl.tokenization import decoding, draft, sentencepiece
from llmctl.tokenization.piece_model import Algorithm, Kind, Piece, PieceModel
from llmctl.tokenizer import Tokenizer

_TRIM, _COLLAPSE = rf"\A +|[ {sentencepiece.SPACE}]+\z", " {2,}"


def bpe(spec: dict, tokenizer: Tokenizer) -> dict[str, Any]:
    """SentencePiece's BPE: llama.cpp joins the pair that makes the piece of the highest score, here the earliest merge."""
    model = spec["model"]
    if not model["byte_fallback"] or tokenizer._pieces is None:
        raise refusal("a BPE that is neither of bytes nor of SentencePiece with byte tokens")
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(model["merges"]):
        ranks.setdefault(left + right, rank)
    bytes_ = {text: Kind.BYTE for text in model["vocab"] if decoding.BYTE_TOKEN.fullmatch(text)}
    texts, types = named_and_kinds(spec, tokenizer, bytes_)
    last = float(len(model["merges"]))
    steps = json.dumps([spec["normalizer"], spec["pre_tokenizer"]])
    if "Precompiled" in steps or "Lowercase" in steps:
        raise refusal("a normalizer of characters")
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": [-float(ranks.get(text, last)) for text in texts],
        "tokenizer.ggml.add_space_prefix": tokenizer.encode(" a", add_special_tokens=False)
        != tokenizer.encode("a", add_special_tokens=False)
        and tokenizer._pieces.stripped_spaces > 0,
    }


def unigram(spec: dict, tokenizer: Tokenizer) -> dict[str, Any]:
    """The likeliest pieces. llama.cpp normalizes by the same table of characters, and as sentencepiece treats spaces."""
    vocab = spec["model"]["vocab"]
    if spec["model"].get("byte_fallback"):
        raise refusal("a unigram model that falls back on bytes, for which llama.cpp has the unknown token")
    charsmap, trims, prefix = _normalization(spec)
    texts, types = named_and_kinds(spec, tokenizer)
    types[spec["model"]["unk_id"]] = int(Kind.UNKNOWN)
    made = {
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": [float(score) for _, score in vocab] + [0.0] * (len(texts) - len(vocab)),
        "tokenizer.ggml.add_space_prefix": prefix,
        "tokenizer.ggml.remove_extra_whitespaces": trims,
    }
    return made | ({"tokenizer.ggml.precompiled_charsmap": charsmap} if charsmap else {})


def _normalization(spec: dict) -> tuple[bytes, bool, bool]:
    """(table of characters, whether spaces are trimmed and made one, whether one is put in front) of a unigram model's text."""
    charsmap, found = b"", set()
    steps = _steps(spec["normalizer"], "normalizers")
    for step in steps:
        pattern, content = step.get("pattern") or {}, step.get("content")
        if step["type"] == "Precompiled":
            charsmap = base64.b64decode(step["precompiled_charsmap"])
        elif step["type"] == "Strip" and step["strip_right"] or (pattern == {"Regex": _TRIM} and content == ""):
            found.add("trims")
        elif pattern == {"Regex": _COLLAPSE} and content in (" ", sentencepiece.SPACE):
            found.add("collapses")
        elif step["type"] == "Prepend" and step["prepend"] == sentencepiece.SPACE:
            found.add("prefix")
        elif pattern == {"String": " "} and content == sentencepiece.SPACE:
            found.add("marks")
        elif step["type"] != "NFC" or not any(other["type"] == "Precompiled" for other in steps):
            raise refusal(f"the normalizer {step['type']} of a unigram model")
    for step in _steps(spec["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "Metaspace" and step["replacement"] == sentencepiece.SPACE:
            found |= {"marks"} if step["prepend_scheme"] == "never" else {"marks", "prefix"}
            found |= {"cuts"} if step.get("split", True) else set()
        elif step["type"] != "Split" or not (
            sentencepiece.SPACE in str(step["pattern"]) or step["behavior"] == "MergedWithPrevious"
        ):
            raise refusal(f"the pre-tokenizer {step['type']} of a unigram model")
    if "marks" not in found or ("trims" in found) != ("collapses" in found):
        raise refusal("a unigram model that does not treat spaces as SentencePiece does")
    if "trims" in found and "prefix" not in found:
        raise refusal(
            "a unigram model that trims spaces and puts none in front of a text, which llama.cpp does all the same"
        )
    if "cuts" in found and any(sentencepiece.SPACE in text[1:] for text, _ in spec["model"]["vocab"]):
        raise refusal("a unigram model whose pieces of several words are never used")
    return charsmap, "trims" in found, "prefix" in found


def _steps(part: dict | None, key: str) -> list[dict]:
    if part is None:
        return []
    return [inner for step in part[key] for inner in _steps(step, key)] if key in part else [part]


def read(fields: dict[str, Any], texts: list[str], types: list[int]) -> draft.Draft:
    """The tokenizer of a file's keys, of either kind."""
    is_unigram = fields["tokenizer.ggml.model"] == "t5"
    scores = fields.get("tokenizer.ggml.scores") or [0.0] * len(texts)
    model = PieceModel(
        [Piece(text, score, kind) for text, score, kind in zip(texts, scores, types, strict=True)],
        algorithm=Algorithm.UNIGRAM if is_unigram else Algorithm.BPE,
        add_dummy_prefix=bool(fields.get("tokenizer.ggml.add_space_prefix", True)),
        remove_extra_whitespaces=bool(fields.get("tokenizer.ggml.remove_extra_whitespaces", is_unigram)),
        charsmap=bytes(fields.get("tokenizer.ggml.precompiled_charsmap") or b""),
    )
    unknown = fields.get("tokenizer.ggml.unknown_token_id", 0)
    model.pieces[unknown].kind = Kind.UNKNOWN
    vocab = {piece.text: number for number, piece in enumerate(model.pieces)}
    return draft.Draft(
        vocab,
        sentencepiece._unigram(model) if is_unigram else sentencepiece._bpe(model, vocab),
        tokens=sentencepiece._tokens(model),
        names={"unk_token": texts[unknown]},
        normalizer={"type": "Sequence", "normalizers": sentencepiece._normalizers(model)},
        pre_tokenizer=sentencepiece._pre_tokenizer(model),
        decoder=sentencepiece._decoder(model),
        front=("bos_token",),
    )
