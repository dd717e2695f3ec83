"""merge-lora against peft's merge_and_unload, as a command and as a library."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from test_adapters import BASES, IDS, randomize, theirs_of  # noqa: E402

from llmctl.checkpoint import open_tensors  # noqa: E402
from llmctl.errors import CalledWrongly, CheckFailed, UserError  # noqa: E402
from llmctl.finetune import adapter, methods  # noqa: E402
from llmctl.finetune.combining import combine  # noqa: E402
from llmctl.finetune.merge import MergeSettings, merge  # noqa: E402
from llmctl.models.loading import load_model  # noqa: E402


def make(tmp_path, family, kind, name="adapter", seed=0, **changes):
    """(base, adapter) directories as peft writes them."""
    torch.manual_seed(0)
    base = tmp_path / "base"
    if not base.exists():
        transformers.AutoModelForCausalLM.from_config(BASES[family](**changes)).save_pretrained(base)
    theirs = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), theirs_of(family)[kind])
    randomize(theirs, seed)
    theirs.save_pretrained(tmp_path / name)
    return base, tmp_path / name


def logits(path):
    with torch.no_grad():
        return load_model(path)(IDS)


@pytest.mark.parametrize("kind", ["lora", "all", "dora", "ia3", "saved", "embeddings"])
@pytest.mark.parametrize("family", BASES)
def test_equals_pefts_merge(tmp_path, family, kind):
    base, adapter = make(tmp_path, family, kind)
    merged = merge(base, [adapter], tmp_path / "ours", MergeSettings())
    assert merged.agreement.max_logit_error < 1e-4
    theirs = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    with torch.no_grad():
        expected = theirs(IDS).logits
        if (family, kind) != ("gpt2", "embeddings"):  # peft's merge changes the tied head too, and with it the model
            assert (theirs.merge_and_unload()(IDS).logits - expected).abs().max() < 1e-4
    assert (expected - logits(base)).abs().max() > 1e-2
    assert (logits(tmp_path / "ours") - expected).abs().max() < 1e-4
    back, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        assert (back(IDS).logits - expected).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["lora", "ia3"])
@pytest.mark.parametrize("family", BASES)
def test_unmerge_restores_the_base(tmp_path, family, kind):
    base, adapter = make(tmp_path, family, kind)
    merge(base, [adapter], tmp_path / "merged", MergeSettings())
    merge(tmp_path / "merged", [adapter], tmp_path / "again", MergeSettings(unmerge=True))
    before, after = open_tensors(base), open_tensors(tmp_path / "again")
    for name in before:
        torch.testing.assert_close(after.get(name), before.get(name), rtol=1e-5, atol=1e-6)


def test_a_replaced_base_cannot_be_restored(tmp_path):
    base, adapter = make(tmp_path, "llama", "dora")
    with pytest.raises(UserError, match="cannot be restored"):
        merge(base, [adapter], tmp_path / "again", MergeSettings(unmerge=True))


def test_several_adapters_add_up_by_weight(tmp_path):
    base, first = make(tmp_path, "llama", "lora", "first")
    _, second = make(tmp_path, "llama", "lora", "second", seed=9)
    merge(base, [first, second], tmp_path / "ours", MergeSettings(weights="0.7,-0.2"))
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model = peft.PeftModel.from_pretrained(model, first, adapter_name="first")
    model.load_adapter(second, adapter_name="second")
    # negative weights are ours alone: peft takes the square root of one
    one, two = (logits_of_scaled(base, path, weight) for path, weight in ((first, 0.7), (second, -0.2)))
    stored = open_tensors(base)
    ours = open_tensors(tmp_path / "ours")
    for name in stored:
        expected = stored.get(name) + (one[name] - stored.get(name)) + (two[name] - stored.get(name))
        torch.testing.assert_close(ours.get(name), expected, rtol=1e-4, atol=1e-5)


def logits_of_scaled(base, adapter, weight):
    """The tensors that peft gives when the adapter's scaling is multiplied by `weight`."""
    model = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), adapter)
    for module in model.modules():
        if hasattr(module, "scaling") and isinstance(module.scaling, dict):
            module.scaling["default"] *= weight
    return model.merge_and_unload().state_dict()


