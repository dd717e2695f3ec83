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

from llmctl.errors import CalledWrongly
from llmctl.finetune import adapter, heads, planning, quantized, saving
from llmctl.finetune.data.batches import PackedExamples, PaddedExamples, Split
from llmctl.finetune.data.prepare import prepare
from llmctl.finetune.data.sources import parse_sources
from llmctl.finetune.data.store import ExampleSet
from llmctl.finetune.labelled import Classification, Regression, Reward
from llmctl.finetune.objectives import RULES, Comparison, SourceToTarget
from llmctl.finetune.planning import FinetunePlan
from llmctl.finetune.rows import rows_of
from llmctl.finetune.selection import freeze
from llmctl.finetune.settings import FinetuneSettings
from llmctl.models.language_model import LanguageModel
from llmctl.models.loading import load_model, read_config
from llmctl.tokenizer import Tokenizer
from llmctl.train import building, distributed
from llmctl.train.feed import Feed
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
    return training(Finetuning(planning.with_length(settings), model), inputs, output, given, began)


FIRST_TEXTS = 64
"""So many show a head without a bias where the mean is."""


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
        self.config = read_config(self._model)
        if spool is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="llmctl-")
            spool = Path(self._temporary.name) / "examples"
        if not (recorded and distributed.on_first(spool.exists)):
            distributed.on_first(self._prepare, inputs, spool)
        self.examples = ExampleSet(spool)
        planning.refuse_kind(self.examples.objective, self.config)
        self._has_head = self.config.classifier is not None
        self._classifier = heads.classifier_for(self.examples, self.config)
        if self._classifier is not None:
            self.config = self.config.classifying(self._classifier)
        return self.examples.sha256

    def make_plan(self, inputs: list[str], device: torch.device) -> FinetunePlan:
        plan = planning.make_plan(self.settings, self._model, self.config, inputs, self.examples, self._seq_len, device)
        if self.settings.batch_size is None:
            rows = self._rows("train", plan).rows_per_epoch
            plan.batch_size = planning.default_batch_size(rows, plan.seq_len, device)
        return plan

    def make_feed(self, plan: FinetunePlan) -> Feed:
        val = self._rows("val", plan) if len(self.examples.val) else None
        return Feed(self._rows("train", plan), val, plan)

    def make_trainer(self, plan: FinetunePlan, device: torch.device, save: Path | None) -> Trainer:
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
        log.info("%s", planning.describe_trained(model))
        trainer = building.build_trainer(self._objective(model, device), plan, settings, device)
        if save is not None:
            saving.load(trainer, save)
        return trainer

    @property
    def tokenizer(self) -> Tokenizer:
        tokenizer = self.examples.tokenizer
        return tokenizer if self._classifier is None else heads.with_padding(tokenizer, self._classifier)

    def write(self, trainer: Trainer, directory: Path | None) -> None:
        saving.write(trainer, self.tokenizer, planning.adapter_method(self.settings), Path(self._model), directory)

    @property
    def _seq_len(self) -> int:
        return planning.seq_len(self.settings, self.config)

    def _prepare(self, inputs: list[str], directory: Path) -> None:
        if not inputs:
            raise CalledWrongly("no data to learn from", hint="llmctl finetune MODEL DATA, or - for standard input")
        if directory.exists():
            shutil.rmtree(directory)
        sources = parse_sources(inputs, self.settings.val_data)
        prepare(
            sources,
            self.settings,
            Tokenizer.load(self._model),
            directory,
            seq_len=self._seq_len,
            label_names=heads.known_labels(self.config),
        )

    def _rows(self, split: Split, plan: FinetunePlan) -> PackedExamples | PaddedExamples:
        return rows_of(self.examples, split, plan, self.settings, self.config)

    def _regression(self, model: LanguageModel) -> Regression:
        objective = Regression(model, heads.training_values(self.examples), self._has_head)
        if not (self._has_head or self._classifier.bias):
            some = PaddedExamples(self.examples, "train", 1, seed=self.settings.seed).train_batch(0, FIRST_TEXTS)
            inputs_BT, _, lengths_B, *_ = some.tensors(torch.device("cpu"))
            objective.start_at_mean(inputs_BT, lengths_B)
        return objective

    def _objective(self, model: LanguageModel, device: torch.device) -> nn.Module:
        settings, objective = self.settings, self.examples.objective
        if objective == "regress":
            return self._regression(model)
        if objective in heads.HEADED:
            return {"classify": Classification, "reward": Reward}[objective](model)
        rule = RULES.get(objective)
        if rule is None:
            return {"mlm": MaskedToken, "seq2seq": SourceToTarget}.get(objective, NextToken)(model, settings.z_loss)
        reference = load_model(self._model, next(model.parameters()).dtype, device) if rule.needs_reference else None
        return Comparison(model, rule, settings, reference)
