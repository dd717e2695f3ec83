"""What a run of `generate` can say about itself."""

from __future__ import annotations

import time

from llmctl.generation.completion import Completion


class Report:
    """Counts finished completions; its clock starts when it is made, after the model was loaded."""

    def __init__(self, seed: int):
        self.seed = seed
        self.started = time.monotonic()
        self.first_token_at: float | None = None
        self.n_completions = self.n_prompt_tokens = self.n_tokens = self.n_cut = 0

    def add(self, completion: Completion) -> None:
        self.n_completions += 1
        self.n_prompt_tokens += len(completion.prompt_ids)
        self.n_tokens += len(completion.ids)
        self.n_cut += completion.is_cut_by_context
        if self.first_token_at is None or completion.first_token_at < self.first_token_at:
            self.first_token_at = completion.first_token_at

    def notes(self) -> list[str]:
        """What a person should know without asking."""
        if not self.n_cut:
            return []
        which = "the completion" if self.n_completions == 1 else f"{self.n_cut} of {self.n_completions} completions"
        return [f"{which} stopped where the model's context ends, before --max-new-tokens"]

    def summary(self) -> str:
        """One line: the seed, counts, seconds to the first token, and tokens per second over the whole run."""
        seconds = time.monotonic() - self.started
        first = f"{self.first_token_at - self.started:.3f} s" if self.first_token_at else "never"
        return (
            f"stats: seed {self.seed}, {self.n_prompt_tokens} prompt tokens, first token after {first}, "
            f"{self.n_tokens} tokens in {seconds:.3f} s ({self.n_tokens / seconds:.1f} tokens/s)"
        )
