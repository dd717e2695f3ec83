"""Text to token ids and back: one class in front of every tokenizer that a checkpoint may carry."""

from __future__ import annotations

import hashlib
import json as jsonlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import tokenizers

from llmctl.errors import UserError
from llmctl.tokenization import bulk, decoding, edges, files, special, training

if TYPE_CHECKING:
    import numpy as np

    from llmctl import chat_template


class Tokenizer:
    """A tokenizer.json together with the tokenizer_config.json beside it.

    `json` is the file's text as it was read, or was made of older files, and `sha256` its digest; `config` names the
    special tokens in full, so that `Tokenizer.from_json(t.json, t.config)` equals `t`. `vocab_size` is the highest id plus
    one, added tokens included. `bos_id`, `eos_id`, `unk_id`, `sep_id`, `pad_id`, `cls_id` and `mask_id` are None where the
    tokenizer has no such token, and `special_ids` holds those and all other special ones. `adds_bos` says whether
    `encode` puts BOS in front by itself. `text_edges` are the ids that it puts in front of and behind every text, and
    `document_edges` those of every document of `encode_documents`.
    """

    def __init__(self, json_text: str, config: dict | None = None):
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json_text)
        except Exception as error:  # the library raises bare Exception for a file that it cannot read
            raise UserError(f"not a tokenizer.json that can be read: {error}") from error
        # A length limit or padding saved with the file belongs to whoever saved it, not to the text.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.json = json_text
        self.sha256 = hashlib.sha256(json_text.encode()).hexdigest()
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        front, back = edges.template_ids(self._tokenizer)
        self.config = special.named_in_full(config or {}, self._tokenizer, front, back)
        ids = (special.token_id(self.config, role, self._tokenizer) for role in special.ROLES)
        self.bos_id, self.eos_id, self.unk_id, self.sep_id, self.pad_id, self.cls_id, self.mask_id = ids
        self.adds_bos = self.bos_id is not None and front[:1] == [self.bos_id]
        edges.note_flags(self.config, {"bos_token": self.adds_bos, "eos_token": self.eos_id in back})
        ends = bool(back) or self.eos_id is None
        self.text_edges = front, back
        self.document_edges = front, back if ends else [self.eos_id]
        self._bulk_encoder = None
        self._pieces = decoding.pieces_for(self._tokenizer)
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a tokenizer.json, or make one from older files; `path` is a file or a directory, "bytes" needs no file.

        The older files are GPT-2's and RoBERTa's vocab.json with merges.txt, WordPiece's and ESM's vocab.txt,
        SentencePiece's .model, and .tiktoken ranks. Raises UserError for anything else, and for what is broken.
        """
        if str(path) == "bytes":
            return cls.bytes()
        json_text, config = files.read(Path(path))
        try:
            return cls(json_text, config)
        except UserError as error:
            raise UserError(f"{path}: {error.message}", hint=error.hint) from error

    @classmethod
    def from_json(cls, tokenizer_json: str, config: dict | None = None) -> Tokenizer:
        return cls(tokenizer_json, config)

    @classmethod
    def train_bpe(cls, texts: Iterable[str], vocab_size: int, special_tokens: str = "text") -> Tokenizer:
        """Learn a byte-level BPE; the vocabulary is smaller than asked where the texts hold no more repeated pairs.

        `special_tokens` is a key of `tokenization.training.SPECIALS`.
        """
        specials = training.SPECIALS[special_tokens]
        return cls(training.byte_level_bpe(texts, vocab_size, specials), specials.config)

    @classmethod
    def bytes(cls) -> Tokenizer:
        """The tokenizer whose id is the UTF-8 byte, and 256 the end of a text."""
        return cls(training.plain_bytes(), training.CONFIG)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a prompt: special tokens written in the text become their ids."""
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_documents(
        self, texts: Sequence[str | bytes], threads: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids of documents in the form for training, and where each begins; bytes are UTF-8.

        Returns ids uint32 [n_tokens] and offsets int64 [n_documents + 1]. What the post-processor adds stands around
        each document, and EOS at its end where the tokenizer has one. Special tokens written in the text stay text.
        Raises UserError for a lone surrogate.
        """
        if self._bulk_encoder is None:
            self._bulk_encoder = bulk.encoder_for(self._tokenizer, *self.document_edges)
        return self._bulk_encoder.encode(bulk.utf8(texts), threads)

    @property
    def chat_template(self) -> str | None:
        """The template for chats without tools, None where the tokenizer has none."""
        from llmctl import chat_template  # its library is large, and most uses of a tokenizer know no chats

        return chat_template.by_name(self.config.get("chat_template")).get("default")

    def render_chat(
        self, messages: Sequence[dict], add_generation_prompt: bool = False, template: str | None = None, **variables
    ) -> chat_template.Rendered:
        """The text of a chat; `template` is the name of one of several templates.

        `variables` are `tools`, `documents` and whatever else the template asks for. Raises UserError where there is no
        template, or it refuses the messages.
        """
        from llmctl import chat_template

        chosen = chat_template.choose(self.config.get("chat_template"), template, bool(variables.get("tools")))
        tokens = {role: special.content(self.config[role]) for role in special.ROLES if self.config.get(role)}
        return chat_template.render(
            chosen, messages, add_generation_prompt=add_generation_prompt, **{**tokens, **variables}
        )

    def apply_chat_template(
        self, messages: Sequence[dict], add_generation_prompt: bool = False, template: str | None = None, **variables
    ) -> list[int]:
        """Ids of a chat, as `render_chat` has its text, in which the template itself writes BOS and EOS."""
        text = self.render_chat(messages, add_generation_prompt, template, **variables).text
        return self.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ids; incomplete UTF-8 becomes U+FFFD, and ids beyond the vocabulary become nothing."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def stream_decoder(
        self, after: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> decoding.ByteStreamDecoder | decoding.WindowStreamDecoder:
        """A decoder that is fed one id at a time; `after` are ids already shown, whose continuation it decodes.

        The pieces that it returns join to what `decode` adds to the text of `after`.
        """
        if self._pieces is None:
            return decoding.WindowStreamDecoder(self._tokenizer, after, skip_special_tokens)
        return decoding.ByteStreamDecoder(self._pieces, after, self.special_ids if skip_special_tokens else frozenset())

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes, possibly a part of a character, that a token stands for inside a text; none beyond the vocabulary."""
        return decoding.token_bytes(self._tokenizer, self._pieces, int(token))

    def save(self, directory: str | Path) -> None:
        """Write tokenizer.json (byte for byte what was read) and tokenizer_config.json into an existing directory."""
        directory = Path(directory)
        (directory / "tokenizer.json").write_bytes(self.json.encode())
        config = jsonlib.dumps(self.config, indent=2, ensure_ascii=False)
        (directory / "tokenizer_config.json").write_bytes(config.encode() + b"\n")
