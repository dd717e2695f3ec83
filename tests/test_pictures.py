"""Attention maps and maps of embeddings: the numbers behind them, and files that a viewer opens."""

from __future__ import annotations

import json
import re
import struct
import xml.etree.ElementTree as ElementTree
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")

from llmctl.errors import CalledWrongly, UserError  # noqa: E402
from llmctl.models.initialization import new_model  # noqa: E402
from llmctl.models.loading import save_model  # noqa: E402
from llmctl.models.shapes import for_parameters  # noqa: E402
from llmctl.pictures import projection  # noqa: E402
from llmctl.pictures.attention_map import attention_map  # noqa: E402
from llmctl.pictures.embedding_map import embedding_map  # noqa: E402
from llmctl.pictures.settings import AttentionSettings, EmbeddingMapSettings  # noqa: E402
from llmctl.plotting import heatmap, scatter  # noqa: E402
from llmctl.tokenizer import Tokenizer  # noqa: E402

TEXT, TARGET = "the cat sat on a mat", "two dogs run"
SMALL = dict(vocab_size=300, num_hidden_layers=2, num_attention_heads=4, hidden_size=32, intermediate_size=48)
MODELS = {
    "llama": transformers.LlamaConfig(**SMALL, num_key_value_heads=2),
    "mistral": transformers.MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=4),
    "gpt2": transformers.GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4),
    "bert": transformers.BertConfig(**SMALL),
    "t5": transformers.T5Config(vocab_size=300, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4),
    "bart": transformers.BartConfig(
        vocab_size=300,
        d_model=32,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
    ),
}


@pytest.fixture(scope="module")
def tokenizer(some_texts):
    return Tokenizer.train_bpe(some_texts, 290)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer):
    """`checkpoint(name)`: (transformers' random model, the directory that holds it and the tokenizer)."""
    made = {}

    def make(name):
        if name not in made:
            torch.manual_seed(0)
            auto = {"bert": transformers.AutoModelForMaskedLM}.get(name, transformers.AutoModelForCausalLM)
            if MODELS[name].is_encoder_decoder:
                auto = transformers.AutoModelForSeq2SeqLM
            MODELS[name].decoder_start_token_id = 0
            model = auto.from_config(MODELS[name], attn_implementation="eager").eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += 0.1 * torch.randn_like(parameter)
            directory = tmp_path_factory.mktemp(name)
            model.save_pretrained(directory)
            tokenizer.save(directory)
            made[name] = model, directory
        return made[name]

    return make


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "bert"])
def test_weights_are_those_of_transformers(checkpoint, tokenizer, name):
    model, directory = checkpoint(name)
    ids = tokenizer.encode(TEXT)
    with torch.no_grad():
        expected = model(torch.tensor([ids]), output_attentions=True).attentions
    heads = attention_map(directory, AttentionSettings(attention=TEXT, layer=1))
    assert [panel.head for panel in heads.panels] == [0, 1, 2, 3]
    for panel, weights_TS in zip(heads.panels, expected[1][0], strict=True):
        assert (panel.weights_TS - weights_TS).abs().max() < 1e-5
    one = attention_map(directory, AttentionSettings(attention=TEXT, layer=0, head=2)).panels
    assert len(one) == 1 and (one[0].weights_TS - expected[0][0, 2]).abs().max() < 1e-5
    layers = attention_map(directory, AttentionSettings(attention=TEXT)).panels
    assert [panel.layer for panel in layers] == [0, 1]
    assert (layers[1].weights_TS - expected[1][0].mean(0)).abs().max() < 1e-5
    mean = attention_map(directory, AttentionSettings(attention=TEXT, mean=True)).panels
    assert len(mean) == 1 and (mean[0].weights_TS - torch.cat(expected)[:, :].mean((0, 1))).abs().max() < 1e-5
    assert len(heads.queries) == len(ids) and "".join(heads.queries).replace("·", " ").strip() == TEXT


@pytest.mark.parametrize("part", ["encoder", "decoder", "cross"])
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_all_parts_of_an_encoder_decoder(checkpoint, tokenizer, name, part):
    model, directory = checkpoint(name)
    source, target = tokenizer.encode(TEXT), [0, *tokenizer.encode(TARGET)]
    with torch.no_grad():
        theirs = model(torch.tensor([source]), decoder_input_ids=torch.tensor([target]), output_attentions=True)
    expected = getattr(theirs, f"{part}_attentions")
    settings = AttentionSettings(attention=TEXT, target=TARGET, part=part, head=3)
    drawn = attention_map(directory, settings)
    assert len(drawn.panels) == len(expected)
    for panel, weights_BHTS in zip(drawn.panels, expected, strict=True):
        assert (panel.weights_TS - weights_BHTS[0, 3]).abs().max() < 1e-5
    assert (len(drawn.queries), len(drawn.keys)) == tuple(expected[0].shape[2:])


