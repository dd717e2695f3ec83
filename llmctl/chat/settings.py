"""What `llmctl chat` can be asked to do. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmctl.model_settings import ModelSettings, flag

SESSION, TOOLS, DOCUMENTS, SAMPLES = "Sessions", "Tools", "Your own documents", "Several answers"


@dataclass(frozen=True)
class ChatSettings(ModelSettings):
    system: str | None = flag(None, "The system message.", metavar="TEXT")
    chat_template: str | None = flag(
        None, "A Jinja template, as a file or as text, in place of the model's own.", metavar="FILE"
    )
    on_full: Literal["stop", "drop-oldest"] = flag(
        "stop", "When the context is full: stop and say so, or drop the oldest turns and say so."
    )
    jsonl: bool = flag(False, "Answer in JSON Lines though the turns are plain lines.", show_default=False)
    session: str | None = flag(
        None, "Keep the conversation in this file.", SESSION, type="output", metavar="FILE",
        show_default="a new one in the state directory, on a terminal",
    )  # fmt: skip
    continue_: bool = flag(False, "Go on with --session, or with the last conversation.", SESSION, show_default=False)
    fixes: str = flag(
        "fixes", "Corrections of /fix go to PREFIX.messages.jsonl and PREFIX.pairs.jsonl.", SESSION, metavar="PREFIX"
    )
    votes: str = flag("votes.jsonl", "Votes of /compare go here.", SESSION, type="output", metavar="FILE")
    tools: tuple[str, ...] = flag(
        (), "calculator, python, files: what the model may call; separated by commas.", TOOLS, metavar="NAMES"
    )
    files_dir: str = flag(".", "The directory that the files tool may read.", TOOLS, type="path", metavar="DIR")
    tool_seconds: float = flag(10.0, "Time of a tool's program.", TOOLS, above=0)
    tool_megabytes: int = flag(512, "Memory of a tool's program.", TOOLS, at_least=64)
    docs: str | None = flag(
        None, "Look up passages of these files for every question; see llmctl index.", DOCUMENTS, type="path",
        metavar="DIR",
    )  # fmt: skip
    embed_model: str | None = flag(
        None, "Find passages by this model's vectors; without it by their words (BM25).", DOCUMENTS, type="path",
        metavar="PATH",
    )  # fmt: skip
    passages: int = flag(3, "Passages for a question.", DOCUMENTS, at_least=1)
    samples: int = flag(1, "Answer N times; with --vote the answer that most of them end in is given.", SAMPLES,
                        type="count", at_least=1, metavar="N")  # fmt: skip
    vote: bool = flag(False, "Self-consistency: count the samples' final answers.", SAMPLES, show_default=False)
    best_of: int = flag(1, "Answer N times and give the one that --reward rates highest.", SAMPLES, type="count",
                        at_least=1, metavar="N")  # fmt: skip
    reward: str | None = flag(
        None, "The reward model, as finetune --objective reward makes it.", SAMPLES, type="path", metavar="PATH"
    )