def test_ties_and_dare_do_what_their_papers_say():
    first = torch.tensor([3.0, -1.0, 0.1, 2.0])
    second = torch.tensor([1.0, 4.0, 0.2, -3.0])
    # trimmed to the larger half: [3, 0, 0, 2] and [0, 4, 0, -3]; the elected signs are +, +, none, -
    ties = combine("ties", "x", [first, second], [1.0, 1.0], density=0.5)
    assert ties.tolist() == [3.0, 4.0, 0.0, -3.0]
    ones = torch.ones(200_000)
    dare = combine("dare", "x", [ones], [1.0], density=0.25)
    assert set(dare.unique().tolist()) == {0.0, 4.0} and abs(dare.mean() - 1.0) < 0.02
    low = torch.randn(30, 3) @ torch.randn(3, 20)
    torch.testing.assert_close(combine("svd", "x", [low], [1.0], rank=3), low, rtol=1e-3, atol=1e-4)


def test_a_base_in_bfloat16_stays_in_bfloat16(tmp_path):
    base, adapter = make(tmp_path, "llama", "lora")
    model = transformers.AutoModelForCausalLM.from_pretrained(base).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    merged = merge(tmp_path / "half", [adapter], tmp_path / "ours", MergeSettings())
    assert {str(open_tensors(tmp_path / "ours").dtype(name)) for name in open_tensors(base)} == {"torch.bfloat16"}
    assert 0 < merged.agreement.max_logit_error < 0.5
    record = json.loads((tmp_path / "ours" / "llmctl.json").read_text())
    assert record["metrics"]["kl_divergence"] == merged.agreement.kl_divergence


def test_past_the_tolerance_nothing_is_left(tmp_path):
    base, adapter = make(tmp_path, "llama", "lora")
    model = transformers.AutoModelForCausalLM.from_pretrained(base).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    with pytest.raises(CheckFailed):
        merge(tmp_path / "half", [adapter], tmp_path / "ours", MergeSettings(tolerance=1e-12))
    assert not (tmp_path / "ours").exists()


def test_what_does_not_fit_is_refused(tmp_path):
    base, adapter = make(tmp_path, "llama", "lora")
    with pytest.raises(CalledWrongly, match="2 --weights for 1"):
        merge(base, [adapter], tmp_path / "ours", MergeSettings(weights="1,2"))
    config = BASES["llama"]()
    config.update({"hidden_size": 64})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "wider")
    with pytest.raises(UserError, match=r"the base has \[48, 64\]"):
        merge(tmp_path / "wider", [adapter], tmp_path / "ours", MergeSettings())
    other, _ = make(tmp_path / "other", "gpt2", "lora")
    with pytest.raises(UserError, match="does not have"):
        merge(other, [adapter], tmp_path / "ours", MergeSettings())
    assert not (tmp_path / "ours").exists()


def test_the_command(tmp_path):
    base, adapter = make(tmp_path, "llama", "lora")
    command = [sys.executable, "-m", "llmctl", "merge-lora", str(base), "-", "-o", str(tmp_path / "ours")]
    done = subprocess.run(command, input=f"{adapter}\n", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'ours'}\n" and "KL divergence" in done.stderr
    again = subprocess.run(command, input=f"{adapter}\n", capture_output=True, text=True)
    assert again.returncode == 2 and "--overwrite" in again.stderr


