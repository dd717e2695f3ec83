"""T5, BART and mBART against transformers' on small random checkpoints."""

from __future__ import annotations

import json

import pytest
import torch

transformers = pytest.importorskip("transformers")

import family_checks as checks  # noqa: E402

from llmctl.checkpoint import open_tensors, save_tensors  # noqa: E402
from llmctl.errors import UserError  # noqa: E402
from llmctl.generation.complete import complete, prepare  # noqa: E402
from llmctl.generation.session import Session  # noqa: E402
from llmctl.generation.settings import Marks, Sampling, resolve  # noqa: E402
from llmctl.models.loading import load_model, save_model  # noqa: E402
from llmctl.tokenizer import Tokenizer  # noqa: E402

VOCAB, START = 97, 2
T5 = dict(
    **dict(vocab_size=VOCAB, d_model=48, d_kv=10, d_ff=80, num_layers=2, num_heads=4),
    **dict(decoder_start_token_id=START, relative_attention_num_buckets=12, relative_attention_max_distance=20),
)
BART = dict(
    **dict(vocab_size=VOCAB, d_model=48, encoder_layers=2, decoder_layers=3, max_position_embeddings=64),
    **dict(encoder_attention_heads=4, decoder_attention_heads=3, encoder_ffn_dim=64, decoder_ffn_dim=80),
    **dict(decoder_start_token_id=START, forced_eos_token_id=None, eos_token_id=None),
)
CONFIGS = {
    "t5": transformers.T5Config(**T5),
    "t5-deep-decoder": transformers.T5Config(**{**T5, "num_heads": 3, "d_kv": 16}, num_decoder_layers=4),
    "t5-v1.1": transformers.T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "t5-gated-silu": transformers.T5Config(**T5, feed_forward_proj="gated-silu", layer_norm_epsilon=1e-3),
    "bart": transformers.BartConfig(**BART),
    "bart-scaled-relu": transformers.BartConfig(**BART, scale_embedding=True, activation_function="relu"),
    "mbart": transformers.MBartConfig(**BART, scale_embedding=True),
}
CLOSE = checks.FLOAT32_LOGITS


def untie(model, directory) -> None:
    """What T5 v1.1 has: transformers makes such a model only from a file that holds one."""
    tensors = {name: open_tensors(directory).get(name).clone() for name in open_tensors(directory)}
    head_VD = torch.randn(VOCAB, model.config.d_model, generator=torch.Generator().manual_seed(9))
    tensors["lm_head.weight"] = 0.15 * head_VD
    save_tensors(directory, tensors)


@pytest.fixture(params=list(CONFIGS))
def reference(request, tmp_path):
    auto = transformers.AutoModelForSeq2SeqLM
    made = checks.reference(CONFIGS[request.param], tmp_path, auto)
    if hasattr(made.model, "final_logits_bias"):
        made.model.final_logits_bias.normal_(generator=torch.Generator().manual_seed(4))
        made.model.save_pretrained(made.directory)
    if request.param == "t5-v1.1":
        untie(made.model, made.directory)
        made.model = auto.from_pretrained(made.directory, attn_implementation="eager").eval()
    return made


def inputs() -> dict[str, torch.Tensor]:
    """Sources of which the second is shorter, and what the decoder has read of both targets.

    No token is BART's padding (1), whose embedding transformers gives no gradient.
    """
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, 29:] = 0
    source, target = checks.token_ids(VOCAB, 2, 40), checks.token_ids(VOCAB, 2, 23, seed=3)
    return {"input_ids": source.clamp(min=2), "attention_mask": mask, "decoder_input_ids": target.clamp(min=2)}


