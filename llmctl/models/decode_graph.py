"""The decode step on a CUDA device: the modules' own forward pass, recorded once in a graph and replayed for each token, so that
neither Python nor the launches of small kernels stand between one token and the next."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from llmctl.models.cache import Cache, KeyValues
from llmctl.models.context import Context
from llmctl.models.decode_step import NotCovered, check_module, check_stack
from llmctl.models.language_model import LanguageModel
from llmctl.ops import native
from llmctl.ops.visibility import Visibility

log = logging.getLogger("llmctl")

FIRST_REACH = 1024
"""Keys that a step reaches at first; a text that outgrows them is gone on with by a step that reaches twice as many."""

Forward = Callable[[], torch.Tensor]
Recorder = Callable[[Forward], tuple[Callable[[], None], torch.Tensor]]
"""What runs a forward pass again, with the addresses and numbers that it had, and where its result then is. Raises RuntimeError
where the pass cannot be recorded."""


def cuda_graph(forward: Forward) -> tuple[Callable[[], None], torch.Tensor]:
    """The `Recorder` of a CUDA device."""
    graph = torch.cuda.CUDAGraph()
    # where capturing fails, torch leaves its own stream behind
    with torch.cuda.stream(torch.cuda.current_stream()):
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            output = forward()
    return graph.replay, output


class DecodeGraph:
    """One token of each row to logits. It goes by the weights where they lie when a step is recorded."""

    def __init__(self, model: LanguageModel, record: Recorder = cuda_graph):
        """Raises NotCovered."""
        check_stack(model)
        for module in model.modules():
            check_module(module)
        self._model, self._record = model, record
        self._step: _Step | None = None
        self._is_possible = True

    @classmethod
    def of(cls, model: LanguageModel) -> DecodeGraph | None:
        """None where the model, the device or the settings want the modules.

        It has not run on a device yet, so that only LLMCTL_KERNELS=cuda chooses it.
        """
        if model.device.type != "cuda" or native.chosen_kernels() != "cuda":
            return None
        try:
            return cls(model)
        except NotCovered:
            return None

    @property
    def is_recorded(self) -> bool:
        """Whether the next token of the same rows is replayed."""
        return self._step is not None and self._step.replay is not None

    def __deepcopy__(self, memo: dict) -> DecodeGraph:
        """The same for a cache's copy: it is the model's."""
        return self

    def takes(self, ids_BT: torch.Tensor) -> bool:
        """Whether these are what a step reads, and nobody asks for a gradient."""
        is_plain = not torch.is_grad_enabled() and not torch.is_autocast_enabled(ids_BT.device.type)
        return self._is_possible and is_plain and ids_BT.shape[1] == 1 and ids_BT.device == self._model.device

    def logits(self, ids_B1: torch.Tensor, cache: Cache) -> torch.Tensor:
        """[B, V] of what follows the ids, which continue what the cache holds."""
        end = cache.length + 1
        if end > cache.capacity:
            raise ValueError(f"the cache holds {cache.capacity} positions; {end} were asked of it")
        if self._step is None or not self._step.fits(cache):
            self._step = None  # what it recorded is freed before another takes as much
            self._step = _Step(self._model, cache)
        self._step.set(ids_B1, cache.length)
        logits_BV = self._run(self._step)
        cache.length = end
        return logits_BV

    def draw(self, *_: object, **__: object) -> None:
        """Nothing: on a device the sampler draws from the logits."""

    def _run(self, step: _Step) -> torch.Tensor:
        """The first token of a step goes through the modules, which also makes ready what cannot be made while recording; so a
        batch that changes with every token, as that of a search does, is not recorded."""
        if step.replay is None and step.has_run:
            try:
                step.replay, step.logits_BV = self._record(step.forward)
            except RuntimeError as error:
                reason = str(error).partition("\n")[0]
                log.info("decoding goes on module by module: it cannot be captured in a CUDA graph (%s)", reason)
                self._is_possible = False
        if step.replay is None:
            step.has_run = True
            return step.forward()
        step.replay()
        return step.logits_BV.clone()


class _Step:
    """A token of each row of one cache, as long as a row has no more than `reach`: whatever differs from token to token is read
    from tensors of its own."""

    def __init__(self, model: LanguageModel, cache: Cache):
        self._model, self._keys, self._starts_B = model, cache.layers[0].keys, cache.starts_B
        self._reach = FIRST_REACH
        while self._reach <= cache.length:
            self._reach *= 2
        self._reach = min(self._reach, cache.capacity)
        device = self._keys.device
        self._ids_B1 = torch.zeros(len(self._keys), 1, dtype=torch.int64, device=device)
        self._at_1 = torch.zeros(1, dtype=torch.int64, device=device)
        self._places = _Places([_Layer(entry, self._at_1, self._reach) for entry in cache.layers])
        # long enough from now on, and alive where a longer text makes others
        self._tables = [table.lookup(None, None, 0, self._reach, device) for table in model.rotaries]
        self.has_run = False
        self.replay: Callable[[], None] | None = None
        self.logits_BV: torch.Tensor | None = None

    def fits(self, cache: Cache) -> bool:
        """Whether the cache is still where it was, with its next token in reach."""
        is_same = cache.layers[0].keys is self._keys and cache.starts_B is self._starts_B
        return is_same and cache.length < self._reach

    def set(self, ids_B1: torch.Tensor, at: int) -> None:
        self._ids_B1.copy_(ids_B1)
        self._at_1.fill_(at)

    def forward(self) -> torch.Tensor:
        context = _Context(self._at_1, self._reach, self._starts_B, self._places)
        hidden_B1D = self._model.run(self._model.embed(self._ids_B1), context)
        return self._model.logits(hidden_B1D[:, -1])


class _Context(Context):
    """One token of each row, at a place that a tensor holds."""

    def __init__(self, at_1: torch.Tensor, reach: int, starts_B: torch.Tensor | None, places: _Places):
        super().__init__(1, at_1.device, starts_B=starts_B, cache=places)
        self._at_1, self._reach = at_1, reach

    @property
    def columns_T(self) -> torch.Tensor:
        return self._at_1

    @property
    def positions_BT(self) -> torch.Tensor:
        return self._at_1[None] if self.starts_B is None else (self._at_1 - self.starts_B)[:, None]

    @property
    def end(self) -> int:
        return self._reach

    @property
    def text_lengths_BT(self) -> None:
        return None

    def _new_visibility(self, causal: bool, window: int | None) -> Visibility:
        first_BT = None if self.starts_B is None else self.starts_B[:, None]
        if window is not None:
            recent_1T = (self._at_1 - window + 1).clamp(min=0)[None]
            first_BT = recent_1T if first_BT is None else torch.maximum(first_BT, recent_1T)
        return Visibility(False, 0, first_BT, self._at_1[None] + 1, self.starts_B)


class _Places:
    """A cache for a pass that is recorded: it has no length of its own."""

    memory = None

    def __init__(self, layers: list[_Layer]):
        self.layers, self.length = layers, 0


class _Layer:
    def __init__(self, entry: KeyValues, at_1: torch.Tensor, reach: int):
        self._entry, self._at_1, self._reach = entry, at_1, reach

    def append(self, at: int, k_BG1K: torch.Tensor, v_BG1K: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one entry where the tensor says, whatever the number."""
        return self._entry.put(self._at_1, k_BG1K, v_BG1K, self._reach)
