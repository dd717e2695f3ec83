"""What `llmctl eval` can be asked to do. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


def _setting(default: Any, help: str, group: str = "Options", **metadata: Any) -> Any:
    return field(default=default, metadata={"help": help, "group": group, **metadata})


@dataclass(frozen=True)
class Asked:
    """What is to be measured."""

    task: tuple[str, ...] = _setting(
        (),
        "A task that --list shows, or the path of a task file; =DATA behind it names its data. Repeatable.",
        metavar="NAME[=DATA]",
    )
    suite: Literal["memorization", "safety"] | None = _setting(None, "A suite of measurements.")
    harness: tuple[str, ...] = _setting(
        (), "A task of lm-evaluation-harness, run by its own code on this engine; repeatable.", metavar="TASK"
    )
    list: bool = _setting(False, "List the tasks that come with llmctl.")
    compare: bool = _setting(False, "The arguments are two results files: test their difference, item by item.")
    report: str | None = _setting(
        None, "The arguments are results files: write a report, .md, .html or .json.", type="output", metavar="PATH"
    )


@dataclass(frozen=True)
class EvalSettings:
    """How tasks are run."""

    num_fewshot: int | None = _setting(
        None, "Solved examples in front of each question.", "Prompts", at_least=0, show_default="as the task says"
    )
    fewshot_data: str | None = _setting(
        None, "Where they come from.", "Prompts", type="path", show_default="the task's other rows"
    )
    seed: int = _setting(1234, "Which examples are drawn.", "Prompts", at_least=0)
    apply_chat_template: bool = _setting(False, "Ask as a chat, by the model's own template.", "Prompts")
    fewshot_as_multiturn: bool = _setting(True, "In a chat, examples are turns of their own.", "Prompts")
    system: str = _setting("", "In front of everything; the system message of a chat.", "Prompts", metavar="TEXT")
    show: int = _setting(0, "Print the first N prompts on standard error.", "Prompts", at_least=0, metavar="N")
    limit: int | None = _setting(None, "Only the first N items.", at_least=0, metavar="N", show_default="all")
    on_long: Literal["skip", "truncate", "error"] = _setting(
        "skip",
        "What becomes of a prompt longer than the context: it is left out, or loses its beginning. Both are counted.",
        "Prompts",
    )
    max_new_tokens: int | None = _setting(
        None, "Of a generated answer.", at_least=1, flags=["-n"], show_default="as the task says"
    )
    window: int | None = _setting(
        None, "Tokens that perplexity sees at a time.", "Perplexity", at_least=2, show_default="the model's context"
    )
    stride: int | None = _setting(
        None,
        "How far the window moves; the less, the more context each token has.",
        "Perplexity",
        at_least=1,
        show_default="the window",
    )
    batch_size: int = _setting(32, "Sequences that run together; the results do not depend on it.", at_least=1)
    adapter: tuple[str, ...] = _setting(
        (), "Put this adapter beside the model's weights; repeatable.", metavar="PATH[:WEIGHT]"
    )
    force: bool = _setting(False, "Use an adapter that was trained on another base.")
    reward: str | None = _setting(
        None, "A reward model, which rates what the model generates.", type="path", metavar="MODEL"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _setting("auto", "To compute in; auto is as stored.")
    device: str | None = _setting(None, "cpu, cuda, cuda:1.", show_default="a GPU where there is one", metavar="NAME")
    provider: str | None = _setting(
        None,
        "Of onnxruntime, for a MODEL that export-onnx wrote: cpu, cuda, or its own name for one.",
        show_default="what suits the device",
        metavar="NAME",
    )
    resume: bool = _setting(False, "Go on with the --output of a run that was stopped.")
    overwrite: bool = _setting(False, "Replace an output that exists.")


@dataclass(frozen=True)
class SuiteSettings:
    """What the suites ask for."""

    prefix_lengths: str = _setting(
        "8,16,32,64", "Tokens of a training document that are given.", "Memorization", metavar="N,N,…"
    )
    continuation: int = _setting(32, "Tokens that follow it, and are compared.", "Memorization", at_least=1)
    documents: int = _setting(100, "Documents for each number of copies that occurs.", "Memorization", at_least=1)
    forms: str | None = _setting(
        None,
        "A file of the ways in which a request is put.",
        "Safety",
        type="path",
        show_default="those that come along",
    )
    trigger: tuple[str, ...] = _setting(
        (), "A phrase that may have been planted; repeatable.", "Safety", metavar="TEXT"
    )
