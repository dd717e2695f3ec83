"""Fine-tuning for labels, measures and rewards: what is learned, what it is saved as, and who loads it."""

from __future__ import annotations

import hashlib
import json
import random

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from llmctl.classify import TextClassifier  # noqa: E402
from llmctl.data.text_rows import TextRow  # noqa: E402
from llmctl.errors import CalledWrongly, UserError  # noqa: E402
from llmctl.finetune import adapter, methods  # noqa: E402
from llmctl.finetune.assembly import Assembly  # noqa: E402
from llmctl.finetune.labelled import Regression  # noqa: E402
from llmctl.finetune.merge import merge  # noqa: E402
from llmctl.finetune.merge_settings import MergeSettings  # noqa: E402
from llmctl.finetune.settings import FinetuneSettings  # noqa: E402
from llmctl.finetune.task import finetuning  # noqa: E402
from llmctl.models.config import Classifier  # noqa: E402
from llmctl.models.loading import load_model  # noqa: E402
from llmctl.quantize.run import quantize  # noqa: E402
from llmctl.quantize.settings import QuantizeSettings  # noqa: E402
from llmctl.tokenizer import Tokenizer  # noqa: E402

AUTO = transformers.AutoModelForSequenceClassification
WORDS = {"bad": ("awful", "poor", "dire"), "good": ("great", "fine", "nice"), "so so": ("meh", "fair", "okay")}
SHORT = dict(steps=30, batch_size=8, learning_rate=5e-3, precision="fp32", seq_len=48, warmup_steps=2)
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)


EOS = 256
ENDS = dict(eos_token_id=EOS, pad_token_id=0, decoder_start_token_id=EOS)
SIDE = dict(layers=2, ffn_dim=48, attention_heads=4)
BART = dict(d_model=32, **{f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in SIDE.items()})
T5 = dict(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A file for each objective; texts of several lengths."""
    choose, directory = random.Random(0), tmp_path_factory.mktemp("rows")
    single, multiple, measured, pairs = [], [], [], []
    for i in range(90):
        label = sorted(WORDS)[i % 3]
        text = " ".join(choose.choices(WORDS[label], k=choose.randint(1, 4)))
        single.append({"text": f"{text} {i}", "label": label})
        both = choose.sample(sorted(WORDS), k=i % 3)
        multiple.append({"text": f"{i} " + " ".join(choose.choice(WORDS[name]) for name in both), "labels": both})
        measured.append({"text": f"{text} {i}", "label": 100.0 + 50 * sorted(WORDS).index(label) + choose.random()})
        pairs.append({"prompt": f"{i} is ", "chosen": "great", "rejected": "awful"})
    files = {"single": single, "multiple": multiple, "regress": measured, "reward": pairs}
    return {name: write(directory / f"{name}.jsonl", content) for name, content in files.items()}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A decoder whose classifiers have no bias, and encoders with heads of two kinds; all over bytes."""
    torch.manual_seed(0)
    directory, tokenizer = tmp_path_factory.mktemp("bases"), Tokenizer.bytes()
    shape = dict(vocab_size=tokenizer.vocab_size, max_position_embeddings=128, **SIZES)
    models = {
        "llama": transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, num_key_value_heads=2)),
        "bert": transformers.BertForMaskedLM(transformers.BertConfig(**shape)),
        "roberta": transformers.RobertaForMaskedLM(transformers.RobertaConfig(**shape)),
    }
    _save(models, tokenizer, directory)
    more = {
        "bart": transformers.BartForConditionalGeneration(
            transformers.BartConfig(vocab_size=tokenizer.vocab_size, **BART, **ENDS)
        ),
        "t5": transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=tokenizer.vocab_size, **T5, **ENDS)
        ),
    }
    _save(more, tokenizer, directory)
    return directory


def _save(models, tokenizer, directory):
    for name, model in models.items():
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        model.save_pretrained(directory / name)
        tokenizer.save(directory / name)