def test_without_a_target_the_decoder_reads_what_it_generates(checkpoint):
    _, directory = checkpoint("t5")
    drawn = attention_map(directory, AttentionSettings(attention=TEXT, layer=0, mean=True))
    assert drawn.part == "cross" and len(drawn.panels) == 1 and len(drawn.queries) > 1


@pytest.fixture(scope="module", params=["mamba", "lstm"])
def recurrent(request, tmp_path_factory, tokenizer):
    directory = tmp_path_factory.mktemp(request.param)
    save_model(new_model(for_parameters(request.param, 50_000, 300, 64), seed=0), directory)
    tokenizer.save(directory)
    return directory


def test_a_model_without_attention_says_so(recurrent):
    with pytest.raises(UserError, match="have no attention"):
        attention_map(recurrent, AttentionSettings(attention=TEXT))


def test_what_is_not_there_is_refused_by_name(checkpoint):
    _, directory = checkpoint("llama")
    for settings, words in (
        (AttentionSettings(attention=TEXT, layer=2), "--layer 2"),
        (AttentionSettings(attention=TEXT, head=4), "--head 4"),
        (AttentionSettings(attention=TEXT, target="x"), "--target"),
    ):
        with pytest.raises(CalledWrongly, match=words):
            attention_map(directory, settings)
    with pytest.raises(UserError, match="a map shows 512 at most"):
        attention_map(directory, AttentionSettings(attention="cat " * 600))


# --- files ---


def check_png(data: bytes) -> None:
    """Signature, and chunks whose checksums hold, from IHDR to IEND."""
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    at, kinds = 8, []
    while at < len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        assert struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0] == zlib.crc32(
            data[at + 4 : at + 8 + length]
        )
        kinds.append(kind)
        at += 12 + length
    assert kinds[0] == b"IHDR" and kinds[-1] == b"IEND"


