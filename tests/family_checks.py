"""What every model family must pass: a random checkpoint that transformers wrote, ours and theirs on the same inputs.

A test module names its configs and calls these checks; each takes a `Reference`. The inputs of a model are a dictionary
with transformers' names; how our class takes them is `call`, which a kind of model whose arguments differ replaces.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from llmctl.generation.complete import complete, prepare  # noqa: E402
from llmctl.generation.settings import Sampling, resolve  # noqa: E402
from llmctl.models.cache import Cache  # noqa: E402
from llmctl.models.config import parameter_count  # noqa: E402
from llmctl.models.loading import load_model, save_model  # noqa: E402

FLOAT32_LOGITS = 1e-4
GRADIENT = 1e-3
BFLOAT16_SHARE = 1.5
"""Ours may be so many times as far from float32 as transformers' bfloat16 is; rounding at other places moves it a little."""

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


@dataclass
class Reference:
    """A model of transformers and the directory that it was saved in (`path / "theirs"`)."""

    model: Any
    path: Path

    @property
    def directory(self) -> Path:
        return self.path / "theirs"

    @property
    def vocab_size(self) -> int:
        return self.model.config.vocab_size

    def ours(self, dtype: torch.dtype | None = None):
        return load_model(self.directory, dtype)


def reference(config, path: Path, auto=transformers.AutoModelForCausalLM, spread: float = 0.15) -> Reference:
    """Random weights for a config: norms and biases too, so that none of them can be forgotten unnoticed."""
    torch.manual_seed(0)
    model = auto.from_config(config, attn_implementation="eager", experts_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter) * spread
            is_gain = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(1 + noise if is_gain else noise)
    if model.can_generate():
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
    model.save_pretrained(path / "theirs")
    return Reference(model, path)


