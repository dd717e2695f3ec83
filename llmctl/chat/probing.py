"""What a person may ask of a conversation's tokens: how many there are, and how likely the model found them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from llmctl.chat.talk import Talk
from llmctl.errors import UserError


def token_counts(talk: Talk) -> Iterator[str]:
    """A line for each message, by what it adds to the prompt, and one for the whole."""
    engine, messages = talk.engine, talk.messages()
    for number, message in enumerate(messages, 1):
        n_own = len(engine.tokenizer.encode(message["content"], add_special_tokens=False))
        yield f"{number:>3} {message['role']:<9} {n_own:>6}"
    total = engine.count(messages, talk.schemas) if messages else 0
    of = f" of {engine.room}" if engine.room else ""
    yield f"context: {total}{of} tokens, with what the template adds"
    if messages:
        yield f"run so far: {engine.model.n_read} tokens; {engine.model.n_reused} did not have to be"


@torch.inference_mode()
def answer_logprobs(talk: Talk, n_top: int) -> list[tuple[int, float, list[tuple[int, float]]]]:
    """(token, log p, the likeliest tokens with theirs) of the last answer, by the model itself: natural logarithms."""
    conversation, engine = talk.conversation, talk.engine
    if talk.last is None or not talk.last.ids or conversation.messages[-1:][0]["content"] != talk.last.text:
        raise UserError("the last message is no answer that was drawn here", hint="/retry draws one")
    prompt_ids = engine.prompt.ids(engine.prompt.text(talk.messages()[:-1], talk.schemas))
    ids, model = [*prompt_ids, *talk.last.ids], engine.session.model
    inputs_BT, first = torch.tensor([ids[:-1]], device=model.device), len(prompt_ids) - 1
    if isinstance(model, torch.nn.Module):  # logits of a long prompt would take more memory than the model
        logits_BTV = model.logits(model.hidden(inputs_BT)[:, first:])
    else:
        logits_BTV = model(inputs_BT)[:, first:]
    logprobs_NV = logits_BTV[0].float().log_softmax(-1)
    top = logprobs_NV.topk(min(n_top, logprobs_NV.shape[1])) if n_top else None
    found = []
    for place, token in enumerate(talk.last.ids):
        best = list(zip(top.indices[place].tolist(), top.values[place].tolist())) if top else []
        found.append((token, logprobs_NV[place, token].item(), best))
    return found


def logprob_lines(talk: Talk, n_top: int) -> Iterator[str]:
    def shown(token: int) -> str:
        return repr(talk.engine.tokenizer.token_bytes(token).decode("utf-8", "replace"))

    total = 0.0
    rows = answer_logprobs(talk, n_top)
    for token, logprob, top in rows:
        total += logprob
        others = "  ".join(f"{shown(other)} {value:.2f}" for other, value in top)
        yield f"{logprob:>8.3f}  {shown(token):<14} {others}"
    yield f"{total:>8.3f}  of {len(rows)} tokens, {total / len(rows):.3f} each"
