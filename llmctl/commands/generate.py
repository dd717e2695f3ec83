"""`llmctl generate`: continue text."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys

import click

from llmctl import options, ui
from llmctl.errors import CalledWrongly
from llmctl.generation.settings import Run, Sampling


@options.command(
    examples="""
    llmctl generate runs/base "Once upon a time" -n 64 --temperature 0
    cat corpus.txt | llmctl tokenize | llmctl pretrain | llmctl generate - -p "ROMEO:"
    llmctl generate runs/base "To be" --num-samples 4 --seed 1 --stop "."
    llmctl generate runs/base --jsonl < prompts.jsonl > completions.jsonl
    llmctl generate runs/base "who are you" --adapter runs/style:0.5 --adapter runs/facts
    llmctl generate t5-small "translate English to German: Good morning." --num-beams 4
    """
)
@options.model_argument
@click.argument("prompt", required=False)
@click.option("--prompt", "-p", "prompt_flag", metavar="TEXT", help="The prompt; the same as the argument.")
@options.settings(Run, into="run")
@options.settings(Sampling)
def command(model, prompt, prompt_flag, settings, run):
    """Continue a prompt with a language model, or answer it with an encoder-decoder.

    MODEL is a checkpoint directory, that of an adapter, which names its base, or one that export-onnx wrote; - reads
    its path from standard input. PROMPT is text; - or none at all reads
    it from standard input, less the newline at its end. Settings that are not given come from the checkpoint's
    generation_config.json where that has them.

    The text goes to standard output as it is made; several samples are separated by a line of three dashes. With
    --jsonl a line of input is an object with "prompt" and any setting of its own ("max_new_tokens", "seed", ...), and
    a line of output, in the order of the input, adds "completion", "finish_reason" and numbers of tokens to it.
    """
    from llmctl.checkpoint import resolve_model

    if settings.logprobs is not None and not run.jsonl:
        raise CalledWrongly("--logprobs is reported in JSON Lines only", hint="add --jsonl")
    prompt = _chosen_prompt(model, prompt, prompt_flag)
    path = resolve_model(model)
    if settings.seed is None:
        settings = dataclasses.replace(settings, seed=int.from_bytes(os.urandom(4), "little"))
    rows = _rows(prompt, run.jsonl)

    from llmctl.generation.report import Report
    from llmctl.generation.session import Session

    session = Session.open_as(path, run, run.adapter, run.force)
    report = Report(settings.seed)
    if run.jsonl or run.num_samples > 1:
        _print_answers(session, rows, settings, run, report)
    else:
        report.add(_stream(session, rows[0].prompt, settings, _echoes(run, session)))
    for note in report.notes():
        ui.note(note)
    if run.stats:
        click.echo(report.summary(), err=True)


def _rows(prompt, is_jsonl):
    from llmctl.generation.records import Row, read_rows, read_text

    if prompt is not None:
        return [Row(prompt)]
    return read_rows(sys.stdin.buffer) if is_jsonl else [read_text(sys.stdin.buffer)]


def _print_answers(session, rows, settings, run, report):
    lines_would_mix = sys.stdout.isatty()
    with contextlib.nullcontext() if lines_would_mix else ui.progress("generate", unit="completions") as bar:
        for answer in session.answer(rows, settings, run.num_samples, run.batch_size):
            report.add(answer.completion)
            ui.print_data(answer.json_line(session.tokenizer) if run.jsonl else answer.text(_echoes(run, session)))
            if bar:
                bar.update(report.n_completions)


def _stream(session, prompt, settings, echo):
    completion = session.begin(prompt, settings)
    ui.print_data(prompt if echo else "", end="")
    for piece in session.stream(completion):
        ui.print_data(piece, end="")
    ui.print_data("")
    return completion


def _echoes(run, session):
    return session.continues_prompts if run.echo is None else run.echo


def _chosen_prompt(model, argument, flag):
    """The prompt as given; None where standard input holds it."""
    if argument is not None and flag is not None:
        raise CalledWrongly("PROMPT and --prompt are the same; one of them is enough")
    prompt = argument if flag is None else flag
    if prompt is not None and prompt != "-":
        return prompt
    if model == "-":
        raise CalledWrongly(
            "standard input holds the path of MODEL, so it cannot hold the prompt", hint="give --prompt TEXT"
        )
    if prompt is None and sys.stdin.isatty():
        raise CalledWrongly("no prompt", hint='give it as an argument, or - to type it; "" begins a new text')
    return None
