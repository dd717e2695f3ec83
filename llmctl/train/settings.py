"""What every kind of training can be told, with its defaults; each field is a flag and a recipe key. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

LENGTH, OPTIMIZER, REGULARIZATION, SPEED, SAVING, REPORTING = (
    "Length of training",
    "Optimizer",
    "Regularization",
    "Speed and memory",
    "Saving and resuming",
    "Validation and reports",
)


def flag(default, help: str, group: str, **metadata):
    return field(default=default, metadata={"help": help, "group": group, **metadata})


@dataclass(frozen=True)
class RunSettings:
    """Length, speed, optimizer, saves and reports of a run; a command adds what is its own."""

    steps: int | None = flag(None, "Optimizer steps.", LENGTH, type="count", at_least=1)
    tokens: int | None = flag(None, "Tokens to train on.", LENGTH, type="count", at_least=1, metavar="1B")
    epochs: float | None = flag(None, "Passes over the corpus.", LENGTH, above=0)
    time: float | None = flag(
        None,
        "Wall time of the whole command at most, turned into steps once, at the start, and no more than 4 epochs or 200 "
        "steps of them; 10m when no length is given.",
        LENGTH,
        type="duration",
        above=0,
        metavar="10m",
    )

    batch_size: int | None = flag(
        None, "Sequences per step; by default 4096 tokens' worth on a CPU and 131072 on a GPU.", SPEED, at_least=1
    )
    micro_batch_size: int | None = flag(
        None, "Sequences per forward pass; gradients add up to --batch-size.", SPEED, at_least=1
    )
    precision: Literal["auto", "bf16", "fp32"] = flag(
        "auto", "Of matrix products; auto is bf16 where the hardware has it. Weights stay float32.", SPEED
    )
    compile: Literal["auto", "on", "off"] = flag(
        "auto", "torch.compile the blocks; auto does on a GPU, and on a CPU in runs of half an hour or more.", SPEED
    )
    activation_checkpointing: bool = flag(False, "Recompute activations in the backward pass to save memory.", SPEED)
    device: str | None = flag(None, "cpu, cuda, cuda:1; by default a GPU where there is one.", SPEED)
    threads: int | None = flag(None, "CPU threads; by default torch's choice.", SPEED, at_least=1)

    optimizer: Literal["muon", "adamw"] = flag("muon", "muon is for the matrices, with AdamW for the rest.", OPTIMIZER)
    learning_rate: float | None = flag(None, "Peak rate.", OPTIMIZER, flags=["--lr"], above=0)
    embedding_learning_rate: float | None = flag(
        None, "Peak rate of embeddings and head; by default --learning-rate.", OPTIMIZER, above=0
    )
    schedule: Literal["cosine", "linear", "wsd"] = flag(
        "wsd", "How the rate falls after the warm-up; wsd holds it, then falls over the last --decay part.", OPTIMIZER
    )
    warmup_steps: int = flag(10, "Steps to reach the peak rate.", OPTIMIZER, at_least=0)
    decay: float = flag(0.5, "Last part of a wsd run in which the rate falls.", OPTIMIZER, at_least=0, at_most=1)
    min_lr: float = flag(0.0, "Final rate, as a share of the peak.", OPTIMIZER, at_least=0, at_most=1)
    beta1: float = flag(0.9, "AdamW's first moment.", OPTIMIZER, at_least=0, at_most=1)
    beta2: float = flag(0.95, "AdamW's second moment.", OPTIMIZER, at_least=0, at_most=1)
    clip: float = flag(1.0, "Largest norm of the gradient; 0 does not clip.", OPTIMIZER, at_least=0)

    weight_decay: float = flag(0.1, "Of the matrices inside the blocks.", REGULARIZATION, at_least=0)
    dropout: float = flag(0.0, "Of embeddings, attention and residuals.", REGULARIZATION, at_least=0, at_most=1)
    z_loss: float = flag(0.0, "Weight of log(Z)^2, which keeps logits small.", REGULARIZATION, at_least=0)

    save_every: float | int | None = flag(
        600.0, "Steps (500) or time (10m) between saves.", SAVING, type="interval", show_default="10m"
    )
    keep: int = flag(1, "How many of the latest saves to keep for --resume.", SAVING, at_least=1)
    resume: bool = flag(False, "Go on from the last save in the output; starts when there is none.", SAVING)
    overwrite: bool = flag(False, "Replace an output that exists.", SAVING)

    validate_every: float | int | None = flag(
        None, "Steps or time between validations; by default a tenth of the run.", REPORTING, type="interval"
    )
    early_stopping: int | None = flag(
        None, "Stop after N validations without a better one.", REPORTING, at_least=1, metavar="N"
    )
    keep_best: bool = flag(False, "The output is the save of the best validation, not the last one.", REPORTING)
    log_every: float | int = flag(
        5.0, "Steps or time between lines of the report.", REPORTING, type="interval", show_default="5s"
    )
    log: tuple[str, ...] = flag((), "Also log to this; may be repeated.", REPORTING, type=("tensorboard", "wandb"))
    dry_run: bool = flag(False, "Print size, memory, disk and time from one real step, and stop.", REPORTING)
    seed: int = flag(0, "Of initialization, data order and dropout.", REPORTING)