def token_ids(vocab_size: int, batch: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def call_plain(model, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of a model whose forward takes token ids and a mask."""
    return model(inputs["input_ids"], inputs.get("attention_mask"))


Call = Callable[[Any, dict[str, torch.Tensor]], torch.Tensor]


def check_logits(reference: Reference, inputs: dict[str, torch.Tensor], call: Call = call_plain) -> None:
    """float32 logits at the real positions."""
    with torch.no_grad():
        difference = call(reference.ours(), inputs) - reference.model(**inputs).logits
    assert _real(difference, inputs).abs().max() < FLOAT32_LOGITS


def check_half_precision(
    reference: Reference, inputs: dict[str, torch.Tensor], dtype: torch.dtype, call: Call = call_plain
) -> None:
    """In `dtype` ours is as near to float32 (of the same rounded weights) as transformers' own is.

    By the median: where two experts are nearly as likely, rounding chooses, and that token's logits say nothing.
    """
    theirs_half = copy.deepcopy(reference.model).to(dtype)
    directory = reference.path / str(dtype)
    theirs_half.save_pretrained(directory)
    ours = load_model(directory)
    assert ours.embed_tokens.weight.dtype == dtype
    with torch.no_grad():
        exact = copy.deepcopy(theirs_half).float()(**inputs).logits
        their_error = _real(theirs_half(**inputs).logits.float() - exact, inputs)
        our_error = _real(call(ours, inputs).float() - exact, inputs)
    assert our_error.abs().median() < BFLOAT16_SHARE * their_error.abs().median()


def check_gradient(
    reference: Reference,
    inputs: dict[str, torch.Tensor],
    labels: torch.Tensor,
    our_loss: Callable[[Any], torch.Tensor],
) -> None:
    """Of every parameter, after one backward pass; `our_loss` maps our model, in training mode, to transformers' loss.

    Theirs stays in eval mode, which drops nothing out.
    """
    ours = reference.ours().train()
    their_loss = reference.model(**inputs, labels=labels).loss
    loss = our_loss(ours)
    assert abs(loss.item() - their_loss.item()) < 1e-4
    their_loss.backward()
    loss.backward()
    our_gradients = {name: _gradient(parameter) for name, parameter in ours.named_parameters()}
    compare_tensors(our_gradients, _their_gradients(reference), GRADIENT)


def check_save_is_identity(reference: Reference, inputs: dict[str, torch.Tensor], call: Call = call_plain) -> None:
    """load -> save -> load keeps every bit, and transformers loads what we saved: no key missing or over, same logits."""
    ours = reference.ours()
    assert parameter_count(ours.config) == sum(p.numel() for p in ours.parameters())
    directory = reference.path / "ours"
    directory.mkdir()
    save_model(ours, directory)
    again = load_model(directory)
    assert again.config == ours.config
    for (name, tensor), (other, expected) in zip(again.state_dict().items(), ours.state_dict().items(), strict=True):
        assert name == other and torch.equal(tensor, expected), name
    theirs = reference.model
    back, info = type(theirs).from_pretrained(directory, output_loading_info=True, attn_implementation="eager")
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    for (name, tensor), (other, expected) in zip(back.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert name == other and torch.equal(tensor, expected), name
    theirs.eval()
    with torch.no_grad():
        difference = back.eval()(**inputs).logits - theirs(**inputs).logits
    assert _real(difference, inputs).abs().max() < 1e-5


def check_cache(reference: Reference, length: int = 30) -> None:
    """A text read in pieces, of one token and of several, gives the logits of the text read whole."""
    model = reference.ours()
    ids = token_ids(reference.vocab_size, 2, length)
    cache = Cache(model.config, batch_size=2, capacity=length)
    cuts = [0, 7, 8, 20, 21, length]
    with torch.no_grad():
        whole = model(ids)
        pieces = [model(ids[:, a:b], cache=cache) for a, b in zip(cuts, cuts[1:])]
    assert (torch.cat(pieces, 1) - whole).abs().max() < FLOAT32_LOGITS


def check_left_padding(reference: Reference, length: int = 12, padding: int = 5) -> None:
    """Padding in front of a text changes nothing."""
    model = reference.ours()
    ids = token_ids(reference.vocab_size, 1, length)
    padded = torch.cat([torch.zeros(1, padding, dtype=torch.long), ids], 1)
    mask = (torch.arange(length + padding) >= padding).long()[None]
    with torch.no_grad():
        assert (model(padded, mask)[:, padding:] - model(ids)).abs().max() < FLOAT32_LOGITS


def check_packing(reference: Reference) -> None:
    """Documents packed into a row give the logits of each alone."""
    model = reference.ours()
    ids = token_ids(reference.vocab_size, 1, 30)
    documents = torch.tensor([[0] * 11 + [1] * 1 + [2] * 18])
    with torch.no_grad():
        packed = model(ids, documents_BT=documents)
        alone = torch.cat([model(part) for part in ids.split([11, 1, 18], dim=1)], 1)
    assert (packed - alone).abs().max() < FLOAT32_LOGITS


def check_greedy(reference: Reference, prompts: list[list[int]], new_tokens: int) -> None:
    """Token for token what transformers generates: each prompt alone, and all in one batch padded on the left."""
    expected = [_their_greedy(reference.model, [prompt], new_tokens)[0] for prompt in prompts]
    assert our_greedy(reference.ours(), prompts, new_tokens, batch_size=1) == expected
    assert our_greedy(reference.ours(), prompts, new_tokens, batch_size=len(prompts)) == expected


def our_greedy(model, prompts: list[list[int]], new_tokens: int, batch_size: int) -> list[list[int]]:
    """Without an end-of-text token; a context may end a text before `new_tokens`."""
    sampling = resolve(Sampling(max_new_tokens=new_tokens, temperature=0.0, seed=0))
    return [c.ids for c in complete(model, [prepare(model, ids, sampling) for ids in prompts], batch_size)]


def compare_tensors(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float) -> None:
    """The same names, and each tensor within `tolerance` of the other, relative to its norm."""
    assert ours.keys() == theirs.keys()
    scale = max(tensor.norm() for tensor in theirs.values())
    for name, expected in theirs.items():
        # A gradient that is zero but for rounding (of a key's bias: softmax does not see it) has no relative error.
        error = (ours[name] - expected).norm() / max(expected.norm(), 1e-4 * scale)
        assert error < tolerance, f"{name}: {error:.1e}"


def _their_greedy(model, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    model.eval()
    ids = model.generate(torch.tensor(prompts), do_sample=False, max_new_tokens=new_tokens)
    return ids[:, len(prompts[0]) :].tolist()


def _their_gradients(reference: Reference) -> dict[str, torch.Tensor]:
    """Under our names: saved and loaded in place of the weights."""
    holder = copy.deepcopy(reference.model)
    with torch.no_grad():
        for theirs, place in zip(reference.model.parameters(), holder.parameters(), strict=True):
            place.copy_(_gradient(theirs))
    holder.save_pretrained(reference.path / "gradient")
    return dict(load_model(reference.path / "gradient").named_parameters())


def _gradient(parameter: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _real(values_BTV: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Those at tokens that are no padding, of the side that the logits belong to."""
    mask = inputs.get("decoder_attention_mask" if "decoder_input_ids" in inputs else "attention_mask")
    return values_BTV if mask is None else values_BTV[mask.bool()]
