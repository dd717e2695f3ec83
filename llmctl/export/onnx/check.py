"""Whether an exported directory computes what its checkpoint does: in one go, padded, and continued from a cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnxruntime
import torch

from llmctl import agreement
from llmctl.errors import CheckFailed
from llmctl.export.onnx.settings import LOGITS, TOLERANCES, OnnxSettings
from llmctl.finetune import adapter
from llmctl.models import rope_scaling
from llmctl.models.config import ModelConfig
from llmctl.models.streaming import StreamedModel
from llmctl.run_onnx.adapters import Adapters
from llmctl.run_onnx.graph_session import session_options
from llmctl.run_onnx.opening import OnnxModel, open_model
from llmctl.tokenizer import Tokenizer

GREEDY = 64
"""Tokens of the text that both must agree on."""


@dataclass(frozen=True)
class Checked:
    """`largest_error` is that of a logit (of a base encoder: of a hidden state) over all ways to compute it; `equal` counts
    the tokens from the first on that both choose alike, of `greedy`."""

    agreement: agreement.Agreement | None
    largest_error: float
    equal: int
    greedy: int

    def as_dict(self) -> dict[str, float]:
        told = {} if self.agreement is None else self.agreement.as_dict()
        return {**told, "max_logit_error": self.largest_error, "greedy_equal": self.equal, "greedy_tokens": self.greedy}

    def __str__(self) -> str:
        told = "" if self.agreement is None else f"; {self.agreement}"
        text = f"; greedy text equal for {self.equal} of {self.greedy} tokens" if self.greedy else ""
        return f"largest error {self.largest_error:.2g} over lengths, batches and cached continuation{text}{told}"


def check(
    source: Path,
    exported: Path,
    provider: str,
    tokenizer: Tokenizer | None,
    settings: OnnxSettings,
    few_bits: bool,
    adapters: Adapters = (),
) -> Checked:
    """`few_bits`: the graph multiplies by such matrices; `adapters` stand beside both. Raises CheckFailed where they differ by more than `settings` allow."""

    def attach(model: torch.nn.Module) -> None:
        for path, weight in adapters:
            adapter.load(model, path, weight)

    before = StreamedModel(source, change=attach)
    after = open_model(exported, provider, options=_frugal(few_bits), adapters=adapters)
    probes = agreement.probe_ids(tokenizer, before.config.vocab_size)
    probes = probes[:, : longest(before.config)]
    compare = {"causal": _causal, "masked": _masked, "seq2seq": _seq2seq}[before.config.kind]
    with torch.no_grad():
        found = compare(before, after, probes)
    _require(found, settings, few_bits and settings.quantize is None)
    return found


def longest(spec: ModelConfig) -> int | None:
    """The length up to which angles are the same whether a text is read at once or token by token."""
    ropes = (getattr(block.mixer, "rope", None) for block in spec.blocks)
    limits = [
        rope.scaling["original_max_position_embeddings"] for rope in ropes if rope and rope_scaling.heeds_length(rope)
    ]
    return min([*limits, *([] if spec.max_positions is None else [spec.max_positions])], default=None)


def _require(found: Checked, settings: OnnxSettings, from_few_bits: bool) -> None:
    """`from_few_bits`: the checkpoint is quantized, and onnxruntime rounds what its matrices multiply."""
    exact = settings.precision == "float32" and not from_few_bits
    if exact and not (found.largest_error <= LOGITS and found.equal == found.greedy):
        raise CheckFailed(
            f"the graph does not compute what the model does: {found}",
            hint=f"nothing was written; in float32 logits may be off by {LOGITS:g}, and the text must be equal",
        )
    if found.agreement is not None:
        least = TOLERANCES["int8"] if from_few_bits and settings.tolerance is None else 0.0
        agreement.require(found.agreement, max(settings.kl_tolerance, least))


def _frugal(few_bits: bool) -> onnxruntime.SessionOptions:
    """Weights stay mapped as they lie in their file, and are not turned into a second form that is faster.

    Those in few bits are: without it they would all be made float32 at every step.
    """
    options = session_options()
    options.enable_cpu_mem_arena = False
    if not few_bits:
        options.add_session_config_entry("session.disable_prepacking", "1")
    return options


def _causal(before: StreamedModel, after: OnnxModel, ids_BT: torch.Tensor) -> Checked:
    mask_BT = _ragged(ids_BT)
    if before.config.classifier is not None:
        return _labels(before, after, ids_BT, mask_BT)
    expected_BTV = before.logits(ids_BT)
    found = agreement.measure(lambda _: expected_BTV, after, ids_BT)
    errors = [found.max_logit_error, _worst(after(ids_BT, mask_BT), expected_BTV, mask_BT)]
    lengths = mask_BT.sum(1).tolist()
    n_more = max(min(lengths) // 2, 1)
    # Rows of unequal lengths, and then the same number of tokens more for each
    starts = [length - n_more for length in lengths]
    if min(starts) > 0:
        prompts = [row[:start] for row, start in zip(ids_BT.tolist(), starts)]
        cache, inputs_BT = after.begin(prompts, prompts, n_more + 1)
        rows = torch.arange(len(ids_BT))
        for step in range(n_more + 1):
            places_B = torch.tensor(starts) + step
            errors.append(_largest(after.next_logits(inputs_BT, cache), expected_BTV[rows, places_B - 1]))
            inputs_BT = ids_BT[rows, places_B.clamp(max=ids_BT.shape[1] - 1)][:, None]
    # One row in pieces of several tokens
    pieces = ids_BT[:1].split(5, dim=1)
    first = [pieces[0][0].tolist()]
    cache, _ = after.begin(first, first, ids_BT.shape[1])
    for piece in pieces:
        logits_BV = after.next_logits(piece, cache)
        errors.append(_largest(logits_BV, expected_BTV[:1, cache.length - 1]))
    limit = longest(before.config)
    count = GREEDY if limit is None else min(GREEDY, limit - 2)
    prompt = ids_BT[:1, : 8 if limit is None else max(1, min(8, limit - count))]
    text = greedy(after, prompt[0].tolist(), prompt[0].tolist(), count)
    whole = torch.tensor([prompt[0].tolist() + text])
    chosen = before.logits(whole[:, :-1])[0, prompt.shape[1] - 1 :]
    return Checked(found, max(errors), _equal(chosen, text), len(text))


def _masked(before: StreamedModel, after: OnnxModel, ids_BT: torch.Tensor) -> Checked:
    mask_BT = _ragged(ids_BT)
    if before.config.classifier is not None:
        return _labels(before, after, ids_BT, mask_BT)
    pairs = [(before.hidden, after.hidden)]
    found = None
    if before.config.head is not None:
        pairs.append((lambda *given: before.head(before.hidden(*given)), after))
        found = agreement.measure(before.logits, after, ids_BT)
    errors = [_worst(ours(ids_BT, mask_BT), theirs(ids_BT, mask_BT), mask_BT) for theirs, ours in pairs]
    short = ids_BT[:1, :3]
    errors += [_largest(ours(short), theirs(short)) for theirs, ours in pairs]
    return Checked(found, max([*errors, found.max_logit_error if found else 0.0]), 0, 0)


def _labels(before: StreamedModel, after: OnnxModel, ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> Checked:
    errors = [_largest(after(ids_BT, mask), before.model(ids_BT, mask)) for mask in (torch.ones_like(mask_BT), mask_BT)]
    return Checked(None, max(errors), 0, 0)


def _seq2seq(before: StreamedModel, after: OnnxModel, ids_BT: torch.Tensor) -> Checked:
    mask_BT, spec = _ragged(ids_BT), before.config
    start = spec.decoder_start_id if spec.decoder_start_id is not None else 0
    limit = spec.max_positions
    count = GREEDY if limit is None else min(GREEDY, limit - 1)
    prompts = [row[:length] for row, length in zip(ids_BT.tolist(), mask_BT.sum(1).tolist())]
    cache, inputs_BT = after.begin(prompts, [[start]] * len(prompts), count)
    made, inputs = [], [inputs_BT]
    for _ in range(count):
        made.append(after.next_logits(inputs[-1], cache))
        inputs.append(made[-1].float().argmax(-1, keepdim=True))
    texts_BT = torch.cat(inputs[:-1], 1)
    expected_BTV = before.answers(ids_BT, mask_BT, texts_BT)
    found = agreement.measure(lambda _: expected_BTV, lambda _: torch.stack(made, 1), texts_BT)
    at_once = _largest(after(ids_BT, mask_BT, input_ids_BT=texts_BT), expected_BTV)
    equal = min(_equal(row, text) for row, text in zip(expected_BTV, torch.cat(inputs[1:], 1).tolist()))
    return Checked(found, max(at_once, found.max_logit_error), equal, count)


def greedy(model: OnnxModel, prompt: list[int], continued: list[int], count: int) -> list[int]:
    """The likeliest tokens, one after another."""
    cache, inputs_BT = model.begin([prompt], [continued], count)
    text: list[int] = []
    while len(text) < count:
        text.append(int(model.next_logits(inputs_BT, cache).float().argmax(-1)))
        inputs_BT = torch.tensor([text[-1:]])
    return text


def _equal(expected_TV: torch.Tensor, text: list[int]) -> int:
    """How many tokens from the first on are the likeliest; of two within rounding either is."""
    for place, token in enumerate(text):
        if expected_TV[place].max() - expected_TV[place, token] > LOGITS / 10:
            return place
    return len(text)


def _ragged(ids_BT: torch.Tensor) -> torch.Tensor:
    """A mask with which the rows have several lengths."""
    n_rows, length = ids_BT.shape
    lengths_B = torch.tensor([max(length - row * length // (n_rows + 1), 1) for row in range(n_rows)])
    return (torch.arange(length) < lengths_B[:, None]).long()


def _worst(found: torch.Tensor, expected: torch.Tensor, mask_BT: torch.Tensor) -> float:
    return _largest(found[mask_BT.bool()], expected[mask_BT.bool()])


def _largest(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float().cpu() - expected.float()).abs().max().nan_to_num(float("inf")))
