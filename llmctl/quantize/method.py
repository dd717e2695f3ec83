"""What GPTQ and AWQ have in common: a whole checkpoint, rounded layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from llmctl.quantize.matrices import Matrix
from llmctl.quantize.scheme import Scheme
from llmctl.quantize.settings import QuantizeSettings
from llmctl.quantize.spool import Spool


class Method:
    """`schemes` say by the file's modules what becomes of the `matrices`; `dtype` is the checkpoint's."""

    def __init__(
        self,
        path: Path,
        matrices: list[Matrix],
        schemes: Mapping[str, Scheme],
        dtype: torch.dtype,
        settings: QuantizeSettings,
    ):
        self._path, self._matrices, self._schemes, self._dtype = path, matrices, schemes, dtype
        self._settings = settings
        self._scheme_of = {ours: schemes[matrix.theirs] for matrix in matrices for ours in matrix.ours}

    def run(self, ids_BT: torch.Tensor, spool: Spool, progress) -> dict[str, torch.Tensor]:
        """Spool every matrix; tensors that had to change beside them, by their names in the file."""
        raise NotImplementedError
