"""A training run from its settings to a checkpoint, as a sequence of events: the same for every `Task`."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from llmctl import allocator, lineage
from llmctl.devices import choose_device
from llmctl.errors import Interrupted
from llmctl.files import read_json
from llmctl.models.config import flops_per_token, parameter_count
from llmctl.train import building, distributed, hardware, state
from llmctl.train.events import Event, Finished, Started
from llmctl.train.plan import Plan, fixed_steps, refuse_other_data, resumed_settings
from llmctl.train.run_directory import STATE, RunDirectory
from llmctl.train.settings import RunSettings
from llmctl.train.signals import StopRequest
from llmctl.train.stepping import Stepping, Stopped
from llmctl.train.task import PIPE, Task

log = logging.getLogger("llmctl")


@contextlib.contextmanager
def training(
    task: Task,
    inputs: Sequence[str],
    output: str | os.PathLike,
    given: frozenset[str] = frozenset(),
    began: float | None = None,
) -> Iterator[Run]:
    """One run in one output directory, in the process group that torchrun may have started.

    Without `inputs` the data come from standard input, or from where the run to resume had them. `given` names the
    settings that the caller set explicitly, `began` is the monotonic time at which the command started.
    """
    began = time.monotonic() if began is None else began
    # What a learned model gives no weight has gradients too small for normal floats, which a CPU takes a hundred cycles each
    # for: zero is as good. Threads that start after this have it too.
    torch.set_flush_denormal(True)
    with distributed.process_group(choose_device(task.settings.device)) as device:
        run = Run(task, inputs, RunDirectory(output), given, device, began)
        try:
            yield run
        finally:
            run.close()
            torch.set_flush_denormal(False)


class Run:
    def __init__(
        self,
        task: Task,
        inputs: Sequence[str],
        directory: RunDirectory,
        given: frozenset[str],
        device: torch.device,
        began: float,
    ):
        self.task, self.directory, self.device, self.began = task, directory, device, began
        self.recorded = self._recorded_plan()
        if self.recorded:
            task.settings = resumed_settings(task.settings, self.recorded, given)
        self.inputs = self._inputs(inputs)
        self.stepping: Stepping | None = None

    @property
    def settings(self) -> RunSettings:
        """The caller's, or those of the run that goes on."""
        return self.task.settings

    def run(self) -> Iterator[Event]:
        """Train to the end. Raises Interrupted, after a save, when a signal asked for it."""
        # what an output that is overwritten holds is no part of this run
        latest = distributed.on_first(self.directory.latest) if self.recorded else None
        if self.recorded and distributed.on_first(self.directory.is_finished):
            seconds = time.monotonic() - self.began
            yield Finished(read_json(latest / STATE)["step"], str(self.directory.path), seconds)
            return
        distributed.on_first(self.directory.claim)
        try:
            self._prepare(latest)
            self.stepping.start_meter()
            if self.recorded:
                self._go_on(latest)
            else:
                distributed.on_first(self.directory.begin, asdict(self.stepping.plan))
        except BaseException:
            if not self.recorded and distributed.rank() == 0:
                self.directory.discard()
            raise
        yield self._started()
        with StopRequest() as stop:
            try:
                yield from self.stepping.steps(stop)
                yield from self.stepping.finish(stop)
            except Stopped:
                yield from self.stepping.save()
                distributed.raise_once(Interrupted(stop.requested or signal.SIGTERM))

    def dry_run(self) -> dict[str, float | int | str]:
        """Size, memory, disk and time, from two real steps; nothing is written."""
        self._prepare(None)
        per_step = [self.stepping.timed_step() for _ in range(2)][-1][1]
        plan, trainer, config = self.stepping.plan, self.stepping.trainer, self.task.config
        plan.total_steps = plan.total_steps or self.stepping.steps_in_time(per_step)
        tensors = [*trainer.objective.parameters(), *state.optimizer_tensors(trainer).values()]
        return {
            "shape": building.describe(config),
            "parameters": parameter_count(config),
            "tokens_per_step": plan.tokens_per_step,
            "steps": plan.total_steps,
            "epochs": plan.epochs,
            "flops": flops_per_token(config, plan.seq_len) * plan.tokens_per_step * plan.total_steps,
            "memory_bytes": hardware.peak_memory(self.device),
            "disk_bytes": (1 + self.settings.keep) * sum(tensor.nbytes for tensor in tensors),
            "tokens_per_second": plan.tokens_per_step / per_step,
            "seconds": plan.total_steps * per_step,
        }

    def close(self) -> None:
        """Let go of the output, the model and, with it, of the process group."""
        self.directory.release()
        self.stepping = None

    def _recorded_plan(self) -> Plan | None:
        settings = self.settings
        if settings.dry_run and not settings.resume:
            return None
        how = {"resume": settings.resume, "overwrite": settings.overwrite}
        content = distributed.on_first(self.directory.recorded_plan, **how)
        return self.task.plan_type.read(content) if content else None

    def _inputs(self, inputs: Sequence[str]) -> list[str]:
        if not inputs and not self.recorded and sys.stdin is not None and not sys.stdin.isatty():
            inputs = [PIPE]
        if self.recorded and (not inputs or PIPE in inputs):
            return self.recorded.inputs
        return [path if path == PIPE else os.path.abspath(path) for path in inputs]

    def _prepare(self, latest: Path | None) -> None:
        """Plan, feed and trainer: a new run's, or the recorded one's with the state of its latest save."""
        settings, task = self.settings, self.task
        threads = settings.threads or (self.recorded.threads if self.recorded else None)
        if threads:
            torch.set_num_threads(threads)
        allocator.keep_freed_memory()
        spool = None if settings.dry_run and not self.recorded else self.directory.spool
        data_sha256 = task.open(self.inputs, spool, self.recorded)
        if self.recorded:
            refuse_other_data(self.recorded, data_sha256, self.inputs)
        plan = self.recorded or task.make_plan(self.inputs, self.device)
        feed = task.make_feed(plan)
        plan.rows_per_epoch = feed.train.rows_per_epoch
        plan.total_steps = plan.total_steps or fixed_steps(settings, plan)
        trainer = task.make_trainer(plan, self.device, latest)
        building.check_micro_batch(task.config, plan, settings, self.device)
        self.stepping = Stepping(task, plan, feed, trainer, self.directory, self.device, self.began)

    def _go_on(self, latest: Path | None) -> None:
        """Count from the latest save, or from 0 where nothing was saved yet."""
        plan = self.stepping.plan
        if latest is not None:
            self.stepping.restore(read_json(latest / STATE))
            best = self.stepping.best.step if self.settings.keep_best else None
            distributed.on_first(
                self.directory.publish_step, self.stepping.trainer.step_number if best is None else best
            )
        distributed.on_first(self.directory.truncate_metrics, self.stepping.trainer.step_number)
        if self.inputs != plan.inputs:
            plan.inputs = self.inputs
            distributed.on_first(self.directory.write_plan, asdict(plan))
        now = {**lineage.versions(), "threads": torch.get_num_threads()}
        then = {**plan.versions, "threads": plan.threads}
        changed = [f"{name} {then[name]}, now {now[name]}" for name in now if now[name] != then.get(name, now[name])]
        if changed:
            log.warning("the run began with %s: its last bits may differ", "; ".join(changed))

    def _started(self) -> Started:
        config, stepping = self.task.config, self.stepping
        return Started(
            step=stepping.trainer.step_number,
            n_parameters=parameter_count(config),
            shape=building.describe(config),
            train_tokens=stepping.feed.train.n_tokens,
            val_tokens=stepping.feed.n_val_tokens,
            tokens_per_step=stepping.plan.tokens_per_step,
            device=str(self.device),
            dtype=str(stepping.trainer.dtype).removeprefix("torch."),
            peak_flops=stepping.meter.peak_flops,
        )
