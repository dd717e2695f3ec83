"""`llmctl show`: prints its settings as they were understood."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Literal

from llmctl import options, ui


@dataclass
class Settings:
    learning_rate: float = field(
        default=3e-4, metadata={"flags": ["--lr"], "above": 0, "help": "Peak.", "group": "Optimizer"}
    )
    warmup_fraction: float = field(default=0.1, metadata={"at_least": 0, "at_most": 1})
    max_new_tokens: int = field(default=100, metadata={"flags": ["-n"], "at_least": 1})
    tokens: int | None = field(default=None, metadata={"type": "count"})
    shard_tokens: int = field(default=100_000_000, metadata={"type": "count"})
    memory: int = field(default=64_000_000, metadata={"type": "size"})
    time: float = field(default=600.0, metadata={"type": "duration"})
    save_every: float = field(default=600.0, metadata={"type": "interval"})
    compile: bool | None = None
    bf16: bool = True
    stop: tuple[str, ...] = ()
    schedule: Literal["cosine", "linear"] = "cosine"


@options.command(examples="llmctl show --lr 1e-4")
@options.settings(Settings)
def command(settings):
    """Print the settings as JSON."""
    given = [name for name in dataclasses.asdict(settings) if options.given(name)]
    ui.print_data(json.dumps({**options.resolved_flags(), "given": given}))
