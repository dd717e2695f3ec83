"""A checkpoint that is ready to continue prompts."""

from __future__ import annotations

import collections
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from llmctl.devices import choose_device
from llmctl.generation.complete import complete, encode_prompt, prepare
from llmctl.generation.completion import Completion
from llmctl.generation.decode import decode
from llmctl.generation.records import Answer, Row
from llmctl.generation.settings import Sampling, eos_ids, read_generation_config, resolve, sampling_from
from llmctl.models.causal_lm import CausalLM
from llmctl.models.loading import load_model
from llmctl.tokenizer import Tokenizer


@dataclass
class Session:
    """A model, its tokenizer, and what the checkpoint says about generation."""

    model: CausalLM
    tokenizer: Tokenizer
    recommended: Sampling
    eos_ids: frozenset[int]

    @classmethod
    def open(cls, path: str | os.PathLike, dtype: str | None = None, device: str | None = None) -> Session:
        """Load a checkpoint directory; dtype None is the stored one, device None a GPU where there is one."""
        generation_config = read_generation_config(path)
        tokenizer = Tokenizer.load(path)
        model = load_model(path, dtype, choose_device(device))
        ends = eos_ids(generation_config, model.config.hf, tokenizer.eos_id)
        return cls(model, tokenizer, sampling_from(generation_config), ends)

    def begin(self, prompt: str, *layers: Sampling, sequence: int = 0, name: str = "the prompt") -> Completion:
        """A completion of `prompt` by the settings of the first layer that has each, then by the checkpoint's."""
        return prepare(
            self.model,
            encode_prompt(self.tokenizer, prompt),
            resolve(*layers, self.recommended),
            sequence=sequence,
            eos_ids=self.eos_ids,
            tokenizer=self.tokenizer,
            name=name,
        )

    def stream(self, completion: Completion) -> Iterator[str]:
        """Run one completion and give its text in pieces, each as soon as it is certain."""
        for _ in decode(self.model, [completion]):
            if piece := completion.take_text():
                yield piece

    def answer(
        self, rows: Iterable[Row], settings: Sampling, num_samples: int = 1, batch_size: int = 32
    ) -> Iterator[Answer]:
        """Complete every row `num_samples` times, in batches, and give the answers in the rows' order.

        A row's own settings come before `settings`. Samples of one seed differ by their number, and rows that share
        the seed of `settings` by their place in the input.
        """
        begun: collections.deque[tuple[int, int, Row]] = collections.deque()

        def begin_all() -> Iterator[Completion]:
            for index, row in enumerate(rows):
                first = 0 if row.sampling.seed is not None else index * num_samples
                for sample in range(num_samples):
                    begun.append((index, sample, row))
                    yield self.begin(row.prompt, row.sampling, settings, sequence=first + sample, name=row.name)

        for completion in complete(self.model, begin_all(), batch_size):
            yield Answer(*begun.popleft(), completion)
