"""BERT, RoBERTa, ESM and Longformer against transformers' on small random checkpoints."""

from __future__ import annotations

import shutil

import pytest
import torch

transformers = pytest.importorskip("transformers")

import family_checks as checks  # noqa: E402

from llmctl.checkpoint import open_tensors, save_tensors  # noqa: E402
from llmctl.errors import UserError  # noqa: E402
from llmctl.models.loading import load_model, save_model  # noqa: E402

SHAPE = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4)
ESM = dict(**SHAPE, pad_token_id=1, mask_token_id=96, max_position_embeddings=66)
CONFIGS = {
    "bert": transformers.BertConfig(**SHAPE, max_position_embeddings=64),
    "bert-untied-relu": transformers.BertConfig(
        **{**SHAPE, "num_attention_heads": 3}, hidden_act="relu", tie_word_embeddings=False, type_vocab_size=5
    ),
    "bert-gelu-new": transformers.BertConfig(**SHAPE, hidden_act="gelu_new", layer_norm_eps=1e-5),
    "roberta": transformers.RobertaConfig(**SHAPE, max_position_embeddings=66, type_vocab_size=1),
    "roberta-untied": transformers.RobertaConfig(**SHAPE, pad_token_id=3, tie_word_embeddings=False),
    "xlm-roberta": transformers.XLMRobertaConfig(**SHAPE, type_vocab_size=1),
    "esm2": transformers.EsmConfig(**ESM, position_embedding_type="rotary", token_dropout=True, layer_norm_eps=1e-5),
    "esm2-untied": transformers.EsmConfig(**ESM, position_embedding_type="rotary", tie_word_embeddings=False),
    "esm1b": transformers.EsmConfig(**ESM, token_dropout=True, emb_layer_norm_before=True),
    "longformer": transformers.LongformerConfig(
        **SHAPE, attention_window=[4, 8, 4], max_position_embeddings=66, type_vocab_size=1
    ),
    "longformer-wide": transformers.LongformerConfig(**SHAPE, attention_window=64, max_position_embeddings=66),
}


@pytest.fixture(params=list(CONFIGS))
def reference(request, tmp_path):
    return checks.reference(CONFIGS[request.param], tmp_path, transformers.AutoModelForMaskedLM)


def inputs(reference, padded: bool = True) -> dict[str, torch.Tensor]:
    """Some tokens masked, the second row shorter than the first."""
    ids = checks.token_ids(95, 2, 40).clamp(min=4)
    ids[:, 5:9] = 96
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 29:] = 0
        ids[1, 29:] = reference.model.config.pad_token_id
    return {"input_ids": ids, "attention_mask": mask}


def test_logits(reference):
    checks.check_logits(reference, inputs(reference))


def test_bfloat16_logits(reference):
    checks.check_half_precision(reference, inputs(reference), torch.bfloat16)


def test_gradient(reference):
    given = inputs(reference, padded=False)
    labels = torch.where(given["input_ids"] == 96, 7, -100)

    def loss(model):
        logits = model(given["input_ids"], given["attention_mask"])
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    checks.check_gradient(reference, given, labels, loss)


def test_save(reference):
    checks.check_save_is_identity(reference, inputs(reference))


def test_left_padding(reference):
    checks.check_left_padding(reference)


def test_packing(reference):
    checks.check_packing(reference)


def written(name: str, path, auto=transformers.AutoModelForMaskedLM):
    return checks.reference(CONFIGS[name], path, auto)


