"""Files of rows to a set of tokenized examples that training maps into memory."""

from __future__ import annotations

import dataclasses
import logging
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from itertools import chain

import numpy as np

from llmctl.data.inputs import find_inputs
from llmctl.errors import CalledWrongly, UserError
from llmctl.files import staged_directory
from llmctl.finetune.data.examples import LABELLED, PAIRED, Counts, Example, ExampleReader
from llmctl.finetune.data.forms import default_objective, parse_columns, renamed
from llmctl.finetune.data.labels import LabelTable
from llmctl.finetune.data.rows import Row, read_rows
from llmctl.finetune.data.settings import DataSettings, FormSettings
from llmctl.finetune.data.sources import Source
from llmctl.finetune.data.store import ExampleSet, ExampleWriter, lowest
from llmctl.finetune.data.template import choose_template
from llmctl.streams import TokenStream
from llmctl.tokenizer import Tokenizer

log = logging.getLogger("llmctl")

HELD_OUT_SHARE, HELD_OUT_MOST = 0.1, 1000
LONGEST_BY_DEFAULT = 1024
_REPORT_EVERY = 1000

Report = Callable[[int], None]


def prepare(
    sources: Sequence[Source],
    settings: DataSettings,
    tokenizer: Tokenizer,
    directory: str | os.PathLike,
    *,
    seq_len: int,
    label_names: Sequence[str] | None = None,
    report: Report = lambda rows: None,
) -> ExampleSet:
    """Read, render, tokenize and split all rows once, into the new `directory`, and open the result.

    `label_names` are those of a model that classifies already. `report` hears the number of rows read. Raises
    `UserError` for rows that cannot be used and for a source without any.
    """
    if settings.val_data and settings.val_fraction:
        raise CalledWrongly("--val-data and --val-fraction both say what is held out", "give one of them")
    rows = [read_rows(source) for source in find_inputs([source.path for source in sources])]
    objective, rows[0] = choose_objective(rows[0], settings)
    work = _Preparation(sources, settings, tokenizer, objective, seq_len, label_names)
    with staged_directory(directory) as stage, ExampleWriter(stage, tokenizer, 1 + (objective in PAIRED)) as writer:
        for number in range(len(sources)):
            work.write(number, rows[number], writer, report)
        writer.close(*work.closing(writer))
    if work.reader.template_used and not (tokenizer.chat_template or settings.chat_template):
        log.info("the model has no chat template; a plain one was taken, which is saved with the result")
    for line in left_out(sources, work.counts, seq_len):
        log.warning("%s", line)
    return ExampleSet(directory)


def default_seq_len(max_positions: int | None) -> int:
    """Tokens per row for a model of this context, None where that has no end."""
    return min(LONGEST_BY_DEFAULT, max_positions or LONGEST_BY_DEFAULT)


def choose_objective(
    rows: Iterator[Row | TokenStream], settings: FormSettings
) -> tuple[str, Iterator[Row | TokenStream]]:
    """The objective that is set, or that of the first row that can be used; and the rows again."""
    if settings.objective is not None:
        return settings.objective, rows
    columns = parse_columns(settings.columns)
    seen, problem = [], None
    for row in rows:
        seen.append(row)
        if isinstance(row, TokenStream):
            return "causal", chain(seen, rows)
        if row.fields is None:
            continue
        try:
            return default_objective(renamed(row.fields, columns)), chain(seen, rows)
        except UserError as error:
            problem = problem or UserError(f"{row.place}: {error.message}", error.hint)
            if isinstance(settings, DataSettings) and not settings.skip_bad:
                break
    if problem is not None:
        raise problem
    return "sft", iter(seen)


def left_out(sources: Sequence[Source], counts: Sequence[Counts], seq_len: int | None) -> Iterator[str]:
    """What a person should know about each file's rows."""
    for source, count in zip(sources, counts):
        if count.bad:
            yield f"{source.path}: {count.bad} of {count.rows} rows cannot be used; the first: {count.problems[0]}"
        if count.untrained:
            yield f"{source.path}: {count.untrained} examples have no learned token"
        if count.long:
            yield f"{source.path}: {count.long} examples are longer than {seq_len} tokens"
        if count.ties:
            yield f"{source.path}: {count.ties} examples prefer an answer to itself"
        if count.torn:
            yield (
                f"{source.path}: in {count.torn} examples the prompt's last token reaches into the answer; "
                "end prompts without a space, and begin answers with it"
            )


