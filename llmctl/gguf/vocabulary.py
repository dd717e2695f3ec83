"""A tokenizer as the keys `tokenizer.*` of a GGUF file, and back."""

from __future__ import annotations

import json
from typing import Any

import tokenizers

from llmctl import chat_template
from llmctl.errors import UserError
from llmctl.gguf import pieces
from llmctl.gguf.tokens import named_and_kinds, refusal
from llmctl.ops import bpe
from llmctl.tokenization import added, byte_level, draft, sentencepiece, training, wordpiece
from llmctl.tokenization.piece_model import Kind
from llmctl.tokenizer import Tokenizer

_WORDS = {bpe.SPLIT_GPT2: "gpt-2", bpe.SPLIT_QWEN2: "qwen2", bpe.SPLIT_CL100K: "dbrx", bpe.SPLIT_O200K: "gpt-4o"}
_WORDS |= {bpe.SPLIT_DIGITS: "smollm"}
_WHOLE_WORDS = {bpe.SPLIT_CL100K: "llama-bpe"}
"""The names that llama.cpp has for ways to cut words; the second where a word that is a token is not taken apart."""

_READ = {"gpt-2": bpe.SPLIT_GPT2, "default": bpe.SPLIT_GPT2, "qwen2": bpe.SPLIT_QWEN2, "dbrx": bpe.SPLIT_CL100K}
_READ |= {"smaug-bpe": bpe.SPLIT_CL100K, "llama-bpe": bpe.SPLIT_CL100K, "llama3": bpe.SPLIT_CL100K}
_READ |= {"gpt-4o": bpe.SPLIT_O200K, "smollm": bpe.SPLIT_DIGITS, "deepseek-r1-qwen": bpe.SPLIT_QWEN2}
_IGNORING_MERGES = ("llama-bpe", "llama3")
_ROLES = {
    "bos": "bos",
    "eos": "eos",
    "unknown": "unk",
    "padding": "pad",
    "seperator": "sep",
    "mask": "mask",
    "cls": "cls",
}
"""Of the keys `tokenizer.ggml.*_token_id` (spelled as llama.cpp does) and of ours."""


def keys(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """Raises UserError naming the part of the tokenizer that GGUF, or llama.cpp, has no form for."""
    spec = json.loads(tokenizers.Tokenizer.from_str(tokenizer.json).to_str())
    model = spec["model"]
    if model["type"] == "WordPiece":
        made = _words(spec, tokenizer)
    elif model["type"] == "Unigram":
        made = pieces.unigram(spec, tokenizer)
    elif model["type"] != "BPE":
        raise refusal(f"the model {model['type']}")
    else:
        alphabet = all(character in model["vocab"] for character in training.byte_characters().values())
        made = _byte_level(spec, tokenizer) if alphabet and not model["byte_fallback"] else pieces.bpe(spec, tokenizer)
    made = {**made, **_special(tokenizer, model["type"])}
    texts, types = made["tokenizer.ggml.tokens"], made["tokenizer.ggml.token_type"]
    for token_id in range(len(texts), vocab_size):  # rows of the embedding that no token has
        texts.append(f"[PAD{token_id}]")
        types.append(int(Kind.UNUSED))
        if "tokenizer.ggml.scores" in made:
            made["tokenizer.ggml.scores"].append(-1e4)
    if len(texts) > vocab_size:
        raise UserError(
            f"the tokenizer has {len(texts)} tokens, the model {vocab_size}", hint="they do not belong together"
        )
    return made


def _special(tokenizer: Tokenizer, kind: str) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for theirs, ours in _ROLES.items():
        token_id = getattr(tokenizer, f"{ours}_id")
        if token_id is not None:
            made[f"tokenizer.ggml.{theirs}_token_id"] = token_id
    front, back = tokenizer.text_edges
    if kind == "WordPiece" and front == [tokenizer.cls_id] and back == [tokenizer.sep_id]:
        made["tokenizer.ggml.bos_token_id"] = tokenizer.cls_id  # the name that llama.cpp has for it
        return made | {"tokenizer.ggml.cls_token_id": tokenizer.cls_id}
    if front not in ([], [tokenizer.bos_id]) or back not in ([], [tokenizer.eos_id]):
        raise refusal("other tokens than BOS and EOS around a text")
    made["tokenizer.ggml.add_bos_token"] = bool(front)
    made["tokenizer.ggml.add_eos_token"] = bool(back)
    for name, template in chat_template.by_name(tokenizer.config.get("chat_template")).items():
        made["tokenizer.chat_template" + ("" if name == "default" else f".{name}")] = template
    return made


def _byte_level(spec: dict, tokenizer: Tokenizer) -> dict[str, Any]:
    split = byte_level._split(spec["pre_tokenizer"])
    whole = bool(spec["model"].get("ignore_merges"))
    name = (_WHOLE_WORDS if whole else _WORDS).get(split)
    if name is None:
        raise refusal("words that llama.cpp does not cut in this way" + (", with whole words first" if whole else ""))
    if not byte_level._normalizer_known(spec):
        raise refusal(f"the normalizer {spec['normalizer']['type']}")
    texts, types = named_and_kinds(spec, tokenizer)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in spec["model"]["merges"]],
        "tokenizer.ggml.add_space_prefix": byte_level.adds_space(spec),
    }


