"""Adds the commands of this directory's `commands` to llmctl: small programs to try pipes and errors with."""

from pathlib import Path

import llmctl.commands

llmctl.commands.__path__.append(str(Path(__file__).parent / "commands"))
