"""Every method meets every objective and every kind of model: two steps of each, and a result that loads again."""

from __future__ import annotations

import json
import math

import pytest
import torch

transformers = pytest.importorskip("transformers")

from llmctl.errors import CalledWrongly, UserError  # noqa: E402
from llmctl.finetune.assembly import Assembly  # noqa: E402
from llmctl.finetune.settings import FinetuneSettings  # noqa: E402
from llmctl.finetune.task import finetuning  # noqa: E402
from llmctl.tokenizer import Tokenizer  # noqa: E402
from llmctl.train.events import Finished, Validated  # noqa: E402

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES = {
    "llama": lambda v: transformers.LlamaConfig(vocab_size=v, **SMALL, num_key_value_heads=2),
    "gpt2": lambda v: transformers.GPT2Config(vocab_size=v, n_embd=32, n_layer=2, n_head=4, n_positions=128),
    "mamba": lambda v: transformers.MambaConfig(
        vocab_size=v, hidden_size=32, num_hidden_layers=2, state_size=4, time_step_rank=8
    ),
    "bert": lambda v: transformers.BertConfig(vocab_size=v, **SMALL, max_position_embeddings=128),
    "t5": lambda v: transformers.T5Config(
        vocab_size=v, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    ),
}
AUTOS = {"bert": transformers.AutoModelForMaskedLM, "t5": transformers.AutoModelForSeq2SeqLM}
LABELLED = ("classify", "regress", "reward")
COMPARING = ("dpo", "orpo", "simpo", "kto")
OBJECTIVES = {
    **dict.fromkeys(("llama", "gpt2", "mamba"), ("sft", "causal", *COMPARING, *LABELLED)),
    "bert": ("mlm", "classify", "regress", "reward"),
    "t5": ("seq2seq",),
}
METHODS = {
    "full": {},
    "freeze": {"train_modules": "norm|layer_norm"},
    "feature": {},
    "lora": {"lora_rank": 4},
    "qlora": {"lora_rank": 4},
    "adapter": {"adapter_width": 4},
    "ia3": {},
    "prompt": {"virtual_tokens": 3},
    "prefix": {"virtual_tokens": 3},
}
ROWS = {
    "sft": lambda i: {"prompt": f"{i} + 1 = ", "completion": str(i + 1)},
    "seq2seq": lambda i: {"prompt": f"{i} + 1 = ", "completion": str(i + 1)},
    "causal": lambda i: {"text": f"the number {i} is a number"},
    "mlm": lambda i: {"text": f"the number {i} is a number"},
    "classify": lambda i: {"text": f"number {i}", "label": ["even", "odd"][i % 2]},
    "regress": lambda i: {"text": f"number {i}", "label": i / 2},
    "kto": lambda i: {"prompt": f"{i} is ", "completion": "good", "label": i % 3 > 0},
    **dict.fromkeys(
        ("dpo", "orpo", "simpo", "reward"), lambda i: {"prompt": f"{i} is ", "chosen": "good", "rejected": "bad"}
    ),
}
CASES = [(family, objective, method) for family in FAMILIES for objective in OBJECTIVES[family] for method in METHODS]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    found = {}

    def base(family):
        if family not in found:
            found[family] = tmp_path_factory.mktemp(family) / "base"
            torch.manual_seed(0)
            tokenizer = Tokenizer.bytes()
            if family == "bert":
                tokenizer = Tokenizer.train_bpe(["the number is a number"] * 3, 300, "encoder")
            auto = AUTOS.get(family, transformers.AutoModelForCausalLM)
            auto.from_config(FAMILIES[family](tokenizer.vocab_size)).save_pretrained(found[family])
            tokenizer.save(found[family])
        return found[family]

    return base


def why_not(family, objective, method):
    """What is said where there is no such combination."""
    if method == "feature" and objective in COMPARING:
        return CalledWrongly, "cannot compare"
    if family == "mamba" and method == "prefix":
        return UserError, "Mamba"
    if family == "mamba" and method == "ia3":
        return CalledWrongly, "k_proj"
    return None


def run(base, objective, method, directory, **changes):
    rows = directory / "rows.jsonl"
    rows.write_text("".join(json.dumps(ROWS[objective](i)) + "\n" for i in range(24)))
    how = {"steps": 2, "batch_size": 4, "seq_len": 48, "precision": "fp32", "validate_every": None, "log_every": 1}
    settings = FinetuneSettings(objective=objective, method=method, **{**METHODS[method], **how, **changes})
    with finetuning(settings, base, [str(rows)], directory / "out") as made:
        return list(made.run())


def check(bases, tmp_path, family, objective, method):
    refusal = why_not(family, objective, method)
    if refusal is not None:
        with pytest.raises(refusal[0], match=refusal[1]):
            run(bases(family), objective, method, tmp_path)
        return
    events = run(bases(family), objective, method, tmp_path)
    assert isinstance(events[-1], Finished)
    assert all(math.isfinite(event.loss) for event in events if isinstance(event, Validated))
    model = Assembly.find(tmp_path / "out").load()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


FEW = [case for number, case in enumerate(CASES) if number % 7 == 0]


@pytest.mark.parametrize("family,objective,method", FEW)
def test_some_combinations(bases, tmp_path, family, objective, method):
    check(bases, tmp_path, family, objective, method)


@pytest.mark.slow
@pytest.mark.parametrize("family,objective,method", [case for case in CASES if case not in FEW])
def test_all_others(bases, tmp_path, family, objective, method):
    check(bases, tmp_path, family, objective, method)


@pytest.mark.parametrize("family,objective", [("llama", "sft"), ("bert", "classify"), ("llama", "reward")])
def test_cached_features_train_the_head_as_if_the_backbone_ran_each_time(bases, tmp_path, family, objective):
    losses = {}
    for method, modules in (("feature", None), ("freeze", "lm_head|classifier")):
        (tmp_path / method).mkdir()
        how = {"steps": 4, "batch_size": 22, "learning_rate": 0.05, "train_modules": modules}
        events = run(bases(family), objective, method, tmp_path / method, **how)
        losses[method] = [event.loss for event in events if isinstance(event, Validated)]
    assert losses["feature"] == pytest.approx(losses["freeze"], rel=1e-2)
