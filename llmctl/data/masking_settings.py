"""How tokens are hidden for masked-language modelling. No torch or numpy here."""

from __future__ import annotations

from dataclasses import dataclass, field

GROUP = "Masked-language modelling"


def _share(default: float, help: str):
    return field(default=default, metadata={"help": help, "group": GROUP, "at_least": 0, "at_most": 1})


@dataclass(frozen=True)
class MaskingSettings:
    """BERT's recipe (arXiv:1810.04805, 3.1) by default."""

    mask_probability: float = _share(0.15, "Share of the tokens that are to be predicted.")
    mask_token_share: float = _share(0.8, "Of these, how many are replaced by the mask token,")
    random_token_share: float = _share(0.1, "and how many by any other token; the rest stay as they are.")
    whole_words: bool = field(
        default=False, metadata={"help": "Choose words, and predict all tokens of each.", "group": GROUP}
    )
