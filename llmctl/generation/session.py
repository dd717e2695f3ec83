"""A checkpoint that is ready to continue prompts."""

from __future__ import annotations

import collections
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llmctl.devices import choose_device
from llmctl.errors import CalledWrongly, UserError
from llmctl.finetune.assembly import Assembly
from llmctl.generation.complete import complete, encode_prompt, prepare
from llmctl.generation.completion import Completion
from llmctl.generation.decode import decode
from llmctl.generation.records import Answer, Row
from llmctl.generation.settings import Marks, Sampling, read_generation_config, read_marks, resolve, sampling_from
from llmctl.model_settings import EngineSettings
from llmctl.models.causal_lm import CausalLM
from llmctl.models.language_model import LanguageModel
from llmctl.ops.dispatch import use_threads
from llmctl.tokenizer import Tokenizer


def marks_of(model: CausalLM, tokenizer: Tokenizer, generation_config: dict[str, Any]) -> Marks:
    """The tokens at the edges of what the model writes."""
    config = {**model.config.hf, "decoder_start_token_id": model.config.decoder_start_id}
    return read_marks(generation_config, config, tokenizer.eos_id)


def load(assembly: Assembly, how: EngineSettings) -> LanguageModel:
    """The model, in the dtypes and on the device and threads that the flags name. Raises `CalledWrongly` for a cache that
    it cannot have."""
    use_threads(how.threads)
    model = assembly.load(how.asked_dtype, choose_device(how.device), how.provider)
    if how.kv_dtype != "auto":
        if not isinstance(model, CausalLM):
            what = "a classifier" if model.config.classifier is not None else model.config.family
            raise CalledWrongly(
                f"--kv-dtype {how.kv_dtype} is for decoder-only checkpoints that write text; this is {what}",
                hint="leave it out",
            )
        model.cache_dtype = getattr(torch, how.kv_dtype)
    return model


@dataclass
class Session:
    """A model, its tokenizer, and what the checkpoint says about generation."""

    model: CausalLM
    tokenizer: Tokenizer
    recommended: Sampling
    marks: Marks

    def __post_init__(self):
        if self.model.config.classifier is not None:
            raise UserError(
                f"this {self.model.config.family} is a classifier: it predicts no tokens",
                hint="llmctl classify works with it",
            )
        if self.model.config.kind == "masked":
            raise UserError(
                f"{self.model.config.family} is an encoder: it reads a whole text and cannot continue one",
                hint="llmctl fill-mask predicts missing tokens, llmctl embed gives vectors",
            )

    @classmethod
    def open(
        cls,
        path: str | os.PathLike,
        dtype: str | None = None,
        device: str | None = None,
        adapters: Sequence[str] = (),
        force: bool = False,
        provider: str | None = None,
    ) -> Session:
        """Load a checkpoint or adapter directory; dtype None is the stored one, device None a GPU where there is one.

        `adapters` and `force` are those of `Assembly.find`, `provider` that of `Assembly.load`.
        """
        how = EngineSettings(dtype="auto" if dtype is None else dtype, device=device, provider=provider)
        return cls.open_as(path, how, adapters, force)

    @classmethod
    def open_as(
        cls, path: str | os.PathLike, how: EngineSettings, adapters: Sequence[str] = (), force: bool = False
    ) -> Session:
        """The same by the flags of a command."""
        assembly = Assembly.find(path, adapters, force)
        tokenizer = assembly.tokenizer()
        return cls.of(load(assembly, how), tokenizer, assembly.generation_config_directory)

    @classmethod
    def of(cls, model: CausalLM, tokenizer: Tokenizer, generation_config_directory: str | os.PathLike) -> Session:
        """Of what has been loaded; the directory may hold a generation_config.json."""
        generation_config = read_generation_config(generation_config_directory)
        recommended = sampling_from(generation_config, has_source=model.config.encoder is not None)
        return cls(model, tokenizer, recommended, marks_of(model, tokenizer, generation_config))

    @property
    def continues_prompts(self) -> bool:
        """Whether a text follows its prompt, or is one of its own that answers it."""
        return self.model.config.encoder is None

    def begin(self, prompt: str, *layers: Sampling, sequence: int = 0, name: str = "the prompt") -> Completion:
        """A completion of `prompt` by the settings of the first layer that has each, then by the checkpoint's."""
        return prepare(
            self.model,
            encode_prompt(self.tokenizer, prompt, name),
            resolve(*layers, self.recommended),
            sequence=sequence,
            marks=self.marks,
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
        the seed of `settings` by their place in the input; those of a search are the best that it found.
        """
        begun: collections.deque[tuple[int, int, Row]] = collections.deque()

        def begin_all() -> Iterator[Completion]:
            for index, row in enumerate(rows):
                first = 0 if row.sampling.seed is not None else index * num_samples
                for sample in range(num_samples):
                    completion = self.begin(row.prompt, row.sampling, settings, sequence=first + sample, name=row.name)
                    begun.append((index, sample, row))
                    if completion.sampling.searches:
                        completion.n_best = _affordable(num_samples, completion.sampling.num_beams, row.name)
                    yield completion
                    if completion.sampling.searches:
                        break

        for completion in complete(self.model, begin_all(), batch_size):
            index, first, row = begun.popleft()
            for sample, one in enumerate([completion, *completion.runners_up], start=first):
                yield Answer(index, sample, row, one)


def _affordable(num_samples: int, num_beams: int, name: str) -> int:
    if num_samples > num_beams:
        raise CalledWrongly(
            f"{name}: num-samples {num_samples} is more than num-beams {num_beams}; a search ends with one text per beam",
            hint="raise --num-beams",
        )
    return num_samples
