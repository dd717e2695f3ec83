"""What training would make of rows, as records: the examples themselves, then the counts of all."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from llmctl.data.inputs import find_inputs
from llmctl.errors import UserError
from llmctl.finetune.data.encoding import Tokens
from llmctl.finetune.data.examples import Counts, Example, ExampleReader
from llmctl.finetune.data.prepare import choose_objective
from llmctl.finetune.data.rows import read_rows
from llmctl.finetune.data.settings import FormSettings
from llmctl.finetune.data.sources import Source
from llmctl.finetune.data.template import choose_template
from llmctl.tokenizer import Tokenizer

_MOST_BINS = 12
_MOST_LABELS = 50


def inspect_data(
    sources: Sequence[Source], settings: FormSettings, tokenizer: Tokenizer, seq_len: int | None, n_shown: int
) -> Iterator[dict[str, Any]]:
    """A record "example" for each of the first `n_shown`, and a record "summary" of all rows; "kind" tells which.

    What would end training, such as a row that does not parse, is counted; the summary names the first few. Raises
    `UserError` for a file that cannot be read at all and, after the summary, where there is no example.
    """
    rows = [read_rows(source) for source in find_inputs([source.path for source in sources])]
    objective, rows[0] = choose_objective(rows[0], settings)
    reader = ExampleReader(choose_template(tokenizer, settings.chat_template), objective, settings, seq_len)
    counts = [Counts() for _ in sources]
    digests: collections.Counter[int] = collections.Counter()
    labels: collections.Counter = collections.Counter()
    lengths: list[int] = []
    for number in range(len(sources)):
        for example in reader.read(rows[number], counts[number]):
            if len(lengths) < n_shown:
                yield _shown(example, tokenizer)
            digests[example.digest()] += 1
            lengths.append(example.n_tokens)
            if example.label is not None and objective != "regress":
                labels.update(example.label if isinstance(example.label, list) else [example.label])
    yield {
        "kind": "summary",
        "objective": objective,
        **_total(counts),
        "duplicates": len(lengths) - len(digests),
        "limit": seq_len,
        "lengths": _distribution(np.array(lengths, np.int64)),
        "labels": dict(labels.most_common(_MOST_LABELS)),
        "problems": [problem for each in counts for problem in each.problems],
    }
    if not lengths:
        names = ", ".join(source.path for source in sources)
        raise UserError(f"{names}: no example in {sum(each.rows for each in counts)} rows")


def _total(counts: Sequence[Counts]) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(Counts) if field.name not in ("forms", "problems")]
    forms: collections.Counter[str] = collections.Counter()
    for each in counts:
        forms.update(each.forms)
    return {**{name: sum(getattr(each, name) for each in counts) for name in names}, "forms": dict(forms)}


def _shown(example: Example, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "kind": "example",
        "place": example.place,
        "form": example.form,
        "label": example.label,
        "sequences": [
            {"ids": each.ids.tolist(), "learned": each.learned.tolist(), "pieces": _pieces(each, tokenizer)}
            for each in example.sequences
        ],
    }


def _pieces(tokens: Tokens, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """The text in stretches that are learned or not."""
    decoder = tokenizer.stream_decoder(skip_special_tokens=False)
    stretches: list[tuple[str, bool]] = []
    for token, is_learned in zip(tokens.ids.tolist(), tokens.learned.tolist()):
        text = decoder.push(token)
        if stretches and stretches[-1][1] == is_learned:
            text = stretches.pop()[0] + text
        stretches.append((text, is_learned))
    rest = decoder.flush()
    if rest:
        stretches.append((stretches.pop()[0] + rest, bool(tokens.learned[-1])))
    return stretches


def _distribution(lengths: np.ndarray) -> dict[str, Any]:
    """Quantiles, and (from, to, number) for bins of one round width."""
    if not len(lengths):
        return {"histogram": []}
    width = next(
        step * 10**power
        for power in range(18)
        for step in (1, 2, 5)
        if lengths.max() // (step * 10**power) - lengths.min() // (step * 10**power) < _MOST_BINS
    )
    bins, numbers = np.unique(lengths // width, return_counts=True)
    found = dict(zip(bins.tolist(), numbers.tolist()))
    return {
        "shortest": int(lengths.min()),
        "median": float(np.median(lengths)),
        "mean": float(lengths.mean()),
        "longest": int(lengths.max()),
        "histogram": [
            (place * width, (place + 1) * width - 1, found.get(place, 0))
            for place in range(int(bins[0]), int(bins[-1]) + 1)
        ],
    }
