"""`llmctl eval` against lm-evaluation-harness on transformers: the same checkpoint, prompts and metrics, in one run.

    python tests/bench/evaluate.py MODEL [--data DIR] [--batch-size 32] [--hellaswag 200] [--mmlu 285] [--gsm8k 50]

DIR holds hellaswag-200.jsonl, mmlu-dev.jsonl and gsm8k-train-500.jsonl, and a text for the perplexity. Both sides load
the model before their clock starts; items/s are those of whole tasks, tokenizing included. Every item is compared.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eval_reference import evaluate, hellaswag_rows, hugging_face, write_task

from llmctl.evaluate import task
from llmctl.evaluate.perplexity import TASK as PERPLEXITY
from llmctl.evaluate.results import ResultsFile
from llmctl.evaluate.run import Evaluation
from llmctl.evaluate.settings import EvalSettings

DATA = Path(os.environ.get("LLMCTL_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
HEADER = "The following are multiple choice questions (with answers) about {{ subject.replace('_', ' ') }}.\n\n"
FILES = {"hellaswag": "hellaswag-200.jsonl", "mmlu": "mmlu-dev.jsonl", "gsm8k": "gsm8k-train-500.jsonl"}


def rows_of(name: str, folder: Path, count: int) -> list[dict]:
    path = folder / "eval" / FILES[name]
    if name == "hellaswag":
        return hellaswag_rows(path)[:count]
    rows = [json.loads(line) for line in path.open()][:count]
    return [{**row, "answer": int(row["answer"])} for row in rows] if name == "mmlu" else rows


def timed(function, *args):
    began = time.perf_counter()
    return function(*args), time.perf_counter() - began


def compare(name: str, rows: list[dict], theirs, ours: Evaluation, folder: Path) -> None:
    """One line: how many items, on how many both are right or both wrong by every metric, and the speeds."""
    local = write_task(folder, name, rows, **({"description": HEADER} if name == "mmlu" else {}))
    found, seconds = timed(evaluate, theirs, folder, [local])
    one = task.find(f"{name}={folder / name}.jsonl")
    done, our_seconds = timed(ours.run, one, ResultsFile(None), print, lambda done, note: None)
    equal: dict[str, int] = {}
    right: dict[str, list[float]] = {}
    for sample in found["samples"][local]:
        end = "" if sample.get("filter", "none") == "none" else f",{sample['filter']}"
        for metric in sample["metrics"]:
            mine = done.records[sample["doc_id"]]["scores"][metric + end]
            equal[metric + end] = equal.get(metric + end, 0) + (mine == sample[metric])
            pair = right.setdefault(metric + end, [0.0, 0.0])
            pair[0], pair[1] = pair[0] + mine, pair[1] + sample[metric]
    for metric, count in equal.items():
        ours_right, theirs_right = right[metric]
        print(f"{name} {metric}: {count} of {len(rows)} items equal; right {ours_right:g} and {theirs_right:g}")
    rates = len(rows) / our_seconds, len(rows) / seconds
    print(f"{name}: {rates[0]:.1f} items/s, the harness {rates[1]:.1f}: {rates[0] / rates[1]:.2f} x", flush=True)


def compare_perplexity(path: Path, theirs, ours: Evaluation) -> None:
    text = path.read_text(encoding="utf-8")[:60_000]

    class Request:
        args = (text,)

    (expected,), seconds = timed(theirs.loglikelihood_rolling, [Request()])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "text.txt")
        file.write_text(text)
        import dataclasses

        one = dataclasses.replace(PERPLEXITY, data=str(file))
        done, our_seconds = timed(ours.run, one, ResultsFile(None), print, lambda done, note: None)
    (record,) = [
        {key: sum(each[key] for each in done.records) for key in ("nats", "tokens")},
    ]
    bits = [nats / math.log(2) / len(text.encode()) for nats in (record["nats"], -expected)]
    print(f"perplexity: bits per byte {bits[0]:.6f} and {bits[1]:.6f}, difference {abs(bits[0] - bits[1]):.1e}")
    print(f"perplexity: {record['tokens'] / our_seconds:.0f} tokens/s, {seconds / our_seconds:.2f} x", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--batch-size", type=int, default=32)
    for name, count in (("hellaswag", 200), ("mmlu", 285), ("gsm8k", 50)):
        parser.add_argument(f"--{name}", type=int, default=count)
    chosen = parser.parse_args()
    logging.disable(logging.WARNING)
    theirs = hugging_face(chosen.model, chosen.batch_size)
    settings = EvalSettings(batch_size=chosen.batch_size, on_long="truncate", num_fewshot=0)
    ours = Evaluation(chosen.model, settings)
    with tempfile.TemporaryDirectory() as temporary:
        for name in FILES:
            if count := getattr(chosen, name):
                compare(name, rows_of(name, chosen.data, count), theirs, ours, Path(temporary))
    compare_perplexity(chosen.data / "text" / "alice29.txt", theirs, ours)


if __name__ == "__main__":
    main()
