"""`llmctl env`: what this machine offers."""

from __future__ import annotations

import json

import click

from llmctl import options, ui


@options.command(
    examples="""
    llmctl env
    llmctl env --json | jq .torch.version
    LLMCTL_KERNELS=reference llmctl env
    """
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a list.")
def command(as_json):
    """Show the versions, devices and native library that llmctl uses here.

    Of the native library it tells whether it was built, with which number of the C ABI, and the instruction sets that
    its kernels may choose from. LLMCTL_KERNELS (auto, cuda, cpu, reference) says which kernels are wanted.
    """
    from llmctl.environment import describe

    report = describe()
    if as_json:
        ui.print_data(json.dumps(report))
        return
    for section, values in report.items():
        ui.print_data(section)
        for name, value in values.items():
            ui.print_data(f"  {name.replace('_', ' '):<18}{_in_words(value)}")


def _in_words(value) -> str:
    if isinstance(value, list):
        return ", ".join(value) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else str(value)
