"""What a person should know of a format: which program runs it as it is stored, and on which machine."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from llmctl.models.packed import KERNEL_MULTIPLE
from llmctl.quantize.matrices import Matrix
from llmctl.quantize.scheme import Scheme

_UNPACKED = "here each matrix is unpacked when it is used, which is slower than bfloat16"


def has_kernel(scheme: Scheme) -> bool:
    """Whether matrices of the scheme are multiplied by as they are stored, where llmctl's own kernels run."""
    size = scheme.group_size or KERNEL_MULTIPLE
    return scheme.kind in ("int", "llm-int8") and size % KERNEL_MULTIPLE == 0


def remarks(matrices: Iterable[Matrix], schemes: Collection[Scheme]) -> list[str]:
    """Lines about schemes that are stored, but that not every program multiplies by."""
    found = []
    kinds = {scheme.kind for scheme in schemes}
    if "fp8" in kinds:
        found.append(f"fp8: {_UNPACKED}; `vllm serve` multiplies in fp8 on a GPU of compute capability 8.9 or later")
    if kinds & {"nf4", "fp4"}:
        found.append(f"{min(kinds)}: {_UNPACKED}; transformers multiplies by it on a GPU, with bitsandbytes")
    if any(scheme.kind == "int" and not has_kernel(scheme) for scheme in schemes):
        found.append(f"groups that are no multiple of {KERNEL_MULTIPLE} have no kernel: {_UNPACKED}")
    if "int" in kinds and any(matrix.transposed for matrix in matrices):
        found.append(
            "transformers has no compressed-tensors for this family, whose matrices lie on their side; "
            "llmctl reads the result, and --format nf4 opens in both"
        )
    elif "int" in kinds and not all(scheme.symmetric for scheme in schemes):
        found.append("transformers reads zero points with CompressedTensorsConfig(dequantize=True)")
    return found
