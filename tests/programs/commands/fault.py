"""`llmctl fault KIND`: ends in the way that is asked for."""

from __future__ import annotations

import errno
import logging
import os
import sys
import time

import click

from llmctl import options, ui
from llmctl.errors import CalledWrongly, CheckFailed, Interrupted, UserError


class OutOfMemoryError(RuntimeError):
    """Named as torch names its own."""


FAULTS = {
    "user": UserError("a.bin: expected 3, got 4", hint="make it 3"),
    "wrongly": CalledWrongly("--x excludes --y"),
    "check": CheckFailed("error 0.5 is above the tolerance 0.1"),
    "interrupted": Interrupted(15),
    "defect": KeyError("secret"),
    "disk-full": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model.safetensors"),
    "missing-file": FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "corpus.txt"),
    "memory": MemoryError("Unable to allocate 9 GiB"),
    "cpu-memory": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 218103808 bytes."),
    "torch-memory": OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    "other-pipe": BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)),
}


@options.command(examples="llmctl fault user")
@click.argument("kind")
@click.option("--batch-size", type=options.COUNT, default=8, help="Something to make smaller.")
def command(kind, batch_size):
    """End in a certain way."""
    if kind == "write":
        for i in range(100_000):
            ui.print_data(f"line {i}")
    elif kind == "buffered":
        sys.stdout.write("left in the buffer")
    elif kind == "sleep":
        ui.print_data("ready")
        time.sleep(60)
    elif kind == "notices":
        logging.getLogger("llmctl.deep").info("a note")
        logging.getLogger("llmctl").warning("a warning")
        ui.print_data("data")
    else:
        raise FAULTS[kind]
