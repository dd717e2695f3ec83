"""How each tensor of a GGUF file is stored: llama.cpp's own mixtures of types, and the bytes of a tensor."""

from __future__ import annotations

import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf import LlamaFileType, quants

from llmctl.gguf import k_quants, own_layouts

FILE_TYPES = {
    "f32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
    "q6_k": LlamaFileType.MOSTLY_Q6_K,
    "q5_0": LlamaFileType.MOSTLY_Q5_0,
    "q4_k": LlamaFileType.MOSTLY_Q4_K_M,
    "q4_1": LlamaFileType.MOSTLY_Q4_1,
    "q4_0": LlamaFileType.MOSTLY_Q4_0,
}
_WRITERS = {Type.Q4_K: k_quants.quantize_q4_k, Type.Q6_K: k_quants.quantize_q6_k}
_BLOCKS = {Type.Q4_K: 256, Type.Q6_K: 256, Type.Q8_0: 32, Type.Q5_0: 32, Type.Q4_1: 32, Type.Q4_0: 32}
_BYTES = {Type.Q4_K: 144, Type.Q6_K: 210, Type.Q8_0: 34, Type.Q5_0: 22, Type.Q4_1: 20, Type.Q4_0: 18}
_NARROW = {Type.Q4_K: Type.Q5_0, Type.Q6_K: Type.Q8_0}
"""In place of types of 256 values to a block, for rows that are no multiple of that."""
_FLOAT32 = ("ffn_gate_inp", "position_embd", "token_types", "rope_")


def type_of(name: str, shape: tuple[int, ...], wanted: str, n_layers: int, is_head: bool) -> Type:
    """`is_head`: the matrix gives the logits, so that few bits would cost most there."""
    if len(shape) < 2 or any(part in name for part in _FLOAT32) or name.endswith(own_layouts.FLOAT32):
        return Type.F32
    chosen = Type[wanted.upper()]
    if chosen in (Type.F32, Type.F16, Type.BF16):
        return chosen
    if chosen != Type.Q8_0 and (is_head or (chosen == Type.Q4_K and _is_sensitive(name, n_layers))):
        chosen = Type.Q6_K
    if shape[-1] % _BLOCKS[chosen]:
        chosen = _NARROW.get(chosen, chosen)
    return Type.F16 if shape[-1] % _BLOCKS[chosen] else chosen


def _is_sensitive(name: str, n_layers: int) -> bool:
    """What Q4_K_M keeps in 6 bits: values and the way down, in the first and last eighth of the layers and each third between."""
    if not any(part in name for part in ("attn_v.", "ffn_down")):
        return False
    layer, eighth = int(name.partition("blk.")[2].split(".")[0]), n_layers // 8
    return layer < eighth or layer >= 7 * n_layers // 8 or (layer - eighth) % 3 == 2


def nbytes(shape: tuple[int, ...], kind: Type) -> int:
    count = int(np.prod(shape))
    if kind in _BYTES:
        return count // _BLOCKS[kind] * _BYTES[kind]
    return count * {Type.F32: 4}.get(kind, 2)


def stored_shape(shape: tuple[int, ...], kind: Type) -> tuple[tuple[int, ...], type]:
    """Shape and numpy type of a tensor's data in the file."""
    if kind in _BYTES:
        return (*shape[:-1], shape[-1] // _BLOCKS[kind] * _BYTES[kind]), np.uint8
    if kind == Type.BF16:
        return (*shape[:-1], 2 * shape[-1]), np.uint8
    return shape, {Type.F32: np.float32, Type.F16: np.float16}[kind]


def data_of(tensor: torch.Tensor, kind: Type) -> np.ndarray:
    """The tensor's bytes as the file holds them."""
    values = tensor.contiguous().numpy()
    if kind in _WRITERS:
        return _WRITERS[kind](values)
    return quants.quantize(values, kind)
