"""From rows to tokenized examples for one objective, counting what is left out on the way."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from llmctl.errors import UserError
from llmctl.finetune.data.encoding import DraftEncoder, Tokens
from llmctl.finetune.data.forms import (
    PREFERENCES,
    Chat,
    Labelled,
    Preference,
    Rated,
    Text,
    Value,
    parse_columns,
    recognize,
    renamed,
)
from llmctl.finetune.data.labels import normal_label
from llmctl.finetune.data.rendering import Draft, Renderer
from llmctl.finetune.data.rows import Row
from llmctl.finetune.data.settings import DataSettings, FormSettings
from llmctl.stream_header import TRAIN, VAL
from llmctl.streams import TokenStream
from llmctl.tokenizer import Tokenizer

_ROWS_AT_ONCE = 256
_KEPT_PROBLEMS = 10
PAIRED = (*PREFERENCES, "seq2seq")
LABELLED = ("classify", "regress")


@dataclasses.dataclass(frozen=True)
class Example:
    """One sequence; chosen and rejected; or source and target. `label` is `normal_label`'s, or None."""

    place: str
    form: str
    sequences: tuple[Tokens, ...]
    label: Any = None
    is_held_out: bool = False

    @property
    def n_tokens(self) -> int:
        """Of the longest sequence."""
        return max(len(each.ids) for each in self.sequences)

    @property
    def n_learned(self) -> int:
        return sum(int(each.learned.sum()) for each in self.sequences)

    def digest(self) -> int:
        """64 bits that two examples share when they are the same."""
        state = hashlib.blake2b(repr(self.label).encode(), digest_size=8)
        for each in self.sequences:
            state.update(len(each.ids).to_bytes(8, "little") + each.ids.tobytes())
        return int.from_bytes(state.digest(), "little")


@dataclasses.dataclass
class Counts:
    """What became of the rows of a file; one row may give several examples, one per answer."""

    rows: int = 0
    examples: int = 0
    bad: int = 0
    untrained: int = 0
    long: int = 0
    ties: int = 0
    torn: int = 0
    tokens: int = 0
    learned: int = 0
    forms: dict[str, int] = dataclasses.field(default_factory=dict)
    problems: list[str] = dataclasses.field(default_factory=list)

    def note(self, error: UserError) -> None:
        if len(self.problems) < _KEPT_PROBLEMS:
            self.problems.append(error.message)


