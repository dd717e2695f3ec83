"""The tokens of a tokenizer as GGUF lists them, and what to say of a tokenizer that has no such form."""

from __future__ import annotations

from collections.abc import Mapping

from llmctl.errors import UserError
from llmctl.tokenization.piece_model import Kind
from llmctl.tokenizer import Tokenizer


def refusal(part: str) -> UserError:
    return UserError(
        f"the tokenizer has no GGUF form: {part}",
        hint="llama.cpp has byte-level BPE with known words, and SentencePiece",
    )


def named_and_kinds(
    spec: dict, tokenizer: Tokenizer, normal: Mapping[str, Kind] | None = None
) -> tuple[list[str], list[int]]:
    """Texts and kinds of all ids; `normal` gives the kind of tokens of the model where it is another than NORMAL."""
    vocab, normal = spec["model"]["vocab"], normal or {}
    if isinstance(vocab, list):  # of a unigram model, with scores
        vocab = {text: token_id for token_id, (text, _) in enumerate(vocab)}
    texts = [f"[PAD{i}]" for i in range(tokenizer.vocab_size)]
    types = [int(Kind.UNUSED)] * len(texts)
    for text, token_id in vocab.items():
        texts[token_id], types[token_id] = text, int(normal.get(text, Kind.NORMAL))
    for token in spec["added_tokens"]:
        texts[token["id"]] = token["content"]
        types[token["id"]] = int(Kind.CONTROL if token["special"] else Kind.USER_DEFINED)
    if tokenizer.unk_id is not None and "unk_token" in spec["model"]:
        types[tokenizer.unk_id] = int(Kind.UNKNOWN) if spec["model"]["unk_token"] else types[tokenizer.unk_id]
    return texts, types