def _words(spec: dict, tokenizer: Tokenizer) -> dict[str, Any]:
    """BERT's: what begins a word has the mark of a space there, and what continues one has none."""
    normalizer, model = spec["normalizer"] or {}, spec["model"]
    if (
        normalizer.get("type") != "BertNormalizer"
        or not normalizer["lowercase"]
        or normalizer["strip_accents"] is False
    ):
        raise refusal("words with capitals or accents, which llama.cpp takes off")
    if (spec["pre_tokenizer"] or {}).get("type") != "BertPreTokenizer" or model["continuing_subword_prefix"] != "##":
        raise refusal("words that are not BERT's")
    texts, types = named_and_kinds(spec, tokenizer)
    return {
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.pre": "jina-v2-en",
        "tokenizer.ggml.tokens": [_to_mark(text) for text in texts],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.token_type_count": 2,
    }


def _to_mark(text: str) -> str:
    if _is_bracketed(text):
        return text
    return text[2:] if text.startswith("##") else sentencepiece.SPACE + text


def _from_mark(text: str) -> str:
    if _is_bracketed(text):
        return text
    return text[1:] if text.startswith(sentencepiece.SPACE) else f"##{text}"


def _is_bracketed(text: str) -> bool:
    """A special token, or one that is free for use."""
    return len(text) > 2 and text.startswith("[") and text.endswith("]")


def tokenizer_json(fields: dict[str, Any]) -> tuple[str, dict]:
    """tokenizer.json and its configuration of a file's keys. Raises UserError for a kind that llmctl does not read."""
    kind = fields.get("tokenizer.ggml.model")
    texts = fields.get("tokenizer.ggml.tokens")
    if not texts:
        raise UserError("the GGUF file has no tokenizer")
    types = fields.get("tokenizer.ggml.token_type") or [int(Kind.NORMAL)] * len(texts)
    config: dict[str, Any] = {}
    for theirs, ours in _ROLES.items():
        token_id = fields.get(f"tokenizer.ggml.{theirs}_token_id")
        if token_id is not None and 0 <= token_id < len(texts):
            config[f"{ours}_token"] = texts[token_id]
    for edge in ("bos", "eos"):
        config[f"add_{edge}_token"] = bool(
            fields.get(f"tokenizer.ggml.add_{edge}_token", edge == "bos" and kind == "llama")
        )
    named = {
        key.removeprefix("tokenizer.chat_template"): text for key, text in fields.items() if "chat_template" in key
    }
    templates = {key.removeprefix(".") or "default": text for key, text in named.items() if isinstance(text, str)}
    if templates:
        several = [{"name": name, "template": text} for name, text in templates.items()]
        config["chat_template"] = templates["default"] if list(templates) == ["default"] else several
    if kind == "gpt2":
        return draft.finished(_read_byte_level(fields, texts, types), config)
    if kind == "bert":
        words = [_from_mark(text) for text in texts]
        roles = {role: text for role, text in config.items() if role.endswith("_token") and isinstance(text, str)}
        roles.pop("bos_token", None)
        return wordpiece.convert("\n".join(words), roles, "bert")
    if kind in ("llama", "t5"):
        return draft.finished(pieces.read(fields, texts, types), config)
    raise UserError(f"the GGUF file's tokenizer is of the kind {kind!r}", hint="llmctl reads gpt2, llama, t5 and bert")


def _added(texts: list[str], types: list[int]) -> list[dict]:
    tokens = []
    for token_id, (text, kind) in enumerate(zip(texts, types, strict=True)):
        if kind in (Kind.CONTROL, Kind.USER_DEFINED, Kind.UNKNOWN):
            tokens.append(added.token(text, kind != Kind.USER_DEFINED) | {"id": token_id})
    return tokens


def _read_byte_level(fields: dict[str, Any], texts: list[str], types: list[int]) -> draft.Draft:
    from llmctl.tokenization import byte_pairs

    pre = fields.get("tokenizer.ggml.pre", "default")
    split = _READ.get(pre)
    if split is None:
        raise UserError(
            f"the GGUF file's tokenizer cuts words as {pre!r} does", hint=f"llmctl knows {', '.join(_READ)}"
        )
    vocab = {text: token_id for token_id, text in enumerate(texts)}
    merges = [line.split(" ", 1) for line in fields.get("tokenizer.ggml.merges", [])]
    made = draft.Draft(vocab, byte_pairs.model(vocab, merges, ignore_merges=pre in _IGNORING_MERGES))
    made.tokens, made.decoder = _added(texts, types), byte_pairs.DECODER
    made.pre_tokenizer = {**byte_pairs.DECODER, "add_prefix_space": bool(fields.get("tokenizer.ggml.add_space_prefix"))}
    patterns = {split: pattern for pattern, split in byte_level.SPLITS.items()}
    if split in patterns:
        made.pre_tokenizer = byte_pairs.split_by(patterns[split])
    elif split == bpe.SPLIT_DIGITS:
        plain = {**byte_pairs.DECODER, "add_prefix_space": False}
        made.pre_tokenizer = {"type": "Sequence", "pretokenizers": [byte_level._DIGITS, plain]}
    made.front, made.back = ("bos_token",), ()
    return made
