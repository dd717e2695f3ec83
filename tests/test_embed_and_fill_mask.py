"""`llmctl embed` and `llmctl fill-mask` against transformers, as a person runs them."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")

from llmctl.data.text_rows import TextRow, read_rows  # noqa: E402
from llmctl.embedding import output as outputs  # noqa: E402
from llmctl.embedding.embedder import Embedder, usual_pooling  # noqa: E402
from llmctl.embedding.settings import EmbedSettings  # noqa: E402
from llmctl.errors import CalledWrongly, UserError  # noqa: E402
from llmctl.fill_mask import MaskFiller  # noqa: E402
from llmctl.models.loading import read_config  # noqa: E402
from llmctl.tokenizer import Tokenizer  # noqa: E402

SHAPE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
T5 = dict(d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, pad_token_id=1, decoder_start_token_id=1)


@pytest.fixture(scope="module")
def tokenizer(some_texts) -> Tokenizer:
    return Tokenizer.train_bpe(some_texts, 300, special_tokens="encoder")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, tokenizer):
    """`checkpoints(kind)`: its directory, and the reference that gives hidden states."""
    size = tokenizer.vocab_size
    made = {
        "bert": lambda: transformers.BertForMaskedLM(
            transformers.BertConfig(vocab_size=size, max_position_embeddings=64, pad_token_id=1, **SHAPE)
        ),
        "bert-base": lambda: transformers.BertModel(transformers.BertConfig(vocab_size=size, **SHAPE)),
        "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=size, **SHAPE)),
        "longformer": lambda: transformers.LongformerForMaskedLM(
            transformers.LongformerConfig(vocab_size=size, attention_window=8, max_position_embeddings=66, **SHAPE)
        ),
        "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=size, **T5)),
    }
    kept = {}

    def get(kind):
        if kind not in kept:
            torch.manual_seed(1)
            model, directory = made[kind]().eval(), tmp_path_factory.mktemp(kind)
            model.save_pretrained(directory)
            tokenizer.save(directory)
            kept[kind] = directory, model
        return kept[kind]

    return get


def their_states(model, ids: list[int], layer: int = -1, **more) -> torch.Tensor:
    base = model.encoder if hasattr(model, "encoder") and hasattr(model, "decoder") else model
    with torch.no_grad():
        return base(torch.tensor([ids]), output_hidden_states=True, **more).hidden_states[layer][0]


def embedded(path, texts, **settings):
    embedder = Embedder.open(path, EmbedSettings(**settings))
    rows = [TextRow(text, f"row {number}", {}) for number, text in enumerate(texts)]
    return np.stack([vector for _, vector in embedder.embed(rows)])


@pytest.mark.parametrize("kind", ["bert", "bert-base", "llama", "longformer", "t5"])
@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_vectors_equal_those_of_transformers(checkpoints, tokenizer, some_texts, kind, pooling):
    path, model = checkpoints(kind)
    texts = [text[:90] for text in some_texts[:9]]
    vectors = embedded(path, texts, pooling=pooling, batch_size=4)
    for text, vector in zip(texts, vectors):
        states = their_states(getattr(model, "longformer", model), tokenizer.encode(text))
        expected = {"mean": states.mean(0), "cls": states[0], "last": states[-1]}[pooling]
        assert np.abs(vector - expected.numpy()).max() < 1e-5


def test_batches_layers_and_norms(checkpoints, tokenizer, some_texts):
    path, model = checkpoints("bert")
    texts = [text[:90] for text in some_texts[:20]]
    alone = embedded(path, texts, batch_size=1)
    assert np.abs(embedded(path, texts, batch_size=7) - alone).max() < 1e-6
    for layer in (0, 1, -2, -3):
        first = embedded(path, texts[:1], layer=layer)[0]
        assert np.abs(first - their_states(model, tokenizer.encode(texts[0]), layer).mean(0).numpy()).max() < 1e-5
    unit = embedded(path, texts, normalize=True)
    assert np.allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-6)
    assert np.abs(unit - alone / np.linalg.norm(alone, axis=1, keepdims=True)).max() < 1e-6
    with pytest.raises(CalledWrongly, match="layers 0 to 2"):
        embedded(path, texts, layer=3)


def test_global_tokens(checkpoints, tokenizer, some_texts):
    path, model = checkpoints("longformer")
    ids = tokenizer.encode(some_texts[0][:90])
    chosen = torch.zeros(1, len(ids), dtype=torch.long)
    chosen[0, 0] = 1
    expected = their_states(model, ids, global_attention_mask=chosen)[0].numpy()
    assert np.abs(embedded(path, [some_texts[0][:90]], pooling="cls", global_tokens=1)[0] - expected).max() < 1e-5
    with pytest.raises(CalledWrongly, match="sees all already"):
        embedded(checkpoints("bert")[0], ["a"], global_tokens=1)


def test_the_usual_pooling(checkpoints, tmp_path):
    assert [usual_pooling(path, read_config(path)) for path, _ in map(checkpoints, ("bert", "llama", "t5"))] == [
        "mean",
        "last",
        "mean",
    ]
    (tmp_path / "1_Pooling").mkdir()
    saved = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(saved))
    assert usual_pooling(tmp_path, read_config(checkpoints("bert")[0])) == "cls"


def test_long_texts_are_refused_or_cut(checkpoints, tokenizer, some_texts):
    path, model = checkpoints("bert")
    text = " ".join(some_texts[:9])
    with pytest.raises(UserError, match="row 1: .* tokens, the model's context is 64"):
        embedded(path, ["short", text])
    ids = tokenizer.encode(text)
    expected = their_states(model, ids[:63] + ids[-1:]).mean(0).numpy()
    assert np.abs(embedded(path, [text], on_long="truncate")[0] - expected).max() < 1e-5


def test_an_empty_text(checkpoints, tmp_path):
    path, _ = checkpoints("bert")
    assert embedded(path, [""]).shape == (1, 32)  # what stands around a text is left
    llama, _ = checkpoints("llama")
    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    Tokenizer.bytes().save(tmp_path)
    with pytest.raises(UserError, match="row 1: an empty text has no tokens"):
        embedded(tmp_path, ["a", ""])


# --- commands ---


def test_every_form_of_output_holds_the_same(llmctl, checkpoints, some_texts, tmp_path):
    path, _ = checkpoints("bert")
    texts = [text[:90] for text in some_texts[:30]]
    lines = "".join(json.dumps({"id": f"t{n}", "text": text}) + "\n" for n, text in enumerate(texts))
    (tmp_path / "texts.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    records = [json.loads(line) for line in llmctl("embed", path, "texts.jsonl.gz").stdout.splitlines()]
    assert [record["id"] for record in records] == [f"t{n}" for n in range(30)]
    expected = np.array([record["embedding"] for record in records], dtype=np.float32)
    for name in ("out.npy", "out.arrow"):
        printed = llmctl("embed", path, "texts.jsonl.gz", "-o", name).stdout
        assert printed == f"{tmp_path / name}\n"
    assert np.array_equal(np.load(tmp_path / "out.npy"), expected)
    import pyarrow as pa

    table = pa.ipc.open_stream(str(tmp_path / "out.arrow")).read_all()
    assert table["index"].to_pylist() == list(range(30))
    assert np.array_equal(np.array(table["embedding"].to_pylist(), dtype=np.float32), expected)
    with outputs.opened(str(tmp_path / "out.jsonl"), 32, overwrite=False) as write:
        for record, vector in zip(records, expected):
            write({"id": record["id"]}, vector)
    assert [json.loads(line) for line in open(tmp_path / "out.jsonl")] == records
    plain = llmctl("embed", path, "-", input="\n".join(texts) + "\n").stdout.splitlines()
    assert np.array_equal(np.array([json.loads(line)["embedding"] for line in plain], dtype=np.float32), expected)


def test_a_failed_embed_leaves_nothing(llmctl, checkpoints, tmp_path):
    path, _ = checkpoints("bert")
    bad = llmctl("embed", path, "-", "-o", "new.npy", input='{"text": "a"}\n{"txt": "b"}\n', code=1)
    assert "line 2" in bad.stderr and not (tmp_path / "new.npy").exists()
    with pytest.raises(CalledWrongly, match="ends in none of"):
        outputs.check_name("out.csv")


def test_rows_of_plain_text_keep_their_blank_lines(tmp_path):
    (tmp_path / "plain.txt").write_bytes(b"one\r\n\n{not json\nlast")
    assert [row.text for row in read_rows([tmp_path / "plain.txt"])] == ["one", "", "{not json", "last"]


def test_fill_mask_equals_transformers(llmctl, checkpoints, tokenizer):
    path, model = checkpoints("bert")
    texts = ["the cat <mask> on", "<mask> dogs saw a <mask> house by the mat."]
    lines = llmctl("fill-mask", path, "--jsonl", "--top-k", 4, input="\n".join(texts)).stdout.splitlines()
    for text, line in zip(texts, lines, strict=True):
        ids = torch.tensor([tokenizer.encode(text)])
        with torch.no_grad():
            top = model(ids).logits[ids == tokenizer.mask_id].softmax(-1).topk(4)
        record = json.loads(line)
        assert record["text"] == text
        assert [[c["id"] for c in mask] for mask in record["masks"]] == top.indices.tolist()
        ours = torch.tensor([[c["probability"] for c in mask] for mask in record["masks"]])
        assert (ours - top.values).abs().max() < 1e-5
        assert record["masks"][0][0]["token"] == tokenizer.decode([record["masks"][0][0]["id"]])
    shown = llmctl("fill-mask", path, texts[1], "--top-k", 2).stdout.splitlines()
    assert len(shown) == 5 and shown[2] == ""


def test_what_fill_mask_refuses(checkpoints):
    bert, llama, base = (checkpoints(kind)[0] for kind in ("bert", "llama", "bert-base"))
    with pytest.raises(UserError, match="the text: nothing to fill") as error:
        list(MaskFiller.open(bert).fill([TextRow("no gap", "the text", {})]))
    assert "<mask>" in error.value.hint
    for path, message, hint in ((llama, "is no encoder", "generate"), (base, "predicts no tokens", "embed")):
        with pytest.raises(UserError, match=message) as error:
            MaskFiller.open(path)
        assert f"llmctl {hint}" in error.value.hint


def test_generate_on_an_encoder_says_what_to_use(llmctl, checkpoints):
    refused = llmctl("generate", checkpoints("bert")[0], "the cat", code=1).stderr
    assert "bert is an encoder" in refused and "fill-mask" in refused and "embed" in refused
