"""An exported encoder, with what fill-mask, embed and classify ask of a `models.masked_lm.MaskedLM`."""

from __future__ import annotations

import torch

from llmctl.errors import UserError
from llmctl.run_onnx.model import OnnxModule


class OnnxMaskedLM(OnnxModule):
    """Token ids to logits over what stands at each of them, or to the last layer's states."""

    def __call__(self, input_ids_BT: torch.Tensor, attention_mask_BT: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [B, T, V], or of a classifier [B, labels]."""
        spec = self.config.classifier
        shape = (*input_ids_BT.shape, self.config.vocab_size) if spec is None else (len(input_ids_BT), len(spec.labels))
        return self._run("logits", shape, input_ids_BT, attention_mask_BT)

    def logits_at(self, where_BT: torch.Tensor, input_ids_BT: torch.Tensor, attention_mask_BT: torch.Tensor):
        """[N, V] at the tokens where `where_BT` is true."""
        return self(input_ids_BT, attention_mask_BT)[where_BT]

    def hidden(
        self,
        input_ids_BT: torch.Tensor,
        attention_mask_BT: torch.Tensor | None = None,
        *,
        recorded_hidden: list | None = None,
    ) -> torch.Tensor:
        """The last layer's output, [B, T, D]."""
        if recorded_hidden is not None:
            raise UserError("an exported encoder gives the last layer only", hint="leave --layer out")
        return self._run(
            "last_hidden_state", (*input_ids_BT.shape, self.config.d_model), input_ids_BT, attention_mask_BT
        )

    def _run(self, output: str, shape, ids_BT: torch.Tensor, mask_BT: torch.Tensor | None) -> torch.Tensor:
        mask_BT = torch.ones_like(ids_BT) if mask_BT is None else mask_BT.long()
        result = self.graph.empty(output, *shape)
        given = {"input_ids": ids_BT, "attention_mask": mask_BT, "token_type_ids": torch.zeros_like(ids_BT)}
        self.graph.run(given, {output: result})
        return result
