"""What holds for checkpoints of every family: how a config is read and written, and how weights are mapped."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from llmctl.checkpoint import save_tensors
from llmctl.errors import UserError
from llmctl.models import families
from llmctl.models.initialization import new_model
from llmctl.models.loading import hf_config, hf_tensors, load_model, read_config, save_model, write_config

LLAMA = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
ROPE = {"rope_theta": 5000.0, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def read(**keys):
    hf = LLAMA | keys
    return families.find(hf["model_type"]).config_from_hf(hf)


def test_an_unknown_family_is_refused_with_the_list_and_the_nearest():
    with pytest.raises(UserError, match="model family 'mixtrall' is not one") as raised:
        families.find("mixtrall")
    assert "llama, " in raised.value.hint and raised.value.hint.endswith("the nearest is mixtral")


@pytest.mark.parametrize(
    "keys", [{"rope_scaling": {"type": "abc", "factor": 2.0}}, {"rope_parameters": ROPE | {"rope_type": "abc"}}]
)
def test_an_unknown_rope_is_refused(keys):
    with pytest.raises(UserError, match="rope_type 'abc' is not supported"):
        read(**keys)


def test_a_key_that_is_missing_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", "vocab_size": 97}))
    with pytest.raises(UserError, match="config.json: the key '.*' is missing"):
        read_config(tmp_path)


OLD = {key: value for key, value in ROPE.items() if key not in ("rope_theta", "rope_type")}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"rope_theta": 5000.0, "rope_scaling": {"type": "yarn", **OLD}}, {"rope_parameters": ROPE}),
        ({"rope_theta": 5000.0, "rope_scaling": {"rope_type": "yarn", **OLD}}, {"rope_parameters": ROPE}),
        (
            {"rope_theta": 5000.0, "rope_scaling": None},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
        ),
        ({"model_type": "mistral", "sliding_window": None}, {"model_type": "mistral", "sliding_window": None}),
        (
            {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 8, "max_window_layers": 1},
            {"model_type": "qwen2", "sliding_window": None, "layer_types": ["full_attention"] * 2},
        ),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            {
                "model_type": "qwen2",
                "use_sliding_window": True,
                "sliding_window": 8,
                "layer_types": ["full_attention", "sliding_attention"],
            },
        ),
        (
            {"model_type": "gemma", "hidden_act": "gelu", "hidden_activation": None},
            {"model_type": "gemma", "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True},
        ),
        (
            {
                "model_type": "gemma3_text",
                "rope_local_base_freq": 700.0,
                "sliding_window_pattern": 2,
                "sliding_window": 8,
            },
            {
                "model_type": "gemma3_text",
                "sliding_window": 8,
                "layer_types": ["sliding_attention", "full_attention"],
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "default", "rope_theta": 700.0},
                    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                },
            },
        ),
        (
            {
                "model_type": "phi3",
                "original_max_position_embeddings": 16,
                "rope_scaling": {"type": "su", "short_factor": [1.0] * 4, "long_factor": [3.0] * 4},
            },
            {
                "model_type": "phi3",
                "original_max_position_embeddings": 16,
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 10000.0,
                    "short_factor": [1.0] * 4,
                    "long_factor": [3.0] * 4,
                },
            },
        ),
        (
            {"model_type": "qwen3_moe", "num_experts": 4, "moe_intermediate_size": 8},
            {"model_type": "qwen3_moe", "num_local_experts": 4, "moe_intermediate_size": 8},
        ),
    ],
)
def test_spellings_of_older_releases_mean_the_same(old, new):
    assert read(**old) == read(**new)


@pytest.mark.parametrize(
    ("keys", "context"),
    [
        ({}, 64),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, 256),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, 128),
        ({"rope_scaling": {"type": "yarn", **OLD, "factor": 8.0}}, 128),
        ({"rope_scaling": {"type": "yarn", **OLD, "factor": 2.0}}, 64),
    ],
)
def test_the_context_is_that_of_the_stretched_rope(keys, context):
    config = read(**keys)
    assert config.max_positions == context
    assert read(**hf_config(config, torch.float32)) == config


def test_what_is_saved_has_the_older_spelling_nulls_and_unknown_keys():
    config = read(model_type="mistral", sliding_window=None, rope_parameters=ROPE, my_key=[1], pad_token_id=None)
    saved = hf_config(config, torch.bfloat16)
    assert "rope_parameters" not in saved and saved["rope_theta"] == 5000.0
    assert saved["rope_scaling"] == {"rope_type": "yarn", **OLD}
    assert saved["sliding_window"] is None and saved["pad_token_id"] is None and saved["my_key"] == [1]
    assert saved["torch_dtype"] == saved["dtype"] == "bfloat16"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shard_bytes", [5e9, 8000])
def test_weights_are_mapped_not_copied(tmp_path, dtype, shard_bytes):
    model = new_model(read(), seed=0).to(dtype)
    write_config(model.config, dtype, tmp_path)
    save_tensors(tmp_path, hf_tensors(model.config, dict(model.named_parameters())), shard_bytes)
    mapped = load_model(tmp_path)
    ranges = [line.split(maxsplit=5) for line in open("/proc/self/maps") if str(tmp_path) in line]
    assert len({fields[5] for fields in ranges}) == len(list(tmp_path.glob("*.safetensors"))) > (shard_bytes < 5e9)
    bounds = [[int(part, 16) for part in fields[0].split("-")] for fields in ranges]
    for name, parameter in mapped.named_parameters():
        assert parameter.dtype == dtype
        assert any(start <= parameter.data_ptr() < end for start, end in bounds), f"{name} was copied"
    assert torch.equal(mapped(torch.arange(9)[None]), model(torch.arange(9)[None]))


def test_a_model_whose_file_goes_away_goes_on(tmp_path):
    model = new_model(read(), seed=0)
    save_model(model, tmp_path)
    mapped = load_model(tmp_path)
    os.remove(tmp_path / "model.safetensors")
    assert torch.equal(mapped(torch.arange(9)[None]), model(torch.arange(9)[None]))


def test_a_first_token_does_not_wait_for_the_compiler(tmp_path):
    save_model(new_model(read(), seed=0), tmp_path)
    program = """if True:
        import sys, torch, llmctl.generation.session
        from llmctl.models.loading import load_model
        load_model(sys.argv[1])(torch.arange(9)[None])
        sys.exit("torch._dynamo" in sys.modules)
    """
    assert subprocess.run([sys.executable, "-c", program, tmp_path], check=False).returncode == 0
