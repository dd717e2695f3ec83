"""A prompt's logits are the same bits in any batch, and so is the text that a seed gives."""

from __future__ import annotations

import copy

import pytest
import torch

from llmctl.finetune import adapter, methods
from llmctl.generation.records import Row
from llmctl.generation.session import Session
from llmctl.generation.settings import Sampling
from llmctl.models import families
from llmctl.models.cache import Cache
from llmctl.models.initialization import new_model
from llmctl.models.loading import save_model
from llmctl.ops import native
from llmctl.tokenizer import Tokenizer

pytestmark = pytest.mark.skipif(not native.path().exists(), reason="the native library is not built")

COMMON = {"vocab_size": 257, "torch_dtype": "float32"}
# odd widths, so that no row ends where a vector does
CONFIGS = {
    "llama": {
        "model_type": "llama",
        "hidden_size": 36,
        "intermediate_size": 83,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 400,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    },
    "gpt2": {"model_type": "gpt2", "n_embd": 36, "n_layer": 2, "n_head": 3, "n_positions": 400, "n_inner": 83},
}
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    hf = {**COMMON, **CONFIGS[request.param]}
    model = new_model(families.find(hf["model_type"]).config_from_hf(hf), seed=0).eval()
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # a fresh model's branches add nothing, whatever attention makes of a batch
                parameter.normal_(0.0, 0.25, generator=draws)
    return model


def logits_of(model, prompts: list[list[int]], drawn: list[list[int]], dtype) -> torch.Tensor:
    """[B, steps, V]: those that follow the prompts and each of the tokens drawn, in one left-padded batch."""
    padding = [max(map(len, prompts)) - len(prompt) for prompt in prompts]
    inputs = torch.tensor([[0] * n + prompt for n, prompt in zip(padding, prompts)])
    cache = Cache(model.config, len(prompts), 400, dtype, "cpu", torch.tensor(padding) if any(padding) else None)
    found = []
    with torch.inference_mode():
        for step in range(len(drawn[0]) + 1):
            found.append(model.logits(model.hidden(inputs, cache=cache)[:, -1]))
            if step < len(drawn[0]):
                inputs = torch.tensor([row[step : step + 1] for row in drawn])
    return torch.stack(found, 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_do_not_depend_on_the_batch(model, dtype):
    model = model.to(dtype)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 257, (n,), generator=generator).tolist() for n in (1, 7, 300, 18, 64, 3, 257, 29)]
    drawn = torch.randint(0, 257, (8, 6), generator=generator).tolist()
    alone = [logits_of(model, [prompts[i]], [drawn[i]], dtype)[0] for i in range(8)]
    for rows in ([0, 1, 2], [3, 4, 5], [7, 6], range(8)):
        together = logits_of(model, [prompts[i] for i in rows], [drawn[i] for i in rows], dtype)
        for i, found in zip(rows, together):
            assert torch.equal(found, alone[i]), f"prompt {i} in a batch of {len(rows)}"


ADAPTERS = {
    "lora": methods.Lora(rank=5, targets=("all-linear", "embed_tokens")),
    "dora": methods.Lora(rank=5, dora=True),
    "bottlenecks": methods.Bottleneck(width=13),
    "ia3": methods.Ia3(),
    "prompt": methods.SoftPrompt(3),
    "prefix": methods.Prefix(3),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ADAPTERS.values(), ids=ADAPTERS)
def test_logits_with_an_adapter_do_not_either(model, dtype, method):
    model, generator = copy.deepcopy(model).to(dtype), torch.Generator().manual_seed(2)
    adapter.attach(model, method)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    prompts = [torch.randint(0, 257, (n,), generator=generator).tolist() for n in (1, 7, 130, 29)]
    drawn = torch.randint(0, 257, (4, 2), generator=generator).tolist()
    alone = [logits_of(model, [prompts[i]], [drawn[i]], dtype)[0] for i in range(4)]
    for i, found in enumerate(logits_of(model, prompts, drawn, dtype)):
        assert torch.equal(found, alone[i]), f"prompt {i}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sampling", [{}, {"top_k": 20, "top_p": 0.8}, {"repetition_penalty": 1.3, "min_p": 0.01}])
def test_a_seed_gives_one_text(model, dtype, sampling, tmp_path):
    save_model(model, tmp_path)
    Tokenizer.bytes().save(tmp_path)
    session = Session.open(tmp_path, dtype, "cpu")
    prompts = ["a", "The quick brown fox", "To be, or not", "xyz" * 7, "b", "cd", "e" * 70, "f g"]
    rows = [Row(prompt, Sampling(max_new_tokens=3 + 2 * i)) for i, prompt in enumerate(prompts)]
    settings = Sampling(seed=42, ignore_eos=True, temperature=1.0, **sampling)
    texts = []
    for batch_size in (1, 3, 8):
        answers = session.answer(rows, settings, num_samples=2, batch_size=batch_size)
        texts.append([answer.completion.ids for answer in answers])
    assert texts[0] == texts[1] == texts[2]
    assert texts[0][0] != texts[0][1], "samples of one prompt differ"
