"""`llmctl merge-lora`: adapters become part of their base, tensor by tensor from the mapped files.

A tensor is taken to float32, changed, and written in the base's dtype, so that memory holds a few matrices whatever the
size of the model; the result is compared with base and adapters before it takes its name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from llmctl import agreement, allocator, checkpoint, companions, files, lineage
from llmctl.errors import CalledWrongly, UserError
from llmctl.finetune import adapter, merge_check
from llmctl.finetune.assembly import refuse_other_base
from llmctl.finetune.changes import AdapterChanges, refuse_strangers
from llmctl.finetune.combining import combine
from llmctl.finetune.merge_settings import MergeSettings
from llmctl.models.config import ModelConfig
from llmctl.models.loading import read_config, write_config
from llmctl.models.streaming import StreamedModel
from llmctl.quantize.stored import CONFIG_KEY, open_weights
from llmctl.tensor_file import LazyTensor

HEAD = "lm_head.weight"
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "shared.weight", "word_embeddings.weight")


@dataclass(frozen=True)
class Merged:
    path: Path
    changed: int
    agreement: agreement.Agreement


def merge(base: str | Path, adapters: Sequence[str | Path], output: str | Path, settings: MergeSettings) -> Merged:
    """Write `base` with the adapters folded in (or, with `unmerge`, taken out again) as a new checkpoint.

    Raises UserError for an adapter that does not fit the base or cannot be merged, CheckFailed where the result does not
    compute what base and adapters do; nothing is left under `output` then.
    """
    files.refuse_input(output, [base, *adapters])
    allocator.return_freed_memory()
    base = Path(base)
    adapter.refuse_as_base(base)
    weights = _weights(settings, len(adapters))
    config = read_config(base)
    stored = open_weights(base)
    changes = [_change(path, config.family, stored, settings) for path in adapters]
    plan = _Plan(_with_head(config, changes), stored, changes, weights, settings)
    with ThreadPoolExecutor(2) as beside, files.staged_directory(output, settings.overwrite) as directory:
        parent = beside.submit(lineage.weights_sha256, base)
        tensors, untied = plan.tensors()
        digests = checkpoint.save_tensors(directory, tensors, hashed=True)
        flushing = [beside.submit(files.flush, directory / name) for name in digests]
        _copy_companions(base, [change.path for change in changes], directory, untied)
        if plan.config.classifier and not config.classifier:
            write_config(plan.config, stored.dtype(next(iter(stored))), directory)
        if not (settings.force or settings.unmerge):
            for change in changes:
                refuse_other_base(change.path, base, parent.result)
        found = _check(base, directory, plan, weights, settings)
        agreement.require(found, settings.tolerance)
        recipe = {"base": str(base), "adapters": [str(path) for path in adapters], **vars(settings)}
        how = {"seed": settings.seed, "parent_sha256": parent.result(), "metrics": found.as_dict()}
        lineage.write(directory, lineage.Lineage(command="merge-lora", recipe=recipe, **how), digests)
        for each in flushing:
            each.result()
    return Merged(Path(output), len(plan.touched), found)


def _change(path: str | Path, family: str, stored: checkpoint.TensorFiles, settings: MergeSettings) -> AdapterChanges:
    change = AdapterChanges(path, family, stored.keys())
    refuse_strangers(change, set(stored.keys()))
    if settings.unmerge and not change.can_be_undone:
        raise UserError(f"{change.path}: what it replaced cannot be restored from the result (DoRA, modules to save)")
    return change


class _Plan:
    """Every tensor of the result, made when it is written."""

    def __init__(
        self,
        config: ModelConfig,
        stored: checkpoint.TensorFiles,
        changes: Sequence[AdapterChanges],
        weights: Sequence[float],
        settings: MergeSettings,
    ):
        """`config` is that of the result."""
        self.config, self.stored, self.changes, self.weights, self.settings = config, stored, changes, weights, settings
        self.touched = [name for name in stored.keys() if any(change.touches(name) for change in changes)]

    def tensors(self) -> tuple[dict[str, LazyTensor], bool]:
        """(tensors by name, whether the head had to part from a changed embedding that it was tied to)."""
        tensors = {name: self.stored.lazy(name) for name in self.stored.keys()}
        for name in self.touched:
            tensors[name] = LazyTensor(
                self.stored.shape(name), self.stored.dtype(name), lambda name=name: self._rounded(name)
            )
        for name, whole in self._new_tensors().items():
            tensors[name] = LazyTensor(tuple(whole.shape), whole.dtype, lambda whole=whole: whole)
        head = self.own_head()
        return tensors | ({} if head is None else {HEAD: head}), head is not None

    def _new_tensors(self) -> dict[str, torch.Tensor]:
        """A classifier's head, which the base does not have."""
        if self.config.classifier is None:
            return {}
        return {name: c.tensor(name) for c in self.changes for name in c.whole if name not in self.stored}

    def own_head(self) -> LazyTensor | None:
        """Of a base whose head is its embedding: what the head is now, where only one of the two has changed."""
        if self.config.classifier or not self.config.tie_embeddings or HEAD in self.stored:
            return None
        for change in self.changes:
            if HEAD in change.whole:
                whole = change.tensor(HEAD)
                embedding = next((name for name in change.whole if name.endswith(EMBEDDINGS)), None)
                if embedding is not None and torch.equal(change.tensor(embedding), whole):
                    return None  # both have changed alike
                return LazyTensor(tuple(whole.shape), whole.dtype, lambda whole=whole: whole)
        embedding = next((name for name in self.touched if name.endswith(EMBEDDINGS)), None)
        return None if embedding is None else self.stored.lazy(embedding)

    def exact(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor as it should be, float32."""
        tensor = tensor.float()
        if self.settings.unmerge:
            (change,) = self.changes
            return change.undone(name, tensor) if change.touches(name) else tensor
        touching = [(c, w) for c, w in zip(self.changes, self.weights, strict=True) if c.touches(name)]
        if not touching:
            return tensor
        parts, weights = [change.of(name, tensor) for change, _ in touching], [weight for _, weight in touching]
        how = {"density": self.settings.density, "rank": self.settings.rank, "seed": self.settings.seed}
        return tensor.add_(combine(self.settings.method, name, parts, weights, **how))

    def _rounded(self, name: str) -> torch.Tensor:
        return self.exact(name, self.stored.copy(name)).to(self.stored.dtype(name))


def _check(base: Path, merged: Path, plan: _Plan, weights, settings: MergeSettings) -> agreement.Agreement:
    """Base with the adapters beside it against the file that was written, in the precision in which the base is kept.

    Where adapters do not simply add up, it is what was meant, in float32, against what was written.
    """
    dtype = merge_check.dtype_of(plan.config)
    is_alone = len(plan.changes) == 1 and weights[0] == 1.0
    adds_up = is_alone or all(change.is_plain_sum for change in plan.changes)
    if not adds_up or settings.method != "linear" or settings.unmerge:
        dtype, head = torch.float32, plan.own_head()
        before = StreamedModel(base, replaced=plan.exact, head_VD=None if head is None else head.load())
    elif any(change.whole for change in plan.changes):
        before = merge_check.Assembled(base, plan.changes[0], dtype)
    else:
        before = StreamedModel(base, dtype, merge_check.attached(plan.changes, weights))
    return merge_check.compare(base, before, StreamedModel(merged, dtype))


def _with_head(config: ModelConfig, changes: Sequence[AdapterChanges]) -> ModelConfig:
    """The config of the result, which is a classifier where an adapter brings a head."""
    found = [head for head in (adapter.classifier_of(change.path, config) for change in changes) if head is not None]
    if not found:
        return config
    if len(changes) > 1:
        raise UserError(f"{changes[0].path}: a classifier's adapter is merged alone: its head is its own")
    return config.classifying(found[0])


def _weights(settings: MergeSettings, count: int) -> list[float]:
    if settings.unmerge and (settings.weights or settings.method != "linear" or count > 1):
        raise CalledWrongly("--unmerge takes out one adapter that was merged whole; give no --weights or --method")
    if not settings.weights:
        return [1.0] * count
    try:
        weights = [float(weight) for weight in settings.weights.split(",")]
    except ValueError as error:
        raise CalledWrongly(f"--weights {settings.weights!r}: not numbers", hint="for example 0.7,0.3") from error
    if not all(map(math.isfinite, weights)):
        raise CalledWrongly(f"--weights {settings.weights!r}: not finite", hint="for example 0.7,0.3")
    if len(weights) != count:
        raise CalledWrongly(f"{len(weights)} --weights for {count} adapters", hint="give one for each")
    return weights


def _copy_companions(base: Path, adapters: Sequence[Path], output: Path, untied: bool) -> None:
    """Config, tokenizer and the rest; what an adapter brings of its own (a chat template) comes before the base's."""
    companions.copy(base, output)
    for adapter_ in adapters:
        companions.copy(adapter_, output, leave=("config.json",))
    config = files.read_json(output / "config.json")
    is_quantized = config.pop(CONFIG_KEY, None) is not None  # what was merged into it is not
    if untied or is_quantized:
        config |= {"tie_word_embeddings": False} if untied else {}
        files.write_atomic(output / "config.json", json.dumps(config, indent=2).encode())
