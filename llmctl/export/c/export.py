"""`llmctl export-c`: a checkpoint becomes run.c, which is always the same, and model.bin with all that is the model's own.

model.bin is written tensor by tensor from the mapped checkpoint; what is compared with the checkpoint before it takes its
name is the program that a C compiler makes of the two files.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from llmctl import allocator, checkpoint, files, lineage
from llmctl.errors import UserError
from llmctl.export.c import model, tokenizer
from llmctl.export.c.check import Checked, check
from llmctl.export.c.settings import ExportCSettings
from llmctl.export.c.writer import GROUP, MAGIC, VERSION, Writer
from llmctl.export.weights import Weights
from llmctl.generation.settings import read_generation_config, read_marks, resolve, sampling_from
from llmctl.models.config import ModelConfig
from llmctl.models.loading import stored_config
from llmctl.tokenization.files import has_tokenizer
from llmctl.tokenizer import Tokenizer

SOURCE = Path(__file__).with_name("run.c")
log = logging.getLogger("llmctl")


@dataclass(frozen=True)
class Exported:
    path: Path
    nbytes: int
    checked: Checked


def export(base: str | Path, output: str | Path, settings: ExportCSettings) -> Exported:
    """Write `output`/run.c and `output`/model.bin of the checkpoint `base`.

    Raises UserError for a model or a tokenizer that has no form in C, before anything is written, and CheckFailed where
    the compiled program does not compute what the checkpoint does; nothing is left under `output` then.
    """
    allocator.return_freed_memory()
    base = Path(base)
    files.refuse_existing(output, settings.overwrite)
    files.refuse_input(output, [base])
    if (base / "adapter_config.json").exists():
        raise UserError(f"{base}: an adapter, which is no whole model", hint="llmctl merge-lora makes it one")
    config = stored_config(base)
    model.refuse(config)
    words = Tokenizer.load(base) if has_tokenizer(base) else None
    form = None if words is None else tokenizer.form_of(words)
    longest = model.context(config)
    if longest < config.max_positions:
        log.info(
            "the context ends at %d of %d tokens: up to there its positions are fixed", longest, config.max_positions
        )
    source, int8 = Weights(base, config), settings.type == "int8"
    checkpoint.check_free_space(output, int(source.n_values * (1 + 4 / GROUP if int8 else 4)))
    with files.staged_directory(output, settings.overwrite) as directory:
        with open(directory / "model.bin", "wb") as file:
            file.write(MAGIC)
            out = Writer(file)
            out.word(VERSION)
            _write_sampling(out, base, config, words)
            tokenizer.write(out, words, form)
            model.write(out, config, source, int8)
            nbytes = file.tell()
        shutil.copyfile(SOURCE, directory / "run.c")
        checked = check(directory, base, words, settings, longest)
        _record(directory, base, settings, checked)
    return Exported(Path(output), nbytes, checked)


def _write_sampling(out: Writer, base: Path, config: ModelConfig, words: Tokenizer | None) -> None:
    """The checkpoint's own settings of a draw, as `llmctl generate` takes them, and the tokens that end a text."""
    said = read_generation_config(base)
    settings = resolve(sampling_from(said))
    marks = read_marks(said, config.hf, None if words is None else words.eos_id)
    if settings.searches or settings.no_repeat_ngram_size or settings.min_new_tokens:
        log.info(
            "generation_config.json asks for a search or for rules that run.c does not have; it draws without them"
        )
    draws = not settings.searches
    out.word(settings.max_new_tokens, settings.top_k if draws else 0)
    out.float(settings.temperature if draws else 0.0)
    out.float(settings.repetition_penalty, settings.presence_penalty, settings.frequency_penalty)
    out.double(settings.top_p if draws else 1.0, settings.min_p if draws else 0.0)
    out.word(len(marks.ends), *sorted(marks.ends))


def _record(directory: Path, base: Path, settings: ExportCSettings, checked: Checked) -> None:
    lineage.write(
        directory,
        lineage.Lineage(
            command="export-c",
            recipe={"base": str(base), **vars(settings)},
            parent_sha256=lineage.weights_sha256(base),
            metrics={} if checked.agreement is None else checked.agreement.as_dict(),
        ),
    )
