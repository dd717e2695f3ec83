"""`llmctl quantize`: a checkpoint in few bits, or back, matrix by matrix from the mapped files."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmctl import agreement, allocator, checkpoint, companions, files, lineage
from llmctl.errors import UserError
from llmctl.models.loading import new_empty, stored_config
from llmctl.models.streaming import StreamedModel
from llmctl.ops.dispatch import cpu_library
from llmctl.quantize import calibration, comparison, contradictions, matrices, storage
from llmctl.quantize.awq import Awq
from llmctl.quantize.gptq import Gptq
from llmctl.quantize.matrices import Matrix
from llmctl.quantize.remarks import has_kernel, remarks
from llmctl.quantize.scheme import FORMATS, PLAIN, Scheme
from llmctl.quantize.sensitivity import widen
from llmctl.quantize.settings import QuantizeSettings
from llmctl.quantize.spool import Spool
from llmctl.quantize.stored import CONFIG_KEY, open_weights
from llmctl.tensor_file import LazyTensor
from llmctl.tokenization.files import has_tokenizer
from llmctl.tokenizer import Tokenizer

Progress = Callable[[str, int, int], None]
"""Told what is being done, how many matrices are done, and how many there are."""


@dataclass(frozen=True)
class Quantized:
    """What came of it: bytes of all weights before and after, stored bits per quantized weight, what a person should know of
    the format, and how far both agree."""

    path: Path
    modules: int
    bytes_before: int
    bytes_after: int
    bits_per_weight: float | None
    remarks: list[str]
    agreement: agreement.Agreement
    running: agreement.Agreement | None = None
    """As the kernels of this machine run it, which round what they multiply; None where they have no part in it."""

    def metrics(self) -> dict[str, Any]:
        sizes = {name: getattr(self, name) for name in ("bytes_before", "bytes_after", "bits_per_weight")}
        running = {} if self.running is None else {"running": self.running.as_dict()}
        return {**sizes, **self.agreement.as_dict(), **running}


def quantize(
    model: str | Path,
    output: str | Path,
    settings: QuantizeSettings,
    recipe: Mapping[str, Any] | None = None,
    progress: Progress = lambda *_: None,
    typed: Collection[str] = (),
) -> Quantized:
    """Write `model` in `settings.format` as a new checkpoint. `typed` fields of the settings must matter to it.

    Raises UserError for weights that are no numbers and for calibration text that is too short, CalledWrongly for settings
    that do not fit the model, CheckFailed where the result is too far from the model; nothing is left under `output` then.
    """
    allocator.return_freed_memory()
    files.refuse_existing(output, settings.overwrite)
    files.refuse_input(output, [model])
    contradictions.refuse(settings, typed)
    job = _Job(Path(model), settings, progress)
    with files.staged_directory(output, settings.overwrite) as directory:
        tensors, said = job.plain() if settings.format in PLAIN else job.quantized(directory / "spool")
        checkpoint.save_tensors(directory, tensors)
        if job.spool is not None:
            job.spool.remove()
        companions.copy(job.path, directory)
        _write_config(directory, said, job.dtype if settings.format not in PLAIN else _plain(settings))
        found = job.compared(directory)
        for one in found:
            agreement.require(one, tolerance(settings))
        sizes = _sizes(job.path, directory)
        result = Quantized(Path(output), len(job.schemes), *sizes, job.bits_per_weight, job.remarks, *found)
        lineage.write(
            directory,
            lineage.Lineage(
                "quantize",
                dict(recipe or {}),
                data_sha256=job.rows.sha256,
                tokenizer_sha256=job.tokenizer.sha256 if job.tokenizer else None,
                parent_sha256=lineage.weights_sha256(job.path),
                metrics=result.metrics(),
            ),
        )
    return result


def tolerance(settings: QuantizeSettings) -> float:
    """The largest KL divergence, in nats, that the result may have."""
    if settings.tolerance is not None:
        return settings.tolerance
    if settings.format in PLAIN:
        return 0.001
    return 0.05 if FORMATS[settings.format].bits == 8 else 0.5


class _Job:
    """One checkpoint on its way."""

    def __init__(self, path: Path, settings: QuantizeSettings, progress: Progress):
        self.path, self.settings, self._progress = path, settings, progress
        self._files = open_weights(path)
        self._config = stored_config(path)
        self.dtype = _main_dtype(self._files)
        with torch.device("meta"):
            self._model = new_empty(self._config)
        self.tokenizer = Tokenizer.load(path) if has_tokenizer(path) else None
        self.rows = calibration.read(
            settings.calibration,
            self.tokenizer,
            self._config,
            settings.calibration_samples,
            settings.calibration_length,
        )
        self.spool: Spool | None = None
        self.schemes: dict[str, Scheme] = {}
        self.bits_per_weight: float | None = None
        self.remarks: list[str] = []

    def plain(self) -> tuple[dict[str, LazyTensor], None]:
        """All tensors unpacked, the floating ones in the dtype that the format names."""
        dtype = _plain(self.settings)

        def cast(name: str) -> LazyTensor:
            if not self._files.dtype(name).is_floating_point:
                return self._files.lazy(name)
            return LazyTensor(self._files.shape(name), dtype, lambda: self._finite(name).to(dtype))

        return {name: cast(name) for name in self._files}, None

    def quantized(self, spool: Path) -> tuple[dict[str, LazyTensor], dict]:
        """The checkpoint's tensors, and its `quantization_config`."""
        found = matrices.find(self._model, self._files.keys())
        self.schemes = matrices.schemes(found, self.settings, self.dtype)
        chosen = [matrix for matrix in found if matrix.theirs in self.schemes]
        if self.settings.target_bits is not None:
            self.schemes = widen(self.path, chosen, self.schemes, self.settings.target_bits, self.rows, self._progress)
        self.bits_per_weight = matrices.mean_bits(chosen, self.schemes)
        self.remarks = remarks(chosen, self.schemes.values())
        self.spool = Spool(spool)
        changed = self._fill(chosen)
        packed = {f"{matrix.theirs}.weight" for matrix in chosen}
        plain = {name: self._plain_tensor(name, changed) for name in self._files if name not in packed}
        kept = matrices.unquantized(self._model, self._files.keys(), self.schemes)
        act_order = self.settings.method == "gptq" and self.settings.act_order
        said = storage.quantization_config(self.schemes, kept, self.dtype, act_order)
        return {**plain, **self.spool.tensors()}, said

    def compared(self, directory: Path) -> list[agreement.Agreement]:
        """How far the result in `directory` agrees with the checkpoint: its weights, and as kernels here multiply by them."""
        after = [StreamedModel(directory)]
        if any(map(has_kernel, self.schemes.values())) and cpu_library() is not None:
            after.append(StreamedModel(directory, packed=True))
        return comparison.compare(StreamedModel(self.path), self.rows.held_out_BT, *after)

    def _fill(self, chosen: list[Matrix]) -> dict[str, torch.Tensor]:
        """Spool every matrix; tensors that had to change beside them, by name."""
        if self.settings.method == "rtn":
            for number, matrix in enumerate(chosen):
                self._progress("rounding", number, len(chosen))
                weight = matrix.upright(self._finite(f"{matrix.theirs}.weight"))
                self.spool.add(matrix.theirs, storage.rounded(weight, self.schemes[matrix.theirs], self.dtype))
            return {}
        for name in self._files:  # what is no number would come back from the calibration as something else
            self._finite(name)
        method = {"gptq": Gptq, "awq": Awq}[self.settings.method]
        work = method(self.path, chosen, self.schemes, self.dtype, self.settings)
        return work.run(self.rows.calibration_BT, self.spool, self._progress)

    def _plain_tensor(self, name: str, changed: Mapping[str, torch.Tensor]) -> LazyTensor:
        dtype = self._files.dtype(name)
        if name not in changed:
            return LazyTensor(self._files.shape(name), dtype, lambda: self._finite(name))
        return LazyTensor(self._files.shape(name), dtype, lambda: changed[name].to(dtype))

    def _finite(self, name: str) -> torch.Tensor:
        tensor = self._files.copy(name)
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            count = int((~torch.isfinite(tensor)).sum())
            raise UserError(
                f"{self.path}: {name} has {count:,} values that are NaN or infinite",
                hint="the training run diverged; take an earlier save",
            )
        return tensor


def _plain(settings: QuantizeSettings) -> torch.dtype:
    return getattr(torch, settings.format)


def _main_dtype(stored) -> torch.dtype:
    """What most floating values of the checkpoint are in."""
    sizes: dict[torch.dtype, int] = {}
    for name in stored:
        dtype = stored.dtype(name)
        if dtype.is_floating_point and dtype.itemsize > 1:
            sizes[dtype] = sizes.get(dtype, 0) + stored.nbytes(name)
    return max(sizes, key=sizes.get)


def _sizes(before: Path, after: Path) -> tuple[int, int]:
    totals = []
    for path in (before, after):
        stored = checkpoint.open_tensors(path)
        totals.append(sum(map(stored.nbytes, stored)))
    return totals[0], totals[1]


def _write_config(output: Path, said: dict | None, dtype: torch.dtype) -> None:
    hf = files.read_json(output / "config.json")
    hf.pop(CONFIG_KEY, None)
    name = str(dtype).removeprefix("torch.")
    hf |= {"torch_dtype": name, "dtype": name}
    if said is not None:
        hf[CONFIG_KEY] = said
    files.write_atomic(output / "config.json", f"{json.dumps(hf, indent=2, ensure_ascii=False)}\n".encode())
