"""From what a model says of an item to the item's scores: one function for each kind of task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from llmctl.errors import UserError
from llmctl.evaluate import answers, templates
from llmctl.evaluate.likelihood import Likelihood
from llmctl.evaluate.prompts import Item
from llmctl.evaluate.task import Task


def judged(task: Task, item: Item, found: Sequence[Likelihood]) -> dict[str, Any]:
    """`scores` by metric, and what they come from, of an item whose continuations have these likelihoods."""
    return _BY_KIND[task.kind](item, found)


def _multiple_choice(item: Item, found: Sequence[Likelihood]) -> dict[str, Any]:
    logprobs = np.array([each.logprob for each in found])
    said = {"logprobs": logprobs.tolist(), "choices": len(found)}
    if isinstance(item.answer, list):
        shares = np.exp(logprobs - logprobs.max())
        is_true = np.array(item.answer) == 1
        return {**said, "scores": {"mc2": float(shares[is_true].sum() / shares.sum())}}
    # by characters, as lm-evaluation-harness normalizes
    lengths = np.array([len(choice) for choice in item.choices], float)
    best, best_norm = int(logprobs.argmax()), int((logprobs / np.maximum(lengths, 1)).argmax())
    scores = {"acc": float(best == item.answer), "acc_norm": float(best_norm == item.answer)}
    return {**said, "answer": item.answer, "predicted": best, "predicted_norm": best_norm, "scores": scores}


def _classification(item: Item, found: Sequence[Likelihood]) -> dict[str, Any]:
    best = int(np.argmax([each.logprob for each in found]))
    return classified(item, item.choices[best], item.choices[item.answer])


def classified(item: Item, predicted: str, label: str) -> dict[str, Any]:
    return {"answer": label, "predicted": predicted, "scores": {"acc": float(predicted == label)}}


def _cloze(item: Item, found: Sequence[Likelihood]) -> dict[str, Any]:
    (one,) = found
    return {"answer": item.answer, "logprob": one.logprob, "scores": {"acc": float(one.is_greedy)}}


def _regression(item: Item, found: Sequence[Likelihood]) -> dict[str, Any]:
    """A language model's value of a text is its log-likelihood."""
    return measured(item, sum(each.logprob for each in found))


def measured(item: Item, value: float) -> dict[str, Any]:
    """Raises UserError for an answer that is no number."""
    try:
        answer = float(item.answer)
    except (TypeError, ValueError):
        answer = math.nan
    if not math.isfinite(answer):
        raise UserError(f"{item.place}: the answer {item.answer!r} is no number", hint="a regression needs one")
    return {"answer": answer, "predicted": value, "scores": {}}


def _preference(item: Item, found: Sequence[Likelihood]) -> dict[str, Any]:
    chosen, rejected = found
    per_token = chosen.logprob / chosen.n_tokens > rejected.logprob / rejected.n_tokens
    return compared(chosen.logprob, rejected.logprob, acc_norm=float(per_token))


def compared(chosen: float, rejected: float, **more: float) -> dict[str, Any]:
    scores = {"acc": float(chosen > rejected), **more, "margin": chosen - rejected}
    return {"chosen": chosen, "rejected": rejected, "scores": scores}


def _perplexity(item: Item, found: Sequence[Likelihood]) -> dict[str, Any]:
    nats, n_tokens = -math.fsum(each.logprob for each in found), sum(each.n_tokens for each in found)
    n_bytes = item.fields.get("_bytes")
    windows = [[-each.logprob, each.n_tokens] for each in found]
    return {"nats": nats, "tokens": n_tokens, "bytes": n_bytes, "windows": windows, "scores": {}}


_BY_KIND = {
    "multiple_choice": _multiple_choice,
    "classification": _classification,
    "cloze": _cloze,
    "regression": _regression,
    "preference": _preference,
    "perplexity": _perplexity,
}


def judged_text(task: Task, item: Item, text: str) -> dict[str, Any]:
    """Of an item that a text was generated for; its program runs in the sandbox."""
    expected = item.answer if isinstance(item.answer, (list, tuple)) else [item.answer]
    expected = [str(each) for each in expected if each is not None]
    scores, said = answers.rated(text, expected, task), {"completion": text, "answer": expected}
    if task.extract:
        said["extracted"] = {name: answers.extracted(text, how) for name, how in task.extract.items()}
    if task.code is not None:
        program = templates.text(task.code, {**item.fields, "completion": text}, item.place)
        scores["pass@1"], said["error"] = answers.passes(program, task.seconds)
    return {**said, "scores": scores}
