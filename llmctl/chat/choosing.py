"""One of several answers: the one that most of them agree with, or the one that a reward model likes best."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from llmctl.chat.engine import Answer

_MARKED = re.compile(r"####\s*(.+)|\\boxed\{([^{}]*)\}|\banswer\s*(?:is|:|=)\s*:?\s*(.+)", re.IGNORECASE)
_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")


class Chooser(Protocol):
    n: int

    def choose(self, messages: Sequence[dict], answers: Sequence[Answer]) -> tuple[Answer, str]:
        """The answer to give, and a line that says why."""


class Vote:
    """Self-consistency (Wang et al. 2022): answers are grouped by what they end in; of the largest group the first is given."""

    def __init__(self, n: int):
        self.n = n

    def choose(self, messages: Sequence[dict], answers: Sequence[Answer]) -> tuple[Answer, str]:
        finals = [final_answer(answer.text) for answer in answers]
        counts = Counter(final for final in finals if final)
        if not counts:
            return answers[0], f"none of {len(answers)} samples has a final answer; this is the first"
        best, n_best = counts.most_common(1)[0]
        listed = ", ".join(f"{final} ({count})" for final, count in counts.most_common(4))
        return answers[finals.index(best)], f"{n_best} of {len(answers)} samples agree: {listed}"


class BestOf:
    """The answer that a reward model rates highest (best-of-n)."""

    def __init__(self, n: int, reward: Reward):
        self.n, self.reward = n, reward

    def choose(self, messages: Sequence[dict], answers: Sequence[Answer]) -> tuple[Answer, str]:
        scores = self.reward.scores(messages, [answer.text for answer in answers])
        best = max(range(len(answers)), key=scores.__getitem__)
        listed = ", ".join(f"{score:.3g}" for score in sorted(scores, reverse=True))
        return answers[best], f"the best of {len(answers)} by reward: {listed}"


class Reward:
    """A reward model, which reads a conversation as it was trained to: rendered by the template saved with it."""

    def __init__(self, path: str | os.PathLike, dtype: str | None = None, device: str | None = None):
        """Raises UserError for a model that does not give one number."""
        from llmctl.data.text_batches import TextBatches
        from llmctl.devices import choose_device
        from llmctl.errors import UserError
        from llmctl.finetune.assembly import Assembly
        from llmctl.finetune.data.encoding import DraftEncoder
        from llmctl.finetune.data.rendering import Renderer
        from llmctl.finetune.data.template import choose_template

        assembly = Assembly.find(path)
        self.model, tokenizer = assembly.load(dtype, choose_device(device)), assembly.tokenizer()
        spec = self.model.config.classifier
        if spec is None or len(spec.labels) != 1:
            raise UserError(
                f"{path}: no reward model", hint="llmctl finetune MODEL pairs.jsonl --objective reward makes one"
            )
        self._batches = TextBatches(tokenizer, tokenizer.encode, self.model.config.max_positions, 1)
        tokenizer = choose_template(tokenizer, None)
        self._renderer, self._encoder = Renderer(tokenizer), DraftEncoder(tokenizer)

    def scores(self, messages: Sequence[dict], answers: Sequence[str]) -> list[float]:
        import torch

        from llmctl.finetune.data.forms import Chat

        drafts = []
        for answer in answers:
            whole = [*messages, {"role": "assistant", "content": answer or " "}]
            drafts += self._renderer.drafts(Chat(whole, None, len(messages)))
        ids = [tokens.ids.tolist() for tokens in self._encoder.encode(drafts)]
        with torch.inference_mode():
            scores_B1 = self.model(*self._batches.padded(ids, self.model.embed_tokens.weight.device))
        return scores_B1.float().flatten().tolist()


def final_answer(text: str) -> str:
    """What an answer comes to: behind ####, in \\boxed{}, behind "answer is", else its last number, else its last line."""
    marked = [next(part for part in found.groups() if part is not None) for found in _MARKED.finditer(text)]
    lines = [line for line in text.splitlines() if line.strip()]
    source = marked[-1] if marked else lines[-1] if lines else ""
    numbers = _NUMBER.findall(source) or ([] if marked else _NUMBER.findall(text))
    if numbers:
        number = numbers[-1].replace(",", "")
        return number.rstrip("0").rstrip(".") if "." in number else number.removeprefix("+")
    return source.strip().strip(".*_`\"' ").casefold()
