"""What a model is taught in pretraining: how its rows are made of tokens, and the loss on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

from torch import nn

from llmctl.data import span_corruption
from llmctl.data.corpus import TokenView
from llmctl.data.corruption_settings import CorruptionSettings
from llmctl.data.masking import MaskedRows, Masking
from llmctl.data.masking_settings import MaskingSettings
from llmctl.data.packing import PackedRows
from llmctl.data.pairs import CorruptedRows
from llmctl.errors import CalledWrongly, UserError
from llmctl.models.config import ModelConfig
from llmctl.pretrain.settings import PretrainSettings
from llmctl.tokenizer import Tokenizer
from llmctl.train.feed import Rows
from llmctl.train.objectives import MaskedToken, NextToken, TargetToken


@dataclass(frozen=True)
class Objective:
    """`rows` makes the rows of one split; `loss` is a module of `train.objectives`; `settings` are the flags of its own."""

    name: str
    model: str
    rows: Callable[[TokenView, int, Tokenizer, PretrainSettings, ModelConfig], Rows]
    loss: type[nn.Module]
    settings: type | None = None


def _packed(
    view: TokenView, seq_len: int, tokenizer: Tokenizer, settings: PretrainSettings, config: ModelConfig
) -> Rows:
    return PackedRows(view, seq_len, tokenizer, **_common(settings))


def _masked(
    view: TokenView, seq_len: int, tokenizer: Tokenizer, settings: PretrainSettings, config: ModelConfig
) -> Rows:
    return MaskedRows(view, seq_len, tokenizer, masking=Masking(tokenizer, settings), **_common(settings))


def _corrupted(
    view: TokenView, seq_len: int, tokenizer: Tokenizer, settings: PretrainSettings, config: ModelConfig
) -> Rows:
    if config.decoder_start_id is None:
        raise UserError(
            f"the config of this {config.family} does not say with which token its decoder begins",
            hint='give "decoder_start_token_id", or a tokenizer with the usual special tokens',
        )
    corruption = span_corruption.build(settings, tokenizer, seq_len)
    how = {"corruption": corruption, "start_id": config.decoder_start_id, **_common(settings)}
    return CorruptedRows(view, seq_len, tokenizer, **how)


def _common(settings: PretrainSettings) -> dict:
    return {"seed": settings.seed, "isolate_documents": settings.isolate_documents}


_BY_KIND = {
    "causal": Objective("causal", "a decoder", _packed, NextToken),
    "masked": Objective("mlm", "an encoder", _masked, MaskedToken, MaskingSettings),
    "seq2seq": Objective("seq2seq", "an encoder-decoder", _corrupted, TargetToken, CorruptionSettings),
}


def choose(settings: PretrainSettings, config: ModelConfig) -> Objective:
    """The objective of a model. Raises CalledWrongly where another was asked for, or a flag belongs to another."""
    own = _BY_KIND[config.kind]
    if settings.objective not in ("auto", own.name):
        raise CalledWrongly(
            f"--objective {settings.objective}: {config.family} is {own.model}", hint=f"its objective is {own.name}"
        )
    for other in _BY_KIND.values():
        for field in fields(other.settings) if other.settings and other is not own else ():
            if getattr(settings, field.name) != field.default:
                flag = "--" + field.name.replace("_", "-")
                raise CalledWrongly(f"{flag} belongs to --objective {other.name}; {config.family} is {own.model}")
    return own
