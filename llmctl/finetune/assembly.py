"""A base with adapters beside it, for whoever uses a model: which they are, whether they fit, and whose files count."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from llmctl import lineage
from llmctl.errors import CalledWrongly, UserError
from llmctl.finetune import adapter
from llmctl.models.config import Classifier
from llmctl.models.language_model import LanguageModel
from llmctl.models.loading import load_model, read_config
from llmctl.run_onnx.files import is_exported
from llmctl.tokenization.files import has_tokenizer
from llmctl.tokenizer import Tokenizer

log = logging.getLogger("llmctl")


@dataclass(frozen=True)
class Assembly:
    """A base's directory, and the adapters that count so many times on top of it: (directory, weight)."""

    base: Path
    adapters: tuple[tuple[Path, float], ...] = ()

    @classmethod
    def find(cls, model: str | os.PathLike, adapters: Sequence[str] = (), force: bool = False) -> Assembly:
        """MODEL, a base or an adapter that names its base, with further adapters as PATH or PATH:WEIGHT.

        Raises CalledWrongly for a weight that is none, UserError for what is no adapter, for a base that is not here, and,
        unless `force`d, for an adapter that was trained on another base.
        """
        base, found = Path(model), [_parsed(word) for word in adapters]
        if adapter.is_adapter(base):
            found.insert(0, (base, 1.0))
            base = _named_base(base)
        for path, _ in found:
            adapter.read_config(path)
            if not force:
                refuse_other_base(path, base)
        return cls(base, tuple(found))

    def load(
        self,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        provider: str | None = None,
    ) -> LanguageModel:
        """The model with all adapters, in eval mode; their weights are float32, the base's as `load_model` has them.

        A directory that `export-onnx` wrote gives a model with the same interface, which onnxruntime runs through its
        `provider` (cpu, cuda, or a name of its own; None: what suits the device).
        """
        if (exported := self._exported(dtype, device, provider)) is not None:
            return exported
        model = load_model(self.base, dtype, device, classifier=self._classifier())
        for path, weight in self.adapters:
            adapter.load(model, path, weight)
        return model.eval()

    def _exported(self, dtype, device, provider: str | None):
        if not is_exported(self.base):
            if provider is not None:
                raise CalledWrongly(f"--provider is for models on onnxruntime; {self.base} is a checkpoint")
            return None
        from llmctl.run_onnx.opening import open_model  # onnxruntime takes long to import

        return open_model(self.base, provider, device, dtype, adapters=self.adapters)

    def tokenizer(self) -> Tokenizer:
        """The last adapter's that brings one, which is what it was trained with, else the base's."""
        return Tokenizer.load(self._last_with(has_tokenizer))

    def _classifier(self) -> Classifier | None:
        """The head that an adapter brings, which takes the place of the base's."""
        config = read_config(self.base) if self.adapters else None
        return next(filter(None, (adapter.classifier_of(path, config) for path, _ in self.adapters)), None)

    @property
    def generation_config_directory(self) -> Path:
        return self._last_with(lambda directory: (directory / "generation_config.json").exists())

    def _last_with(self, has) -> Path:
        return next((path for path, _ in reversed(self.adapters) if has(path)), self.base)


def refuse_other_base(path: Path, base: Path, sha256: Callable[[], str] | None = None) -> None:
    """Raise UserError where an adapter's lineage says that it was trained on another base; `sha256()` is that of `base`.

    Of an exported model that is the checkpoint that it was made of.
    """
    record = lineage.read(path)
    if record is None or record.parent_sha256 is None:
        return
    if sha256 is None and is_exported(base):
        if (made := lineage.read(base)) is None or made.parent_sha256 is None:
            return
        sha256 = lambda: made.parent_sha256  # noqa: E731
    if record.parent_sha256 != (found := sha256() if sha256 else lineage.weights_sha256(base)):
        raise UserError(
            f"{path}: trained on another base ({record.parent_sha256[:12]}; {base} is {found[:12]})",
            hint="--force uses it all the same",
        )


def _parsed(word: str) -> tuple[Path, float]:
    path, colon, number = word.rpartition(":")
    if not colon or os.path.exists(word):
        return Path(word), 1.0
    with contextlib.suppress(ValueError):
        if math.isfinite(weight := float(number)):
            return Path(path), weight
    raise CalledWrongly(f"--adapter {word!r}: {number!r} is no weight", hint="PATH or PATH:0.5")


def _named_base(path: Path) -> Path:
    name = adapter.read_config(path).get("base_model_name_or_path")
    base = Path(name or "")
    if not name or not (base.is_file() or (base / "config.json").exists()):
        raise UserError(
            f"{path}: an adapter, whose base {name!r} is no checkpoint here",
            hint="give the base as MODEL, and this as --adapter",
        )
    log.info("%s is an adapter of %s", path, base)
    return base
