"""What tells one kind of training from another; everything else about a run is `llmctl.train.run`'s."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

import torch

from llmctl.models.config import ModelConfig
from llmctl.tokenizer import Tokenizer
from llmctl.train import state
from llmctl.train.feed import Feed
from llmctl.train.loop import Trainer
from llmctl.train.plan import Plan
from llmctl.train.settings import RunSettings

PIPE = "-"
"""The input that is read from standard input."""


class Task(ABC):
    """Data, model and objective of a run.

    The run calls `open`, `make_plan` (where no plan is recorded), `make_feed` and `make_trainer` in this order, on every
    rank, and later `write`. `settings` are those of the caller or, once a run goes on, the recorded ones.
    """

    name: ClassVar[str]
    """Of the command, for the lineage."""
    plan_type: ClassVar[type[Plan]] = Plan
    validates_first: ClassVar[bool] = False
    """Whether what the model knows already is worth a validation in front of the first step."""

    def __init__(self, settings: RunSettings):
        self.settings = settings
        self.config: ModelConfig | None = None
        """Of the model, from `make_trainer` on."""

    @abstractmethod
    def open(self, inputs: list[str], spool: Path | None, recorded: Plan | None) -> str:
        """Open the data and return its sha256; what comes through a pipe ("-") is kept in the file `spool`.

        Raises UserError for data that cannot be used, and for another tokenizer than the `recorded` one.
        """

    @abstractmethod
    def make_plan(self, inputs: list[str], device: torch.device) -> Plan:
        """Fill in every default from the data and the machine."""

    @abstractmethod
    def make_feed(self, plan: Plan) -> Feed:
        """What the steps read, and what is held out."""

    @abstractmethod
    def make_trainer(self, plan: Plan, device: torch.device, save: Path | None) -> Trainer:
        """A trainer at step 0, or with the state of `save`. The plan learns whether it is compiled."""

    @property
    @abstractmethod
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the checkpoint gets."""

    def measures(self, trainer: Trainer) -> dict[str, float]:
        """Losses beside that on held-out rows, by name, that are worth knowing before the first step and after the last."""
        return {}

    def write(self, trainer: Trainer, directory: Path | None) -> None:
        """Write a checkpoint with all that `make_trainer` needs to go on from it; rank 0 has the directory."""
        state.write(trainer, self.tokenizer, directory)