class _Preparation:
    """What is known of all sources while they are read one after the other."""

    def __init__(self, sources, settings: DataSettings, tokenizer, objective: str, seq_len: int, label_names):
        self.sources, self.settings, self.objective = sources, settings, objective
        self.reader = ExampleReader(choose_template(tokenizer, settings.chat_template), objective, settings, seq_len)
        self.labels = LabelTable(objective, label_names)
        self.counts = [Counts() for _ in sources]
        self.origins = array("i")

    def write(self, number: int, rows: Iterator[Row | TokenStream], writer: ExampleWriter, report: Report) -> None:
        """All examples of source `number`."""
        if self.sources[number].is_held_out:
            self.labels.seal()
        for example in self.reader.read(rows, self.counts[number]):
            if example.label is not None and not self._took_label(example, self.counts[number]):
                continue
            writer.write(example)
            self.origins.append(number)
            if len(self.origins) % _REPORT_EVERY == 0:
                report(sum(count.rows for count in self.counts))

    def closing(self, writer: ExampleWriter) -> tuple[dict[str, np.ndarray], dict]:
        """The index and summary of the set. Raises `UserError` where a source has nothing to train on."""
        origins = np.array(self.origins, np.int32)
        digests = np.array(writer.digests, np.uint64)
        is_val = self._split(origins, digests, np.array(writer.is_held_out, bool))
        self._refuse_empty(origins, is_val)
        n_leaked = int(np.isin(digests[is_val], digests[~is_val]).sum())
        if n_leaked:
            log.warning("%d of the %d held-out examples are also trained on", n_leaked, is_val.sum())
        index = {"sources": origins, "is_held_out": is_val}
        if self.objective in (*LABELLED, "kto"):
            index["labels"] = self.labels.array()
        weights = [source.weight for source in self.sources if not source.is_held_out]
        return index, {
            "objective": self.objective,
            "width": writer.width,
            "n_sources": len(weights),
            "weights": None if None in weights else weights,
            "label_names": self.labels.names,
            "chat_template": self.reader.template_used,
            "duplicates": len(digests) - len(np.unique(digests)),
            "files": [{"path": s.path, **dataclasses.asdict(count)} for s, count in zip(self.sources, self.counts)],
        }

    def _took_label(self, example: Example, counts: Counts) -> bool:
        try:
            self.labels.add(example.label)
        except UserError as error:
            self.reader.refuse(error, example.place, counts)
            counts.bad += 1
            return False
        return True

    def _split(self, origins: np.ndarray, digests: np.ndarray, is_val: np.ndarray) -> np.ndarray:
        """bool [n]: held out. A share of each file, unless the files themselves say it, or rows do (`is_val`)."""
        is_val = is_val | np.array([source.is_held_out for source in self.sources])[origins]
        if is_val.any() or self.settings.val_data:
            return is_val
        fraction = self.settings.val_fraction
        for number, source in enumerate(self.sources):
            if source.is_earlier:
                continue
            mine = np.flatnonzero(origins == number)
            wanted = round(len(mine) * (HELD_OUT_SHARE if fraction is None else fraction))
            wanted = min(wanted, HELD_OUT_MOST) if fraction is None else wanted
            is_val[mine[lowest(digests[mine], wanted)]] = True
        if self.objective == "classify" and is_val.any():
            is_val &= ~_only_held_out(self.labels.array(), is_val)
        return is_val

    def _refuse_empty(self, origins: np.ndarray, is_val: np.ndarray) -> None:
        for number, (source, count) in enumerate(zip(self.sources, self.counts)):
            if source.is_held_out or (~is_val[origins == number]).any():
                continue
            reasons = {
                "cannot be used": count.bad + count.untrained,
                "too long": count.long,
                "ties": count.ties,
                "held out": int(is_val[origins == number].sum()),
            }
            found = ", ".join(f"{n} {reason}" for reason, n in reasons.items() if n)
            raise UserError(
                f"{source.path}: no example to train on in {count.rows} rows" + (f": {found}" if found else ""),
                hint=self._how_to_fill(count, reasons["held out"]),
            )

    def _how_to_fill(self, count: Counts, held_out: int) -> str | None:
        if count.long and self.settings.on_long == "truncate":
            return "nothing of the answers is within --seq-len; a larger one keeps them"
        if count.long:
            return "--on-long truncate or a larger --seq-len keep long rows"
        if held_out:  # duplicates stay together
            return "--val-fraction 0 holds nothing out, --val-data names other rows"
        return None


def _only_held_out(labels: np.ndarray, is_val: np.ndarray) -> np.ndarray:
    """bool [n]: of a class that no training example has."""
    if labels.ndim == 1:
        return ~np.isin(labels, labels[~is_val])
    return (labels[:, ~labels[~is_val].any(axis=0)] > 0).any(axis=1)
