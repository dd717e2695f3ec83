"""Fresh weights."""

from __future__ import annotations

import torch
from torch import nn

from llmctl.models.config import ModelConfig
from llmctl.models.language_model import LanguageModel
from llmctl.models.loading import new_empty, reset_buffers
from llmctl.models.norm import OffsetRMSNorm


def new_model(config: ModelConfig, seed: int, device: torch.device | str = "cpu") -> LanguageModel:
    """A model with random weights, the same for the same seed on every device.

    Matrices are normal with variance 0.5 / fan-in, so that a layer keeps the size of its input at any width; the last matrix
    of each branch starts at zero, so that a block begins as the identity (arXiv:1901.09321); embeddings are normal with the
    config's `initializer_range`, norms one, biases zero. A module with parameters of another kind has an `initialize`.

    Where masked tokens are embedded as zero, the branches do not start at zero too: a norm of nothing has a gradient of
    1 / sqrt(eps).
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        model = new_empty(config)
    model.to_empty(device="cpu")
    reset_buffers(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _initialize(name, parameter, config, generator)
        for module in model.modules():
            if isinstance(module, OffsetRMSNorm):
                module.reset_parameters()
            elif hasattr(module, "initialize"):
                module.initialize(generator)
    return model.to(device)


def _initialize(name: str, parameter: nn.Parameter, config: ModelConfig, generator: torch.Generator) -> None:
    is_last = name.endswith(_LAST_OF_BRANCH) and config.token_dropout is None
    if parameter.dim() == 1:
        parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    elif is_last or name == "lm_head.weight":
        parameter.zero_()
    else:
        scale = config.initializer_range if name.startswith("embed") else (0.5 / parameter.shape[1]) ** 0.5
        parameter.normal_(0.0, scale, generator=generator)


_LAST_OF_BRANCH = ("o_proj.weight", "out_proj.weight", "down_proj.weight")
