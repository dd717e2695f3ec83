"""Compiles what was exported and asks the program what the checkpoint is asked: ids, logits, greedy tokens."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from llmctl import agreement
from llmctl.errors import CheckFailed, UserError
from llmctl.export.c.settings import ExportCSettings
from llmctl.models.streaming import StreamedModel
from llmctl.tokenizer import Tokenizer

FLAGS = ("-std=c99", "-O3")
GREEDY_TOKENS = 64
LOGIT_ERROR = 1e-3
"""Of float32, relative to the largest logit."""

TEXTS = (
    *agreement.PROBES,
    "  Two  spaces,\n\n\ttabs;  ",
    "naïve Ünïcode: 東京 42,195 km — 😀 e\u0301 it's <s> </s>\n",
    "x",
)


@dataclass(frozen=True)
class Checked:
    """What was found; `compiler` None: there is none, so nothing was compared."""

    compiler: str | None
    agreement: agreement.Agreement | None = None


def compiler() -> str | None:
    """The C compiler of this machine: that of $CC, or the first that is there."""
    names = (os.environ.get("CC"), "cc", "gcc", "clang")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def check(directory: Path, base: Path, tokenizer: Tokenizer | None, settings: ExportCSettings, longest: int) -> Checked:
    """Compare the files of `directory` with the checkpoint `base`. Raises CheckFailed where they disagree."""
    found = compiler()
    if found is None:
        return Checked(None)
    with tempfile.TemporaryDirectory() as scratch:
        program = _Program(Path(scratch, "run"), directory / "model.bin")
        _compile(found, directory / "run.c", program.path)
        if tokenizer is not None:
            _check_ids(program, tokenizer)
        model = StreamedModel(base)
        probes = agreement.probe_ids(tokenizer, model.config.vocab_size)[:, :longest]
        measured = agreement.measure(model.logits, program.logits, probes)
        agreement.require(measured, settings.tolerance)
        if settings.type == "f32":
            _check_float32(program, model, probes, measured, longest)
    return Checked(found, measured)


class _Program:
    def __init__(self, path: Path, model: Path):
        self.path, self._model = path, model

    def __call__(self, *arguments: str) -> bytes:
        result = subprocess.run([self.path, self._model, *arguments], capture_output=True, stdin=subprocess.DEVNULL)
        if result.returncode:
            raise CheckFailed(f"the compiled program failed: {result.stderr.decode(errors='replace').strip()}")
        return result.stdout

    def logits(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """[B, T, V]"""
        rows = (self("--logits", "--ids", _joined(ids)) for ids in ids_BT.tolist())
        logits_BN = torch.stack([torch.from_numpy(np.frombuffer(row, "<f4").copy()) for row in rows])
        return logits_BN.view(*ids_BT.shape, -1)

    def greedy(self, ids: list[int], count: int) -> list[int]:
        greedy = ("--temperature", "0", "--repetition-penalty", "1", "--presence-penalty", "0")
        words = self(*greedy, "--frequency-penalty", "0", "--ignore-eos", "-n", str(count), "--ids", _joined(ids))
        return [int(word) for word in words.split()]


def _compile(compiler_: str, source: Path, program: Path) -> None:
    command = [compiler_, *FLAGS, "-o", program, source, "-lm"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        line = next(iter(result.stderr.splitlines()), "no message")
        raise UserError(f"{compiler_} does not compile run.c: {line}", hint="set CC to another compiler")


def _check_ids(program: _Program, tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        expected, found = tokenizer.encode(text), [int(word) for word in program("--tokenize", "--", text).split()]
        if found != expected:
            raise CheckFailed(
                f"run.c's tokenizer gives other ids for {text[:40]!r}: {found[:8]}..., expected {expected[:8]}...",
                hint="nothing was written; this tokenizer has a part that run.c does not know",
            )


def _check_float32(program: _Program, model: StreamedModel, probes: torch.Tensor, measured, longest: int) -> None:
    """The logits' error, and greedy tokens: each has to be the likeliest after those before it."""
    with torch.no_grad():
        largest = float(model.logits(probes[:1]).abs().max())
        if not measured.max_logit_error <= LOGIT_ERROR * max(1.0, largest):
            raise CheckFailed(f"the result does not compute what it should: {measured}", hint="nothing was written")
        prompt = probes[0, : min(8, longest)].tolist()
        ids = program.greedy(prompt, min(GREEDY_TOKENS, longest - len(prompt) + 1))
        logits_TV = model.logits(torch.tensor([(prompt + ids)[:-1]]))[0, len(prompt) - 1 :]
    for place, (token, logits_V) in enumerate(zip(ids, logits_TV)):
        if logits_V[token] < logits_V.max() - LOGIT_ERROR * max(1.0, largest):
            raise CheckFailed(
                f"greedy token {place} is {token} in C, {int(logits_V.argmax())} in the checkpoint",
                hint="nothing was written",
            )


def _joined(ids: list[int]) -> str:
    return " ".join(map(str, ids))
