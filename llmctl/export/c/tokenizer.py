"""A tokenizer in the terms of run.c: a byte-level BPE with its words, or SentencePiece's BPE or unigram pieces.

Refused, by the name of the part, is what run.c could not give the same ids for.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import tokenizers

from llmctl.errors import UserError
from llmctl.export.c import characters
from llmctl.export.c.writer import Writer
from llmctl.tokenization import byte_level, decoding, sentencepiece, training
from llmctl.tokenizer import Tokenizer

NONE, BYTES, CHARACTERS, UNIGRAM = range(4)
_MARK = "▁"
_SPLIT_BEFORE_MARK, _SPLIT_MARK_RUNS = 6, 7
_PREFIX = {"never": 0, "first": 1, "always": 2}
_PREFIX_SPACE = 3
_PREPEND, _REPLACE, _TRIM, _PREFIX_UNLESS, _NFC = range(5)
_KINDS = {r"\p{L}": 1, r"\p{N}": 2, r"\s": 3}
_TRAITS = {r"\p{L}": 3, r"[\p{Lu}\p{Lt}]": 1, r"\p{Ll}": 2, r"\p{M}": 4}
_NEWLINE, _DIGIT = 4, 5
_UNKNOWN_PENALTY = 10.0
"""The tokenizers library scores an unknown character by so much below its worst piece."""

Step = tuple[int, list[bytes]]


@dataclass
class Form:
    """What run.c needs besides the tokens themselves."""

    kind: int
    split: int = 0
    prefix: int = 0
    unknown: int | None = None
    fuse_unknown: bool = False
    whole_words: bool = False
    byte_ids: list[int | None] = field(default_factory=lambda: [None] * 256)
    merges: list[tuple[int, int, int]] = field(default_factory=list)
    characters: list[tuple[int, int]] = field(default_factory=list)
    pieces: list[tuple[int, float, bytes]] = field(default_factory=list)
    unknown_score: float = 0.0
    steps: list[Step] = field(default_factory=list)


def form_of(tokenizer: Tokenizer) -> Form:
    """Raises UserError naming the part of the tokenizer that run.c cannot express."""
    spec = json.loads(tokenizers.Tokenizer.from_str(tokenizer.json).to_str())
    model = spec["model"]
    for token in spec["added_tokens"]:
        if token["single_word"]:
            raise _refusal(f"the added token {token['content']!r}, which is found as a whole word only")
    if tokenizer._pieces is None:
        raise _refusal(f"the decoder {_name(spec['decoder'])}")
    form = _model_form(model)
    if form.kind == BYTES:
        _byte_level(form, spec)
    else:
        _marks(form, spec)
    form.steps += _steps(spec["normalizer"])
    return form


def _refusal(part: str) -> UserError:
    return UserError(
        f"the tokenizer cannot be exported to C: {part}",
        hint="run.c has byte-level BPE with known words, and SentencePiece's BPE and unigram",
    )


def _name(part: dict | None) -> str:
    steps = (part or {}).get("decoders") or (part or {}).get("pretokenizers") or (part or {}).get("normalizers")
    return " + ".join(map(_name, steps)) if steps else str((part or {}).get("type"))


def _model_form(model: dict) -> Form:
    if model["type"] == "Unigram":
        return _unigram(model)
    if model["type"] != "BPE":
        raise _refusal(f"the model {model['type']}")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise _refusal(f"BPE with {key} {model[key]!r}")
    vocab = model["vocab"]
    form = Form(CHARACTERS)
    form.merges = [(vocab[left], vocab[right], vocab[left + right]) for left, right in model["merges"]]
    form.unknown = vocab.get(model.get("unk_token") or "")
    form.fuse_unknown = bool(model.get("fuse_unk"))
    form.whole_words = bool(model.get("ignore_merges"))
    if model.get("byte_fallback"):
        form.byte_ids = [vocab.get(f"<0x{byte:02X}>") for byte in range(256)]
    form.characters = [(ord(token), token_id) for token, token_id in vocab.items() if len(token) == 1]
    if form.whole_words:
        form.pieces = [(token_id, 0.0, token.encode()) for token, token_id in vocab.items()]
    alphabet = [vocab.get(character) for _, character in sorted(training.byte_characters().items())]
    if None not in alphabet and not model.get("byte_fallback"):
        form.kind, form.byte_ids, form.characters = BYTES, alphabet, []
        spelled = ((token_id, decoding.spelled_bytes(token)) for token, token_id in vocab.items())
        form.pieces = [(token_id, 0.0, word) for token_id, word in spelled if word and form.whole_words]
    return form


def _unigram(model: dict) -> Form:
    form = Form(UNIGRAM, unknown=model["unk_id"])
    scores = [score for _, score in model["vocab"]]
    form.unknown_score = min(scores) - _UNKNOWN_PENALTY
    ids = {token: token_id for token_id, (token, _) in enumerate(model["vocab"])}
    if model.get("byte_fallback"):
        form.byte_ids = [ids.get(f"<0x{byte:02X}>") for byte in range(256)]
    form.pieces = [(i, score, token.encode()) for i, (token, score) in enumerate(model["vocab"]) if token]
    if form.unknown is None:
        raise _refusal("a unigram model without a token for the unknown")
    return form


def _byte_level(form: Form, spec: dict) -> None:
    form.split = byte_level._split(spec["pre_tokenizer"])
    if form.split is None:
        raise _refusal(f"the pre-tokenizer {_name(spec['pre_tokenizer'])} with words that run.c does not know")
    if byte_level.adds_space(spec):
        form.prefix = _PREFIX_SPACE


def _marks(form: Form, spec: dict) -> None:
    """How a model of marks for spaces cuts and begins its words."""
    part = spec["pre_tokenizer"]
    steps = (part or {}).get("pretokenizers") or ([part] if part else [])
    for step in steps:
        pattern = step.get("pattern") or {}
        behavior = (step.get("behavior"), step.get("invert"))
        if step["type"] == "Metaspace" and step["replacement"] == _MARK:
            form.prefix = _PREFIX[step["prepend_scheme"]] if step["prepend_scheme"] != "never" else 0
            spec["normalizer"] = _also_marking(spec["normalizer"]) if form.prefix == 0 else spec["normalizer"]
            form.split = _SPLIT_BEFORE_MARK if step.get("split", True) else form.split
        elif pattern == {"String": _MARK} and behavior == ("MergedWithNext", False):
            form.split = _SPLIT_BEFORE_MARK
        elif pattern == {"Regex": f"{_MARK}+[^{_MARK}]*|[^{_MARK}]+"} and behavior == ("Isolated", False):
            form.split = _SPLIT_MARK_RUNS
        elif pattern == {"String": " "} and _replaces_spaces(spec["normalizer"]):
            continue  # there is no space left to cut at
        elif form.kind == UNIGRAM and step["type"] == "Split" and behavior == ("MergedWithPrevious", False):
            # Cuts that keep a text from becoming a byte's token (sentencepiece._apart): such are left out here.
            form.pieces = [row for row in form.pieces if not decoding.BYTE_TOKEN.fullmatch(row[2].decode())]
        else:
            raise _refusal(f"the pre-tokenizer {_name(step)}")


def _also_marking(normalizer: dict | None) -> dict:
    steps = (normalizer or {}).get("normalizers") or ([normalizer] if normalizer else [])
    return {"type": "Sequence", "normalizers": [*steps, sentencepiece._replace({"String": " "}, _MARK)]}


def _replaces_spaces(normalizer: dict | None) -> bool:
    steps = (normalizer or {}).get("normalizers") or [normalizer or {}]
    return any(step.get("pattern") == {"String": " "} for step in steps)


def _steps(normalizer: dict | None) -> list[Step]:
    if normalizer is None:
        return []
    steps: list[Step] = []
    for step in normalizer.get("normalizers") or [normalizer]:
        steps += _step(step)
    return steps


def _step(step: dict) -> list[Step]:
    pattern, content = step.get("pattern") or {}, step.get("content")
    if step["type"] == "NFC":
        return [(_NFC, [])]
    if step["type"] == "Prepend":
        return [(_PREPEND, [step["prepend"].encode()])]
    if step["type"] == "Replace" and "String" in pattern:
        return [(_REPLACE, [pattern["String"].encode(), content.encode()])]
    regex = pattern.get("Regex", "")
    if regex == rf"\A +|[ {_MARK}]+\z" and content == "":
        return [(_TRIM, [])]
    if regex == " {2,}" and content == " ":
        return []  # the step before this one has done it
    if regex.startswith(r"\A(?!(?:") and regex.endswith(r")\z)(?=[\s\S])") and content == _MARK:
        return [(_PREFIX_UNLESS, [])]
    raise _refusal(f"the normalizer {_name(step)}")


def write(out: Writer, tokenizer: Tokenizer | None, form: Form | None) -> None:
    """The tokenizer's part of model.bin; of a model without one, that there is none."""
    if form is None:
        out.word(NONE)
        return
    library, special = tokenizer._tokenizer, tokenizer.special_ids
    out.word(form.kind, tokenizer.vocab_size)
    for token_id in range(tokenizer.vocab_size):
        out.word(int(token_id in special))
        out.text(tokenizer.token_bytes(token_id))
    for token_id in form.byte_ids:
        out.id(token_id)
    out.word(form.split, form.prefix, tokenizer._pieces.stripped_spaces)
    out.id(form.unknown)
    out.word(int(form.fuse_unknown), int(form.whole_words))
    out.id(tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id)
    for ids in tokenizer.text_edges:
        out.ids(ids)
    _write_added(out, library)
    _write_steps(out, form, library)
    _write_classes(out, form, library)
    out.triples((left + 1, right + 1, joined + 1) for left, right, joined in form.merges)
    out.word(len(form.characters))
    for point, token_id in form.characters:
        out.word(point, token_id + 1)
    out.double(form.unknown_score)
    out.word(len(form.pieces))
    for token_id, score, piece in form.pieces:
        out.id(token_id)
        out.double(score)
        out.text(piece)


