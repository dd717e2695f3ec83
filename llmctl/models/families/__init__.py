"""One small file per family: how a Hugging Face config and its weight names map onto ours.

A family module is found by listing this folder. It has `MODEL_TYPES` (Hugging Face `model_type` values),
`config_from_hf(hf) -> ModelConfig`, `config_to_hf(config) -> dict`, and `WEIGHTS`, a tuple of `common.Row`. `IGNORABLE`
are patterns of names that a file may have beside them, and `SPELLINGS`, where there is one, pairs of a pattern and what it
stands for, for names that older files write differently; `CLASSIFIER` is the form of its classifiers' head where that is
another than one matrix on the last token. A family that `pretrain --family` offers has
`usual_shape(model_type, width, depth, context) -> dict`, the keys of a config.json for a width and a transformer's depth.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Iterator
from types import ModuleType

from llmctl.errors import UserError


def modules() -> Iterator[ModuleType]:
    for entry in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{entry.name}")
        if hasattr(module, "MODEL_TYPES"):  # else it holds what several families share
            yield module


def find(model_type: str | None) -> ModuleType:
    """The family module for a Hugging Face `model_type`. Raises UserError with the list of those that exist."""
    known = {name: module for module in modules() for name in module.MODEL_TYPES}
    if model_type in known:
        return known[model_type]
    near = difflib.get_close_matches(str(model_type), known, n=1)
    hint = f"known families: {', '.join(sorted(known))}" + (f"; the nearest is {near[0]}" if near else "")
    raise UserError(f"model family {model_type!r} is not one that llmctl has", hint)
