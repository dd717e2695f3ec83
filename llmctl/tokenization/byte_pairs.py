"""GPT-2's pair of files, vocab.json and merges.txt, and the families that share it."""

from __future__ import annotations

from llmctl.errors import UserError
from llmctl.tokenization import added, draft, training

ROBERTA = frozenset(["roberta", "bart", "longformer", "led", "mvp", "xlmrobertaxl", "layoutlmv3", "deberta"])
QWEN = frozenset(["qwen2", "qwen2moe", "qwen3", "qwen3moe"])
DECODER = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}


def convert(vocab: dict[str, int], merges_text: str, config: dict, family: str) -> tuple[str, dict]:
    """tokenizer.json and its configuration; raises UserError where the two files do not fit."""
    merges = _merges(merges_text, vocab)
    if any(token.endswith("</w>") for token in vocab):
        raise UserError("a BPE whose words end in </w> is not read", hint="give a tokenizer.json made of it")
    if family in ROBERTA or (not family and {"<s>", "</s>", "<mask>"} <= vocab.keys()):
        made = _roberta(vocab)
    else:
        made = _gpt2(vocab)
    made.model = model(vocab, merges)
    made.decoder = DECODER
    made.pre_tokenizer = {**DECODER, "add_prefix_space": bool(config.get("add_prefix_space", False))}
    if family in QWEN:
        made.normalizer = {"type": "NFC"}
        made.pre_tokenizer = split_by(training.SPLIT_PATTERN)
    return draft.finished(made, config)


def model(vocab: dict[str, int], merges: list[list[str]], **changes: object) -> dict:
    """The section of a BPE in tokenizer.json."""
    plain = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
    }
    return {**plain, **changes, "vocab": vocab, "merges": merges}


def split_by(pattern: str) -> dict:
    """The pre-tokenizer of a byte-level BPE that cuts words by another pattern than GPT-2's."""
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {
        "type": "Sequence",
        "pretokenizers": [split, {**DECODER, "add_prefix_space": False, "use_regex": False}],
    }


def _gpt2(vocab: dict[str, int]) -> draft.Draft:
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), training.END_OF_TEXT)
    return draft.Draft(vocab, {}, names=names)


def _roberta(vocab: dict[str, int]) -> draft.Draft:
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    names |= {"cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"}
    # The mask takes the space in front of it, since the word that it hides would have.
    tokens = [added.token("<mask>", lstrip=True)] if "<mask>" in vocab else []
    edges = {"front": ("cls_token",), "back": ("sep_token",), "between": ("sep_token",)}
    return draft.Draft(vocab, {}, tokens, names, **edges)


def _merges(text: str, vocab: dict[str, int]) -> list[list[str]]:
    merges = []
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.rstrip("\r")
        if not line or (number == 1 and line.startswith("#version")):
            continue
        parts = line.split(" ")
        if len(parts) != 2:
            raise UserError(f"merges.txt, line {number}: expected two tokens, found {line!r}")
        missing = next((token for token in (*parts, "".join(parts)) if token not in vocab), None)
        if missing is not None:
            raise UserError(f"merges.txt, line {number}: {missing!r} is not in vocab.json")
        merges.append(parts)
    word = next((token for token in vocab if token.startswith("Ġ") and len(token) > 1), None)
    if not merges and word is not None:
        raise UserError(
            f"merges.txt holds no merges, of which a token like {word!r} is made", hint="is the file whole?"
        )
    return merges
