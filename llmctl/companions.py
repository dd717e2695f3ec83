"""What lies beside a checkpoint's weights: config, tokenizer, chat template, settings of generation."""

from __future__ import annotations

import shutil
from pathlib import Path

from llmctl import checkpoint, lineage
from llmctl.models.loading import read_config, write_config
from llmctl.tokenization.files import has_tokenizer
from llmctl.tokenizer import Tokenizer

_OF_ADAPTERS = "adapter_config.json"


def copy(source: Path, output: Path, leave: tuple[str, ...] = ()) -> None:
    """Into another checkpoint's directory, over what lies there, but for what is named in `leave`.

    A .gguf file's are written as those of the directory that it stands for.
    """
    if source.is_file():
        stored = checkpoint.open_tensors(source)
        write_config(read_config(source), stored.dtype(next(iter(stored))), output)
        if has_tokenizer(source):
            Tokenizer.load(source).save(output)
        return
    for path in sorted(source.iterdir()):
        is_weights = ".safetensors" in path.name or path.suffix in checkpoint.PICKLE_SUFFIXES
        is_other = path.suffix == ".md" or path.name in (_OF_ADAPTERS, lineage.FILE_NAME, *leave)
        if path.is_file() and not is_weights and not is_other:
            shutil.copyfile(path, output / path.name)
