"""`llmctl eval`: measure a model."""

from __future__ import annotations

import os

import click

from llmctl import options, ui
from llmctl.errors import CalledWrongly
from llmctl.evaluate.settings import Asked, EvalSettings, SuiteSettings


@options.command(
    examples="""
    llmctl eval runs/base held-out.txt
    llmctl eval runs/base --task hellaswag=hellaswag_val.jsonl -o base.jsonl
    llmctl eval runs/base gsm8k_test.jsonl --task gsm8k --limit 50 --show 1 --json | jq .value
    llmctl eval --compare base.jsonl tuned.jsonl
    llmctl eval --report models.html small.jsonl large.jsonl
    llmctl eval runs/base corpus.arrow --suite memorization
    """
)
@options.model_argument(required=False)
@click.argument("files", nargs=-1, type=options.PATH, metavar="[FILES…|-]")
@options.settings(Asked, into="asked")
@options.settings(EvalSettings)
@options.settings(SuiteSettings, into="suite_settings")
@options.output_option(help="Add each item to this file, JSON Lines, as soon as it is done.")
@click.option("--json", "as_json", is_flag=True, help="Print the numbers as JSON Lines on standard output.")
def command(model, files, asked, settings, suite_settings, output, as_json):
    """Measure a model: perplexity of texts, tasks, suites; compare results and report on them.

    MODEL is a checkpoint directory, that of an adapter, or a classifier; - reads its path from standard input. FILES are
    the texts or the token stream whose perplexity is measured or, with --task, the task's data; with --suite
    memorization the token stream of the training data, with --suite safety the requests.

    Numbers come with their standard error and do not depend on --batch-size; a table goes to standard error. A run that
    was stopped goes on with --resume. With --compare and --report the arguments are results files.
    """
    given = [name for name in (model, *files) if name is not None]
    if asked.list or asked.compare or asked.report:
        _without_model(asked, given, settings.overwrite, as_json)
        return
    if model is None:
        raise CalledWrongly("no MODEL", hint="llmctl eval MODEL FILES…, or --list, --compare, --report")
    if given.count("-") > 1:
        raise CalledWrongly("standard input (-) can be read once only")
    from llmctl import result_tables
    from llmctl.checkpoint import resolve_model
    from llmctl.evaluate import plans, suites
    from llmctl.evaluate.results import ResultsFile
    from llmctl.evaluate.run import Evaluation

    tasks, path = plans.tasks_of(asked, list(files)), resolve_model(model)
    plans.check_output(output, settings, path, files, tasks)
    evaluation = Evaluation(path, settings)
    with ResultsFile(output, settings.resume, settings.overwrite) as results, ui.progress("eval", unit="items") as bar:
        for done in suites.run(evaluation, asked, suite_settings, list(files), tasks, results, ui.message, bar.update):
            result_tables.show_done(done, as_json)
    if output and not as_json:
        ui.print_data(os.path.abspath(output))


def _without_model(asked, given, overwrite, as_json):
    from llmctl import result_tables
    from llmctl.evaluate import comparison, report, task

    if asked.list:
        result_tables.show_tasks(task.shipped(), as_json)
    elif asked.compare:
        if len(given) != 2:
            raise CalledWrongly(f"--compare takes two results files, got {len(given)}")
        result_tables.show_comparison(comparison.compare(*given), tuple(given), as_json)
    else:
        report.write(asked.report, given, overwrite)
        ui.print_data(os.path.abspath(asked.report))
