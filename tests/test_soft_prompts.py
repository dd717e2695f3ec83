"""Prompt and prefix tuning against peft, and with padding, caches and limits of the context."""

from __future__ import annotations

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from test_adapters import BASES, IDS, randomize  # noqa: E402

from llmctl.errors import UserError  # noqa: E402
from llmctl.finetune import adapter, methods  # noqa: E402
from llmctl.generation.complete import complete, prepare  # noqa: E402
from llmctl.generation.settings import Sampling, resolve  # noqa: E402
from llmctl.models.loading import load_model  # noqa: E402

METHODS = {"prompt": methods.SoftPrompt(5), "prefix": methods.Prefix(5)}
THEIRS = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}
T5 = transformers.T5Config(
    vocab_size=97, d_model=48, d_kv=12, d_ff=80, num_layers=2, num_heads=4, decoder_start_token_id=0
)


@pytest.fixture(params=BASES)
def base(request, tmp_path):
    torch.manual_seed(0)
    config = BASES[request.param](initializer_range=0.2)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture(params=METHODS)
def kind(request):
    return request.param


def attached(base, kind):
    ours = load_model(base)
    adapter.attach(ours, METHODS[kind])
    randomize(ours)
    return ours


def saved(ours, kind, base, directory):
    directory.mkdir()
    adapter.save(ours, METHODS[kind], directory, str(base))
    return directory


def in_peft(base, directory):
    return peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), directory).eval()


def test_at_first_they_are_words_of_the_vocabulary(base, kind):
    ours, plain = load_model(base), load_model(base)
    adapter.attach(ours, METHODS[kind], seed=3)
    words = torch.randint(97, (1, 5), generator=torch.Generator().manual_seed(3)).expand(len(IDS), -1)
    with torch.no_grad():
        assert (ours(IDS) - plain(torch.cat([words, IDS], 1))[:, 5:]).abs().max() < 1e-4
    assert [name for name, p in ours.named_parameters() if p.requires_grad] == ["virtual.weight"]


@torch.no_grad()
def test_peft_computes_the_same_with_ours(base, kind, tmp_path):
    ours = attached(base, kind)
    theirs = in_peft(base, saved(ours, kind, base, tmp_path / "adapter"))
    expected = theirs(IDS).logits[:, -IDS.shape[1] :]
    assert (ours(IDS) - expected).abs().max() < 1e-4
    assert (ours(IDS) - load_model(base)(IDS)).abs().max() > 1e-2
    again = load_model(base)
    assert adapter.load(again, tmp_path / "adapter") == METHODS[kind]
    assert torch.equal(again(IDS), ours(IDS))


@torch.no_grad()
def test_we_compute_the_same_with_pefts(base, kind, tmp_path):
    config = THEIRS[kind](num_virtual_tokens=5, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    ours = load_model(base)
    adapter.load(ours, tmp_path / "adapter")
    assert (ours(IDS) - theirs(IDS).logits[:, -IDS.shape[1] :]).abs().max() < 1e-4


@torch.no_grad()
def test_padding_on_either_side_changes_nothing(base, kind):
    ours = attached(base, kind)
    expected = ours(IDS[:1, :12])
    for left, right in ((3, 0), (0, 4), (2, 2)):
        row = torch.cat([IDS[1:, :left], IDS[:1, :12], IDS[1:, :right]], 1)
        mask = torch.tensor([[0] * left + [1] * 12 + [0] * right])
        rows, masks = torch.cat([row, IDS[1:, : row.shape[1]]]), torch.cat([mask, torch.ones_like(mask)])
        assert (ours(rows, masks)[:1, left : left + 12] - expected).abs().max() < 1e-4


def test_generated_tokens_are_pefts(base, kind, tmp_path):
    ours = attached(base, kind)
    theirs = in_peft(base, saved(ours, kind, base, tmp_path / "adapter"))
    sampling = resolve(Sampling(temperature=0.0, max_new_tokens=12, ignore_eos=True))
    prompts = [IDS[0, :9].tolist(), IDS[1, :4].tolist(), IDS[1, :6].tolist()]
    made = complete(ours, [prepare(ours, prompt, sampling) for prompt in prompts], 3)
    for completion, prompt in zip(made, prompts):
        inputs = torch.tensor([prompt])
        with torch.no_grad():
            for _ in range(12):  # peft's generate has no prefix cache of its own in every release: without any cache
                logits = theirs(inputs, use_cache=False).logits[:, -1]
                inputs = torch.cat([inputs, logits.argmax(-1, keepdim=True)], 1)
        assert completion.ids == inputs[0, len(prompt) :].tolist()


def test_the_context_holds_so_many_fewer(base, kind):
    ours = attached(base, kind)
    limit = ours.config.max_positions
    sampling = resolve(Sampling(temperature=0.0, max_new_tokens=10 * limit))
    with pytest.raises(UserError, match=f"context is {limit - 5}"):
        prepare(ours, [1] * (limit - 4), sampling)
    assert prepare(ours, [1] * (limit - 5), sampling).max_new_tokens == 1


@torch.no_grad()
@pytest.mark.parametrize("kind", METHODS)
def test_encoder_decoders(tmp_path, kind):
    """A prompt stands in front of the source, as peft has it for one stack; a prefix in the decoder is our own."""
    torch.manual_seed(0)
    transformers.AutoModelForSeq2SeqLM.from_config(T5).save_pretrained(tmp_path / "base")
    ours = attached(tmp_path / "base", kind)
    before = load_model(tmp_path / "base")(IDS, input_ids_BT=IDS[:, :4])
    found = ours(IDS, input_ids_BT=IDS[:, :4])
    assert (found - before).abs().max() > 1e-2
    saved(ours, kind, tmp_path / "base", tmp_path / "adapter")
    again = load_model(tmp_path / "base")
    adapter.load(again, tmp_path / "adapter")
    assert torch.equal(again(IDS, input_ids_BT=IDS[:, :4]), found)
    if kind == "prompt":
        theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base")
        theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
        assert (theirs(input_ids=IDS, decoder_input_ids=IDS[:, :4]).logits - found).abs().max() < 1e-4


def test_models_without_keys_and_values_take_prompts_only(tmp_path):
    config = transformers.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    ours = load_model(tmp_path / "base")
    with pytest.raises(UserError, match="Mamba"):
        adapter.attach(ours, methods.Prefix(5))
    before = ours(IDS)
    adapter.attach(ours, methods.SoftPrompt(5))
    assert (ours(IDS) - before).abs().max() > 1e-4


def test_one_adapter_of_virtual_tokens_only(base, kind, tmp_path):
    ours = attached(base, kind)
    directory = saved(ours, kind, base, tmp_path / "adapter")
    with pytest.raises(UserError, match="one adapter"):
        adapter.load(ours, directory)
    with pytest.raises(UserError, match="only plain LoRA"):
        adapter.load(load_model(base), directory, weight=0.5)
