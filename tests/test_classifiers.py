"""Sequence classifiers of every family against transformers' AutoModelForSequenceClassification."""

from __future__ import annotations

import json

import pytest
import torch

transformers = pytest.importorskip("transformers")

import family_checks as checks  # noqa: E402

from llmctl.errors import UserError  # noqa: E402
from llmctl.inspection import inspect  # noqa: E402
from llmctl.models.config import Classifier, parameter_count  # noqa: E402
from llmctl.models.loading import load_model, read_config, save_model, usual_classifier  # noqa: E402

V, CONTEXT, PAD = 97, 40, 3
SHAPE = dict(vocab_size=V, hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4)
DECODER = dict(**SHAPE, num_key_value_heads=2, max_position_embeddings=CONTEXT, pad_token_id=PAD)
ENCODER = dict(**SHAPE, max_position_embeddings=CONTEXT + PAD + 1, pad_token_id=PAD)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=20)
BART_SIDE = dict(layers=2, ffn_dim=44, attention_heads=4)
ENDS = dict(eos_token_id=2, pad_token_id=PAD, decoder_start_token_id=1)
T5 = dict(vocab_size=V, d_model=32, d_kv=8, d_ff=44, num_layers=2, num_heads=4, **ENDS)
SIDES = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in BART_SIDE.items()}
BART = dict(vocab_size=V, d_model=32, max_position_embeddings=CONTEXT, **SIDES, **ENDS)
CONFIGS = {
    "llama": transformers.LlamaConfig(**DECODER),
    "llama-tied": transformers.LlamaConfig(**DECODER, tie_word_embeddings=True),
    "mistral": transformers.MistralConfig(**DECODER, sliding_window=6),
    "mixtral": transformers.MixtralConfig(**DECODER, num_local_experts=4),
    "qwen2": transformers.Qwen2Config(**DECODER),
    "qwen3": transformers.Qwen3Config(**DECODER, head_dim=10),
    "qwen3_moe": transformers.Qwen3MoeConfig(**DECODER, **EXPERTS),
    "gemma": transformers.GemmaConfig(**DECODER, head_dim=10),
    "gemma2": transformers.Gemma2Config(**DECODER, head_dim=10, sliding_window=6),
    "gemma3_text": transformers.Gemma3TextConfig(**DECODER, head_dim=10, sliding_window=6),
    "phi3": transformers.Phi3Config(**DECODER),
    "smollm3": transformers.SmolLM3Config(**DECODER),
    "gpt2": transformers.GPT2Config(
        vocab_size=V, n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=4, pad_token_id=PAD
    ),
    "bert": transformers.BertConfig(**ENCODER),
    "bert-untied": transformers.BertConfig(**ENCODER, tie_word_embeddings=False),
    "roberta": transformers.RobertaConfig(**ENCODER, type_vocab_size=1),
    "xlm-roberta": transformers.XLMRobertaConfig(**ENCODER),
    "camembert": transformers.CamembertConfig(**ENCODER),
    "esm": transformers.EsmConfig(**ENCODER, position_embedding_type="rotary", token_dropout=True, mask_token_id=96),
    "esm1b": transformers.EsmConfig(**ENCODER, emb_layer_norm_before=True),
    "longformer": transformers.LongformerConfig(**ENCODER, attention_window=8),
    "t5": transformers.T5Config(**T5),
    "t5-gated": transformers.T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "bart": transformers.BartConfig(**BART),
    "mbart": transformers.MBartConfig(**BART),
}
AUTO = transformers.AutoModelForSequenceClassification
NAMES = {0: "bad", 1: "so so", 2: "good"}


FIRST = ("llama", "gpt2", "bert", "esm", "t5", "bart")


@pytest.fixture(params=[name if name in FIRST else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS])
def theirs(request, tmp_path):
    """A random classifier that transformers saved."""
    config = type(CONFIGS[request.param])(**{**CONFIGS[request.param].to_dict(), "id2label": NAMES, "num_labels": 3})
    return checks.reference(config, tmp_path, AUTO)


def inputs() -> dict[str, torch.Tensor]:
    """The second of two texts is shorter; both end with the EOS token, at which encoder-decoders are read there."""
    ids = checks.token_ids(V, 2, 24).clamp(min=PAD + 1)
    mask = torch.ones_like(ids)
    ids[1, 15:], mask[1, 15:] = PAD, 0
    ids[0, 23] = ids[1, 14] = ENDS["eos_token_id"]
    return {"input_ids": ids, "attention_mask": mask}


def ours_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model(inputs()["input_ids"], inputs()["attention_mask"])


def theirs_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**inputs()).logits


def test_theirs_load_here(theirs):
    ours = theirs.ours()
    assert ours.config.classifier.labels == tuple(NAMES.values())
    assert parameter_count(ours.config) == sum(p.numel() for p in ours.parameters())
    assert (ours_of(ours) - theirs_of(theirs.model)).abs().max() < checks.FLOAT32_LOGITS


