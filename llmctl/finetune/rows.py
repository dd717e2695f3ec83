"""The rows that each objective trains on, from prepared examples."""

from __future__ import annotations

from llmctl.data.masking import Masking
from llmctl.errors import UserError
from llmctl.finetune.data.batches import PackedExamples, PaddedExamples, Split
from llmctl.finetune.data.store import ExampleSet
from llmctl.finetune.planning import FinetunePlan
from llmctl.finetune.settings import SOFT, FinetuneSettings
from llmctl.models.config import ModelConfig


def rows_of(
    examples: ExampleSet, split: Split, plan: FinetunePlan, settings: FinetuneSettings, config: ModelConfig
) -> PackedExamples | PaddedExamples:
    """Packed where texts may share a row; behind virtual tokens, which stand once in front of it, each has its own."""
    objective, tokenizer = examples.objective, examples.tokenizer
    is_alone = settings.method in SOFT
    if objective == "mlm":
        masking = Masking(tokenizer, settings)
        return PackedExamples(examples, split, plan.seq_len, seed=settings.seed, masking=masking, one_per_row=is_alone)
    if objective in ("sft", "causal") and not is_alone:
        return PackedExamples(examples, split, plan.seq_len, seed=settings.seed)
    if objective == "seq2seq" and config.decoder_start_id is None:
        raise UserError(
            "the checkpoint does not say with which token its decoder begins",
            hint='give "decoder_start_token_id" in its config.json',
        )
    n_examples = len(examples.val if split == "val" else examples) - len(examples.val) * (split == "train")
    return PaddedExamples(
        examples,
        split,
        min(plan.batch_size, max(1, n_examples)),
        seed=settings.seed,
        pad_id=tokenizer.pad_id or 0,
        decoder_start=config.decoder_start_id if objective == "seq2seq" else None,
    )