def _write_added(out: Writer, library: tokenizers.Tokenizer) -> None:
    added = library.get_added_tokens_decoder()
    out.word(len(added))
    for token_id, token in added.items():
        content = token.content
        if token.normalized and library.normalizer is not None:
            content = library.normalizer.normalize_str(content)
        out.id(token_id)
        out.word(token.lstrip + 2 * token.rstrip + 4 * token.normalized)
        out.text(content.encode())


def _write_steps(out: Writer, form: Form, library: tokenizers.Tokenizer) -> None:
    symbols = [t.content for t in library.get_added_tokens_decoder().values() if t.normalized]
    out.word(len(form.steps))
    for kind, texts in form.steps:
        out.word(kind)
        if kind == _PREFIX_UNLESS:
            texts = [symbol.encode() for symbol in symbols]
            out.word(len(texts))
        for text in texts:
            out.text(text)
    composes = any(kind == _NFC for kind, _ in form.steps)
    rows, classes = characters.compositions() if composes else ([], [])
    out.word(len(rows))
    for row in rows:
        out.word(*row)
    out.triples(classes)


def _write_classes(out: Writer, form: Form, library: tokenizers.Tokenizer) -> None:
    """Kinds and traits of characters: by whom words are cut, and white space beside added tokens."""
    newlines = [(10, 10, _NEWLINE), (13, 13, _NEWLINE)]
    strips = any(token.lstrip or token.rstrip for token in library.get_added_tokens_decoder().values())
    out.triples([*characters.ranges(_KINDS), *newlines] if strips or form.kind == BYTES else [])
    traits = {4: _TRAITS, 5: {}}.get(form.split if form.kind == BYTES else 0)
    digits = characters.digits(_DIGIT) if traits == {} else []
    out.triples([] if traits is None else [*characters.ranges(traits), *digits])
