"""The steps of a run, with its reports, validations and saves."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any, TypeVar

import torch

from llmctl import lineage
from llmctl.models.config import flops_per_token
from llmctl.train import distributed, hardware, length
from llmctl.train.best import Best
from llmctl.train.events import Compared, Event, Finished, Planned, Saved, Trained, Validated
from llmctl.train.feed import Batch, Feed
from llmctl.train.loop import StepResult, Trainer
from llmctl.train.pace import Interval, Meter
from llmctl.train.plan import Plan
from llmctl.train.run_directory import RunDirectory
from llmctl.train.signals import StopRequest
from llmctl.train.task import Task

log = logging.getLogger("llmctl")

E = TypeVar("E", Trained, Validated)


class Stopped(Exception):
    """A signal asked for the end, and what it interrupted can be given up."""


class Stepping:
    """From step `trainer.step_number` to the last. `began` is the monotonic time at which the command started."""

    def __init__(
        self,
        task: Task,
        plan: Plan,
        feed: Feed,
        trainer: Trainer,
        directory: RunDirectory,
        device: torch.device,
        began: float,
    ):
        self.task, self.settings, self.plan, self.feed, self.trainer = task, task.settings, plan, feed, trainer
        self._directory, self._device, self._began = directory, device, began
        self.meter: Meter | None = None
        self._durations: list[float] = []
        self._saved_step: int | None = None
        self.best = Best()
        self._before: dict[str, float] = {}

    def start_meter(self) -> None:
        """Measure what this machine can do, for the reports."""
        peak_flops = hardware.peak_flops(self._device, self.trainer.dtype) * distributed.world_size()
        self.meter = Meter(self.plan.tokens_per_step, flops_per_token(self.task.config, self.plan.seq_len), peak_flops)

    def restore(self, counters: Mapping[str, Any]) -> None:
        """Go on from a save, whose state the trainer has already."""
        self.trainer.step_number = self._saved_step = counters["step"]
        self.meter.restore(counters["unreported"])
        self.best, self._before = Best(**counters["best"]), counters["before"]

    def steps(self, stop: StopRequest) -> Iterator[Event]:
        """All steps that are left. Raises Stopped soon after a signal."""
        trainer = self.trainer
        save, report = Interval(self.settings.save_every), Interval(self.settings.log_every)
        validate = Interval(self._validation_interval())
        while True:
            if trainer.total_steps is None and self._fix_length():
                validate = Interval(self._validation_interval())
                yield Planned(trainer.total_steps, self.plan.epochs)
            if trainer.step_number == trainer.total_steps:
                return
            # in front of the step, so that a run resumed here does it too
            if trainer.step_number == 0 and self.task.validates_first:
                yield from self._measure_before(stop)
            elif trainer.step_number and validate.due(trainer.step_number):
                yield from self._judge(stop)
                if self.settings.early_stopping and self.best.waited >= self.settings.early_stopping:
                    log.info("%d validations were no better than that of step %d", self.best.waited, self.best.step)
                    return
            self.meter.add(*self.timed_step())
            is_last = trainer.step_number == trainer.total_steps
            if report.due(trainer.step_number) or is_last:
                yield self._recorded(self._report())
            _heed(stop)
            if not is_last and save.due(trainer.step_number):
                yield from self.save()

    def finish(self, stop: StopRequest) -> Iterator[Event]:
        """Save, validate, and leave the lineage, which says that the run is complete."""
        step = self.trainer.step_number
        yield from self.save()
        numbers: dict[str, float] = {}
        for event in self._judge(stop):
            numbers = event.numbers if isinstance(event, Validated) else numbers
            yield event
        if self.settings.keep_best and self.best.step is not None:
            step, numbers = self.best.step, self.best.numbers
            distributed.on_first(self._directory.publish_step, step)
        metrics = {"step": step, "tokens": step * self.plan.tokens_per_step}
        metrics |= {f"validation_{name}": value for name, value in numbers.items()}
        after = self._losses(numbers, self.task.measures(self.trainer)) if self._before else {}
        if rows := {name: (self._before[name], after[name]) for name in self._before if name in after}:
            metrics |= {"before": self._before, "after": after}
            yield Compared(step, rows)
        distributed.on_first(self._write_lineage, metrics)
        yield Finished(step, str(self._directory.path), self._elapsed())

    def save(self) -> Iterator[Saved]:
        """Save the current step, unless that was done."""
        step = self.trainer.step_number
        if step == self._saved_step:
            return
        counters = {
            "step": step,
            "unreported": self.meter.unreported,
            "best": asdict(self.best),
            "before": self._before,
        }
        best = self.best.step if self.settings.keep_best else None
        with distributed.entered_on_first(self._directory.saving(step, counters, self.settings.keep, best)) as place:
            self.task.write(self.trainer, place)
        self._saved_step = step
        yield Saved(step, str(self._directory.path))

    def timed_step(self) -> tuple[StepResult, float]:
        started = time.perf_counter()
        result = self.trainer.step(*self.feed.micro_batches(self.trainer.step_number))
        seconds = time.perf_counter() - started
        self._durations.append(seconds)
        return result, seconds

    def steps_in_time(self, per_step: float) -> int:
        """The run's length where a step takes so many seconds and time is what limits it."""
        left = (self.settings.time or length.DEFAULT_SECONDS) - self._elapsed()
        return length.steps_in_time(left, per_step, self.plan, self.trainer.step_number, self.feed.n_val_tokens)

    def _fix_length(self) -> bool:
        """Let the schedule know the number of steps: at once, or when a time budget has become one.

        The plan on disk keeps that number and when it was fixed, so that a resumed run takes the same steps.
        """
        plan = self.plan
        if plan.total_steps is None:
            per_step = length.seconds_per_step(self._durations, self.settings.time or length.DEFAULT_SECONDS)
            total = distributed.from_first(None if per_step is None else self.steps_in_time(per_step))
            if total is None:
                return False
            plan.total_steps, plan.length_fixed_at = total, self.trainer.step_number
            distributed.on_first(self._directory.write_plan, asdict(plan))
        if self.trainer.step_number < plan.length_fixed_at:
            return False
        self.trainer.total_steps = plan.total_steps
        return True

    def _validation_interval(self) -> int | float | None:
        total = self.trainer.total_steps
        if self.feed.val is None:
            return None
        if self.settings.validate_every is not None or total is None:
            return self.settings.validate_every
        return length.validation_interval(total, self.plan.tokens_per_step, self.feed.n_val_tokens)

    def _measure_before(self, stop: StopRequest) -> Iterator[Validated]:
        numbers: dict[str, float] = {}
        for validated in self._validate(stop):
            numbers = validated.numbers
            yield validated
        self._before = self._losses(numbers, self.task.measures(self.trainer))

    def _losses(self, numbers: Mapping[str, float], others: Mapping[str, float]) -> dict[str, float]:
        """By name: what is learned, and what else the task measures."""
        return {**({"held-out rows": numbers["loss"]} if numbers else {}), **others}

    def _judge(self, stop: StopRequest) -> Iterator[Validated | Saved]:
        """Validate, and keep what is the best so far where that is asked for."""
        for validated in self._validate(stop):
            yield validated
            if self.best.improves(validated) and self.settings.keep_best:
                yield from self.save()
                distributed.on_first(self._directory.publish_step, validated.step)

    def _validate(self, stop: StopRequest) -> Iterator[Validated]:
        if self.feed.val is None:
            return
        started = time.perf_counter()
        nats, n_scored, metrics = self.trainer.validate(_until(stop, self.feed.validation_batches()))
        if not n_scored:
            return
        n_bytes = self.feed.val.n_bytes
        yield self._recorded(
            Validated(
                step=self.trainer.step_number,
                loss=nats / n_scored,
                bits_per_byte=nats / math.log(2) / n_bytes if n_bytes else None,
                seconds=time.perf_counter() - started,
                measure=getattr(self.trainer.objective, "measure", "nats"),
                unit=self.feed.val.unit,
                metrics=metrics,
            )
        )

    def _report(self) -> Trained:
        trainer = self.trainer
        memory = hardware.peak_memory(self._device)
        return self.meter.report(trainer.step_number, trainer.total_steps, self._elapsed(), memory)

    def _recorded(self, event: E) -> E:
        kind = "train" if isinstance(event, Trained) else "validation"
        record = {"event": kind, **asdict(event)}
        record |= record.pop("metrics", {})
        distributed.on_first(self._directory.append_metrics, record)
        return event

    def _write_lineage(self, metrics: dict[str, Any]) -> None:
        made_by = lineage.Lineage(
            command=self.task.name,
            recipe={key: value for key, value in asdict(self.plan).items() if key != "hf_config"},
            seed=self.settings.seed,
            data_sha256=self.plan.data_sha256,
            tokenizer_sha256=self.plan.tokenizer_sha256,
            parent_sha256=self.plan.parent_sha256,
            metrics=metrics,
        )
        lineage.write(self._directory.path, made_by)

    def _elapsed(self) -> float:
        return time.monotonic() - self._began


def _heed(stop: StopRequest) -> None:
    if distributed.any_rank(stop.requested is not None):
        raise Stopped


def _until(stop: StopRequest, batches: Iterator[Batch]) -> Iterator[Batch]:
    for number, batch in enumerate(batches):
        # once for a batch on every rank: in between each rank takes its turn at the sharded forward
        if number % distributed.world_size() == 0:
            _heed(stop)
        yield batch
