"""`llmctl pretrain`: a model, new or of a checkpoint, on token streams."""

from __future__ import annotations

import dataclasses
import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from llmctl import files
from llmctl.models import families
from llmctl.models.initialization import new_model
from llmctl.models.loading import new_empty
from llmctl.pretrain import objectives, planning
from llmctl.pretrain.corpus import open_corpus, open_feed
from llmctl.pretrain.settings import PretrainSettings
from llmctl.tokenizer import Tokenizer
from llmctl.train import building, distributed, state
from llmctl.train.run import Run, training
from llmctl.train.task import Task

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llmctl.models.config import ModelConfig
    from llmctl.models.language_model import LanguageModel
    from llmctl.train.feed import Feed
    from llmctl.train.loop import Trainer
    from llmctl.train.plan import Plan


def pretraining(
    settings: PretrainSettings,
    inputs: Sequence[str],
    output: str | os.PathLike,
    given: frozenset[str] = frozenset(),
    began: float | None = None,
) -> AbstractContextManager[Run]:
    """A pretraining run as `training` gives it."""
    planning.refuse_contradictions(settings)
    if settings.overwrite:
        files.refuse_input(output, filter(None, [settings.init_from, *inputs]))
    return training(Pretraining(settings), inputs, output, given, began)


class Pretraining(Task):
    name = "pretrain"

    settings: PretrainSettings

    def open(self, inputs: list[str], spool: Path | None, recorded: Plan | None) -> str:
        tokenizer_sha256 = None
        if recorded:
            tokenizer_sha256 = recorded.tokenizer_sha256
        elif self.settings.init_from:
            tokenizer_sha256 = Tokenizer.load(self.settings.init_from).sha256
        self.corpus = open_corpus(inputs, spool, self.settings.resume, tokenizer_sha256)
        return self.corpus.sha256

    def make_plan(self, inputs: list[str], device: torch.device) -> Plan:
        return planning.make_plan(self.settings, inputs, self.corpus, device)

    def make_feed(self, plan: Plan) -> Feed:
        return open_feed(self.corpus, plan, self.settings, _config(plan))

    def make_trainer(self, plan: Plan, device: torch.device, save: Path | None) -> Trainer:
        settings = self.settings
        self.config = dataclasses.replace(_config(plan), dropout=settings.dropout)
        building.check_memory(self.config, settings.optimizer, device)
        model = self._model(None if save else settings.init_from)
        loss = objectives.choose(settings, self.config).loss(model, settings.z_loss)
        trainer = building.build_trainer(loss, plan, settings, device)
        if save is not None:
            state.load(trainer, save)
        return trainer

    def _model(self, parent: str | None) -> LanguageModel:
        """With fresh weights or the parent's on rank 0, whose they are until they are shared out, without any on others."""
        if distributed.rank() > 0:
            with torch.device("meta"):
                return new_empty(self.config)
        model = new_model(self.config, self.settings.seed)
        if parent:
            state.load_weights(model, parent)
        return model

    @property
    def tokenizer(self) -> Tokenizer:
        return self.corpus.tokenizer


def _config(plan: Plan) -> ModelConfig:
    return families.find(plan.hf_config["model_type"]).config_from_hf(plan.hf_config)
