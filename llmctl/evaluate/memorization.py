"""How much of its training data a model gives away: documents continued, by length of the prompt and number of copies.

The setup is that of Carlini et al. (2023): the same tokens of a document are to be produced from the tokens before them.
"""

from __future__ import annotations

import collections
import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from llmctl.data.corpus import Corpus, TokenView
from llmctl.errors import CalledWrongly, UserError
from llmctl.evaluate.results import Record, ResultsFile
from llmctl.evaluate.run import Done, Evaluation, Progress
from llmctl.evaluate.settings import SuiteSettings
from llmctl.evaluate.suffix_array import SuffixArray
from llmctl.evaluate.summary import summarize
from llmctl.evaluate.task import Task
from llmctl.generation.settings import Sampling, resolve

TASK = Task(name="memorization", kind="memorization", prompt="")
_NO_PART = (
    "num_fewshot", "fewshot_data", "apply_chat_template", "system", "max_new_tokens", "window", "stride", "reward"
)  # fmt: skip
_ALIKE = 0.75  # BLEU above which a continuation counts as approximately extracted (Ippolito et al., 2023)


@dataclass(frozen=True)
class Probe:
    """`expected` follows `prefix` in a training document that has `copies`."""

    number: int
    prefix: list[int]
    expected: list[int]
    copies: int


def run(
    evaluation: Evaluation,
    files: Sequence[str],
    settings: SuiteSettings,
    results: ResultsFile,
    show: Callable[[str], None],
    progress: Progress,
) -> Done:
    """Each probe continued by the likeliest tokens, and compared with its document and with all of the stream."""
    if not files:
        raise CalledWrongly("memorization of what?", hint="llmctl eval MODEL corpus.arrow --suite memorization")
    evaluation.settings.refuse("--suite memorization", _NO_PART)
    lengths = _lengths(settings.prefix_lengths)
    room, longest = evaluation.judge.room, lengths[-1] + settings.continuation
    if room is not None and longest > room + 1:  # the last token is not read back
        raise CalledWrongly(
            f"a prefix of {lengths[-1]} and {settings.continuation} more tokens: the model's context is {room}",
            hint="lower --prefix-lengths or --continuation",
        )
    corpus = Corpus.open(files, tokenizer_sha256=evaluation.tokenizer.sha256)
    view = corpus.split("train")
    if view is None:
        raise UserError("the token stream holds no training tokens")
    how = {"prefix_lengths": lengths, "continuation": settings.continuation, "documents": settings.documents}
    about = {**evaluation.about(TASK, corpus.sha256), **how}
    limit = evaluation.settings.limit
    records = [record for record in results.begin(about) if limit is None or record["id"] < limit]
    done = {record["id"] for record in records}
    with SuffixArray(view, settings.continuation) as suffixes:
        probes = list(itertools.islice(_probes(view, lengths, settings), limit))
        for each in probes[: evaluation.settings.show]:
            given, expected = (evaluation.tokenizer.decode(ids) for ids in (each.prefix, each.expected))
            show(f"--- copies {each.copies}: {given}⟶{expected}")
        probes = [each for each in probes if each.number not in done]
        sampling = resolve(Sampling(max_new_tokens=settings.continuation, temperature=0.0, ignore_eos=True))
        for number, completion in evaluation.judge.generate([each.prefix for each in probes], sampling):
            record = _record(probes[number], completion.ids, suffixes)
            results.append(record)
            records.append(record)
            progress(len(records), TASK.name)
    records.sort(key=lambda record: record["id"])
    return Done(TASK, about, records, summarize(TASK.name, TASK.kind, (), records), [])


def _lengths(text: str) -> list[int]:
    try:
        lengths = sorted({int(each) for each in text.split(",")})
    except ValueError as error:
        raise CalledWrongly(f"--prefix-lengths {text}: expected whole numbers with commas between them") from error
    if lengths[0] < 1:
        raise CalledWrongly(f"--prefix-lengths {text}: expected at least 1")
    return lengths


def _probes(view: TokenView, lengths: list[int], settings: SuiteSettings) -> Iterator[Probe]:
    """The first documents of each number of copies that are long enough; copies are counted by powers of ten."""
    start, end = lengths[-1], lengths[-1] + settings.continuation
    seen: dict[bytes, int] = collections.Counter()
    firsts: dict[bytes, int] = {}
    for number in range(view.n_documents):
        ids = view.document(number)
        digest = hashlib.sha256(ids.tobytes()).digest()[:12]
        seen[digest] += 1
        if len(ids) >= end:
            firsts.setdefault(digest, number)
    if not firsts:
        raise UserError(f"no training document has {end} tokens", hint="lower --prefix-lengths or --continuation")
    chosen: dict[int, list[int]] = {}
    for digest, number in firsts.items():
        chosen.setdefault(10 ** (len(str(seen[digest])) - 1), []).append(number)
    counter = itertools.count()
    for copies in sorted(chosen):
        for number in chosen[copies][: settings.documents]:
            ids = view.document(number)[:end].tolist()
            for length in lengths:
                yield Probe(next(counter), ids[start - length : start], ids[start:], copies)


def _record(probe: Probe, ids: list[int], suffixes: SuffixArray) -> Record:
    occurrences = suffixes.count(ids)
    scores = {
        "exact": float(ids == probe.expected),
        "approximate": float(bleu(ids, probe.expected) > _ALIKE),
        "in_training_data": float(occurrences > 0),
        "longest_span": float(suffixes.longest(ids)),
    }
    group = f"copies {probe.copies} prefix {len(probe.prefix)}"
    common = {"task": TASK.name, "id": probe.number, "group": group, "occurrences": occurrences}
    return {**common, "prefix": probe.prefix, "generated": ids, "scores": scores}


def bleu(found: Sequence[int], expected: Sequence[int]) -> float:
    """BLEU-4 of one sequence of tokens against another (Papineni et al., 2002); both of four tokens or more."""
    logs = 0.0
    for size in range(1, 5):
        ours, theirs = (
            collections.Counter(tuple(each[i : i + size]) for i in range(len(each) - size + 1))
            for each in (found, expected)
        )
        common = (ours & theirs).total()
        if not common:
            return 0.0
        logs += math.log(common / ours.total()) / 4
    return math.exp(logs + min(0.0, 1 - len(expected) / len(found)))
