"""`llmctl pretrain`: from settings and a token stream to a checkpoint, as a sequence of events."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence

import torch

from llmctl import lineage
from llmctl.data.packing import Batch
from llmctl.devices import choose_device
from llmctl.errors import Interrupted
from llmctl.files import read_json
from llmctl.models.config import flops_per_token, parameter_count
from llmctl.tokenizer import Tokenizer
from llmctl.train import building, distributed, hardware, planning, state
from llmctl.train.events import Event, Finished, Planned, Saved, Started, Trained, Validated
from llmctl.train.feed import PIPE, Feed, open_corpus
from llmctl.train.loop import StepResult, Trainer
from llmctl.train.pace import Interval, Meter, seconds_per_step, steps_in, validation_interval
from llmctl.train.run_directory import STATE, RunDirectory
from llmctl.train.settings import PretrainSettings
from llmctl.train.signals import StopRequest

log = logging.getLogger("llmctl")


class _Stopped(Exception):
    """A signal asked for the end; everything up to the last whole step is to be saved."""


@contextlib.contextmanager
def pretraining(
    settings: PretrainSettings,
    inputs: Sequence[str],
    output: str | os.PathLike,
    given: frozenset[str] = frozenset(),
    began: float | None = None,
) -> Iterator[Pretraining]:
    """One run in one output directory, in the process group that torchrun may have started.

    Without `inputs` the tokens come from standard input, or from where the run to resume had them. `given` names the
    settings that the caller set explicitly, `began` is the monotonic time at which the command started.
    """
    planning.refuse_contradictions(settings)
    with distributed.process_group(choose_device(settings.device)) as device:
        run = Pretraining(settings, inputs, RunDirectory(output), given, device)
        run.began = time.monotonic() if began is None else began
        try:
            yield run
        finally:
            run.close()


class Pretraining:
    def __init__(self, settings, inputs, directory: RunDirectory, given: frozenset[str], device: torch.device):
        self.directory, self.device, self.began = directory, device, time.monotonic()
        self.recorded = self._recorded_plan(settings)
        self.settings = planning.resumed_settings(settings, self.recorded, given) if self.recorded else settings
        self.inputs = self._inputs(inputs)
        self.trainer: Trainer | None = None
        self._durations: list[float] = []
        self._saved_step: int | None = None

    def run(self) -> Iterator[Event]:
        """Train to the end. Raises Interrupted, after a save, when a signal asked for it."""
        latest = distributed.on_first(self.directory.latest)
        if self.recorded and distributed.on_first(self.directory.is_finished):
            yield Finished(read_json(latest / STATE)["step"], str(self.directory.path), self._elapsed())
            return
        distributed.on_first(self.directory.claim)
        try:
            self._prepare(latest)
            self._meter = self._new_meter()
            if self.recorded:
                self._restore(latest)
            else:
                distributed.on_first(self.directory.begin, dataclasses.asdict(self.plan))
        except BaseException:
            if not self.recorded and distributed.rank() == 0:
                self.directory.discard()
            raise
        yield self._started()
        with StopRequest() as stop:
            try:
                yield from self._steps(stop)
                yield from self._finish(stop)
            except _Stopped:
                if self._saved_step != self.trainer.step_number:
                    yield self._save()
                distributed.raise_once(Interrupted(stop.requested or signal.SIGTERM))

    def dry_run(self) -> dict[str, float | int | str]:
        """Size, memory, disk and time, from two real steps; nothing is written."""
        self._prepare(None)
        per_step = [self._timed_step() for _ in range(2)][-1][1]
        plan = self.plan
        plan.total_steps = plan.total_steps or self._steps_in_time(per_step)
        tensors = [*self.trainer.objective.parameters(), *state.optimizer_tensors(self.trainer).values()]
        return {
            "shape": building.describe(self.config),
            "parameters": parameter_count(self.config),
            "tokens_per_step": plan.tokens_per_step,
            "steps": plan.total_steps,
            "epochs": plan.epochs,
            "flops": flops_per_token(self.config, plan.seq_len) * plan.tokens_per_step * plan.total_steps,
            "memory_bytes": hardware.peak_memory(self.device),
            "disk_bytes": (1 + self.settings.keep) * sum(tensor.nbytes for tensor in tensors),
            "tokens_per_second": plan.tokens_per_step / per_step,
            "seconds": plan.total_steps * per_step,
        }

    def close(self) -> None:
        """Let go of the output, the model and, with it, of the process group."""
        self.directory.release()
        self.trainer = None

    # --- preparing ---

    def _recorded_plan(self, settings: PretrainSettings) -> planning.Plan | None:
        if settings.dry_run and not settings.resume:
            return None
        how = {"resume": settings.resume, "overwrite": settings.overwrite}
        content = distributed.on_first(self.directory.recorded_plan, **how)
        return planning.read_plan(content) if content else None

    def _inputs(self, inputs: Sequence[str]) -> list[str]:
        if not inputs and not self.recorded and sys.stdin is not None and not sys.stdin.isatty():
            inputs = [PIPE]
        if self.recorded and (not inputs or PIPE in inputs):
            return self.recorded.inputs
        return [path if path == PIPE else os.path.abspath(path) for path in inputs]

    def _prepare(self, latest) -> None:
        settings = self.settings
        threads = settings.threads or (self.recorded.threads if self.recorded else None)
        if threads:
            torch.set_num_threads(threads)
        hardware.keep_freed_memory()
        tokenizer_sha256 = None
        if self.recorded:
            tokenizer_sha256 = self.recorded.tokenizer_sha256
        elif settings.init_from:
            tokenizer_sha256 = Tokenizer.load(settings.init_from).sha256
        spool = None if settings.dry_run and not self.recorded else self.directory.spool
        self.corpus = open_corpus(self.inputs, spool, settings.resume, tokenizer_sha256)
        if self.recorded:
            planning.refuse_other_data(self.recorded, self.corpus, self.inputs)
        self.plan = self.recorded or planning.make_plan(settings, self.inputs, self.corpus, self.device)
        self.feed = Feed(self.corpus, self.plan, settings)
        self.plan.rows_per_epoch = self.feed.rows_per_epoch
        self.plan.total_steps = self.plan.total_steps or planning.fixed_steps(settings, self.plan)
        self.config = building.model_config(self.plan, settings)
        parent = None if latest else settings.init_from
        self.trainer = building.build_trainer(self.plan, settings, self.config, self.device, parent)

    def _new_meter(self) -> Meter:
        peak_flops = hardware.peak_flops(self.device, self.trainer.dtype) * distributed.world_size()
        return Meter(self.plan.tokens_per_step, flops_per_token(self.config, self.plan.seq_len), peak_flops)

    def _restore(self, latest) -> None:
        """Take up the latest save, or start again where nothing was saved yet."""
        if latest is not None:
            counters = read_json(latest / STATE)
            self.trainer.step_number = self._saved_step = counters["step"]
            self._meter.restore(counters["unreported"])
            state.load(self.trainer, latest)
            distributed.on_first(self.directory.publish, latest)
        distributed.on_first(self.directory.truncate_metrics, self.trainer.step_number)
        if self.inputs != self.plan.inputs:
            self.plan.inputs = self.inputs
            distributed.on_first(self.directory.write_plan, dataclasses.asdict(self.plan))
        if torch.get_num_threads() != self.plan.threads:
            log.warning(
                "the run began with %d threads and goes on with %d: its last bits may differ",
                self.plan.threads,
                torch.get_num_threads(),
            )

    def _started(self) -> Started:
        return Started(
            step=self.trainer.step_number,
            n_parameters=parameter_count(self.config),
            shape=building.describe(self.config),
            train_tokens=self.feed.train_view.n_tokens,
            val_tokens=self._n_val_tokens,
            tokens_per_step=self.plan.tokens_per_step,
            device=str(self.device),
            dtype=str(self.trainer.dtype).removeprefix("torch."),
            peak_flops=self._meter.peak_flops,
        )

    # --- training ---

    def _steps(self, stop: StopRequest) -> Iterator[Event]:
        trainer = self.trainer
        save, log_ = Interval(self.settings.save_every), Interval(self.settings.log_every)
        validate = Interval(self._validation_interval())
        while True:
            if trainer.total_steps is None and self._fix_length():
                validate = Interval(self._validation_interval())
                yield Planned(trainer.total_steps, self.plan.epochs)
            if trainer.step_number == trainer.total_steps:
                return
            # in front of the step, so that a run resumed here does it too
            if trainer.step_number and validate.due(trainer.step_number):
                yield from self._validate(stop)
            self._meter.add(*self._timed_step())
            is_last = trainer.step_number == trainer.total_steps
            if log_.due(trainer.step_number) or is_last:
                yield self._recorded(self._report())
            _heed(stop)
            if not is_last and save.due(trainer.step_number):
                yield self._save()

    def _finish(self, stop: StopRequest) -> Iterator[Event]:
        step = self.trainer.step_number
        if self._saved_step != self.trainer.step_number:
            yield self._save()
        metrics = {"step": step, "tokens": step * self.plan.tokens_per_step}
        for validated in self._validate(stop):
            metrics |= {"validation_loss": validated.loss, "validation_bits_per_byte": validated.bits_per_byte}
            yield validated
        distributed.on_first(self._write_lineage, metrics)
        yield Finished(step, str(self.directory.path), self._elapsed())

    def _timed_step(self) -> tuple[StepResult, float]:
        started = time.perf_counter()
        result = self.trainer.step(*self.feed.micro_batches(self.trainer.step_number))
        seconds = time.perf_counter() - started
        self._durations.append(seconds)
        return result, seconds

    def _fix_length(self) -> bool:
        """Let the schedule know the number of steps: at once, or when a time budget has become one.

        The plan on disk keeps that number and when it was fixed, so that a resumed run takes the same steps.
        """
        plan = self.plan
        if plan.total_steps is None:
            per_step = seconds_per_step(self._durations, self.settings.time or planning.DEFAULT_SECONDS)
            total = distributed.from_first(None if per_step is None else self._steps_in_time(per_step))
            if total is None:
                return False
            plan.total_steps, plan.length_fixed_at = total, self.trainer.step_number
            distributed.on_first(self.directory.write_plan, dataclasses.asdict(plan))
        if self.trainer.step_number < plan.length_fixed_at:
            return False
        self.trainer.total_steps = plan.total_steps
        return True

    def _steps_in_time(self, per_step: float) -> int:
        plan = self.plan
        left = (self.settings.time or planning.DEFAULT_SECONDS) - self._elapsed()
        fitting = self.trainer.step_number + steps_in(left, per_step, plan.tokens_per_step, self._n_val_tokens)
        useful = max(planning.TIMED_STEPS, planning.TIMED_EPOCHS * plan.rows_per_epoch // plan.batch_size)
        if fitting > useful:
            log.info("%d steps are enough for this corpus, less than the time would allow; --epochs goes on", useful)
        return min(fitting, useful)

    def _validation_interval(self) -> int | float | None:
        total = self.trainer.total_steps
        if not self.feed.has_validation:
            return None
        if self.settings.validate_every is not None or total is None:
            return self.settings.validate_every
        return validation_interval(total, self.plan.tokens_per_step, self._n_val_tokens)

    @property
    def _n_val_tokens(self) -> int:
        return self.feed.val_view.n_tokens if self.feed.has_validation else 0

    def _validate(self, stop: StopRequest) -> Iterator[Validated]:
        if not self.feed.has_validation:
            return
        started = time.perf_counter()
        nats, n_scored = self.trainer.validate(_until(stop, self.feed.validation_batches()))
        if not n_scored:
            return
        n_bytes = self.feed.val_view.n_bytes
        yield self._recorded(
            Validated(
                step=self.trainer.step_number,
                loss=nats / n_scored,
                bits_per_byte=nats / math.log(2) / n_bytes if n_bytes else None,
                seconds=time.perf_counter() - started,
            )
        )

    def _report(self) -> Trained:
        trainer = self.trainer
        memory = hardware.peak_memory(self.device)
        return self._meter.report(trainer.step_number, trainer.total_steps, self._elapsed(), memory)

    # --- records ---

    def _save(self) -> Saved:
        step = self.trainer.step_number
        counters = {"step": step, "unreported": self._meter.unreported}
        with distributed.entered_on_first(self.directory.saving(step, counters, self.settings.keep)) as place:
            state.write(self.trainer, self.corpus.tokenizer, place)
        self._saved_step = step
        return Saved(step, str(self.directory.path))

    def _recorded(self, event: Trained | Validated):
        kind = "train" if isinstance(event, Trained) else "validation"
        distributed.on_first(self.directory.append_metrics, {"event": kind, **dataclasses.asdict(event)})
        return event

    def _write_lineage(self, metrics: dict) -> None:
        plan = dataclasses.asdict(self.plan)
        made_by = lineage.Lineage(
            command="pretrain",
            recipe={key: value for key, value in plan.items() if key != "hf_config"},
            seed=self.settings.seed,
            data_sha256=self.plan.data_sha256,
            tokenizer_sha256=self.plan.tokenizer_sha256,
            parent_sha256=self.plan.parent_sha256,
            metrics=metrics,
        )
        lineage.write(self.directory.path, made_by)

    def _elapsed(self) -> float:
        return time.monotonic() - self.began


def _heed(stop: StopRequest) -> None:
    if distributed.any_rank(stop.requested is not None):
        raise _Stopped


def _until(stop: StopRequest, batches: Iterator[Batch]) -> Iterator[Batch]:
    for number, batch in enumerate(batches):
        # once for a batch on every rank: in between each rank takes its turn at the sharded forward
        if number % distributed.world_size() == 0:
            _heed(stop)
        yield batch
