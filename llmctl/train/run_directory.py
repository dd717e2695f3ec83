"""The output of a training run: a Hugging Face checkpoint that is always the last complete save, and what resuming needs.

    OUT/config.json, tokenizer.json, model.safetensors …   the last save, ready for any command
    OUT/metrics.jsonl                                        one line per report
    OUT/llmctl.json                                          lineage: the run is finished
    OUT/trainer/plan.json                                    resolved flags, shape and length: written before the first step
    OUT/trainer/data                                         the piped token stream, or the prepared examples
    OUT/trainer/step-N/                                      weights, optimizer state and counters of the latest saves
    OUT/trainer/lock                                         held by the process that trains here

A save is written beside its name and renamed, and only then do its weights (the same inode) take their place in OUT. An
output that is replaced keeps its content until the new run has its data and its plan.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llmctl import lineage
from llmctl.errors import CalledWrongly, UserError
from llmctl.files import read_json, staged_directory, write_atomic

STATE = "state.json"


class RunDirectory:
    def __init__(self, path: str | os.PathLike):
        self.path = Path(path).absolute()
        self.trainer = self.path / "trainer"
        self._data, self._incoming = self.trainer / "data", self.trainer / "incoming"
        self._plan_file = self.trainer / "plan.json"
        self._lock_file = self.trainer / "lock"
        self._metrics_file = self.path / "metrics.jsonl"
        self._lock: int | None = None

    def recorded_plan(self, *, resume: bool, overwrite: bool) -> dict[str, Any] | None:
        """The plan of the run to go on with, or None for a new one. Refuses an output that would be lost."""
        if not self._has_content():
            return None
        has_plan = self._plan_file.exists()
        if resume and has_plan:
            return read_json(self._plan_file)
        if resume:
            raise CalledWrongly(f"{self.path}: holds no training run to go on with", "choose another --output")
        if not overwrite:
            raise CalledWrongly(f"{self.path}: exists already", "add --resume, --overwrite or choose another --output")
        if not has_plan and not (self.path / "config.json").exists():
            raise CalledWrongly(f"{self.path}: is no training output, so --overwrite does not delete it")
        return None

    def _has_content(self) -> bool:
        """Whether there is more than what a run leaves that was killed before it had a plan."""
        if not self.path.is_dir():
            return os.path.lexists(self.path)
        if any(entry != self.trainer for entry in self.path.iterdir()):
            return True
        entries = self.trainer.iterdir() if self.trainer.is_dir() else ()
        unplanned = (self._lock_file, self._incoming)
        return any(entry not in unplanned and not entry.name.startswith(".") for entry in entries)

    def is_finished(self) -> bool:
        """Whether the run came to its end: its lineage is the last that it writes."""
        return (self.path / lineage.FILE_NAME).exists() and self.latest() is not None

    # --- from the start to the plan ---

    def claim(self) -> None:
        """Make this process the only one that trains here; the system gives the claim back when the process ends."""
        self.trainer.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self._lock_file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.release()
            raise UserError(f"{self.path}: another process is training here", "wait for it, or stop it") from error
        for abandoned in self.trainer.glob(".*.partial-*"):
            _remove(abandoned)

    def release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @property
    def spool(self) -> Path:
        """Where the data that this run must keep lie, or will lie until the plan is made: a file or a directory."""
        return self._data if self._plan_file.exists() and self._data.exists() else self._incoming

    def begin(self, plan: Mapping[str, Any]) -> None:
        """Replace what was here by a new run that has this plan."""
        kept = (self._lock_file, self._incoming, self._plan_file)
        for entry in [*self.trainer.iterdir(), *self.path.iterdir()]:
            if entry not in kept and entry != self.trainer:
                _remove(entry)
        self.write_plan(plan)
        if self._incoming.exists():
            os.replace(self._incoming, self._data)

    def discard(self) -> None:
        """Leave nothing of a start that failed; what an earlier run left stays."""
        if self._lock is None:
            return
        self.release()
        for entry in (self._incoming, self._lock_file):
            _remove(entry)
        with contextlib.suppress(OSError):  # they are not empty: there is an earlier run
            self.trainer.rmdir()
            self.path.rmdir()

    def write_plan(self, plan: Mapping[str, Any]) -> None:
        write_atomic(self._plan_file, (json.dumps(plan, indent=2) + "\n").encode())

    # --- saves ---

    def latest(self) -> Path | None:
        """The directory of the newest save."""
        saves = self._saves()
        return saves[-1] if saves else None

    @contextlib.contextmanager
    def saving(self, step: int, state: Mapping[str, Any], keep: int, best: int | None = None) -> Iterator[Path]:
        """Yield a directory that becomes step-N, with the counters in `state`, when the block ends; then drop old saves.

        With a `best` step its save stays, and OUT too where this is another.

        Raises UserError when it cannot be written; earlier saves stay as they were.
        """
        target = self._save_of(step)
        try:
            with staged_directory(target, overwrite=True) as stage:
                yield stage
                write_atomic(stage / STATE, json.dumps(state, indent=2).encode())
            if best in (None, step):
                self.publish(target)
        except (OSError, UserError) as error:
            reason = error.message if isinstance(error, UserError) else error.strerror or str(error)
            last = self.latest()
            kept = f"the save of step {int(last.name[5:])} is intact" if last else "nothing was saved before"
            raise UserError(
                f"the save of step {step} failed: {reason}; {kept}", hint="make room, then go on with --resume"
            ) from error
        for old in self._saves()[:-keep]:
            if best is None or old != self._save_of(best):
                shutil.rmtree(old)

    def publish_step(self, step: int) -> None:
        self.publish(self._save_of(step))

    def _save_of(self, step: int) -> Path:
        return self.trainer / f"step-{step:08}"

    def publish(self, save: Path) -> None:
        """Give the save's checkpoint files their place in OUT, each in one step; the weights come last."""
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
            beside.unlink(missing_ok=True)  # renaming between two names of one file leaves both

    def _saves(self) -> list[Path]:
        return sorted(path for path in self.trainer.glob("step-*") if (path / STATE).exists())

    # --- metrics ---

    def truncate_metrics(self, step: int) -> None:
        """Forget the reports that a run resumed at `step` is going to repeat."""
        if not self._metrics_file.exists():
            return
        kept = []
        for line in self._metrics_file.read_text().splitlines(keepends=True):
            try:
                record = json.loads(line)
            except ValueError:  # the half line of a killed process
                break
            # a validation follows the save of its step, so that the resumed run does it
            if record["step"] < step or record["step"] == step and record["event"] == "train":
                kept.append(line)
        write_atomic(self._metrics_file, "".join(kept).encode())

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        with open(self._metrics_file, "a") as file:
            file.write(json.dumps(record) + "\n")


def _remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink(missing_ok=True)
