"""Names and layouts of a GGUF file's tensors beside ours, one table that is read both ways.

The names are llama.cpp's (the `gguf` library lists them). Its matrices are [out, in] as ours are; what differs is said by
`change`: "rename" nothing, "join" rows of several of ours, "stack" the experts of a layer, "rope" rows in the order in which
neighbours turn together, "offset" a norm's weight with the family's offset added; of state spaces, "decay" is -exp of ours,
"column" a vector as a matrix of one column, "taps" a convolution without its middle dimension, "groups" a norm's weight by groups; of T5, "scaled" a
head with its scale, which is written and not read: read back it is a head of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from llmctl.gguf.own_layouts import OWN
from llmctl.models.config import ModelConfig

NEIGHBOURS_TURN = ("llama", "mistral", "mixtral", "smollm3")
"""Families whose queries and keys llama.cpp turns in pairs of neighbours."""

_KINDS = ("weight", "bias")
_SIMPLE = {
    "token_embd": "embed_tokens",
    "position_embd": "embed_positions",
    "token_types": "embed_types",
    "token_embd_norm": "embed_norm",
    "output_norm": "norm",
    "output": "lm_head",
    "blk.{}.attn_norm": "layers.{}.mixer_norm",
    "blk.{}.attn_q_norm": "layers.{}.mixer.q_norm",
    "blk.{}.attn_k_norm": "layers.{}.mixer.k_norm",
    "blk.{}.attn_output": "layers.{}.mixer.o_proj",
    "blk.{}.post_attention_norm": "layers.{}.mixer_output_norm",
    "blk.{}.attn_output_norm": "layers.{}.mixer_sum_norm",
    "blk.{}.layer_output_norm": "layers.{}.ffn_sum_norm",
    "blk.{}.ffn_norm": "layers.{}.ffn_norm",
    "blk.{}.post_ffw_norm": "layers.{}.ffn_output_norm",
    "blk.{}.ffn_down": "layers.{}.ffn.down_proj",
    "blk.{}.ffn_gate_inp": "layers.{}.ffn.router",
}


@dataclass(frozen=True)
class Entry:
    """One tensor of a GGUF file, and the parameters of ours that it holds."""

    name: str
    ours: tuple[str, ...]
    change: str


def entries(config: ModelConfig, shapes: Mapping[str, torch.Size]) -> list[Entry]:
    """Every tensor of a model with these parameters, in the order of the file."""
    found: dict[str, Entry] = {}
    for theirs, ours, change in _rows(config):
        pattern = re.compile(re.escape(ours[0]).replace(r"\{\}", r"(\d+)"))
        for name in shapes:
            if match := pattern.fullmatch(name):
                numbers = match.groups()
                names = tuple(other.format(*numbers) for other in ours)
                if all(other in shapes for other in names):
                    key = theirs.format(*numbers)
                    before = found[key].ours if key in found else ()
                    found[key] = Entry(key, (*before, *names), change)
    return list(found.values())


def _rows(config: ModelConfig):
    if config.family in OWN:
        yield from OWN[config.family].rows(config)
        return
    yield from _attention_and_ffn(config)
    offset = "offset" if config.blocks[0].norm.offset else "rename"
    for theirs, ours in _SIMPLE.items():
        change = offset if ours.endswith("norm") else "rename"
        yield from ((f"{theirs}.{kind}", (f"{ours}.{kind}",), change) for kind in _KINDS)


def _attention_and_ffn(config: ModelConfig):
    mixer, ffn = "layers.{}.mixer", "layers.{}.ffn"
    fused = config.family in ("gpt2", "phi3")
    for kind in _KINDS:
        if fused:
            yield f"blk.{{}}.attn_qkv.{kind}", tuple(f"{mixer}.{part}_proj.{kind}" for part in "qkv"), "join"
        else:
            turns = "rope" if config.family in NEIGHBOURS_TURN else "rename"
            for part, change in (("q", turns), ("k", turns), ("v", "rename")):
                yield f"blk.{{}}.attn_{part}.{kind}", (f"{mixer}.{part}_proj.{kind}",), change
        if config.family == "phi3":
            yield f"blk.{{}}.ffn_up.{kind}", tuple(f"{ffn}.{part}_proj.{kind}" for part in ("gate", "up")), "join"
        else:
            for part in ("gate", "up"):
                yield f"blk.{{}}.ffn_{part}.{kind}", (f"{ffn}.{part}_proj.{kind}",), "rename"
    for part in ("gate", "up", "down"):
        yield f"blk.{{}}.ffn_{part}_exps.weight", (f"{ffn}.experts.{{}}.{part}_proj.weight",), "stack"


def to_gguf(entry: Entry, parts: Sequence[torch.Tensor], config: ModelConfig) -> torch.Tensor:
    """The file's tensor of ours, float32."""
    if entry.change == "join":
        return torch.cat(list(parts))
    if entry.change == "stack":
        return torch.stack(list(parts))
    if entry.change == "rope":
        halves = parts[0].unflatten(0, (-1, 2, _head_dim(config) // 2))
        return halves.transpose(1, 2).flatten(0, 2).contiguous()
    if entry.change == "offset":
        return parts[0] + config.blocks[0].norm.offset
    if entry.change.startswith("decay"):
        decay = -parts[0].exp()
        return decay.unsqueeze(1) if entry.change.endswith("column") else decay
    if entry.change == "column":
        return parts[0].unsqueeze(1)
    if entry.change == "taps":
        return parts[0].squeeze(1)
    if entry.change == "scaled":
        return parts[0] * config.head.scale
    if entry.change == "groups":
        return parts[0].unflatten(0, (config.blocks[0].mixer.n_groups, -1))
    return parts[0]


def to_ours(entry: Entry, tensor: torch.Tensor, sizes: Sequence[int], config: ModelConfig) -> list[torch.Tensor]:
    """The inverse; `sizes` are the lengths of our parts along their first dimension."""
    if entry.change == "join":
        return list(tensor.split(list(sizes)))
    if entry.change == "stack":
        return list(tensor)
    if entry.change == "rope":
        pairs = tensor.unflatten(0, (-1, _head_dim(config) // 2, 2))
        return [pairs.transpose(1, 2).flatten(0, 2).contiguous()]
    if entry.change == "offset":
        return [tensor - config.blocks[0].norm.offset]
    if entry.change.startswith("decay"):
        logarithm = (-tensor).log()
        return [logarithm.squeeze(1) if entry.change.endswith("column") else logarithm]
    if entry.change == "column":
        return [tensor.squeeze(1)]
    if entry.change == "taps":
        return [tensor.unsqueeze(1)]
    if entry.change == "groups":
        return [tensor.flatten()]
    return [tensor]


def rows_in_order(entry: Entry, config: ModelConfig, n_rows: int) -> torch.Tensor:
    """Which row of the file's matrix each of ours is, int64 [rows]."""
    rows = torch.arange(n_rows)
    return to_ours(entry, rows[:, None], [n_rows], config)[0].squeeze(1) if entry.change == "rope" else rows


def _head_dim(config: ModelConfig) -> int:
    return config.blocks[0].mixer.head_dim
