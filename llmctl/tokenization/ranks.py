"""Files of ranks as tiktoken keeps them: a line holds a token in base64 and its rank, which is its id."""

from __future__ import annotations

import base64
import binascii
import logging
import re
from dataclasses import dataclass

from llmctl.errors import UserError
from llmctl.tokenization import added, byte_level, byte_pairs, draft, training

log = logging.getLogger("llmctl")

_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+")
_END = training.END_OF_TEXT


@dataclass(frozen=True)
class Encoding:
    """How a family of rank files cuts text, the special tokens with the distance of their ids from the last rank, and roles."""

    pattern: str | None
    specials: dict[str, int]
    names: dict[str, str]
    adds_bos: bool = False


def _llama3() -> Encoding:
    known = {0: "<|begin_of_text|>", 1: "<|end_of_text|>", 4: "<|finetune_right_pad_id|>", 6: "<|start_header_id|>"}
    known |= {7: "<|end_header_id|>", 8: "<|eom_id|>", 9: "<|eot_id|>", 10: "<|python_tag|>"}
    free = iter(range(256))
    tokens = [known.get(i) or f"<|reserved_special_token_{next(free)}|>" for i in range(256)]
    names = {"bos_token": known[0], "eos_token": known[1]}
    return Encoding(byte_level.CL100K_PATTERN, {token: i + 1 for i, token in enumerate(tokens)}, names, adds_bos=True)


def _qwen() -> Encoding:
    tokens = [_END, "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))]
    specials = {token: i + 1 for i, token in enumerate(tokens)}
    return Encoding(training.SPLIT_PATTERN, specials, {"eos_token": _END, "pad_token": _END})


_ENDED = {"bos_token": _END, "eos_token": _END}
_CL100K = {_END: 2, "<|fim_prefix|>": 3, "<|fim_middle|>": 4, "<|fim_suffix|>": 5, "<|endofprompt|>": 21}
ENCODINGS = {
    "gpt2": Encoding(None, {_END: 1}, _ENDED),
    "r50k": Encoding(None, {_END: 1}, _ENDED),
    "p50k": Encoding(None, {_END: -24}, _ENDED),
    "cl100k": Encoding(byte_level.CL100K_PATTERN, _CL100K, _ENDED),
    "o200k": Encoding(byte_level.O200K_PATTERN, {_END: 2, "<|endofprompt|>": 21}, _ENDED),
    "llama3": _llama3(),
    "qwen": _qwen(),
}
# Numbers of ranks that tell the encoding where the file's name does not.
_SIZES = {50256: "gpt2", 50280: "p50k", 100256: "cl100k", 199998: "o200k", 128000: "llama3", 151643: "qwen"}


def looks_like(data: bytes) -> bool:
    """Whether a file's first line is a token and its rank."""
    return _LINE.fullmatch(data[:1000].split(b"\n", 1)[0].rstrip(b"\r")) is not None


def convert(data: bytes, stem: str, config: dict, family: str) -> tuple[str, dict]:
    """tokenizer.json and its configuration; the encoding is known by the file's name `stem`, or by its size."""
    ranks = _ranks(data)
    encoding = ENCODINGS[_encoding_name(ranks, stem, family)]
    characters = training.byte_characters()
    spelled = {token: "".join(characters[byte] for byte in token) for token in ranks}
    vocab = {spelled[token]: rank for token, rank in ranks.items()}
    merges = [[spelled[token[:i]], spelled[token[i:]]] for token in ranks for i in _cuts(token, ranks)]
    pattern = encoding.pattern
    made = draft.Draft(
        vocab,
        # A word that is a token stays whole before any merge is looked at.
        byte_pairs.model(vocab, merges, ignore_merges=True),
        names=encoding.names,
        pre_tokenizer=byte_pairs.split_by(pattern) if pattern else {**byte_pairs.DECODER, "add_prefix_space": False},
        decoder=byte_pairs.DECODER,
        front=("bos_token",) if encoding.adds_bos else (),
    )
    if not config.get("added_tokens_decoder") and not config.get("added_tokens"):
        last = max(ranks.values())
        made.tokens = [added.token(token) | {"id": last + i} for token, i in encoding.specials.items()]
    return draft.finished(made, config)


def _cuts(token: bytes, ranks: dict[bytes, int]) -> list[int]:
    """Where a token falls into two: any pair of tokens that joins to one is merged at that one's rank."""
    return [i for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]


def _encoding_name(ranks: dict[bytes, int], stem: str, family: str) -> str:
    named = [name for name in ENCODINGS if stem.lower().startswith(name)]
    named += [name for name in ENCODINGS if family.startswith(name)]
    name = next(iter(named), None) or _SIZES.get(len(ranks))
    if name is None:
        log.info("%s.tiktoken does not tell how it cuts text into words; taking cl100k's way", stem)
    return name or "cl100k"


def _ranks(data: bytes) -> dict[bytes, int]:
    """Tokens in order of their ranks."""
    ranks = {}
    for number, line in enumerate(data.splitlines(), start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise UserError(f"line {number}: expected a token in base64 and its rank, found {line[:60]!r}") from error
    missing = next((byte for byte in range(256) if bytes([byte]) not in ranks), None)
    if missing is not None:
        raise UserError(f"the byte {missing:#04x} has no rank", hint="is the file whole?")
    return dict(sorted(ranks.items(), key=lambda item: item[1]))
