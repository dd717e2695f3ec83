"""How quantized matrices lie in checkpoint files: one module for each tool that writes such files.

Each has a class whose instances are made of config.json's `quantization_config` and the file's tensors, with
`modules()`, the names of the packed modules and the endings of their tensors; `shape(module)`, [out, in]; and
`packed(module)`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from llmctl.checkpoint import TensorFiles
from llmctl.errors import UserError, did_you_mean
from llmctl.quantize.layouts.awq_files import AwqFiles
from llmctl.quantize.layouts.bitsandbytes import BitsAndBytes
from llmctl.quantize.layouts.compressed_tensors import CompressedTensors
from llmctl.quantize.layouts.gptq_files import GptqFiles

_KINDS = {
    "compressed-tensors": CompressedTensors,
    "bitsandbytes": BitsAndBytes,
    "gptq": GptqFiles,
    "awq": AwqFiles,
}

Layout = CompressedTensors | BitsAndBytes | GptqFiles | AwqFiles


def find(said: Mapping, files: TensorFiles) -> Layout:
    """The layout that a `quantization_config` names. Raises UserError for one that llmctl cannot read."""
    if not isinstance(said, Mapping):
        raise UserError(
            f"{files.path}: config.json's quantization_config is {said!r}; expected an object with quant_method"
        )
    method = said.get("quant_method")
    if method is None and (said.get("load_in_4bit") or said.get("load_in_8bit")):
        method = "bitsandbytes"
    if not isinstance(method, str) or method not in _KINDS:
        near = did_you_mean(str(method), _KINDS)
        raise UserError(
            f"{files.path}: quantized by {method!r}; llmctl reads {', '.join(_KINDS)}",
            hint=near or "convert it with the tool that wrote it, to one of these or back to bfloat16",
        )
    return _KINDS[method](said, files)


def names_of(layout: Layout) -> Iterable[str]:
    """The tensors of the file that are parts of packed modules."""
    return (f"{module}.{ending}" for module, endings in layout.modules().items() for ending in endings)
