"""Who sees whom: the places of queries and keys, and the masks made of them."""

from __future__ import annotations

from dataclasses import dataclass

from llmctl.export.onnx.builder import Builder
from llmctl.export.onnx.graph import INT32, Value


@dataclass
class Places:
    """Where the tokens of a forward pass stand; places count padding too, positions do not.

    `queries` int64 [T] and `keys` [S] are places in the row, `positions` [B or 1, T] those within the text, `mask` int64
    [B, S] is 1 at real tokens (None: all are). `lengths` int64 [B, 1] are those of the texts, and `new_lengths` [B] how many
    tokens of this pass are real.
    """

    b: Builder
    queries: Value
    keys: Value
    positions: Value
    mask: Value | None = None
    lengths: Value | None = None
    new_lengths: Value | None = None

    def visible(self, causal: bool, window: int | None) -> Value | None:
        """bool, broadcast to [B, G, R, T, S]; None where every query sees every key."""
        return self.b.graph.once(("visible", causal, window, self.queries.name), lambda: self._visible(causal, window))

    def _visible(self, causal: bool, window: int | None) -> Value | None:
        seen = None
        queries, keys = self.queries.unsqueeze(1), self.keys.unsqueeze(0)
        if causal:
            seen = keys.compare("LessOrEqual", queries)
        if window is not None:
            recent = keys.compare("Greater", queries - window)
            seen = recent if seen is None else seen & recent
        if self.mask is None:
            return seen
        real = self.mask.compare("Greater", 0).unsqueeze(1, 2, 3)
        return real if seen is None else real & seen

    def counts(self) -> tuple[Value, Value]:
        """What GroupQueryAttention asks: of each row the last real key's place, int32 [B], and the row's length, int32."""

        def make() -> tuple[Value, Value]:
            last = self.mask.sum(1, keepdims=False) - 1
            return last.cast(INT32), self.mask.size(1).squeeze(0).cast(INT32)

        return self.b.graph.once("counts", make)
