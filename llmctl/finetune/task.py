"""`llmctl finetune`: a checkpoint, taught from rows by some method and objective."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from llmctl import files, lineage
from llmctl.devices import choose_device
from llmctl.errors import CalledWrongly, UserError
from llmctl.finetune import adapter, earlier_task, heads, planning, quantized, saving
from llmctl.finetune.data.batches import PackedExamples, PaddedExamples, Split
from llmctl.finetune.data.prepare import prepare
from llmctl.finetune.data.sources import parse_sources
from llmctl.finetune.data.store import ExampleSet
from llmctl.finetune.distillation import Distilled, Teacher, refuse_teacher
from llmctl.finetune.features import FeatureRows, HeadOnly, freeze_backbone
from llmctl.finetune.labelled import Classification, Regression, Reward
from llmctl.finetune.neftune import add_noise
from llmctl.finetune.objectives import RULES, Comparison, SourceToTarget
from llmctl.finetune.planning import FinetunePlan
from llmctl.finetune.rows import rows_of
from llmctl.finetune.selection import freeze
from llmctl.finetune.settings import FinetuneSettings
from llmctl.models.language_model import LanguageModel
from llmctl.models.loading import load_model, read_config
from llmctl.tokenizer import Tokenizer
from llmctl.train import building, distributed, hardware
from llmctl.train.feed import Feed, Rows
from llmctl.train.objectives import MaskedToken, NextToken
from llmctl.train.run import Run, training
from llmctl.train.task import Task

if TYPE_CHECKING:
    from llmctl.train.loop import Trainer

log = logging.getLogger("llmctl")


def finetuning(
    settings: FinetuneSettings,
    model: str | os.PathLike | None,
    inputs: Sequence[str],
    output: str | os.PathLike,
    given: frozenset[str] = frozenset(),
    began: float | None = None,
) -> contextlib.AbstractContextManager[Run]:
    """A fine-tuning run as `training` gives it; `model` may be left out where a run goes on."""
    planning.refuse_contradictions(settings)
    if settings.overwrite:
        files.refuse_input(output, filter(None, [model, settings.teacher, settings.retain, *inputs]))
    return training(Finetuning(planning.with_length(settings), model), inputs, output, given, began)


FIRST_TEXTS, CENTRE_TEXTS = 64, 2
"""So many show a fresh head what texts have in common, and so many go on doing so while the model learns."""
RETAINED = "retained.arrow"
"""An earlier task's text, beside the examples."""
SCORED_AT_ONCE = 4096
"""Tokens of it."""


