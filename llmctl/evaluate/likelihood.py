"""Log-likelihoods of continuations: each context is run once, whatever follows it, and what contexts share once for all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from llmctl.evaluate.batches import affordable, plan
from llmctl.evaluate.shared_prefix import SharedPrefix
from llmctl.models.cache import Cache
from llmctl.models.causal_lm import CausalLM
from llmctl.models.rope_scaling import heeds_length
from llmctl.ops.cross_entropy import cross_entropy_
from llmctl.ops.dispatch import cpu_library
from llmctl.ops.linear import MatmulPrecision, float32_products

T = TypeVar("T")
_LOGITS = 1 << 24  # so many at a time: 64 MiB in float32
_TOKENS = 4096  # of texts that are run whole, at a time


@dataclass(frozen=True)
class Fork:
    """Token ids: one context, and the continuations to score after it, each of at least one token."""

    context: Sequence[int]
    continuations: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Likelihood:
    """Natural log-probability of a continuation; `is_greedy` says whether each of its tokens was the likeliest, where that
    was asked."""

    logprob: float
    is_greedy: bool | None
    n_tokens: int


class LikelihoodScorer:
    """Scores forks in batches of at most `batch_size` sequences; what it gives does not depend on their number.

    `start_id` is what the decoder of an encoder-decoder reads first: there the encoder reads the context.
    """

    def __init__(
        self, model: CausalLM, start_id: int | None, batch_size: int = 32, matmul_precision: MatmulPrecision = "highest"
    ):
        self.model, self.batch_size, self._start_id = model, batch_size, start_id
        self._matmul_precision, self._asks_greedy = matmul_precision, True
        self._shared = SharedPrefix(model)
        ropes = (getattr(block.mixer, "rope", None) for block in model.config.blocks)
        # A graph that was exported gives logits of texts, and has no hidden states to ask for.
        self._reads_whole = not isinstance(model, torch.nn.Module) or any(
            rope is not None and heeds_length(rope) for rope in ropes
        )

    def score(self, forks: Sequence[Fork], asks_greedy: bool = True) -> Iterator[tuple[int, list[Likelihood]]]:
        """The number of each fork with the likelihoods of its continuations, as soon as they are there: in any order.

        To find the likeliest tokens is one more look at all logits, a quarter of the time of a small model with a large
        vocabulary: it is done where `asks_greedy`.
        """
        self._asks_greedy = asks_greedy
        if self._reads_whole:
            for number, fork in enumerate(forks):
                yield number, [self._do(self._run_whole, fork.context, ids) for ids in fork.continuations]
            return
        contexts = [fork.context for fork in forks]
        lengths = [len(fork.context) + max(map(len, fork.continuations)) for fork in forks]
        for batch in plan(contexts, self.batch_size, self._shared.is_possible, lengths):
            alone = [] if batch.shared else [number for number in batch.numbers if self._is_one_text(forks[number])]
            rest = [number for number in batch.numbers if number not in alone]
            for numbers in _together(alone, lengths):
                yield from zip(numbers, self._do(self._run_texts, [forks[number] for number in numbers]), strict=True)
            if rest:
                found = self._do(self._run, batch.shared, [forks[number] for number in rest])
                yield from zip(rest, found, strict=True)

    def _do(self, run: Callable[..., T], *args) -> T:
        with torch.inference_mode(), float32_products(self._matmul_precision):
            return run(*args)

    def _is_one_text(self, fork: Fork) -> bool:
        """Whether a fork is run without a cache: nothing else follows its context, in a model that only looks back."""
        return self._shared.is_possible and len(fork.continuations) == 1

    def _run_texts(self, forks: list[Fork]) -> list[list[Likelihood]]:
        """Contexts with their only continuations, each read in one go; padding stands behind, where no real token sees it."""
        inputs = [[*fork.context, *fork.continuations[0][:-1]] for fork in forks]
        longest = max(map(len, inputs))
        padded = [ids + [0] * (longest - len(ids)) for ids in inputs]
        hidden_BTD = self.model.hidden(torch.tensor(padded, device=self.model.device), **self._narrow_cache(padded))
        hidden_ND = torch.cat(
            [hidden_TD[len(fork.context) - 1 : len(ids)] for hidden_TD, fork, ids in zip(hidden_BTD, forks, inputs)]
        )
        targets = [fork.continuations[0] for fork in forks]
        return [
            [Likelihood(logprob, is_greedy, len(ids))]
            for (logprob, is_greedy), ids in zip(self._rated(hidden_ND, targets), targets, strict=True)
        ]

    def _run_whole(self, context: Sequence[int], continuation: Sequence[int]) -> Likelihood:
        """One text without a cache."""
        text = [[*context, *continuation[:-1]]]
        inputs_1T = torch.tensor(text, device=self.model.device)
        logits_NV = self.model(inputs_1T, **self._narrow_cache(text))[0, len(context) - 1 :].float()
        targets_N = torch.tensor(continuation, device=logits_NV.device)
        logprobs_N = _logprobs(logits_NV).gather(1, targets_N[:, None])[:, 0]
        is_greedy = bool((logits_NV.argmax(1) == targets_N).all()) if self._asks_greedy else None
        return Likelihood(float(logprobs_N.double().sum()), is_greedy, len(continuation))

    def _narrow_cache(self, rows: Sequence[Sequence[int]]) -> dict[str, Cache]:
        """For texts that are read in one go: what a cache narrower than the weights keeps of them is what they see."""
        if getattr(self.model, "cache_dtype", None) is None:
            return {}
        return {"cache": self.model.begin(rows, rows, 1)[0]}

    def _run(self, shared: Sequence[int], forks: list[Fork]) -> list[list[Likelihood]]:
        cache, logits_BV = self._read_contexts(shared, forks)
        pairs = [(row, ids) for row, fork in enumerate(forks) for ids in fork.continuations]
        rows = torch.tensor([row for row, _ in pairs], device=logits_BV.device)
        firsts = torch.tensor([ids[0] for _, ids in pairs], device=logits_BV.device)
        sums = _logprobs(logits_BV)[rows, firsts].double().tolist()
        greedy = (logits_BV.argmax(1)[rows] == firsts).tolist() if self._asks_greedy else [None] * len(pairs)
        longer = sorted((i for i, (_, ids) in enumerate(pairs) if len(ids) > 1), key=lambda i: -len(pairs[i][1]))
        while longer:
            count = affordable(len(pairs[longer[0]][1]), self.batch_size)
            chosen, longer = longer[:count], longer[count:]
            rest = self._rate_rest(cache, [pairs[i] for i in chosen])
            for i, (logprob, is_greedy) in zip(chosen, rest, strict=True):
                sums[i] += logprob
                greedy[i] = greedy[i] and is_greedy
        scored = iter(zip(sums, greedy, pairs, strict=True))
        return [
            [Likelihood(logprob, hit, len(ids)) for logprob, hit, (_, ids) in (next(scored) for _ in each)]
            for each in (fork.continuations for fork in forks)
        ]

    def _read_contexts(self, shared: Sequence[int], forks: list[Fork]) -> tuple[Cache, torch.Tensor]:
        """A cache that holds every context, right-aligned, and the logits at the end of each, float32 [B, V]."""
        contexts = [fork.context for fork in forks]
        longest = max(len(ids) for fork in forks for ids in fork.continuations)
        continued = [self.model.continued(ids, self._start_id) for ids in contexts]
        cache, inputs_BT = self._shared.begin(shared, contexts, continued, longest)
        return cache, self.model.next_logits(inputs_BT, cache).float()

    def _rate_rest(self, cache: Cache, pairs: list[tuple[int, Sequence[int]]]) -> list[tuple[float, bool]]:
        """Of the tokens behind the first one of each continuation: the sum of their log-probabilities, and all likeliest."""
        device, length = self.model.device, max(len(ids) for _, ids in pairs) - 1
        rows = torch.tensor([row for row, _ in pairs], device=device)
        # Padding stands behind, where no real token sees it.
        inputs_BT = torch.tensor([[*ids[:-1], *[0] * (length + 1 - len(ids))] for _, ids in pairs], device=device)
        hidden_BTD = self.model.hidden(inputs_BT, cache=cache.branch(rows))
        counts = [len(ids) - 1 for _, ids in pairs]
        is_real_BT = torch.arange(length, device=device) < torch.tensor(counts, device=device)[:, None]
        return self._rated(hidden_BTD[is_real_BT], [ids[1:] for _, ids in pairs])

    def _rated(self, hidden_ND: torch.Tensor, targets: Sequence[Sequence[int]]) -> list[tuple[float, bool]]:
        """Of each text the sum of its tokens' log-probabilities, and whether all are the likeliest; hidden states are in order."""
        targets_N = torch.tensor([token for ids in targets for token in ids], device=hidden_ND.device)
        step = max(1, _LOGITS // self.model.config.vocab_size)
        parts = [
            _rate(self.model.logits(hidden[None])[0], wanted, self._asks_greedy)
            for hidden, wanted in zip(hidden_ND.split(step), targets_N.split(step), strict=True)
        ]
        logprobs_N, hits_N = (torch.cat(each).cpu() for each in zip(*parts, strict=True))
        counts = [len(ids) for ids in targets]
        return [
            (float(logprobs.double().sum()), bool(hits.all()) if self._asks_greedy else None)
            for logprobs, hits in zip(logprobs_N.split(counts), hits_N.split(counts), strict=True)
        ]


def _together(numbers: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
    """Texts of so many tokens as stay in a processor's cache from one matrix product to the next."""
    taken: list[int] = []
    for number in numbers:
        if taken and (len(taken) + 1) * max(lengths[each] for each in (*taken, number)) > _TOKENS:
            yield taken
            taken = []
        taken.append(number)
    if taken:
        yield taken


def _rate(
    logits_NV: torch.Tensor, targets_N: torch.Tensor, asks_greedy: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 log-probabilities [N] of the targets, and whether each is the likeliest token (False where that is not asked);
    the logits may be overwritten."""
    hits_N = _hits(logits_NV, targets_N) if asks_greedy else torch.zeros_like(targets_N, dtype=torch.bool)
    if logits_NV.device.type == "cpu" and cpu_library() is not None:
        return -cross_entropy_(logits_NV, targets_N), hits_N
    return _logprobs(logits_NV.float()).gather(1, targets_N[:, None])[:, 0], hits_N


def _hits(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """Of equal logits the first is the likeliest. To find the largest alone is ten times as fast, and mostly enough."""
    hits_N = logits_NV.gather(1, targets_N[:, None])[:, 0] >= logits_NV.amax(1)
    hits_N[hits_N.clone()] = logits_NV[hits_N].argmax(1) == targets_N[hits_N]
    return hits_N


def _logprobs(logits_NV: torch.Tensor) -> torch.Tensor:
    """Softmax in torch works row by row; a sum over a dimension gives other last bits for other numbers of rows."""
    return logits_NV.log_softmax(-1)