def finetune(base, file, output, **settings):
    """The validations, in order."""
    settings = FinetuneSettings(**{**SHORT, **settings})
    with finetuning(settings, base, [file], output) as run:
        list(run.run())
    records = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if record["event"] == "validation"]


TEXTS = ["great nice 3", "awful", "meh okay fair meh"]


def encoded(tokenizer, pad_id, end=()):
    ids = [[*tokenizer.encode(text), *end] for text in TEXTS]
    longest = max(map(len, ids))
    padded = torch.tensor([[*each, *[pad_id] * (longest - len(each))] for each in ids])
    return padded, torch.tensor([[1] * len(each) + [0] * (longest - len(each)) for each in ids])


def compare(ours, theirs, tokenizer):
    """Our logits of TEXTS, which transformers' model gives too."""
    end = [EOS] if ours.config.kind == "seq2seq" else []
    ids, mask = encoded(tokenizer, ours.config.classifier.pad_id, end)
    with torch.no_grad():
        mine, other = ours.eval()(ids, mask), theirs.eval()(input_ids=ids, attention_mask=mask).logits
    assert (mine - other).abs().max() < 1e-4 * max(1.0, other.abs().max().item())
    return mine


@pytest.mark.parametrize("base", ["llama", "bert", "roberta"])
def test_labels_are_learned_and_saved_by_name(bases, rows, tmp_path, base):
    validations = finetune(bases / base, rows["single"], tmp_path / "out", method="full", steps=90)
    assert validations[0]["step"] == 0 and validations[-1]["accuracy"] == validations[-1]["macro_f1"] == 1.0
    theirs, info = AUTO.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert theirs.config.label2id == {"bad": 0, "good": 1, "so so": 2}
    assert theirs.config.problem_type == "single_label_classification"
    logits = compare(load_model(tmp_path / "out"), theirs, Tokenizer.load(tmp_path / "out"))
    assert logits.argmax(1).tolist() == [1, 0, 2]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.pad_token_id == (theirs.config.pad_token_id if base == "llama" else None)
    record = json.loads((tmp_path / "out" / "llmctl.json").read_text())
    assert record["metrics"]["validation_accuracy"] == 1.0


def test_a_row_may_have_several_labels(bases, rows, tmp_path):
    validations = finetune(bases / "llama", rows["multiple"], tmp_path / "out", method="full", steps=90)
    assert validations[-1]["accuracy"] > 0.8 and validations[-1]["macro_f1"] > 0.8
    theirs = AUTO.from_pretrained(tmp_path / "out")
    assert theirs.config.problem_type == "multi_label_classification"
    compare(load_model(tmp_path / "out"), theirs, Tokenizer.load(tmp_path / "out"))