class Finetuning(Task):
    name = "finetune"
    plan_type = FinetunePlan
    validates_first = True

    settings: FinetuneSettings

    def __init__(self, settings: FinetuneSettings, model: str | os.PathLike | None):
        super().__init__(settings)
        self._model = None if model is None else os.path.abspath(model)
        self.examples: ExampleSet | None = None
        self._temporary: tempfile.TemporaryDirectory | None = None

    def open(self, inputs: list[str], spool: Path | None, recorded: FinetunePlan | None) -> str:
        if self._model is None:
            if recorded is None:
                raise CalledWrongly("no model to fine-tune", hint="llmctl finetune MODEL DATA")
            self._model = recorded.model
        distributed.on_first(adapter.refuse_as_base, self._model)
        self.config = read_config(self._model)
        self._refuse_other_base(recorded)
        if spool is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="llmctl-")
            spool = Path(self._temporary.name) / "examples"
        if not (recorded and distributed.on_first(spool.exists)):
            distributed.on_first(self._prepare, inputs, spool)
        self.examples, self._spool = ExampleSet(spool), spool
        if self.settings.retain:
            how = (self._seq_len, self.config.kind, self.examples.tokenizer, self.settings)
            self._retained = earlier_task.scored_rows(spool / RETAINED, *how)
        planning.refuse_kind(self.examples.objective, self.config)
        planning.refuse_no_features(self.settings, self.examples.objective)
        planning.refuse_extras(self.settings, self.examples.objective, self.config)
        planning.refuse_quantized(self.settings, self.config)
        self._has_head = self.config.classifier is not None
        self._classifier = heads.classifier_for(self.examples, self.config, self.settings.pooling)
        if self._classifier is not None:
            self.config = self.config.classifying(self._classifier)
        if self.settings.teacher:
            adapter.refuse_as_base(self.settings.teacher)
            refuse_teacher(read_config(self.settings.teacher), self.config, self._seq_len)
        if recorded and inputs != recorded.inputs:  # the examples are there already; are these the same?
            return distributed.on_first(self._sha256_of, inputs)
        return self.examples.sha256

    def _sha256_of(self, inputs: list[str]) -> str:
        with tempfile.TemporaryDirectory(prefix="llmctl-") as temporary:
            self._prepare(inputs, Path(temporary) / "examples")
            return ExampleSet(Path(temporary) / "examples").sha256

    def _refuse_other_base(self, recorded: FinetunePlan | None) -> None:
        if recorded is None or recorded.parent_sha256 is None:
            return
        found = distributed.on_first(lineage.weights_sha256, self._model)
        if found != recorded.parent_sha256:
            raise UserError(
                f"the run began with the weights {recorded.parent_sha256[:12]}; {self._model} has {found[:12]}",
                hint="give the model that it began with, or start anew with --overwrite",
            )

    def make_plan(self, inputs: list[str], device: torch.device) -> FinetunePlan:
        plan = planning.make_plan(self.settings, self._model, self.config, inputs, self.examples, self._seq_len, device)
        if self.settings.batch_size is None:
            rows = self._rows("train", plan).rows_per_epoch
            plan.batch_size = planning.default_batch_size(rows, plan.seq_len, device)
        return plan

    def make_feed(self, plan: FinetunePlan) -> Feed:
        val = self._rows("val", plan) if len(self.examples.val) else None
        train = self._rows("train", plan)
        if self.settings.method == "feature":
            train, val = self._behind_backbone(plan, train, val)
        return Feed(train, val, plan)

    def make_trainer(self, plan: FinetunePlan, device: torch.device, save: Path | None) -> Trainer:
        if self.settings.method == "feature":
            objective = HeadOnly(self._of_head)
        else:
            objective = self._objective(self._model_to_train(plan, device), device)
        trainer = building.build_trainer(objective, plan, self.settings, device)
        if save is not None:
            saving.load(trainer, save)
        return trainer

    def _behind_backbone(self, plan: FinetunePlan, train: Rows, val: Rows | None) -> tuple[Rows, Rows | None]:
        """The same rows with what the backbone makes of them, in files beside the examples."""
        device = choose_device(self.settings.device)
        self._of_head = self._objective(self._model_to_train(plan, device), device)
        how = {"dtype": hardware.compute_dtype(plan.precision, device), "seed": self.settings.seed}
        path = self._spool / "features-train.bin"
        train = FeatureRows(train, self._of_head, path, **how, shuffled=True)
        if val is not None:
            val = FeatureRows(val, self._of_head, self._spool / "features-val.bin", **how, shuffled=False)
        return train, val

    def _model_to_train(self, plan: FinetunePlan, device: torch.device) -> LanguageModel:
        settings = self.settings
        method = planning.adapter_method(settings)
        is_alone = distributed.world_size() == 1
        # sharding wants one dtype, and weights that are trained must be float32
        dtype = torch.bfloat16 if method is not None and plan.precision == "bf16" and is_alone else torch.float32
        model = load_model(
            self._model, None if settings.method == "qlora" else dtype, classifier=self._classifier, seed=settings.seed
        )
        self.config = model.config = dataclasses.replace(model.config, dropout=settings.dropout)
        if method is not None:
            adapter.attach(model, method, settings.seed)
            if settings.method == "qlora":
                quantized.quantize(model, settings.quantize_base, settings.double_quantization)
        elif settings.method == "freeze":
            freeze(model, settings.train_layers, settings.train_modules)
        elif settings.method == "feature":
            self.config = freeze_backbone(model.to(device)).config
        if settings.neftune:
            add_noise(model, settings.neftune)
        log.info("%s", planning.describe_trained(model))
        return model

    @property
    def tokenizer(self) -> Tokenizer:
        tokenizer = self.examples.tokenizer
        return tokenizer if self._classifier is None else heads.with_padding(tokenizer, self._classifier)

    def write(self, trainer: Trainer, directory: Path | None) -> None:
        saving.write(trainer, self.tokenizer, planning.adapter_method(self.settings), Path(self._model), directory)

    def measures(self, trainer: Trainer) -> dict[str, float]:
        """The loss on an earlier task's text."""
        if not self.settings.retain:
            return {}
        is_same = self.examples.objective in ("sft", "causal", "mlm")
        objective = trainer.objective if is_same else NextToken(trainer.objective.model, 0.0)
        at_once = max(1, SCORED_AT_ONCE // self._seq_len)
        nats, count, _ = trainer.validate(self._retained.validation_batches(at_once), objective)
        return {"earlier task": nats / count}

    @property
    def _seq_len(self) -> int:
        return planning.seq_len(self.settings, self.config)

    def _prepare(self, inputs: list[str], directory: Path) -> None:
        if not inputs:
            raise CalledWrongly("no data to learn from", hint="llmctl finetune MODEL DATA, or - for standard input")
        if directory.exists():
            shutil.rmtree(directory)
        settings, tokenizer = self.settings, Tokenizer.load(self._model)
        how = {"seq_len": self._seq_len, "label_names": heads.known_labels(self.config)}
        with tempfile.TemporaryDirectory(prefix="llmctl-") as temporary:
            sources = parse_sources(inputs, settings.val_data)
            if settings.replay:
                file = Path(temporary) / "replay.arrow"
                held_out = [source for source in sources if source.is_held_out]
                sources = [*earlier_task.replayed(inputs, settings.replay, file), *held_out]
                path = settings.replay.rpartition(":")[0]
                earlier_task.write_pieces(path, self._model, file, self._seq_len, earlier_task.REPLAYED_TOKENS)
            prepare(sources, settings, tokenizer, directory, **how)
        if settings.retain:
            file = directory / RETAINED
            earlier_task.write_pieces(settings.retain, self._model, file, self._seq_len, earlier_task.SCORED_TOKENS)

    def _rows(self, split: Split, plan: FinetunePlan) -> PackedExamples | PaddedExamples:
        return rows_of(self.examples, split, plan, self.settings, self.config)

    def _labelled(self, model: LanguageModel) -> Classification | Regression | Reward:
        if self.examples.objective == "regress":
            objective = Regression(model, heads.training_values(self.examples), self._has_head)
        else:
            objective = {"classify": Classification, "reward": Reward}[self.examples.objective](model)
        device = model.embed_tokens.weight.device
        if not self._has_head:
            some = PaddedExamples(self.examples, "train", 1, seed=self.settings.seed).train_batch(0, FIRST_TEXTS)
            inputs_BT, _, lengths_B, *_ = some.tensors(device)
            if device.type != "meta":  # else this process gets its share of another's
                objective.begin_with(inputs_BT, lengths_B)
            objective.centre_on(inputs_BT[:CENTRE_TEXTS], lengths_B[:CENTRE_TEXTS])
        return objective

    def _objective(self, model: LanguageModel, device: torch.device) -> nn.Module:
        settings, objective = self.settings, self.examples.objective
        dtype, teacher = next(model.parameters()).dtype, None
        if settings.teacher:
            theirs = load_model(settings.teacher, dtype, device)
            teacher = Teacher(theirs, settings.teacher_weight, settings.teacher_temperature)
        if objective in heads.HEADED:
            learned = self._labelled(model)
            learned.learn_from(teacher)
            return learned
        if objective in RULES:
            rule = RULES[objective]
            reference = load_model(self._model, dtype, device) if rule.needs_reference else None
            return Comparison(model, rule, settings, reference, teacher)
        learned = {"mlm": MaskedToken, "seq2seq": SourceToTarget}.get(objective, NextToken)(model, settings.z_loss)
        return learned if teacher is None else Distilled(learned, teacher)