class Balanced(HTMLParser):
    """Fails at a tag that closes another than the one that is open."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], set()

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def parsed(text: str) -> set[str]:
    parser = Balanced()
    parser.feed(text)
    parser.close()
    assert text.startswith("<!DOCTYPE html>") and not parser.open and "http" not in text
    return parser.seen


def test_attention_pictures(checkpoint, tmp_path):
    pytest.importorskip("matplotlib")
    _, directory = checkpoint("llama")
    drawn = attention_map(directory, AttentionSettings(attention="a $x$ </script> 語", layer=0))
    for name in ("map.png", "map.svg", "map.html"):
        heatmap.save(drawn, tmp_path / name)
    check_png((tmp_path / "map.png").read_bytes())
    assert ElementTree.parse(tmp_path / "map.svg").getroot().tag.endswith("svg")
    page = (tmp_path / "map.html").read_text()
    assert "script" in parsed(page)
    data = json.loads(re.search(r"^const data = (.*);$", page, re.MULTILINE).group(1))
    assert data["queries"] == drawn.queries
    weights = torch.tensor([panel["weights"] for panel in data["panels"]])
    assert (weights - torch.stack([panel.weights_TS for panel in drawn.panels])).abs().max() < 1e-4


def test_attention_in_characters(checkpoint):
    _, directory = checkpoint("llama")
    drawn = attention_map(directory, AttentionSettings(attention=TEXT, layer=0, head=0))
    lines = heatmap.draw(drawn, 100).splitlines()
    assert len(lines) == 2 + len(drawn.queries)
    assert lines[2].endswith("██")  # the first token sees itself alone


def test_embedding_pictures(recurrent, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "lines.txt").write_text("cat\ndog <b>\n\nmat\n$house$")
    drawn = embedding_map(recurrent, str(tmp_path / "lines.txt"), EmbeddingMapSettings())
    assert drawn.labels == ["cat", "dog <b>", "mat", "$house$"] and drawn.kind == "sentences"
    for name in ("map.png", "map.html"):
        scatter.save(drawn, tmp_path / name)
    check_png((tmp_path / "map.png").read_bytes())
    page = (tmp_path / "map.html").read_text()
    assert "circle" in parsed(page) and page.count("<circle") == 4 and "dog &lt;b&gt;" in page
    assert "•cat" in scatter.draw(drawn, 80)


# --- projections ---


def test_tokens_are_projected_from_the_embedding_matrix(checkpoint, tokenizer, tmp_path):
    model, directory = checkpoint("gpt2")
    words = ["cat", "dogs", "house", "red", "mat"]
    (tmp_path / "words.txt").write_text("\n".join(words))
    drawn = embedding_map(directory, str(tmp_path / "words.txt"), EmbeddingMapSettings())
    rows = []
    for word in words:
        ids = min((tokenizer.encode(text) for text in (f" {word}", word)), key=len)
        rows.append(model.transformer.wte.weight[ids].detach().mean(0).double().numpy())
    centred = np.stack(rows) - np.stack(rows).mean(0)
    u, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    ours, theirs = np.array(drawn.points), u[:, :2] * sizes[:2]
    for axis in (0, 1):
        sign = np.sign(ours[:, axis] @ theirs[:, axis])
        np.testing.assert_allclose(ours[:, axis], sign * theirs[:, axis], atol=1e-5)
    assert drawn.kind == "tokens" and f"{sizes[0] ** 2 / (sizes**2).sum():.0%}" in drawn.axes[0]


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_sentences_are_the_vectors_of_embed(checkpoint, tokenizer, name, tmp_path):
    model, directory = checkpoint(name)
    lines = ["the cat sat", "two dogs run by", "his red house", "a mat"]
    base = model.get_encoder() if name == "t5" else model.base_model
    with torch.no_grad():
        states = [base(torch.tensor([tokenizer.encode(line)])).last_hidden_state[0] for line in lines]
    vectors = [state[-1] if name == "llama" else state.mean(0) for state in states]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    drawn = embedding_map(directory, str(tmp_path / "lines.jsonl"), EmbeddingMapSettings())
    expected, _ = projection.pca(torch.stack(vectors))
    assert drawn.kind == "sentences" and np.abs(np.array(drawn.points) - expected.numpy()).max() < 1e-4


def test_tsne_keeps_clusters_together():
    generator = torch.Generator().manual_seed(0)
    centres = 10 * torch.randn(4, 20, generator=generator)
    points = (centres[:, None] + torch.randn(4, 25, 20, generator=generator)).flatten(0, 1)
    placed = projection.tsne(points)
    nearest = torch.cdist(placed, placed).fill_diagonal_(float("inf")).argmin(1)
    assert (nearest // 25 == torch.arange(100) // 25).all()
    assert torch.equal(placed, projection.tsne(points))


def test_pca_of_points_on_a_line():
    points_N2, shares = projection.pca(torch.arange(5.0).outer(torch.tensor([0.0, -3.0, 4.0])))
    torch.testing.assert_close(points_N2[:, 0], torch.linspace(-10, 10, 5, dtype=torch.float64))
    assert shares[0] == pytest.approx(1.0) and points_N2[:, 1].abs().max() < 1e-9


# --- the command ---


@pytest.mark.parametrize("recurrent", ["mamba"], indirect=True)
def test_the_command_draws_writes_and_refuses(llmctl, checkpoint, recurrent, tmp_path):
    _, directory = checkpoint("gpt2")
    result = llmctl("inspect", directory, "--attention", TEXT, "--layer", 1, "--head", 0, "-o", "map.html")
    assert result.stdout == f"{tmp_path / 'map.html'}\n" and (tmp_path / "map.html").exists()
    record = json.loads(llmctl("inspect", directory, "--attention", TEXT, "--mean", "--json").stdout)
    assert sum(record["weights"][-1]) == pytest.approx(1.0, abs=1e-4)
    drawn = llmctl("inspect", directory, "--embedding-map", "-", input="cat\ndog\nmat\nred\n").stdout
    assert "•cat" in drawn and "•red" in drawn
    refused = llmctl("inspect", recurrent, "--attention", TEXT, code=1).stderr
    assert refused.count("\n") == 1 and "no attention" in refused
    assert (
        "map.html: exists already" in llmctl("inspect", directory, "--attention", "x", "-o", "map.html", code=2).stderr
    )
    assert "--output is for a picture" in llmctl("inspect", directory, "-o", "x.png", code=2).stderr
    both = llmctl("inspect", "-", "--embedding-map", "-", code=2, input="x\n").stderr
    assert "standard input" in both