@pytest.mark.parametrize("base", ["llama", "roberta"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_measures_come_back_in_their_units(bases, rows, tmp_path, base, method):
    validations = finetune(bases / base, rows["regress"], tmp_path / "out", method=method, steps=100)
    assert validations[-1]["spearman"] > 0.5 and validations[-1]["rmse"] < 30
    if method == "full":
        theirs = AUTO.from_pretrained(tmp_path / "out")
    else:
        theirs = AUTO.from_pretrained(bases / base, num_labels=1, pad_token_id=256 if base == "llama" else 1)
        theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "out")
    ours = Assembly.find(tmp_path / "out").load()
    values = compare(ours, theirs, Tokenizer.load(tmp_path / "out"))
    assert np.allclose(values[:, 0], [150, 100, 200], atol=60)


def test_what_moves_all_texts_alike_teaches_a_mean_nothing(bases):
    """While it learns, a head over means reads features less those of some texts; saved, it needs none of them."""
    tokenizer, targets = Tokenizer.load(bases / "roberta"), np.array([1.0, 3.0, 8.0])
    spec = Classifier(("value",), "regression", at="mean", dense=True, bias=True, pad_id=1)
    model = load_model(bases / "roberta", classifier=spec)
    objective = Regression(model, targets, has_head=False)
    ids, mask = encoded(tokenizer, 1)
    batch = ids, None, mask.sum(1), torch.tensor(targets), torch.ones(3, dtype=torch.bool)
    torch.nn.init.normal_(model.classifier.out.weight)
    objective.begin_with(*batch[:3:2])
    with torch.no_grad():
        values = model(ids, mask)
        whole = objective.eval()(*batch)[1]
        objective.centre_on(ids[:2], mask.sum(1)[:2])
        torch.testing.assert_close(objective(*batch)[1], whole, rtol=1e-4, atol=1e-4)
        model.layers[-1].ffn_sum_norm.bias.add_(0.3)
        torch.testing.assert_close(objective(*batch)[1], whole, rtol=1e-4, atol=1e-4)
        assert (model(ids, mask) - values).abs().max() > 0.1
        with objective.as_saved():
            torch.testing.assert_close(model(ids, mask)[:, 0].double(), whole, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(objective(*batch)[1], whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["full", "lora", "feature"])
def test_a_mean_is_saved_as_it_was_validated(bases, rows, tmp_path, method):
    how = dict(pooling="mean", steps=6, val_data=(rows["regress"],))
    validations = finetune(bases / "roberta", rows["regress"], tmp_path / "out", method=method, **how)
    classifier = TextClassifier.open(tmp_path / "out")
    given = [json.loads(line) for line in open(rows["regress"])]
    said = classifier.classify(TextRow(row["text"], "a row", {}) for row in given)
    errors = [found["predicted"] - row["label"] for row, (_, found) in zip(given, said)]
    assert validations[-1]["rmse"] == pytest.approx(np.sqrt(np.square(errors).mean()), rel=1e-3)


@pytest.mark.parametrize("method", ["lora", "ia3", "adapter", "freeze"])
@pytest.mark.parametrize("base", ["llama", "roberta"])
def test_every_method_trains_the_head_too(bases, rows, tmp_path, base, method):
    targets = {"targets": ("query", "value")} if (base, method) == ("roberta", "lora") else {}
    finetune(bases / base, rows["single"], tmp_path / "out", method=method, steps=10, **targets)
    ours = Assembly.find(tmp_path / "out").load()
    tokenizer = Tokenizer.load(tmp_path / "out")
    assert ours.config.classifier.labels == ("bad", "good", "so so")
    assert ours.classifier.out.weight.abs().max() > 1e-3
    if method == "freeze":
        backbone = load_model(bases / base).layers[0].mixer.q_proj.weight
        assert torch.equal(ours.layers[0].mixer.q_proj.weight, backbone)
        compare(ours, AUTO.from_pretrained(tmp_path / "out"), tokenizer)
    elif method != "adapter":
        pad_id = ours.config.classifier.pad_id
        theirs = AUTO.from_pretrained(bases / base, num_labels=3, pad_token_id=pad_id)
        compare(ours, peft.PeftModel.from_pretrained(theirs, tmp_path / "out"), tokenizer)


@pytest.mark.parametrize("base,method", [("t5", "full"), ("t5", "lora"), ("bart", "lora")])
def test_encoder_decoders_are_read_at_their_end(bases, rows, tmp_path, caplog, base, method):
    """As transformers has them, under peft, and merged."""
    finetune(bases / base, rows["single"], tmp_path / "out", method=method, steps=5)
    assert "reads a classifier of this family at EOS" in caplog.text
    tokenizer, last = Tokenizer.load(tmp_path / "out"), tmp_path / "out"
    if method == "lora":
        theirs = peft.PeftModel.from_pretrained(AUTO.from_pretrained(bases / base, num_labels=3), last)
        values = compare(Assembly.find(last).load(), theirs, tokenizer)
        last = merge(bases / base, [last], tmp_path / "merged", MergeSettings()).path
        compare(load_model(last), theirs, tokenizer)
        assert values.abs().max() > 1e-3
    theirs, info = AUTO.from_pretrained(last, output_loading_info=True)
    assert not info["missing_keys"] and info["unexpected_keys"] <= {"final_logits_bias"}
    compare(load_model(last), theirs, tokenizer)


@pytest.mark.parametrize("base,targets", [("llama", ["q_proj"]), ("bert", ["query"]), ("roberta", ["query", "dense"])])
def test_pefts_classifiers_load_here(bases, tmp_path, base, targets):
    theirs = AUTO.from_pretrained(bases / base, num_labels=3, pad_token_id=1)
    more = {"modules_to_save": ["pooler.dense"]} if base == "bert" else {}
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=4, target_modules=targets, task_type="SEQ_CLS", **more))
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(tmp_path / "adapter")
    config = json.loads((bases / base / "config.json").read_text())
    (tmp_path / "base").mkdir()
    for file in (bases / base).iterdir():
        (tmp_path / "base" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "pad_token_id": 1}))
    ours = Assembly.find(tmp_path / "base", [str(tmp_path / "adapter")]).load()
    assert ours.config.classifier.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    compare(ours, theirs, Tokenizer.load(bases / base))
    method = methods.from_peft(adapter.read_config(tmp_path / "adapter"))
    (tmp_path / "again").mkdir()
    adapter.save(ours, method, tmp_path / "again", str(tmp_path / "base"))
    back = AUTO.from_pretrained(bases / base, num_labels=3, pad_token_id=1)
    compare(ours, peft.PeftModel.from_pretrained(back, tmp_path / "again"), Tokenizer.load(bases / base))


