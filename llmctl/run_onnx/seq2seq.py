"""An exported encoder-decoder, with what generation asks of a `models.seq2seq_lm.Seq2SeqLM`."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch

from llmctl.errors import UserError
from llmctl.models.config import ModelConfig
from llmctl.models.context import padding_of
from llmctl.models.memory import Memory
from llmctl.models.seq2seq_lm import Seq2SeqLM
from llmctl.run_onnx.graph_session import GraphSession
from llmctl.run_onnx.model import OnnxModule


class OnnxSeq2SeqCache:
    """What the decoder has read, and its keys and values of the source."""

    def __init__(self, states_BSD: torch.Tensor, mask_BS: torch.Tensor):
        self.states_BSD, self.mask_BS, self.length = states_BSD, mask_BS, 0
        self.past: dict[str, torch.Tensor] = {}

    def branch(self, rows: torch.Tensor) -> OnnxSeq2SeqCache:
        """Another cache, of these rows; this one stays as it is."""
        other = copy.copy(self)
        other.select(rows)
        return other

    def select(self, rows: torch.Tensor) -> None:
        """Keep only these rows of the batch, in this order."""
        self.states_BSD, self.mask_BS = self.states_BSD[rows], self.mask_BS[rows]
        self.past = {name: tensor[rows] for name, tensor in self.past.items()}


class Decoders:
    """The decoder of the first pass and that of those that follow, which may be one file."""

    def __init__(self, first: GraphSession, following: GraphSession):
        self.first, self.following = first, following

    def run(self, ids_BT: torch.Tensor, cache: OnnxSeq2SeqCache, config: ModelConfig) -> torch.Tensor:
        """Logits [B, T, V]; the cache has read these ids then."""
        graph, mixer = (self.following if cache.length else self.first), config.blocks[0].mixer
        given = {
            "input_ids": ids_BT,
            "encoder_attention_mask": cache.mask_BS,
            "encoder_hidden_states": cache.states_BSD,
            "use_cache_branch": torch.tensor([cache.length > 0]),
        }
        none = torch.zeros(len(ids_BT), mixer.n_kv_heads, 0, mixer.head_dim, device=graph.device)
        given |= {name: cache.past.get(name, none) for name in graph.inputs if name.startswith("past_")}
        total, source = cache.length + ids_BT.shape[1], cache.mask_BS.shape[1]
        lengths = {"decoder": total, "encoder": source}
        made = {"logits": graph.empty("logits", *ids_BT.shape, config.vocab_size)}
        for name in graph.outputs:
            if name.startswith("present."):
                shape = (len(ids_BT), mixer.n_kv_heads, lengths[name.split(".")[2]], mixer.head_dim)
                made[name] = graph.empty(name, *shape)
        graph.run(given, made)
        logits_BTV = made.pop("logits")
        cache.past = cache.past | {
            name.replace("present", "past_key_values", 1): tensor for name, tensor in made.items()
        }
        cache.length = total
        return logits_BTV


class OnnxSeq2SeqLM(OnnxModule):
    """A source and the ids written so far to logits over what comes next."""

    shares_prefixes = False
    continued = Seq2SeqLM.continued

    def __init__(self, encoder: GraphSession, decoders: Decoders, config: ModelConfig):
        super().__init__(encoder, config)
        self.decoders, self.encoder = decoders, _Side(config.encoder)

    def __call__(
        self, source_ids_BS: torch.Tensor, source_mask_BS: torch.Tensor | None = None, *, input_ids_BT: torch.Tensor
    ) -> torch.Tensor:
        """The decoder's logits [B, T, V] at these inputs."""
        return self.decoders.run(input_ids_BT, self._cache(source_ids_BS, source_mask_BS), self.config)

    def encode(
        self,
        source_ids_BS: torch.Tensor,
        source_mask_BS: torch.Tensor | None = None,
        *,
        recorded_hidden: list | None = None,
    ) -> Memory:
        """What the decoder attends to."""
        if recorded_hidden is not None:
            raise UserError("an exported encoder gives the last layer only", hint="leave --layer out")
        return Memory(self._cache(source_ids_BS, source_mask_BS).states_BSD, *padding_of(source_mask_BS))

    def hidden(self, input_ids_BT: torch.Tensor, *, cache: OnnxSeq2SeqCache) -> torch.Tensor:
        """The graphs end in logits [B, T, V], so they stand for what `logits` would be made of."""
        return self.decoders.run(input_ids_BT, cache, self.config)

    @staticmethod
    def logits(hidden_BTV: torch.Tensor) -> torch.Tensor:
        return hidden_BTV

    def next_logits(self, input_ids_BT: torch.Tensor, cache: OnnxSeq2SeqCache) -> torch.Tensor:
        """Logits [B, V] of what follows when these ids have continued what the cache holds."""
        return self.decoders.run(input_ids_BT, cache, self.config)[:, -1]

    def begin(
        self, prompts: Sequence[Sequence[int]], continued: Sequence[Sequence[int]], max_new_tokens: int
    ) -> tuple[OnnxSeq2SeqCache, torch.Tensor]:
        length = max(map(len, prompts))
        padded = [[*prompt, *[0] * (length - len(prompt))] for prompt in prompts]
        mask = [[1] * len(prompt) + [0] * (length - len(prompt)) for prompt in prompts]
        return self._cache(torch.tensor(padded), torch.tensor(mask)), torch.tensor([list(ids) for ids in continued])

    def _cache(self, source_ids_BS: torch.Tensor, mask_BS: torch.Tensor | None) -> OnnxSeq2SeqCache:
        mask_BS = torch.ones_like(source_ids_BS) if mask_BS is None else mask_BS.long()
        states_BSD = self.graph.empty("last_hidden_state", *source_ids_BS.shape, self.config.d_model)
        self.graph.run({"input_ids": source_ids_BS, "attention_mask": mask_BS}, {"last_hidden_state": states_BSD})
        return OnnxSeq2SeqCache(states_BSD, mask_BS.to(self.device))


class _Side:
    """What is asked of an encoder as a stack: how much it can read."""

    n_virtual = 0

    def __init__(self, config: ModelConfig):
        self.config = config
