"""What `llmctl inspect` says of checkpoints and token streams, good ones and damaged ones."""

from __future__ import annotations

import json

import numpy as np
import pytest

from llmctl import lineage
from llmctl.checkpoint import save_tensors
from llmctl.data.summary import SHOWN_TOKENS
from llmctl.errors import UserError
from llmctl.finetune import adapter, methods
from llmctl.inspection import inspect
from llmctl.models.loading import load_model
from llmctl.streams import TokenStreamWriter
from llmctl.tokenizer import Tokenizer

DOCUMENTS = ["First, héllo.", "", "b" * 3000, "last one"]


def write_stream(path, documents=DOCUMENTS, split_of=lambda i: "train", **close):
    tokenizer = Tokenizer.bytes()
    n_bytes: dict[str, int] = {}
    with open(path, "wb") as sink:
        writer = TokenStreamWriter(sink, tokenizer, split=True)
        for i, text in enumerate(documents):
            writer.write(*tokenizer.encode_documents([text]), split=split_of(i))
            n_bytes[split_of(i)] = n_bytes.get(split_of(i), 0) + len(text.encode())
        writer.close(n_bytes, **close)
    return path


def records_of(result) -> list[dict]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_checkpoint_counts_agree_with_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=60,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=99,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path)
    found, *tensors = inspect(tmp_path)
    assert found["parameters"] == model.num_parameters() == sum(found["parameters_per_part"].values())
    assert found["parameters_per_part"]["embedding"] == 60 * 16
    expected = {"family": "llama", "n_layers": 3, "d_model": 16, "n_heads": 4, "n_kv_heads": 2, "head_dim": 4}
    expected |= {"d_ff": 24, "vocab_size": 60, "context": 99, "tied": True, "lineage": None}
    assert {key: found[key] for key in expected} == expected
    assert found["bytes"] == sum(found["bytes_per_dtype"].values()) == 4 * model.num_parameters()
    stored = {name: list(tensor.shape) for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    assert {tensor["name"]: tensor["shape"] for tensor in tensors} == stored


def test_a_family_that_llmctl_lacks_is_still_described(tmp_path):
    import torch

    (tmp_path / "config.json").write_text('{"model_type": "strange"}')
    save_tensors(tmp_path, {"a": torch.zeros(3, dtype=torch.bfloat16)})
    found, tensor = inspect(tmp_path)
    assert found["family"] == "strange" and "strange" in found["unsupported"]
    assert found["bytes_per_dtype"] == {"bfloat16": 6} and tensor["dtype"] == "bfloat16"


def test_files_are_compared_with_what_was_saved(llmctl, tmp_path, data):
    checkpoint = tmp_path / "model"
    checkpoint.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (checkpoint / name).write_bytes((data / "models" / "stories260K" / name).read_bytes())
    lineage.write(checkpoint, lineage.Lineage("pretrain", {"steps": 7}, seed=3))
    (found,) = records_of(llmctl("inspect", checkpoint, "--json"))
    assert found["files_checked"] == 4 and found["files_wrong"] == []
    assert found["lineage"]["recipe"] == {"steps": 7} and found["lineage"]["seed"] == 3

    config = checkpoint / "config.json"
    config.write_text(config.read_text() + " ")
    result = llmctl("inspect", checkpoint, "--json", code=1)
    assert records_of(result)[0]["files_wrong"] and "config.json: sha256" in result.stderr
    llmctl("inspect", checkpoint, "--no-verify")
    table = llmctl("inspect", "-", "--tensors", "--no-verify", input=f"{checkpoint}\n")
    assert table.stdout == "" and "260,032 (260k)" in table.stderr and "model.norm.weight" in table.stderr


def test_stream_counts_per_split(tmp_path):
    path = write_stream(tmp_path / "a.arrow", split_of=lambda i: "val" if i == 3 else "train")
    (found,) = inspect(path)
    assert found["documents"] == 4 and found["tokens"] == sum(len(text.encode()) + 1 for text in DOCUMENTS)
    assert found["splits"]["val"] == {"documents": 1, "tokens": 9, "bytes": 8, "bytes_per_token": round(8 / 9, 4)}
    assert found["splits"]["train"]["documents"] == 3 and found["max_id"] == 256
    assert found["tokenizer"]["sha256"] == Tokenizer.bytes().sha256 and found["tokenizer"]["eos_id"] == 256


def test_documents_are_shown_as_text_and_long_ones_in_part(tmp_path):
    path = write_stream(tmp_path / "a.arrow")
    _, *documents = inspect(path, n_documents=3)
    end = "<|endoftext|>"
    assert [document["text"] for document in documents] == [DOCUMENTS[0] + end, end, "b" * SHOWN_TOKENS]
    assert [document["tokens"] for document in documents] == [15, 1, 3001]
    _, *all_documents = inspect(path, n_documents=100)
    assert len(all_documents) == 4


def test_a_document_in_pieces_is_one(tmp_path):
    tokenizer = Tokenizer.bytes()
    with open(tmp_path / "a.arrow", "wb") as sink:
        writer = TokenStreamWriter(sink, tokenizer)
        writer.write(np.frombuffer(b"one ", np.uint8).astype(np.uint32), np.array([0, 4]))
        writer.write(np.frombuffer(b"long two", np.uint8).astype(np.uint32), np.array([0, 5, 8]), continues=True)
        writer.close()
    found, *documents = inspect(tmp_path / "a.arrow", n_documents=1)
    assert found["documents"] == 2 and found["splits"]["train"]["bytes_per_token"] is None
    assert [document["text"] for document in documents] == ["one long "]


def test_shards_are_counted_together_and_the_identity_is_that_of_the_corpus(tmp_path):
    from llmctl.data.corpus import Corpus

    write_stream(tmp_path / "shard-00000.arrow", DOCUMENTS[:2], shard=0, last=False)
    write_stream(tmp_path / "shard-00001.arrow", DOCUMENTS[2:], shard=1, last=True)
    found, *documents = inspect(tmp_path, n_documents=3)
    assert found["shards"] == 2 and found["documents"] == 4 and len(documents) == 3
    assert found["sha256"] == Corpus.open([tmp_path]).sha256


def test_command_reads_a_stream_from_a_pipe_and_shows_documents(llmctl, tmp_path):
    content = write_stream(tmp_path / "a.arrow").read_bytes()
    result = llmctl("inspect", "-", "--show", "3", input=content)
    text = result.stdout.decode()
    assert text == "First, héllo.<|endoftext|>\n<|endoftext|>\n" + "b" * SHOWN_TOKENS + "\n"
    assert b"the last 2,001 are not shown" in result.stderr and b"bytes per token" in result.stderr


@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_a_stream_that_was_cut_short_is_refused(llmctl, tmp_path, keep):
    path = write_stream(tmp_path / "a.arrow")
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    for args, stdin in (([path], b""), (["-"], path.read_bytes())):
        result = llmctl("inspect", *args, input=stdin, code=1)
        assert b"truncated" in result.stderr and not result.stdout


def test_what_is_neither_is_refused(tmp_path):
    with pytest.raises(UserError, match="neither a checkpoint"):
        inspect(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        inspect(tmp_path / "absent")
    (tmp_path / "text.txt").write_text("some text")
    with pytest.raises(UserError, match="not a llmctl token stream"):
        list(inspect(tmp_path / "text.txt"))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="a pickle"):
        list(inspect(tmp_path))


def test_an_adapter_says_what_it_is(tmp_path, data):
    base = data / "models" / "stories260K"
    model, method = load_model(base), methods.Lora(rank=3, targets=("q_proj",))
    adapter.attach(model, method)
    adapter.save(model, method, tmp_path, str(base))
    lineage.write(tmp_path, lineage.Lineage("finetune", {}, parent_sha256="0123"))
    found, *tensors = inspect(tmp_path)
    expected = {"kind": "adapter", "method": "LORA", "base": str(base), "rank": 3, "targets": ["q_proj"]}
    assert expected.items() <= found.items() and found["parameters"] == 5 * 3 * 128 and found["bytes"] == 5 * 3 * 512
    assert found["lineage"]["parent_sha256"] == "0123" and found["files_checked"] == 2 and len(tensors) == 10
    (tmp_path / "adapter_config.json").write_text((tmp_path / "adapter_config.json").read_text() + " ")
    with pytest.raises(UserError, match="adapter_config.json: sha256"):
        list(inspect(tmp_path))
