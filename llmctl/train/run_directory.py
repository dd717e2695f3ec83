"""The output of a training run: a Hugging Face checkpoint that is always the last complete save, and what resuming needs.

    OUT/config.json, tokenizer.json, model.safetensors …   the last save, ready for any command
    OUT/metrics.jsonl                                        one line per report
    OUT/trainer/plan.json                                    resolved flags, shape and length: written before the first step
    OUT/trainer/data.arrow                                   the token stream, when it came through a pipe
    OUT/trainer/step-N/                                      weights, optimizer state and counters of the latest saves

A save is written beside its name and renamed, and only then do its weights (the same inode) take their place in OUT.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llmctl.errors import CalledWrongly, UserError
from llmctl.files import read_json, staged_directory, write_atomic

STATE = "state.json"


class RunDirectory:
    def __init__(self, path: str | os.PathLike):
        self.path = Path(path).absolute()
        self.trainer = self.path / "trainer"
        self.spool = self.trainer / "data.arrow"
        self._plan_file = self.trainer / "plan.json"
        self._metrics_file = self.path / "metrics.jsonl"

    def open(self, *, resume: bool, overwrite: bool) -> dict[str, Any] | None:
        """The plan of the run to go on with, or None for a new one. Refuses an output that would be lost."""
        if self.path.is_dir() and resume and (self._plan_file.exists() or not self._has_content()):
            return read_json(self._plan_file) if self._plan_file.exists() else None
        if self.path.exists() and self._has_content():
            if not overwrite:
                raise CalledWrongly(f"{self.path}: exists already", "add --resume, --overwrite or another --output")
            if not self._plan_file.exists() and not (self.path / "config.json").exists():
                raise CalledWrongly(f"{self.path}: is no training output, so --overwrite does not delete it")
            shutil.rmtree(self.path)
        return None

    def _has_content(self) -> bool:
        """Whether there is more than what a run leaves that was killed before it had a plan."""
        if not self.path.is_dir():
            return True
        return any(entry.name != "trainer" for entry in self.path.iterdir()) or self._plan_file.exists()

    def write_plan(self, plan: Mapping[str, Any]) -> None:
        write_atomic(self._plan_file, (json.dumps(plan, indent=2) + "\n").encode())

    def latest(self) -> Path | None:
        """The directory of the newest save."""
        saves = self._saves()
        return saves[-1] if saves else None

    def save(self, step: int, state: Mapping[str, Any], write: Callable[[Path], None], keep: int) -> Path:
        """Make step-N complete with what `write(directory)` puts there and the counters in `state`; drop old saves.

        Raises UserError when it cannot be written; earlier saves stay as they were.
        """
        target = self.trainer / f"step-{step:08}"
        try:
            with staged_directory(target, overwrite=True) as stage:
                write(stage)
                write_atomic(stage / STATE, json.dumps(state, indent=2).encode())
        except (OSError, UserError) as error:
            reason = error.message if isinstance(error, UserError) else error.strerror
            last = self.latest()
            kept = f"the save of step {int(last.name[5:])} is intact" if last else "nothing was saved before"
            raise UserError(
                f"the save of step {step} failed: {reason}; {kept}", hint="make room, then go on with --resume"
            ) from error
        self._publish(target)
        for old in self._saves()[:-keep]:
            shutil.rmtree(old)
        return target

    def _publish(self, save: Path) -> None:
        """Give the save's checkpoint files their place in OUT, each in one step; the last is config.json's weights."""
        files = sorted(file for file in save.iterdir() if not file.name.startswith(("optimizer", STATE)))
        files.sort(key=lambda file: file.suffix == ".safetensors")
        for file in files:
            beside = self.path / f".{file.name}.partial"
            beside.unlink(missing_ok=True)
            try:
                os.link(file, beside)
            except OSError:  # a filesystem without hard links
                shutil.copyfile(file, beside)
            os.replace(beside, self.path / file.name)

    def _saves(self) -> list[Path]:
        return sorted(path for path in self.trainer.glob("step-*") if (path / STATE).exists())

    def truncate_metrics(self, step: int) -> None:
        """Forget the reports of steps that a resumed run is going to repeat."""
        if not self._metrics_file.exists():
            return
        kept = []
        for line in self._metrics_file.read_text().splitlines(keepends=True):
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except ValueError:  # the half line of a killed process
                break
        write_atomic(self._metrics_file, "".join(kept).encode())

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        with open(self._metrics_file, "a") as file:
            file.write(json.dumps(record) + "\n")