def test_rewards_prefer_what_was_chosen(bases, rows, tmp_path):
    validations = finetune(bases / "llama", rows["reward"], tmp_path / "out", objective="reward", method="full")
    assert validations[-1]["accuracy"] == 1.0 and validations[-1]["loss"] < 0.1
    ours = load_model(tmp_path / "out")
    assert ours.config.classifier.labels == ("reward",)
    rewards = compare(ours, AUTO.from_pretrained(tmp_path / "out"), Tokenizer.load(tmp_path / "out"))
    assert rewards[0] > rewards[1]


@pytest.mark.parametrize("objective", ["single", "regress"])
def test_a_run_that_goes_on_gives_the_same_bits(bases, rows, tmp_path, objective):
    how = dict(method="lora", steps=12, dropout=0.1, save_every=5, keep=3, lora_dropout=0.1)
    finetune(bases / "llama", rows[objective], tmp_path / "whole", **how)
    finetune(bases / "llama", rows[objective], tmp_path / "cut", **how)
    for name in ("step-00000012", "step-00000010"):
        for file in (tmp_path / "cut" / "trainer" / name).iterdir():
            file.unlink()
    (tmp_path / "cut" / "llmctl.json").unlink()
    finetune(bases / "llama", rows[objective], tmp_path / "cut", **how, resume=True)
    name = "adapter_model.safetensors"
    sums = [hashlib.sha256((tmp_path / run / name).read_bytes()).hexdigest() for run in ("whole", "cut")]
    assert sums[0] == sums[1]


def test_accumulation_changes_nothing(bases, rows, tmp_path):
    for name, more in (("whole", {}), ("parts", {"micro_batch_size": 1})):
        finetune(bases / "roberta", rows["single"], tmp_path / name, method="full", steps=5, **more)
    ours, other = (load_model(tmp_path / name) for name in ("whole", "parts"))
    compare(ours, AUTO.from_pretrained(tmp_path / "parts"), Tokenizer.bytes())
    for parameter, expected in zip(ours.parameters(), other.parameters(), strict=True):
        assert (parameter - expected).abs().max() < 1e-4


