"""Where the numbers of a training run go for others to draw: TensorBoard's event files, or Weights & Biases."""

from __future__ import annotations

import importlib
import os
import secrets
from pathlib import Path

from llmctl.errors import CalledWrongly, UserError
from llmctl.files import read_json, write_atomic


class TensorBoard:
    """Event files in `run`/tensorboard. A run that goes on from `step` takes back what an earlier process wrote after it."""

    @staticmethod
    def require():
        return _module("torch.utils.tensorboard", "tensorboard")

    def __init__(self, run: Path, step: int):
        later = step + 1 if step else None
        self._writer = self.require().SummaryWriter(str(run / "tensorboard"), purge_step=later)

    def log(self, numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self, exit_code: int) -> None:
        self._writer.close()


class Wandb:
    """One run of Weights & Biases for one run here, whatever its directory is called and however often it goes on."""

    @staticmethod
    def require():
        return _module("wandb", "wandb")

    def __init__(self, run: Path, step: int):
        wandb = self.require()
        run_id, is_new = _run_id(run / "wandb" / "run-id")
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "llmctl"),
                name=run.name,
                dir=str(run),
                id=run_id,
                resume=None if is_new else "allow",
                config=read_json(run / "trainer" / "plan.json"),
                # standard output is for the next command
                settings=wandb.Settings(console="off"),
            )
        except wandb.errors.Error as error:
            raise UserError(
                f"--log wandb: {error}", hint="then go on with --resume; WANDB_MODE=offline needs no account"
            ) from error
        # Its own count of steps only grows, but a run that was killed goes on from its last save.
        self._run.define_metric("*", step_metric="step")

    def log(self, numbers: dict[str, float], step: int) -> None:
        self._run.log({**numbers, "step": step})

    def close(self, exit_code: int) -> None:
        self._run.finish(exit_code=exit_code)


LOGGERS = {"tensorboard": TensorBoard, "wandb": Wandb}


def _run_id(file: Path) -> tuple[str, bool]:
    """The identity of this run, which it keeps when it goes on, and whether it is new."""
    if file.exists():
        return file.read_text(), False
    run_id = secrets.token_hex(8)
    file.parent.mkdir(exist_ok=True)
    write_atomic(file, run_id.encode())
    return run_id, True


def _module(name: str, package: str):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise CalledWrongly(f"--log {package} needs the package {package}", f"pip install {package}") from error
