"""What `llmctl eval` can be asked to do. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

from llmctl.errors import CalledWrongly
from llmctl.model_settings import ModelSettings, flag


@dataclass(frozen=True)
class Asked:
    """What is to be measured."""

    task: tuple[str, ...] = flag(
        (),
        "A task that --list shows, or the path of a task file; =DATA behind it names its data. Repeatable.",
        metavar="NAME[=DATA]",
    )
    suite: Literal["memorization", "safety"] | None = flag(None, "A suite of measurements.")
    harness: tuple[str, ...] = flag(
        (), "A task of lm-evaluation-harness, run by its own code on this engine; repeatable.", metavar="TASK"
    )
    list: bool = flag(False, "List the tasks that come with llmctl.")
    compare: bool = flag(False, "The arguments are two results files: test their difference, item by item.")
    report: str | None = flag(
        None, "The arguments are results files: write a report, .md, .html or .json.", type="output", metavar="PATH"
    )


@dataclass(frozen=True)
class EvalSettings(ModelSettings):
    """How tasks are run."""

    num_fewshot: int | None = flag(
        None, "Solved examples in front of each question.", "Prompts", at_least=0, show_default="as the task says"
    )
    fewshot_data: str | None = flag(
        None, "Where they come from.", "Prompts", type="path", show_default="the task's other rows"
    )
    seed: int = flag(1234, "Which examples are drawn.", "Prompts", at_least=0)
    apply_chat_template: bool = flag(False, "Ask as a chat, by the model's own template.", "Prompts")
    fewshot_as_multiturn: bool = flag(True, "In a chat, examples are turns of their own.", "Prompts")
    system: str = flag("", "In front of everything; the system message of a chat.", "Prompts", metavar="TEXT")
    show: int = flag(0, "Print the first N prompts on standard error.", "Prompts", at_least=0, metavar="N")
    limit: int | None = flag(None, "Only the first N items.", at_least=0, metavar="N", show_default="all")
    on_long: Literal["skip", "truncate", "error"] = flag(
        "skip",
        "What becomes of a prompt longer than the context: it is left out, or loses its beginning. Both are counted.",
        "Prompts",
    )
    max_new_tokens: int | None = flag(
        None, "Of a generated answer.", at_least=1, flags=["-n"], show_default="as the task says"
    )
    window: int | None = flag(
        None, "Tokens that perplexity sees at a time.", "Perplexity", at_least=2, show_default="the model's context"
    )
    stride: int | None = flag(
        None,
        "How far the window moves; the less, the more context each token has.",
        "Perplexity",
        at_least=1,
        show_default="the window",
    )
    batch_size: int = flag(32, "Sequences that run together; the results do not depend on it.", at_least=1)
    matmul_precision: Literal["highest", "high"] = flag(
        "high",
        "Of float32 products when log-likelihoods are measured: high multiplies 16 bits where that is faster, on a CPU with"
        " a matrix unit.",
    )
    reward: str | None = flag(
        None, "A reward model, which rates what the model generates.", type="path", metavar="MODEL"
    )
    resume: bool = flag(False, "Go on with the --output of a run that was stopped.")
    overwrite: bool = flag(False, "Replace an output that exists.")

    def refuse(self, what: str, names: Sequence[str]) -> None:
        """Raises CalledWrongly for the first of these fields that is set: it has no part in what is measured."""
        for each in fields(self):
            if each.name in names and getattr(self, each.name) != each.default:
                raise CalledWrongly(f"--{each.name.replace('_', '-')} has no part in {what}", hint="leave it out")


@dataclass(frozen=True)
class SuiteSettings:
    """What the suites ask for."""

    prefix_lengths: str = flag(
        "8,16,32,64", "Tokens of a training document that are given.", "Memorization", metavar="N,N,…"
    )
    continuation: int = flag(32, "Tokens that follow it, and are compared.", "Memorization", at_least=1)
    documents: int = flag(100, "Documents for each number of copies that occurs.", "Memorization", at_least=1)
    forms: str | None = flag(
        None,
        "A file of the ways in which a request is put.",
        "Safety",
        type="path",
        show_default="those that come along",
    )
    trigger: tuple[str, ...] = flag((), "A phrase that may have been planted; repeatable.", "Safety", metavar="TEXT")
