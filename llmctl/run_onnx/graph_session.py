"""One ONNX file on onnxruntime, between torch tensors: nothing is copied on the way in or out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnxruntime
import torch

from llmctl.errors import UserError

_DTYPES = {
    "tensor(float)": (torch.float32, 1),
    "tensor(float16)": (torch.float16, 10),
    "tensor(bfloat16)": (torch.bfloat16, 16),
    "tensor(int64)": (torch.int64, 7),
    "tensor(int32)": (torch.int32, 6),
    "tensor(bool)": (torch.bool, 9),
}
"""onnxruntime's names for what torch and onnx.TensorProto call so."""
_SHORT = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def provider_name(provider: str | None, device: torch.device | str | None = None) -> str:
    """onnxruntime's full name: of `cpu` or `cuda`, of a full name itself, or else what suits the device.

    Raises UserError for one that this onnxruntime does not have.
    """
    kind = torch.device(device).type if device is not None else "cpu"
    name = _SHORT.get(provider or kind, provider or kind)
    available = onnxruntime.get_available_providers()
    if name not in available:
        short = {full: brief for brief, full in _SHORT.items()}
        raise UserError(
            f"this onnxruntime has no provider {provider or kind!r}",
            hint=f"it has {', '.join(short.get(known, known) for known in available)}",
        )
    return name


class GraphSession:
    """`inputs` and `outputs` are (dtype, shape) by name; a shape has names for what is dynamic. `optional` are the names of
    inputs that have values where none are given."""

    def __init__(self, path: Path, provider: str, options: onnxruntime.SessionOptions | None = None):
        """Raises UserError where the file is broken, or the provider does not start or lacks an operator."""
        self.path, self.provider = path, provider
        try:
            self._session = onnxruntime.InferenceSession(path, options or session_options(), providers=[provider])
        except Exception as error:  # onnxruntime has classes of its own for each of its status codes
            reason = str(error).strip().splitlines()[0][:300]
            raise UserError(f"{path}: onnxruntime cannot run it: {reason}") from error
        if self._session.get_providers()[0] != provider:
            raise UserError(f"{provider} does not start here", hint="--provider cpu always can")
        self.device = torch.device("cuda" if provider == _SHORT["cuda"] else "cpu")
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        optional = [place for place in self._session.get_overridable_initializers() if place.type in _DTYPES]
        self._types = {place.name: _DTYPES[place.type] for place in (*inputs, *outputs, *optional)}
        self.inputs = {place.name: (self._types[place.name][0], place.shape) for place in inputs}
        self.outputs = {place.name: (self._types[place.name][0], place.shape) for place in outputs}
        self.optional = {place.name for place in optional}
        self._given: dict[str, torch.Tensor] = {}
        self.metadata = self._session.get_modelmeta().custom_metadata_map
        self._nothing = torch.zeros(1, device=self.device)

    def __deepcopy__(self, memo: dict) -> GraphSession:
        """Itself: a copy of a cache runs on the same weights."""
        return self

    def give(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Values of optional inputs, for every run from now on."""
        self._given = {
            name: tensor.to(self.device, self._types[name][0]).contiguous() for name, tensor in tensors.items()
        }

    def binding(self) -> onnxruntime.IOBinding:
        binding = self._session.io_binding()
        for name, tensor in self._given.items():
            self.bind_input(binding, name, tensor)
        return binding

    def bind_input(self, binding: onnxruntime.IOBinding, name: str, tensor: torch.Tensor) -> None:
        """`tensor` is contiguous, and lives as long as the binding is used."""
        binding.bind_input(name, *self._place(name, tensor))

    def bind_output(self, binding: onnxruntime.IOBinding, name: str, tensor: torch.Tensor) -> None:
        binding.bind_output(name, *self._place(name, tensor))

    def run_bound(self, binding: onnxruntime.IOBinding) -> None:
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        self._session.run_with_iobinding(binding)

    def run(self, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> None:
        """Fill `outputs`, of which each has the shape that these inputs give; those not named are not computed."""
        binding = self.binding()
        held = {name: inputs[name].to(self.device, self._types[name][0]).contiguous() for name in self.inputs}
        for name, tensor in held.items():
            self.bind_input(binding, name, tensor)
        for name, tensor in outputs.items():
            self.bind_output(binding, name, tensor)
        self.run_bound(binding)

    def empty(self, name: str, *shape: int) -> torch.Tensor:
        """Room for an output."""
        return torch.empty(shape, dtype=self._types[name][0], device=self.device)

    def _place(self, name: str, tensor: torch.Tensor) -> tuple:
        pointer = tensor.data_ptr() if tensor.numel() else self._nothing.data_ptr()
        return self.device.type, self.device.index or 0, self._types[name][1], list(tensor.shape), pointer


def session_options(threads: int | None = None) -> onnxruntime.SessionOptions:
    """As many threads as torch uses, and no notes of onnxruntime's own on standard error."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 4
    onnxruntime.set_default_logger_severity(4)
    return options