def test_token_types(tmp_path):
    reference = written("bert", tmp_path)
    ids, types = checks.token_ids(97, 2, 20), checks.token_ids(2, 2, 20, seed=2)
    with torch.no_grad():
        theirs = reference.model(ids, token_type_ids=types).logits
        assert (reference.ours()(ids, types_BT=types) - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("n_padding", [0, 11])
@pytest.mark.parametrize("name", ["longformer", "longformer-wide"])
def test_global_tokens(tmp_path, name, n_padding):
    """Of other numbers and at other places in each row: at the beginning, in the middle, next to each other."""
    reference, ids = written(name, tmp_path), checks.token_ids(97, 3, 41).clamp(min=2)
    mask, chosen = torch.ones_like(ids), torch.zeros_like(ids)
    mask[1, 41 - n_padding :] = 0
    ids[mask == 0] = 1
    chosen[:, 0] = 1
    chosen[1, 8:11] = chosen[2, 40] = 1
    with torch.no_grad():
        theirs = reference.model(ids, attention_mask=mask, global_attention_mask=chosen).logits
        ours = reference.ours()(ids, mask, global_BT=chosen)
    assert (ours - theirs)[mask.bool()].abs().max() < 1e-4


def test_gradient_reaches_the_projections_of_global_tokens(tmp_path):
    reference, ids = written("longformer", tmp_path), checks.token_ids(97, 2, 30).clamp(min=2)
    chosen = (torch.arange(30) % 13 == 0).long().expand(2, -1)
    inputs = {"input_ids": ids, "global_attention_mask": chosen}

    def loss(model):
        return torch.nn.functional.cross_entropy(model(ids, global_BT=chosen).flatten(0, 1), ids.flatten())

    checks.check_gradient(reference, inputs, ids, loss)
    assert reference.model.longformer.encoder.layer[0].attention.self.query_global.weight.grad.norm() > 0


def test_attention_maps_of_global_tokens(tmp_path):
    """Each row of a map sums to one, and no more is seen than the window and the global token."""
    model, maps = written("longformer", tmp_path).ours(), []
    chosen = torch.zeros(1, 20, dtype=torch.long)
    chosen[0, 3] = 1
    model.hidden(checks.token_ids(97, 1, 20), global_BT=chosen, recorded_weights=maps)
    assert torch.allclose(maps[0].sum(-1), torch.ones(1))
    assert (maps[0][0, 0, 10] > 0).nonzero().flatten().tolist() == [3, 8, 9, 10, 11, 12]
    assert (maps[0][0, 0, 3] > 0).all()


@pytest.mark.parametrize("name", ["bert", "roberta", "esm2", "longformer"])
def test_base_models_embed_and_say_what_they_lack(tmp_path, name):
    reference = written(name, tmp_path, transformers.AutoModel)
    ids = checks.token_ids(95, 2, 20).clamp(min=4)
    model = reference.ours()
    with torch.no_grad():
        assert (model.hidden(ids) - reference.model(ids).last_hidden_state).abs().max() < 1e-4
    with pytest.raises(UserError, match="no language-model head"):
        model(ids)
    (tmp_path / "ours").mkdir()
    save_model(model, tmp_path / "ours")
    _, info = transformers.AutoModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert all("pooler" in key for key in info["missing_keys"]) and not info["unexpected_keys"]


@pytest.mark.parametrize("kind", ["BertForPreTraining", "BertForSequenceClassification"])
def test_heads_for_other_tasks_are_left_aside(tmp_path, kind):
    torch.manual_seed(0)
    theirs = getattr(transformers, kind)(CONFIGS["bert"]).eval()
    theirs.save_pretrained(tmp_path)
    ids = checks.token_ids(97, 2, 20)
    with torch.no_grad():
        ours = load_model(tmp_path).hidden(ids)
        assert (ours - theirs.bert(ids).last_hidden_state).abs().max() < 1e-4


def rewritten(reference, tensors: dict[str, torch.Tensor]):
    """A checkpoint of the same model with these tensors."""
    directory = reference.path / "rewritten"
    directory.mkdir()
    shutil.copy(reference.directory / "config.json", directory)
    save_tensors(directory, tensors)
    return directory


def test_names_of_old_files(tmp_path):
    """The first files call weight and bias of a norm gamma and beta."""
    reference = written("bert", tmp_path)
    stored = open_tensors(reference.directory)
    gamma_beta = {".LayerNorm.weight": ".LayerNorm.gamma", ".LayerNorm.bias": ".LayerNorm.beta"}
    tensors = {name: stored.get(name) for name in stored}
    for new, old in gamma_beta.items():
        tensors = {name.replace(new, old): tensor for name, tensor in tensors.items()}
    assert sum("gamma" in name for name in tensors) == 8
    ours = load_model(rewritten(reference, tensors)).state_dict()
    for name, tensor in reference.ours().state_dict().items():
        assert torch.equal(tensor, ours[name]), name


@pytest.mark.parametrize("layers", [1, 3])
def test_stored_frequencies_are_those_used(tmp_path, layers):
    """ESM-2 was trained with rounded ones; its first files have them in every layer."""
    reference = written("esm2", tmp_path)
    stored = open_tensors(reference.directory)
    tensors = {name: stored.get(name) for name in stored if "inv_freq" not in name}
    rounded = torch.rand(6)
    for layer in range(layers):
        place = f"encoder.layer.{layer}.attention.self." if layers > 1 else ""
        tensors[f"esm.{place}rotary_embeddings.inv_freq"] = rounded.clone()
    directory = rewritten(reference, tensors)
    theirs = transformers.EsmForMaskedLM.from_pretrained(directory).eval()
    ids = checks.token_ids(95, 2, 40).clamp(min=4)
    with torch.no_grad():
        assert (theirs(ids).logits - reference.model(ids).logits).abs().max() > 1e-2
        assert (load_model(directory)(ids) - theirs(ids).logits).abs().max() < 1e-4