class ExampleReader:
    """Reads files as examples of `objective`, each at most `seq_len` tokens long.

    What is wrong with rows is an error or, as `DataSettings` say it, counted; with plain `FormSettings` it is counted
    only, and every example is there.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        objective: str,
        settings: FormSettings,
        seq_len: int | None = None,
    ):
        self.tokenizer, self.objective, self.settings = tokenizer, objective, settings
        self.seq_len, self._lenient = seq_len, not isinstance(settings, DataSettings)
        self._columns = parse_columns(settings.columns)
        self._renderer = Renderer(tokenizer, _loss_on(objective, settings.loss_on))
        self._encoder = DraftEncoder(tokenizer)

    @property
    def template_used(self) -> str | list | None:
        """The chat template as the tokenizer has it; None where none was given and no row needed one so far."""
        is_used = self._renderer.has_used_template or self.settings.chat_template is not None
        return self.tokenizer.config.get("chat_template") if is_used else None

    def read(self, rows: Iterable[Row | TokenStream], counts: Counts) -> Iterator[Example]:
        """Examples in the order of the rows. Raises `UserError` naming the place of the first that cannot be used."""
        pending: list[tuple[Row, str, list[list[Draft]], Any]] = []
        for row in rows:
            if isinstance(row, TokenStream):
                yield from self._accepted(self._documents(row, counts), counts)
                continue
            counts.rows += 1
            try:
                pending.append(self._drafted(row))
            except UserError as error:
                self.refuse(error, row.place, counts)
                counts.bad += 1
            if len(pending) == _ROWS_AT_ONCE:
                yield from self._accepted(self._encoded(pending), counts)
                pending = []
        yield from self._accepted(self._encoded(pending), counts)

    def _drafted(self, row: Row) -> tuple[Row, str, list[list[Draft]], Any]:
        if row.error is not None:
            raise row.error
        fields = renamed(row.fields, self._columns)
        form = recognize(fields, self.objective)
        value = form.build(fields)
        label = None
        if isinstance(value, (Labelled, Rated)):
            given = value.label if isinstance(value, Labelled) else value.is_desirable
            label = normal_label(self.objective, given)
        return row, form.name, self._drafts(value), label

    def _drafts(self, value: Value) -> list[list[Draft]]:
        """For each example the drafts of its sequences."""
        if isinstance(value, Preference):
            return [[self._one_draft(value.chosen), self._one_draft(value.rejected)]]
        if isinstance(value, Rated):
            return [[self._one_draft(value.answer)]]
        if isinstance(value, Labelled):
            return [[Draft(value.text, [], edges=True, literal=True)]]
        if self.objective == "seq2seq":
            return [_source_and_target(value)]
        return [[draft] for draft in self._renderer.drafts(value)]

    def _one_draft(self, value) -> Draft:
        drafts = self._renderer.drafts(value)
        if len(drafts) != 1:
            raise UserError("the answer has several turns, which the chat template writes differently in the end")
        return drafts[0]

    def _encoded(self, pending: list[tuple[Row, str, list[list[Draft]], Any]]) -> Iterator[Example]:
        drafts = [draft for _, _, examples, _ in pending for example in examples for draft in example]
        sequences = iter(self._encoder.encode(drafts))
        for row, form, examples, label in pending:
            for example in examples:
                yield Example(row.place, form, tuple(next(sequences) for _ in example), label)

    def _documents(self, stream: TokenStream, counts: Counts) -> Iterator[Example]:
        self._check_stream(stream)
        for tokens, is_val in _whole_documents(stream):
            counts.rows += 1
            yield Example(f"{stream.name}: document {counts.rows}", "tokens", (tokens,), None, is_val)

    def _check_stream(self, stream: TokenStream) -> None:
        if self.objective not in ("sft", "causal", "mlm"):
            raise UserError(f"{stream.name}: a token stream cannot serve the objective {self.objective}")
        if stream.metadata.tokenizer_sha256 != self.tokenizer.sha256:
            raise UserError(
                f"{stream.name}: its tokens were made with another tokenizer than the model's",
                hint="re-run `llmctl tokenize` with --tokenizer MODEL",
            )

    def _accepted(self, examples: Iterable[Example], counts: Counts) -> Iterator[Example]:
        for example in examples:
            try:
                kept = self._fitted(example, counts)
            except UserError as error:
                self.refuse(error, example.place, counts)
                continue
            if kept is not None:
                counts.examples += 1
                counts.forms[kept.form] = counts.forms.get(kept.form, 0) + 1
                counts.tokens += sum(len(each.ids) for each in kept.sequences)
                counts.learned += kept.n_learned
                counts.torn += any(each.is_torn for each in kept.sequences)
                yield kept

    def _fitted(self, example: Example, counts: Counts) -> Example | None:
        """The example within the limit, or None. Raises `UserError` for one that teaches nothing."""
        is_long = self.seq_len is not None and example.n_tokens > self.seq_len
        counts.long += is_long
        if self._teaches_nothing(example):
            counts.untrained += 1
            if not self._lenient:
                raise UserError("no token of it is learned", hint="is there an answer? --loss-on says what is learned")
        if self.objective in PREFERENCES and _is_tie(example):
            counts.ties += 1
            return example if self._lenient else None
        if self._lenient or not is_long:
            return example
        if self.settings.on_long == "error":
            raise UserError(
                f"{example.n_tokens} tokens, the limit is {self.seq_len}",
                hint="--on-long skip or truncate, or --seq-len",
            )
        return self._cut(example) if self.settings.on_long == "truncate" else None

    def _cut(self, example: Example) -> Example | None:
        """The beginning of a long example, if anything of it is learned."""
        cut = tuple(Tokens(each.ids[: self.seq_len], each.learned[: self.seq_len]) for each in example.sequences)
        example = dataclasses.replace(example, sequences=cut)
        return None if self._teaches_nothing(example) else example

    def _teaches_nothing(self, example: Example) -> bool:
        if self.objective in LABELLED:
            return False
        sequences = example.sequences[1:] if self.objective == "seq2seq" else example.sequences
        return not all(each.learned.any() for each in sequences)

    def refuse(self, error: UserError, place: str, counts: Counts) -> None:
        """Note what is wrong at a place, or raise it there."""
        placed = UserError(f"{place}: {error.message}", hint=error.hint or "--skip-bad counts such rows and goes on")
        if not (self._lenient or self.settings.skip_bad):
            raise placed from error
        counts.note(placed)


def _loss_on(objective: str, chosen: str) -> str:
    """Language modelling learns every token, and a comparison of answers is about the answers."""
    if objective in ("causal", "mlm"):
        return "all"
    return chosen if objective == "sft" else "assistant"


def _source_and_target(value: Value) -> list[Draft]:
    """For an encoder and a decoder, which have no chat template: the words of the prompt, and those of the answer."""
    if isinstance(value, Chat):
        *prompt, answer = (message["content"] for message in value.messages)
        if value.messages[-1]["role"] != "assistant" or not answer:
            raise UserError("the conversation does not end with an answer in words")
        source, target = "\n\n".join(prompt), answer
    elif isinstance(value, Text):
        raise UserError("seq2seq needs a prompt and a completion")
    else:
        source, target = value.prompt, value.completion
    return [Draft(source, [], edges=True), Draft(target, [(0, len(target))], edges=True)]


def _is_tie(example: Example) -> bool:
    chosen, rejected = example.sequences
    return np.array_equal(chosen.ids, rejected.ids)


def _whole_documents(stream: TokenStream) -> Iterator[tuple[Tokens, bool]]:
    """Documents, which may go on from one batch to the next, and whether they are held out."""
    held: tuple[Tokens, bool] | None = None
    for batch in stream:
        is_val = (batch.split or [TRAIN])[0] == VAL
        ids, mask = batch.ids.astype(np.int64), batch.loss_mask
        mask = np.ones(len(ids), bool) if mask is None else mask.copy()
        for number, (start, stop) in enumerate(zip(batch.offsets[:-1], batch.offsets[1:])):
            part = Tokens(ids[start:stop], mask[start:stop])
            if number == 0 and batch.continues:
                held = (Tokens(*map(np.append, held[0][:2], part[:2])), is_val)
                continue
            if held is not None:
                yield held
            part.learned[:1] = False  # nothing stands in front of it to predict it from
            held = (part, is_val)
    if held is not None:
        yield held