def call(model, given: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(given["input_ids"], given["attention_mask"], input_ids_BT=given["decoder_input_ids"])


def test_logits(reference):
    checks.check_logits(reference, inputs(), call)


def test_bfloat16_logits(reference):
    checks.check_half_precision(reference, inputs(), torch.bfloat16, call)


def test_gradient(reference):
    given, labels = inputs(), checks.token_ids(VOCAB, 2, 23, seed=5)

    def loss(model):
        return torch.nn.functional.cross_entropy(call(model, given).flatten(0, 1), labels.flatten())

    checks.check_gradient(reference, given, labels, loss)


def test_save(reference):
    checks.check_save_is_identity(reference, inputs(), call)


def test_steps_with_a_cache_equal_one_pass(reference):
    model, given = reference.ours(), inputs()
    cache, _ = model.begin([[1], [1]], [[START], [START]], 40)
    targets = given["decoder_input_ids"]
    cuts = [0, 1, 2, 9, 10, 23]
    with torch.no_grad():
        whole = call(model, given)
        cache.memory = model.encode(given["input_ids"], given["attention_mask"], keep=True)
        pieces = [model.logits(model.hidden(targets[:, a:b], cache=cache)) for a, b in zip(cuts, cuts[1:])]
    assert (torch.cat(pieces, 1) - whole).abs().max() < CLOSE


def test_the_memory_is_projected_once(reference):
    model, given = reference.ours(), inputs()
    calls = []
    for layer in model.layers:
        layer.cross.k_proj.register_forward_hook(lambda *_: calls.append(1))
    sampling = resolve(Sampling(max_new_tokens=5, temperature=0.0))
    prompt = given["input_ids"][0].tolist()
    list(complete(model, [prepare(model, prompt, sampling, marks=Marks(start=START))], 1))
    assert len(calls) == len(model.layers)


def test_beams_share_their_source(reference):
    model = reference.ours()
    cache, inputs_BT = model.begin([[5, 6, 7], [8, 9]], [[START], [START]], 4)
    with torch.no_grad():
        model.hidden(inputs_BT, cache=cache)
        keys, _ = cache.memory.keys_and_values(0, None)
        cache.select(torch.tensor([0, 0, 0, 1, 1, 1]))
        cache.select(torch.tensor([2, 0, 1, 5, 5, 3]))
        assert cache.memory.keys_and_values(0, None)[0] is keys
        tokens_B1 = torch.tensor([[4], [5], [6], [7], [8], [9]])
        both = model.hidden(tokens_B1, cache=cache)
        cache.select(torch.tensor([3, 4]))
        assert len(cache.memory.hidden_BSD) == 1
        alone, _ = model.begin([[8, 9]], [[START]], 4)
        model.hidden(inputs_BT[1:], cache=alone)
        assert (model.hidden(tokens_B1[3:4], cache=alone) - both[3:4]).abs().max() < CLOSE


def test_padding_on_either_side_changes_nothing(reference):
    model, n = reference.ours(), 5
    source, target = checks.token_ids(VOCAB, 1, 12), checks.token_ids(VOCAB, 1, 9, seed=3)
    zeros = torch.zeros(1, n, dtype=torch.long)
    with torch.no_grad():
        alone = model(source, input_ids_BT=target)
        for order in (lambda a, b: [a, b], lambda a, b: [b, a]):
            padded = torch.cat(order(zeros, source), 1)
            mask = torch.cat(order(zeros, torch.ones_like(source)), 1)
            assert (model(padded, mask, input_ids_BT=target) - alone).abs().max() < CLOSE
        left = model(
            source,
            input_ids_BT=torch.cat([zeros, target], 1),
            attention_mask_BT=torch.cat([zeros, torch.ones_like(target)], 1),
        )
    assert (left[:, n:] - alone).abs().max() < CLOSE


def test_packed_pairs_equal_separate_ones(reference):
    model = reference.ours()
    source, target = checks.token_ids(VOCAB, 1, 30), checks.token_ids(VOCAB, 1, 20, seed=3)
    source_sizes, target_sizes = [11, 1, 18], [3, 9, 8]
    documents = [torch.repeat_interleave(torch.tensor(sizes))[None] for sizes in (source_sizes, target_sizes)]
    with torch.no_grad():
        packed = model(source, input_ids_BT=target, source_documents_BS=documents[0], documents_BT=documents[1])
        pairs = zip(source.split(source_sizes, 1), target.split(target_sizes, 1))
        alone = torch.cat([model(one, input_ids_BT=other) for one, other in pairs], 1)
    assert (packed - alone).abs().max() < CLOSE


def their_text(model, prompt: list[int], new_tokens: int, num_beams: int) -> list[int]:
    """Without a cache: transformers makes T5's as deep as the encoder, whatever the decoder's depth."""
    how = {"do_sample": False, "max_new_tokens": new_tokens, "num_beams": num_beams, "use_cache": False}
    return model.generate(torch.tensor([prompt]), **how)[0, 1:].tolist()


def test_greedy_and_beam_texts_equal_transformers(reference):
    ours = reference.ours()
    prompts = [checks.token_ids(VOCAB, 1, length, seed=length)[0].clamp(min=3).tolist() for length in (1, 7, 19)]
    for num_beams in (1, 3):
        expected = [their_text(reference.model, ids, 24, num_beams) for ids in prompts]
        sampling = resolve(Sampling(max_new_tokens=24, temperature=0.0, num_beams=num_beams))
        for batch_size in (1, 16):
            begun = [prepare(ours, ids, sampling, marks=Marks(start=START)) for ids in prompts]
            found = [completion.ids for completion in complete(ours, begun, batch_size)]
            assert found == expected


def test_bfloat16_texts_stay_within_a_batch_of_any_size(reference):
    model = reference.ours(torch.bfloat16)
    sampling = resolve(Sampling(max_new_tokens=6, temperature=0.0))
    prompts = [[5, 6, 7], [9] * 20]
    texts = list(complete(model, [prepare(model, ids, sampling, marks=Marks(start=START)) for ids in prompts], 2))
    assert all(len(text.ids) == 6 for text in texts)


def test_the_context_limits_source_and_text(tmp_path):
    made = checks.reference(CONFIGS["bart"], tmp_path, transformers.AutoModelForSeq2SeqLM)
    model, marks = made.ours(), Marks(start=START)
    sampling = resolve(Sampling(max_new_tokens=1000, temperature=0.0))
    (done,) = complete(model, [prepare(model, [5] * 64, sampling, marks=marks)], 1)
    assert len(done.ids) == 64 and done.is_cut_by_context
    with pytest.raises(UserError, match="65 tokens; the model's context is 64"):
        prepare(model, [5] * 65, sampling, marks=marks)
    with pytest.raises(UserError, match="with which token its decoder begins"):
        prepare(model, [5], sampling)


def test_a_head_of_its_own_is_found_whatever_the_config_says(tmp_path):
    made = checks.reference(CONFIGS["t5"], tmp_path, transformers.AutoModelForSeq2SeqLM)
    untie(made.model, made.directory)
    assert json.loads((made.directory / "config.json").read_text())["tie_word_embeddings"] is True
    ours = made.ours()
    assert not ours.config.tie_embeddings and ours.lm_head is not None
    made.model = made.model.from_pretrained(made.directory).eval()
    checks.check_logits(made, inputs(), call)


def test_a_file_without_the_fixed_bias_has_none(tmp_path):
    made = checks.reference(CONFIGS["bart"], tmp_path, transformers.AutoModelForSeq2SeqLM)
    stored = open_tensors(made.directory)
    bare = {name.removeprefix("model."): stored.get(name).clone() for name in stored if name != "final_logits_bias"}
    save_tensors(made.directory, bare)
    checks.check_logits(made, inputs(), call)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """With the byte tokenizer, and settings of its own in generation_config.json."""
    config = transformers.T5Config(**{**T5, "vocab_size": 257}, eos_token_id=256, pad_token_id=0)
    made = checks.reference(config, tmp_path_factory.mktemp("t5"), transformers.AutoModelForSeq2SeqLM)
    Tokenizer.bytes().save(made.directory)
    settings = {"decoder_start_token_id": 7, "num_beams": 3, "max_length": 9, "eos_token_id": 256, "pad_token_id": 0}
    (made.directory / "generation_config.json").write_text(json.dumps(settings))
    return made


def test_the_generation_config_is_honoured(checkpoint):
    session = Session.open(checkpoint.directory)
    theirs = checkpoint.model.from_pretrained(checkpoint.directory)
    completion = session.begin("hello")
    list(session.stream(completion))
    expected = theirs.generate(torch.tensor([completion.prompt_ids]))[0]
    assert completion.continued == [7] == expected[:1].tolist()
    assert completion.sampling.num_beams == 3 and completion.sampling.max_new_tokens == 8
    assert completion.ids == expected[1:].tolist()


def test_the_command_answers_without_repeating_the_prompt(llmctl, checkpoint):
    text = llmctl("generate", checkpoint.directory, "hello", "-n", 5, "--num-beams", 1).stdout
    assert not text.startswith("hello")
    assert (
        llmctl("generate", checkpoint.directory, "hello", "-n", 5, "--num-beams", 1, "--echo").stdout == f"hello{text}"
    )
    lines = llmctl(
        *("generate", checkpoint.directory, "--jsonl", "--logprobs", 1, "-n", 5, "--temperature", 0.9, "--seed", 3),
        input='{"prompt": "hello"}\n{"prompt": "a longer one", "seed": 4}\n',
    ).stdout.splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["prompt_tokens"] for record in records] == [5, 12]
    assert all(len(record["logprobs"]) == record["completion_tokens"] for record in records)


def test_drawn_texts_do_not_depend_on_their_batch(checkpoint):
    session = Session.open(checkpoint.directory)
    settings = Sampling(temperature=1.0, seed=5, max_new_tokens=12, ignore_eos=True)
    alone = [session.begin(prompt, settings, sequence=i) for i, prompt in enumerate(["ab", "c" * 20, "xyz"])]
    for completion in alone:
        list(session.stream(completion))
    together = [session.begin(prompt, settings, sequence=i) for i, prompt in enumerate(["ab", "c" * 20, "xyz"])]
    assert [c.ids for c in complete(session.model, together, 8)] == [c.ids for c in alone]


def test_a_saved_head_of_its_own_stays_one(tmp_path):
    made = checks.reference(CONFIGS["t5-v1.1"], tmp_path, transformers.AutoModelForSeq2SeqLM)
    untie(made.model, made.directory)
    (tmp_path / "ours").mkdir()
    save_model(load_model(made.directory), tmp_path / "ours")
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert (written["tie_word_embeddings"], written["scale_decoder_outputs"]) == (False, False)