SMALL = {"d_model": 32, "num_layers": 2, "num_heads": 4, "d_ff": 64, "vocab_size": 96, "d_kv": 8}
SEQ2SEQ = {
    "t5": lambda: transformers.T5Config(**SMALL, decoder_start_token_id=0),
    "bart": lambda: transformers.BartConfig(
        vocab_size=96, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64,
        pad_token_id=1, bos_token_id=0, eos_token_id=2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", SEQ2SEQ)
@pytest.mark.parametrize("method", ["linear", "svd"])
def test_encoder_decoders_equal_pefts_merge(tmp_path, family, method):
    torch.manual_seed(0)
    base = tmp_path / "base"
    transformers.AutoModelForSeq2SeqLM.from_config(SEQ2SEQ[family]()).save_pretrained(base)
    targets = ["q", "v"] if family == "t5" else ["q_proj", "v_proj"]
    config = peft.LoraConfig(r=4, target_modules=targets, task_type="SEQ_2_SEQ_LM")
    theirs = peft.get_peft_model(transformers.AutoModelForSeq2SeqLM.from_pretrained(base), config)
    randomize(theirs, 0)
    theirs.save_pretrained(tmp_path / "adapter")
    settings = MergeSettings(method=method)  # of rank 16, which the change does not exceed
    merged = merge(base, [tmp_path / "adapter"], tmp_path / "ours", settings)
    assert merged.agreement.max_logit_error < 1e-4 and merged.agreement.perplexity_before > 1
    back = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "ours").eval()
    how = {"input_ids": IDS % 96, "decoder_input_ids": IDS[:, :7] % 96}
    with torch.no_grad():
        expected = theirs.eval()(**how).logits
        plain = transformers.AutoModelForSeq2SeqLM.from_pretrained(base).eval()(**how).logits
        assert (plain - expected).abs().max() > 1e-2
        assert (back(**how).logits - expected).abs().max() < 1e-4


@pytest.mark.parametrize(("family", "has_head"), [("llama", True), ("llama", False), ("bert", True)])
def test_classifiers_equal_pefts_merge(tmp_path, family, has_head):
    """An adapter of a classifier brings the head, to a base with one or to a language model."""
    torch.manual_seed(0)
    base = tmp_path / "base"
    if family == "llama":
        shape = BASES["llama"](pad_token_id=0, num_labels=3)
        plain = transformers.AutoModelForCausalLM
    else:
        shape = transformers.BertConfig(
            vocab_size=96,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            num_labels=3,
        )
        plain = transformers.AutoModelForMaskedLM
    kind = transformers.AutoModelForSequenceClassification
    (kind if has_head else plain).from_config(shape).save_pretrained(base)
    theirs = kind.from_pretrained(base, num_labels=3)
    targets = ["q_proj", "v_proj"] if family == "llama" else ["query", "value"]
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=4, target_modules=targets, task_type="SEQ_CLS"))
    randomize(theirs, 0)
    theirs.save_pretrained(tmp_path / "adapter")
    merged = merge(base, [tmp_path / "adapter"], tmp_path / "ours", MergeSettings())
    assert merged.agreement.max_logit_error < 1e-4
    back, info = kind.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and back.config.num_labels == 3
    with torch.no_grad():
        expected = theirs.eval()(IDS % 90 + 2).logits
        assert (back.eval()(IDS % 90 + 2).logits - expected).abs().max() < 1e-4
        ours = load_model(tmp_path / "ours")(IDS % 90 + 2)
        assert (ours - expected).abs().max() < 1e-4 and ours.std() > 1e-3


@pytest.mark.parametrize("whose", ["ours", "theirs"])
def test_an_embedding_that_is_the_head_too(tmp_path, whose):
    """Where we train it whole the head learns with it; peft's head stays what it was. Both say so in the file."""
    torch.manual_seed(0)
    base, adapter_ = tmp_path / "base", tmp_path / "adapter"
    config = BASES["llama"](tie_word_embeddings=True)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(base)
    plain = transformers.AutoModelForCausalLM.from_pretrained(base)
    if whose == "ours":
        method = methods.Lora(rank=4, targets=("q_proj",), modules_to_save=("embed_tokens",))
        model = load_model(base, torch.float32)
        adapter.attach(model, method)
        randomize(model)
        adapter_.mkdir()
        adapter.save(model.eval(), method, adapter_, str(base))
        expected = model(IDS).detach()
        theirs = peft.PeftModel.from_pretrained(plain, adapter_).eval()
        with torch.no_grad():
            assert (theirs(IDS).logits - expected).abs().max() < 1e-4
    else:
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
        theirs = peft.get_peft_model(plain, config).eval()
        randomize(theirs)
        theirs.save_pretrained(adapter_)
        expected = theirs(IDS).logits.detach()
    again = load_model(base, torch.float32)
    adapter.load(again, adapter_)
    merged = merge(base, [adapter_], tmp_path / "merged", MergeSettings())
    with torch.no_grad():
        assert (again(IDS) - expected).abs().max() < 1e-4
        assert (logits(tmp_path / "merged") - expected).abs().max() < 1e-4
        assert (logits(base) - expected).abs().max() > 1e-2
    assert merged.agreement.max_logit_error < 1e-4
    is_tied = json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"]
    assert is_tied == (whose == "ours")
