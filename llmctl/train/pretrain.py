"""`llmctl pretrain`: from settings and a token stream to a checkpoint, as a sequence of events."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Iterator, Sequence

import torch

from llmctl import lineage
from llmctl.data.corpus import Corpus
from llmctl.data.packing import PackedRows
from llmctl.errors import CalledWrongly, Interrupted, UserError
from llmctl.files import read_json
from llmctl.models import families
from llmctl.models.config import ModelConfig, flops_per_token, parameter_count
from llmctl.train import distributed, hardware, optim, planning, state
from llmctl.train.events import Event, Finished, Planned, Saved, Started, Trained, Validated
from llmctl.train.loop import Objective, StepResult, Trainer
from llmctl.train.pace import Interval, Meter, seconds_per_step
from llmctl.train.planning import Plan
from llmctl.train.run_directory import STATE, RunDirectory
from llmctl.train.schedule import Schedule
from llmctl.train.settings import PretrainSettings
from llmctl.train.signals import StopRequest

SECONDS_TO_FINISH = 1.5
"""Of a time budget, kept back for the last save and the exit."""


class Pretraining:
    """One run in one output directory: prepared by the constructor, carried out by `run`.

    `given` names the settings that the caller set explicitly, `began` is the monotonic time at which the command started.
    """

    def __init__(
        self,
        settings: PretrainSettings,
        inputs: Sequence[str],
        output: str | os.PathLike,
        given: frozenset[str] = frozenset(),
        began: float | None = None,
    ):
        self.began = time.monotonic() if began is None else began
        self.device = distributed.start(hardware.pick_device(settings.device))
        self.run_directory = RunDirectory(output)
        recorded = self._recorded_plan(settings)
        self.settings = planning.resumed_settings(settings, recorded, given) if recorded else settings
        if self.settings.threads:
            torch.set_num_threads(self.settings.threads)
        paths = [path if path == "-" else os.path.abspath(path) for path in inputs]
        self.corpus = self._open_corpus(recorded, paths)
        self.plan = recorded or planning.make_plan(self.settings, paths, self.corpus, self.device)
        self.config = self._model_config()
        self.dtype = hardware.compute_dtype(self.plan.precision, self.device)
        self._cut_rows()
        self.plan.total_steps = self.plan.total_steps or planning.fixed_steps(self.settings, self.plan)
        self.trainer = self._trainer()
        self._durations: list[float] = []

    def run(self) -> Iterator[Event]:
        """Train to the end. Raises Interrupted, after a save, when a signal asked for it."""
        self._restore()
        if distributed.rank() == 0:
            self.run_directory.truncate_metrics(self.trainer.step_number)
        self._record_plan()
        yield self._started()
        with StopRequest() as stop:
            yield from self._steps(stop)
        yield from self._finish()

    def dry_run(self) -> dict[str, float | int | str]:
        """Size, memory, disk and time, from two real steps; nothing is written."""
        steps = [self._timed_step() for _ in range(2)]
        n = parameter_count(self.config)
        total = self.plan.total_steps
        per_step = steps[-1][1]
        if total is None:
            total = self._steps_in_time(per_step)
        return {
            "shape": planning.describe(self.config),
            "parameters": n,
            "tokens_per_step": self.plan.tokens_per_step,
            "steps": total,
            "epochs": total * self.plan.batch_size / self.plan.rows_per_epoch,
            "flops": flops_per_token(self.config, self.plan.seq_len) * self.plan.tokens_per_step * total,
            "memory_bytes": hardware.peak_memory(self.device),
            "disk_bytes": (1 + self.settings.keep) * sum(t.nbytes for t in self._state_tensors()),
            "tokens_per_second": self.plan.tokens_per_step / per_step,
            "seconds": total * per_step,
        }

    # --- preparing ---

    def _recorded_plan(self, settings: PretrainSettings) -> Plan | None:
        if settings.dry_run and not settings.resume:
            return None
        content = None
        if distributed.rank() == 0:
            content = self.run_directory.open(resume=settings.resume, overwrite=settings.overwrite)
        content = distributed.from_first(content)
        return planning.read_plan(content) if content else None

    def _open_corpus(self, recorded: Plan | None, paths: list[str]) -> Corpus:
        paths = recorded.inputs if recorded else paths
        if not paths:
            raise CalledWrongly("no token stream to train on", hint="llmctl tokenize FILE | llmctl pretrain")
        if "-" in paths and not self.settings.dry_run:
            spool = self.run_directory.spool
            if distributed.rank() == 0 and not (recorded and spool.exists()):
                Corpus.open(paths, spool_to=spool)
            distributed.barrier()
            paths = [str(spool) if path == "-" else path for path in paths]
        corpus = Corpus.open(paths)
        if corpus.split("train") is None:
            raise UserError("the token stream holds no training tokens")
        if recorded and recorded.data_sha256 != corpus.sha256:
            raise UserError(
                f"the run began with the tokens {recorded.data_sha256[:12]}; {paths[0]} now holds {corpus.sha256[:12]}",
                hint="put the old file back, or start anew with --overwrite",
            )
        return corpus

    def _model_config(self) -> ModelConfig:
        hf = self.plan.hf_config
        config = families.find(hf["model_type"]).config_from_hf(hf)
        return dataclasses.replace(config, dropout=self.settings.dropout)

    def _cut_rows(self) -> None:
        tokenizer, seq_len = self.corpus.tokenizer, self.plan.seq_len
        how = {"seed": self.settings.seed, "isolate_documents": self.settings.isolate_documents}
        self.train_view, self.val_view = self.corpus.split("train"), self.corpus.split("val")
        self.rows = PackedRows(self.train_view, seq_len, tokenizer, **how)
        self.plan.rows_per_epoch = self.rows.rows_per_epoch
        self.val_rows = None
        if self.val_view is not None and self.val_view.n_tokens > 2:
            self.val_rows = PackedRows(self.val_view, min(seq_len, self.val_view.n_tokens - 1), tokenizer, **how)
        self._rows_per_rank, left_over = divmod(self.plan.batch_size, distributed.world_size())
        if left_over:
            raise CalledWrongly(
                f"--batch-size {self.plan.batch_size} is no multiple of the {distributed.world_size()} processes"
            )
        self._micro_batch_size = min(self.plan.micro_batch_size or self._rows_per_rank, self._rows_per_rank)

    def _trainer(self) -> Trainer:
        settings, plan = self.settings, self.plan
        model = planning.initial_model(settings, self.config).to(self.device)
        model.activation_checkpointing = settings.activation_checkpointing
        objective = Objective(model, settings.z_loss)
        distributed.shard(objective, self.device)
        if plan.compile:
            plan.compile = planning.compile_blocks(model)
        betas = (settings.beta1, settings.beta2)
        return Trainer(
            objective=objective,
            optimizers=optim.build(
                model,
                settings.optimizer,
                plan.learning_rate,
                settings.weight_decay,
                betas,
                plan.embedding_learning_rate,
            ),
            schedule=Schedule(settings.schedule, settings.warmup_steps, settings.decay, settings.min_lr),
            device=self.device,
            dtype=self.dtype,
            clip=settings.clip,
            seed=settings.seed,
            total_steps=plan.total_steps,
        )

    def _restore(self) -> None:
        latest = distributed.from_first(self.run_directory.latest() if distributed.rank() == 0 else None)
        if latest is None:
            return
        self.trainer.step_number = read_json(latest / STATE)["step"]
        state.load(self.trainer, latest)
        if torch.get_num_threads() != self.plan.threads:
            planning.log.warning(
                "the run began with %d threads and goes on with %d: its last bits may differ",
                self.plan.threads,
                torch.get_num_threads(),
            )

    def _started(self) -> Started:
        self._peak_flops = hardware.peak_flops(self.device, self.dtype) * distributed.world_size()
        return Started(
            step=self.trainer.step_number,
            n_parameters=parameter_count(self.config),
            shape=planning.describe(self.config),
            train_tokens=self.train_view.n_tokens,
            val_tokens=self.val_view.n_tokens if self.val_view else 0,
            tokens_per_step=self.plan.tokens_per_step,
            device=str(self.device),
            dtype=str(self.dtype).removeprefix("torch."),
            peak_flops=self._peak_flops,
        )

    # --- training ---

    def _steps(self, stop: StopRequest) -> Iterator[Event]:
        trainer = self.trainer
        save, log = Interval(self.settings.save_every), Interval(self.settings.log_every)
        validate = Interval(self._validation_interval())
        meter = Meter(self.plan.tokens_per_step, flops_per_token(self.config, self.plan.seq_len), self._peak_flops)
        if trainer.total_steps is not None:
            yield Planned(trainer.total_steps, self.plan.epochs)
        while trainer.total_steps is None or trainer.step_number < trainer.total_steps:
            meter.add(*self._timed_step())
            if trainer.total_steps is None and self._fix_length():
                validate = Interval(self._validation_interval())
                yield Planned(trainer.total_steps, self.plan.epochs)
            is_last = trainer.step_number == trainer.total_steps
            if log.due(trainer.step_number) or is_last:
                yield self._recorded(self._report(meter))
            if distributed.any_rank(stop.requested is not None):
                yield self._save()
                raise Interrupted(stop.requested or 15)
            if not is_last and save.due(trainer.step_number):
                yield self._save()
            if not is_last and validate.due(trainer.step_number):
                yield from self._validate()

    def _finish(self) -> Iterator[Event]:
        step = self.trainer.step_number
        latest = distributed.from_first(self.run_directory.latest() if distributed.rank() == 0 else None)
        if latest is None or read_json(latest / STATE)["step"] != step:
            yield self._save()
        metrics = {"step": step, "tokens": step * self.plan.tokens_per_step}
        for validated in self._validate():
            metrics |= {"validation_loss": validated.loss, "validation_bits_per_byte": validated.bits_per_byte}
            yield validated
        if distributed.rank() == 0:
            self._write_lineage(metrics)
        distributed.barrier()
        yield Finished(step, str(self.run_directory.path), self._elapsed())

    def _timed_step(self) -> tuple[StepResult, float]:
        started = time.perf_counter()
        result = self.trainer.step(*self._next_batches())
        seconds = time.perf_counter() - started
        self._durations.append(seconds)
        return result, seconds

    def _next_batches(self):
        """This rank's micro batches of the next step, and the number of targets of all ranks together."""
        first = self.trainer.step_number * self.plan.batch_size + distributed.rank() * self._rows_per_rank
        batches = [
            self.rows.train_batch(first + at, min(self._micro_batch_size, self._rows_per_rank - at))
            for at in range(0, self._rows_per_rank, self._micro_batch_size)
        ]
        n_targets = torch.tensor(sum(batch.n_targets for batch in batches))
        return batches, int(distributed.sum_over_ranks(n_targets))

    def _fix_length(self) -> bool:
        """Turn the time budget into steps, once enough of them were timed; the plan on disk keeps the number."""
        per_step = seconds_per_step(self._durations, self.settings.time or planning.DEFAULT_SECONDS)
        per_step = distributed.from_first(per_step)
        if per_step is None:
            return False
        self.trainer.total_steps = self.plan.total_steps = distributed.from_first(self._steps_in_time(per_step))
        self._record_plan()
        return True

    def _steps_in_time(self, per_step: float) -> int:
        left = (self.settings.time or planning.DEFAULT_SECONDS) - self._elapsed() - SECONDS_TO_FINISH
        if self.val_view is not None:
            # the last validation is a forward pass, a third of a step per token; those in between take 5 % at most
            left -= per_step * self.val_view.n_tokens / self.plan.tokens_per_step / 3
            left /= 1.05
        return self.trainer.step_number + max(1, int(left / per_step))

    def _validation_interval(self) -> int | float | None:
        """Ten validations a run, fewer where they would cost more than a twentieth of it."""
        if self.val_rows is None or self.settings.validate_every is not None:
            return self.settings.validate_every if self.val_rows is not None else None
        total = self.trainer.total_steps
        if total is None:
            return None
        affordable = 0.05 * 3 * total * self.plan.tokens_per_step / self.val_view.n_tokens
        return max(1, math.ceil(total / max(1, min(10, int(affordable)))))

    def _validate(self) -> Iterator[Validated]:
        if self.val_rows is None:
            return
        started = time.perf_counter()
        rows_at_once = max(1, self._micro_batch_size)
        nats, n_scored = self.trainer.validate(self.val_rows.validation_batches(rows_at_once))
        n_bytes = self.val_view.n_bytes
        yield self._recorded(
            Validated(
                step=self.trainer.step_number,
                loss=nats / n_scored,
                bits_per_byte=nats / math.log(2) / n_bytes if n_bytes else None,
                seconds=time.perf_counter() - started,
            )
        )

    def _report(self, meter: Meter) -> Trained:
        trainer = self.trainer
        memory = hardware.peak_memory(self.device)
        return meter.report(trainer.step_number, trainer.total_steps, self._elapsed(), memory)

    # --- records ---

    def _save(self) -> Saved:
        step = self.trainer.step_number
        write = self._write_state
        path = self.run_directory.path
        if distributed.rank() == 0:
            self.run_directory.save(step, {"step": step}, write, self.settings.keep)
        else:
            write(None)
        distributed.barrier()
        return Saved(step, str(path))

    def _write_state(self, directory) -> None:
        state.write(self.trainer, self.corpus.tokenizer, directory)

    def _state_tensors(self):
        yield from self.trainer.objective.parameters()
        yield from state.optimizer_tensors(self.trainer).values()

    def _record_plan(self) -> None:
        if distributed.rank() == 0:
            self.run_directory.write_plan(dataclasses.asdict(self.plan))

    def _recorded(self, event: Trained | Validated):
        kind = "train" if isinstance(event, Trained) else "validation"
        if distributed.rank() == 0:
            self.run_directory.append_metrics({"event": kind, **dataclasses.asdict(event)})
        return event

    def _write_lineage(self, metrics: dict) -> None:
        parent = self.settings.init_from
        made_by = lineage.Lineage(
            command="pretrain",
            recipe={key: value for key, value in dataclasses.asdict(self.plan).items() if key != "hf_config"},
            seed=self.settings.seed,
            data_sha256=self.plan.data_sha256,
            tokenizer_sha256=self.plan.tokenizer_sha256,
            parent_sha256=lineage.weights_sha256(parent) if parent else None,
            metrics=metrics,
        )
        lineage.write(self.run_directory.path, made_by)

    def _elapsed(self) -> float:
        return time.monotonic() - self.began


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Leave torchrun's process group in any case, so that no rank waits for one that failed."""
    try:
        yield
    finally:
        distributed.stop()
