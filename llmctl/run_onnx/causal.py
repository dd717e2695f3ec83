"""An exported decoder, with what generation and evaluation ask of a `models.causal_lm.CausalLM`."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch

from llmctl.errors import UserError
from llmctl.models import rope_scaling
from llmctl.models.config import ModelConfig
from llmctl.models.context import padding_of
from llmctl.run_onnx.cache import GrowingBuffers, Rows, SharedBuffers, cached_names
from llmctl.run_onnx.graph_session import GraphSession
from llmctl.run_onnx.model import OnnxModule


class OnnxCache:
    """Rows of texts and what the graph keeps of them. Where the angles of a rope jump at some length (LongRoPE) the ids
    are kept too: a text that outgrows it is read again."""

    memory = None

    def __init__(self, model: OnnxCausalLM, texts: Sequence[Sequence[int]], capacity: int):
        self.rows = Rows(map(len, texts), model.pads_right)
        self.capacity, self.can_be_cut = capacity, model.sees_past
        kind = SharedBuffers if model.shares_buffers else GrowingBuffers
        self.buffers = kind(model.graph, model.cached, len(texts), capacity)
        self.texts: list[list[int]] | None = None if model.switch_length is None else [[] for _ in texts]

    @property
    def length(self) -> int:
        return self.rows.n_read

    def branch(self, rows: torch.Tensor) -> OnnxCache:
        """Another cache, of these rows; this one stays as it is."""
        other = copy.copy(self)
        other.rows, other.buffers = copy.copy(self.rows), copy.copy(self.buffers)
        other.select(rows)
        return other

    def cut(self, length: int, capacity: int) -> bool:
        """As `Cache.cut`, of one row: False, and unchanged, where that cannot be."""
        is_one = len(self.rows.lengths_B) == 1 and not self.rows.starts_B.any()
        if not is_one or not self.can_be_cut or not 0 < length <= self.length or self.texts is not None:
            return False
        self.rows = copy.copy(self.rows)
        self.rows.cut(length)
        self.buffers.cut(length, capacity)
        self.capacity = max(capacity, self.capacity)
        return True

    def select(self, rows: torch.Tensor) -> None:
        """Keep only these rows of the batch, in this order."""
        rows = rows.cpu()
        self.rows.select(rows)
        self.buffers.select(rows.to(self.buffers.graph.device))
        if self.texts is not None:
            self.texts = [list(self.texts[row]) for row in rows.tolist()]


class OnnxCausalLM(OnnxModule):
    """Token ids to logits over what comes next."""

    cuts_caches = True
    shares_prefixes = False
    """Whether a cache can begin with another one's tokens."""

    def __init__(self, graph: GraphSession, config: ModelConfig, pads_right: bool, shares_buffers: bool):
        super().__init__(graph, config)
        self.pads_right, self.shares_buffers = pads_right, shares_buffers
        self.cached = cached_names(graph)
        self.switch_length = rope_scaling.switch_length(config)

    def __call__(self, input_ids_BT: torch.Tensor, attention_mask_BT: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [B, T, V], or of a classifier [B, labels]; the mask is 1 at real tokens, 0 at padding at the ends."""
        starts_B, ends_B = padding_of(attention_mask_BT)
        length = input_ids_BT.shape[1]
        starts_B = torch.zeros(len(input_ids_BT), dtype=torch.long) if starts_B is None else starts_B.cpu()
        ends_B = torch.full_like(starts_B, length) if ends_B is None else ends_B.cpu()
        # every text begins in its first column, and the logits go back to where it stood
        from_BT = (torch.arange(length) + starts_B[:, None]) % length
        ids_BT = input_ids_BT.cpu().gather(1, from_BT)
        if self.config.classifier is not None:
            return self._labels(ids_BT, ends_B - starts_B)
        cache = OnnxCache(self, [[]] * len(ids_BT), length)
        cache.rows = Rows((ends_B - starts_B).tolist(), pads_right=True)
        logits_BTV = self._run(ids_BT, cache)
        back_BT = ((torch.arange(length) - starts_B[:, None]) % length).to(logits_BTV.device)
        return logits_BTV.gather(1, back_BT.unsqueeze(2).expand_as(logits_BTV)) if starts_B.any() else logits_BTV

    def hidden(
        self, input_ids_BT: torch.Tensor, _mask=None, *, cache: OnnxCache | None = None, **_more
    ) -> torch.Tensor:
        """The graph ends in logits [B, T, V], so they stand for what `logits` would be made of. Only with a cache: a vector
        for a text is not to be had."""
        if cache is None:
            raise UserError(
                "an exported decoder gives logits only", hint="embed with the checkpoint that it was made of"
            )
        input_ids_BT = input_ids_BT.cpu()
        width = 1 if self.reads_one_by_one(cache, len(input_ids_BT)) else input_ids_BT.shape[1]
        return torch.cat([self._run(piece_BT, cache) for piece_BT in input_ids_BT.split(width, dim=1)], 1)

    @staticmethod
    def logits(hidden_BTV: torch.Tensor) -> torch.Tensor:
        return hidden_BTV

    def reads_one_by_one(self, cache: OnnxCache, n_rows: int) -> bool:
        """GroupQueryAttention continues several rows by one token at a time."""
        return self.shares_buffers and cache.length > 0 and n_rows > 1

    def next_logits(self, input_ids_BT: torch.Tensor, cache: OnnxCache) -> torch.Tensor:
        """Logits [B, V] of what follows when these ids have continued what the cache holds."""
        input_ids_BT = input_ids_BT.cpu()
        if cache.texts is not None:
            input_ids_BT = self._to_read(input_ids_BT, cache)
        if self.reads_one_by_one(cache, len(input_ids_BT)):
            for column in range(input_ids_BT.shape[1] - 1):
                self._run(input_ids_BT[:, column : column + 1], cache)
            input_ids_BT = input_ids_BT[:, -1:]
        last_B = cache.rows.last_B(input_ids_BT.shape[1])
        logits_BTV = self._run(input_ids_BT, cache)
        if logits_BTV.shape[1] == 1:
            return logits_BTV[:, 0]
        return logits_BTV[torch.arange(len(last_B)), last_B]

    def continued(self, prompt_ids: Sequence[int], start_id: int | None) -> Sequence[int]:
        return prompt_ids

    def begin(
        self, prompts: Sequence[Sequence[int]], continued: Sequence[Sequence[int]], max_new_tokens: int
    ) -> tuple[OnnxCache, torch.Tensor]:
        """A cache with room for `max_new_tokens` more of each text, and the first inputs [B, T]."""
        length = max(map(len, continued))
        cache = OnnxCache(self, continued, length + max_new_tokens - 1)
        return cache, _padded(continued, self.pads_right)

    def _run(self, ids_BT: torch.Tensor, cache: OnnxCache) -> torch.Tensor:
        n_rows, n_new = ids_BT.shape
        rows, graph = cache.rows, self.graph
        if rows.n_read + n_new > cache.capacity:
            raise ValueError(f"the cache holds {cache.capacity} positions; {rows.n_read + n_new} were asked of it")
        mask_BS = rows.mask_BS(n_new) if self.sees_past else rows.new_mask_BT(n_new)
        given = {"input_ids": ids_BT, "attention_mask": mask_BS}
        if "position_ids" in graph.inputs:
            given["position_ids"] = rows.positions_BT(n_new)
        binding = graph.binding()
        given = {name: tensor.to(graph.device).contiguous() for name, tensor in given.items()}
        for name, tensor in given.items():
            graph.bind_input(binding, name, tensor)
        logits_BTV = graph.empty("logits", n_rows, n_new, self.config.vocab_size)
        graph.bind_output(binding, "logits", logits_BTV)
        cache.buffers.bind(binding, n_new)
        graph.run_bound(binding)
        cache.buffers.advance()
        rows.advance(n_new)
        return logits_BTV

    @property
    def sees_past(self) -> bool:
        """Whether the mask is that of all tokens so far: a state needs no mask for what it has read."""
        return not any(name.startswith("past_states") for name in self.cached)

    def _labels(self, ids_BT: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        mask_BT = (torch.arange(ids_BT.shape[1]) < lengths_B[:, None]).long()
        labels_BC = self.graph.empty("logits", len(ids_BT), len(self.config.classifier.labels))
        self.graph.run({"input_ids": ids_BT, "attention_mask": mask_BT}, {"logits": labels_BC})
        return labels_BC

    def _to_read(self, ids_BT: torch.Tensor, cache: OnnxCache) -> torch.Tensor:
        """These ids, or all of the texts where one of them outgrows the length at which angles jump."""
        before, rows, width = [len(text) for text in cache.texts], cache.rows, ids_BT.shape[1]
        starts, ends = [0] * len(before), [width] * len(before)
        if not cache.length:
            starts = rows.starts_B.tolist()
            ends = rows.lengths_B.tolist() if self.pads_right else ends
        for text, row, start, end in zip(cache.texts, ids_BT.tolist(), starts, ends):
            text += row[start:end]
        if not any(0 < n <= self.switch_length < len(text) for n, text in zip(before, cache.texts)):
            return ids_BT
        cache.rows = Rows(map(len, cache.texts), self.pads_right)
        if isinstance(cache.buffers, GrowingBuffers):
            cache.buffers.length = 0
        return _padded(cache.texts, self.pads_right)


def _padded(texts: Sequence[Sequence[int]], right: bool) -> torch.Tensor:
    length = max(map(len, texts))
    rows = [[*text, *[0] * (length - len(text))] if right else [*[0] * (length - len(text)), *text] for text in texts]
    return torch.tensor(rows)
