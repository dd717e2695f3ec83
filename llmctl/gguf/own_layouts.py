"""Families that GGUF describes in a way of their own, unlike decoders of attention and feed-forward layers, and who knows it.

Each module has `rows`, `obstacles`, `metadata`, `context` of a config, `of_keys` of a file, and FLOAT32, the ends of the names of
tensors that are never stored otherwise.
"""

from __future__ import annotations

from llmctl.gguf import state_spaces, t5

OWN = {"mamba": state_spaces, "mamba2": state_spaces, "t5": t5}
FLOAT32 = tuple({end for module in OWN.values() for end in module.FLOAT32})