def test_ours_load_there(theirs):
    ours, directory = theirs.ours(), theirs.path / "ours"
    directory.mkdir()
    save_model(ours, directory)
    back, info = AUTO.from_pretrained(directory, output_loading_info=True, attn_implementation="eager")
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    assert type(back) is type(theirs.model) and back.config.id2label == NAMES and back.config.pad_token_id == PAD
    assert (theirs_of(back) - theirs_of(theirs.model)).abs().max() < 1e-5
    again = load_model(directory)
    assert again.config == ours.config and torch.equal(ours_of(again), ours_of(ours))


def test_padding_and_packing_change_nothing(theirs):
    model, ids = theirs.ours(), inputs()["input_ids"][:1]
    lengths = [7, 2, 15]
    packed = torch.tensor([[n for n, length in enumerate(lengths) for _ in range(length)]])
    padded = torch.cat([torch.full((1, 5), PAD), ids, torch.full((1, 3), PAD)], 1)
    mask = torch.tensor([[0] * 5 + [1] * 24 + [0] * 3])
    with torch.no_grad():
        alone = torch.cat([model(part) for part in ids.split(lengths, dim=1)])
        assert (model(ids, documents_BT=packed) - alone).abs().max() < 1e-5
        assert (model(padded, mask) - model(ids)).abs().max() < 1e-5


def test_a_language_model_gets_a_head(theirs, tmp_path):
    """The backbone is the language model's, the rest fresh, and transformers reads the same of what is saved."""
    lm = {"masked": "MaskedLM", "causal": "CausalLM", "seq2seq": "Seq2SeqLM"}[read_config(theirs.directory).kind]
    base = checks.reference(theirs.model.config, tmp_path / "lm", getattr(transformers, f"AutoModelFor{lm}"))
    config = read_config(base.directory)
    labels = {"labels": ("no", "yes"), "problem": "multi_label_classification", "pad_id": PAD}
    model = load_model(base.directory, classifier=Classifier(**{**vars(usual_classifier(config)), **labels}), seed=1)
    assert not ours_of(model).any()
    torch.nn.init.normal_(model.classifier.out.weight)
    (tmp_path / "saved").mkdir()
    save_model(model, tmp_path / "saved")
    back, info = AUTO.from_pretrained(tmp_path / "saved", output_loading_info=True, attn_implementation="eager")
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    assert back.config.problem_type == "multi_label_classification" and back.config.label2id == {"no": 0, "yes": 1}
    assert (ours_of(model) - theirs_of(back)).abs().max() < checks.FLOAT32_LOGITS


def test_inspect_names_the_head(tmp_path):
    config = transformers.LlamaConfig(**DECODER, id2label=NAMES, num_labels=3)
    reference = checks.reference(config, tmp_path, AUTO)
    record = next(inspect(reference.directory))
    assert record["head"] == "classifier, one of bad, so so, good (3)" and record["parameters_per_part"]["head"] == 96


def test_it_predicts_no_tokens(tmp_path):
    config = transformers.LlamaConfig(**DECODER)
    model = checks.reference(config, tmp_path, AUTO).ours()
    with pytest.raises(UserError, match="classifier") as caught:
        model.logits(torch.zeros(1, 1, 32))
    assert "llmctl classify" in caught.value.hint


def test_a_decoder_needs_a_beginning(tmp_path):
    config = transformers.T5Config(**{**T5, "decoder_start_token_id": None, "pad_token_id": None}).to_dict()
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["T5ForSequenceClassification"]}))
    with pytest.raises(UserError, match="with which token its decoder begins"):
        read_config(tmp_path)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_mean_of_all_tokens_is_that_of_real_ones(tmp_path, family):
    """Padded, packed and alone; and a config that says so is read again."""
    config = type(CONFIGS[family])(**{**CONFIGS[family].to_dict(), "id2label": NAMES, "num_labels": 3})
    checks.reference(config, tmp_path, AUTO)
    path = tmp_path / "theirs"
    hf = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**hf, "classifier_pooling": "mean"}))
    model = load_model(path)
    ids, mask = inputs()["input_ids"], inputs()["attention_mask"]
    with torch.no_grad():
        padded = model(ids, mask)
        alone = torch.cat([model(ids[:1]), model(ids[1:, :15])])
        documents = torch.tensor([[0] * 24 + [1] * 15])
        packed = model(torch.cat([ids[:1], ids[1:, :15]], 1), documents_BT=documents)
        hidden_TD = model.hidden(ids[1:, :15])[0]
        torch.testing.assert_close(model.features(ids[1:, :15])[0], hidden_TD.mean(0))
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-4)
    (tmp_path / "again").mkdir()  # the model's own file is mapped
    save_model(model, tmp_path / "again")
    assert read_config(tmp_path / "again").classifier.at == "mean"