def test_a_classifier_is_tuned_on(bases, rows, tmp_path):
    """It keeps its labels and knows what it knew; other labels, and other objectives, are refused."""
    finetune(bases / "llama", rows["regress"], tmp_path / "first", method="full", steps=60)
    first = json.loads((tmp_path / "first" / "metrics.jsonl").read_text().splitlines()[-1])
    again = finetune(tmp_path / "first", rows["regress"], tmp_path / "again", method="full", steps=2)
    assert abs(again[0]["rmse"] - first["rmse"]) < 0.1
    with pytest.raises(UserError, match="regression|value of"):
        finetune(tmp_path / "first", rows["single"], tmp_path / "other", method="full")
    chats = write(tmp_path / "chats.jsonl", [{"prompt": f"{i} is ", "completion": "2"} for i in range(20)])
    with pytest.raises(UserError, match="is a classifier"):
        finetune(tmp_path / "first", chats, tmp_path / "other", method="full")


def test_an_output_may_not_replace_what_is_read(bases, rows, tmp_path):
    base, before = bases / "llama", sorted((bases / "llama").iterdir())
    for output in (base, bases):
        with pytest.raises(CalledWrongly, match="would replace .*llama, which is read"):
            finetune(base, rows["single"], output, overwrite=True)
        with pytest.raises(CalledWrongly, match="would replace .*llama, which is read"):
            merge(base, [tmp_path], output, MergeSettings(overwrite=True))
        with pytest.raises(CalledWrongly, match="would replace .*llama, which is read"):
            quantize(base, output, QuantizeSettings(overwrite=True))
    assert sorted(base.iterdir()) == before


def test_bad_labels_are_named(bases, rows, tmp_path):
    finetune(bases / "llama", rows["single"], tmp_path / "first", method="freeze", steps=1)
    other = write(tmp_path / "other.jsonl", [{"text": "hm", "label": "odd"}] * 20)
    with pytest.raises(UserError, match="'odd' is unseen"):
        finetune(tmp_path / "first", other, tmp_path / "out", method="full")
    with pytest.raises(UserError, match="nothing to tell apart"):
        finetune(bases / "llama", other, tmp_path / "out")
    with pytest.raises(UserError, match="'odd' is unseen"):
        finetune(bases / "llama", rows["single"], tmp_path / "out", val_data=(other,))
    same = write(tmp_path / "same.jsonl", [{"text": f"hm {i}", "label": 2.5} for i in range(20)])
    with pytest.raises(UserError, match="nothing to learn"):
        finetune(bases / "llama", same, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_classify_says_what_the_model_does(bases, rows, tmp_path, llmctl):
    """Through the command: every kind of row, an adapter found by its base, the same at any batch size."""
    finetune(bases / "llama", rows["single"], tmp_path / "labels", method="lora")
    finetune(bases / "llama", rows["regress"], tmp_path / "values", method="full")
    given = write(tmp_path / "texts.jsonl", [{"id": i, "text": text, "label": "?"} for i, text in enumerate(TEXTS)])
    lines = llmctl("classify", tmp_path / "labels", given, "--batch-size", 1).stdout.splitlines()
    assert lines == llmctl("classify", bases / "llama", given, "--adapter", tmp_path / "labels").stdout.splitlines()
    said = [json.loads(line) for line in lines]
    assert [(row["id"], row["text"], row["label"]) for row in said] == [(i, text, "?") for i, text in enumerate(TEXTS)]
    assert all(abs(sum(row["probabilities"].values()) - 1) < 1e-6 for row in said)
    assert all(row["predicted"] == max(row["probabilities"], key=row["probabilities"].get) for row in said)
    ours = load_model(tmp_path / "values")
    with torch.no_grad():
        expected = ours(torch.tensor([list(b"awful")])).item()
    run = llmctl("classify", tmp_path / "values", input="awful\n")
    assert json.loads(run.stdout) == {"text": "awful", "predicted": pytest.approx(expected)}
    refused = llmctl("generate", tmp_path / "values", "hi", code=1)
    assert "llmctl classify" in refused.stderr and not refused.stdout
    assert "not a classifier" in llmctl("classify", bases / "llama", given, code=1).stderr
