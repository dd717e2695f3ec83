"""Generated text against transformers and published models, in any batch, and through the command."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import llmctl as api
from llmctl.errors import UserError
from llmctl.generation.complete import complete, encode_prompt, prepare
from llmctl.generation.completion import Completion
from llmctl.generation.session import Session
from llmctl.generation.settings import Marks, Sampling, resolve
from llmctl.models import causal_lm
from llmctl.models.loading import load_model
from llmctl.tokenizer import Tokenizer

CONTEXT = 64


def random_checkpoint(directory, family="llama", **config):
    """A small random model with the byte tokenizer, written by transformers."""
    transformers = pytest.importorskip("transformers")
    if family == "llama":
        config = transformers.LlamaConfig(
            vocab_size=257,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            bos_token_id=None,
            eos_token_id=256,
            **config,
        )
    else:
        config = transformers.GPT2Config(
            vocab_size=257, n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=4, eos_token_id=256, **config
        )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 1.0))
    model.save_pretrained(directory)
    Tokenizer.bytes().save(directory)
    return model


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def both(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    return random_checkpoint(directory, request.param), load_model(directory)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    random_checkpoint(directory)
    return directory


@pytest.fixture(scope="module")
def session(checkpoint):
    return Session.open(checkpoint)


def greedy(model, prompts, n, batch_size=8, **settings):
    sampling = resolve(Sampling(temperature=0.0, max_new_tokens=n, **settings))
    return [c.ids for c in complete(model, [prepare(model, ids, sampling) for ids in prompts], batch_size)]


def some_prompts(*lengths):
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, 256, (length,), generator=generator).tolist() for length in lengths]


def test_stories260k_gives_the_reference_text_and_logits(data):
    path = data / "models" / "stories260K"
    reference = json.loads((path / "reference.json").read_text())
    session = Session.open(path)
    for row in reference:
        completion = session.begin(row["text"], Sampling(temperature=0.0, max_new_tokens=64))
        text = "".join(session.stream(completion))
        assert completion.prompt_ids == row["ids"] and completion.ids == row["greedy_ids"]
        assert row["text"] + text == row["greedy_text"]
        with torch.no_grad():
            logits = session.model(torch.tensor([row["ids"]]))[0]
        assert (logits[-1] - torch.tensor(row["last_logits"])).abs().max() < 1e-4
        logprobs = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(row["ids"])[1:, None])
        assert logprobs.sum().item() == pytest.approx(row["sum_logprob"], abs=1e-3)


def test_gpt_nano_sort_sorts_every_input(data):
    model = load_model(data / "models" / "gpt-nano-sort")
    prompts = [list(digits) for digits in itertools.product(range(3), repeat=6)]
    assert greedy(model, prompts, 6, batch_size=300) == [sorted(prompt) for prompt in prompts]


def test_greedy_ids_equal_transformers_up_to_the_context(both):
    theirs, ours = both
    theirs.generation_config.eos_token_id = None
    for prompt in some_prompts(1, 10, 40):
        n = CONTEXT - len(prompt)
        ids = torch.tensor([prompt])
        expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False)
        expected = expected[0, len(prompt) :]
        assert greedy(ours, [prompt], n) == [expected.tolist()]


def test_cached_equals_uncached(both):
    _, ours = both
    (prompt,) = some_prompts(7)
    ids = list(prompt)
    for _ in range(30):
        with torch.no_grad():
            ids.append(ours(torch.tensor([ids]))[0, -1].argmax().item())
    assert greedy(ours, [prompt], 30) == [ids[7:]]


def test_left_padded_batches_equal_single_prompts(both):
    _, ours = both
    prompts = some_prompts(1, 5, 5, 30, 17, 2, 40)
    assert greedy(ours, prompts, 25, batch_size=4) == [greedy(ours, [prompt], 25)[0] for prompt in prompts]


@pytest.mark.parametrize("sampling", [{}, {"top_k": 20, "top_p": 0.8}, {"repetition_penalty": 1.3, "min_p": 0.01}])
def test_the_same_seed_gives_the_same_text_at_any_batch_size(session, sampling):
    prompts = ["a", "The quick brown fox", "", "To be, or not", "xyz" * 7, "b", "cd", "e" * 30]
    rows = [Sampling(max_new_tokens=3 + 4 * i) for i in range(8)]
    from llmctl.generation.records import Row

    texts = []
    for batch_size in (1, 3, 8):
        answers = session.answer(
            [Row(prompt, row) for prompt, row in zip(prompts, rows, strict=True)],
            Sampling(seed=42, ignore_eos=True, temperature=1.0, **sampling),
            num_samples=2,
            batch_size=batch_size,
        )
        texts.append([(answer.index, answer.sample, answer.completion.text) for answer in answers])
    assert texts[0] == texts[1] == texts[2]
    assert [(index, sample) for index, sample, _ in texts[0]] == list(itertools.product(range(8), range(2)))
    assert texts[0][4][2] != texts[0][5][2]


def test_another_seed_gives_another_text(session):
    texts = {session_text(session, "a", seed=seed) for seed in range(5)}
    assert len(texts) == 5


def session_text(session, prompt, **sampling):
    sampling = Sampling(**{"max_new_tokens": 20, "ignore_eos": True, "temperature": 1.0, **sampling})
    return "".join(session.stream(session.begin(prompt, sampling)))


def push_all(ids, tokenizer, **sampling):
    completion = Completion([97], resolve(Sampling(**sampling)), 0, len(ids) + 1, Marks(frozenset({256})), tokenizer)
    pieces = []
    for token in ids:
        completion.push(token)
        pieces.append(completion.take_text())
        if completion.finish_reason:
            break
    return completion, pieces


def test_characters_are_never_torn():
    text = "naïve café, 日本語, 👍🏽 end"
    completion, pieces = push_all([*text.encode(), 256], Tokenizer.bytes())
    assert "".join(pieces) == completion.text == text and completion.finish_reason == "stop"
    assert not any("\ufffd" in piece for piece in pieces)
    assert pieces.count("") == len(text.encode()) + 1 - len(text)


def test_a_character_that_never_ends_is_replaced():
    completion, pieces = push_all([97, 0xE6, 0x97, 256], Tokenizer.bytes())
    assert "".join(pieces) == completion.text == "a\ufffd"


@settings(max_examples=200, deadline=None)
@given(
    text=st.text("abcé", max_size=30),
    stops=st.lists(st.text("abcé", min_size=1, max_size=5), max_size=3),
)
def test_text_ends_before_the_first_stop_text_wherever_tokens_break(text, stops):
    completion, pieces = push_all([*text.encode(), 256], Tokenizer.bytes(), stop=stops)
    # the first to be complete wins, and of several complete at once the longest
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    expected = text[: min(ends)[1]] if ends else text
    assert completion.text == "".join(pieces) == expected
    assert completion.finish_reason == "stop"


def test_any_of_several_end_tokens_ends_a_text_and_can_be_ignored(session):
    ids = greedy(session.model, [[97]], 10)[0]
    first = {ids[4], ids[7]}
    stop_at = next(i for i, token in enumerate(ids) if token in first)
    for ignore, expected in ((False, ids[: stop_at + 1]), (True, ids)):
        sampling = resolve(Sampling(temperature=0.0, max_new_tokens=10, ignore_eos=ignore))
        marks = Marks(frozenset(first))
        (completion,) = complete(session.model, [prepare(session.model, [97], sampling, marks=marks)], 1)
        assert completion.ids == expected
        assert completion.finish_reason == ("length" if ignore else "stop")


def test_the_context_ends_a_text_and_is_reported(session):
    sampling = Sampling(max_new_tokens=1000, ignore_eos=True)
    completion = session.begin("a" * 60, sampling)
    for _ in session.stream(completion):
        pass
    # the last token is drawn but never read back, so it may lie one beyond
    assert len(completion.ids) == CONTEXT - 60 + 1
    assert completion.finish_reason == "length" and completion.is_cut_by_context
    with pytest.raises(UserError, match=f"65 tokens; the model's context is {CONTEXT}"):
        session.begin("a" * 65, sampling)


def test_an_empty_prompt_begins_with_bos_or_eos_or_is_refused(session, data):
    assert encode_prompt(session.tokenizer, "") == [256]
    stories = Tokenizer.load(data / "models" / "stories260K")
    assert encode_prompt(stories, "") == [stories.bos_id]
    assert encode_prompt(stories, "Once").count(stories.bos_id) == 1
    bare = Tokenizer.from_json(session.tokenizer.json, {})
    if bare.eos_id is None:
        with pytest.raises(UserError, match="neither a BOS nor an EOS"):
            encode_prompt(bare, "")


def test_a_token_beyond_the_vocabulary_is_refused(session):
    with pytest.raises(UserError, match="vocabulary ends at 256"):
        prepare(session.model, [3, 300], resolve(Sampling()))


def test_weights_that_are_no_numbers_are_told(checkpoint):
    model = load_model(checkpoint)
    with torch.no_grad():
        model.norm.weight[3] = torch.nan
    with pytest.raises(UserError, match="NaN"):
        greedy(model, [[1, 2]], 3)


def test_out_of_memory_names_the_flag(session, monkeypatch):
    def no_room(*args, **kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(causal_lm, "Cache", no_room)
    with pytest.raises(UserError, match="out of memory for 1 sequences of up to 21 tokens") as caught:
        session_text(session, "ab")
    assert "--batch-size" in caught.value.hint


def test_results_stream_in_order_before_all_is_done(session):
    begun = []

    def endless():
        for i in itertools.count():
            begun.append(i)
            yield prepare(session.model, [i % 256], resolve(Sampling(max_new_tokens=2)), sequence=i)

    results = complete(session.model, endless(), batch_size=2)
    assert [next(results).sequence for _ in range(100)] == list(range(100))
    assert len(begun) < 200


def test_python_api(checkpoint):
    model, tokenizer = api.load(checkpoint), api.load_tokenizer(checkpoint)
    one = api.generate(model, tokenizer, "ab", max_new_tokens=5, seed=1)
    several = api.generate(model, tokenizer, ["ab", "c"], max_new_tokens=5, seed=1, batch_size=1)
    assert one[0].text == several[0].text and len(several) == 2
    assert len(several[1].ids) <= 5


def test_command_prints_prompt_and_continuation(llmctl, data):
    path = data / "models" / "stories260K"
    expected = json.loads((path / "reference.json").read_text())[0]
    args = ["--temperature", 0, "-n", 64]
    assert llmctl("generate", path, expected["text"], *args).stdout == expected["greedy_text"] + "\n"
    only_new = expected["greedy_text"].removeprefix(expected["text"])
    piped = llmctl("generate", path, "--no-echo", *args, input=expected["text"] + "\n")
    assert piped.stdout == only_new + "\n"
    model_from_pipe = llmctl("generate", "-", "-p", expected["text"], *args, input=f"{path}\n")
    assert model_from_pipe.stdout == expected["greedy_text"] + "\n"


def test_threads_change_no_text(llmctl, checkpoint):
    texts = {llmctl("generate", checkpoint, "ab", "-n", "8", "--temp", "0", "--threads", n).stdout for n in (1, 3)}
    assert len(texts) == 1
    assert "at least 1" in llmctl("generate", checkpoint, "ab", "--threads", "0", code=2).stderr


def test_command_samples_and_stats(llmctl, checkpoint):
    args = ["generate", checkpoint, "ab", "-n", "4", "--num-samples", "3", "--ignore-eos", "--stats"]
    first = llmctl(*args, "--seed", "9", "--jsonl")
    again = llmctl(*args, "--seed", "9", "--jsonl", "--batch-size", "1")
    assert first.stdout == again.stdout and "seed 9" in first.stderr and "tokens/s" in first.stderr
    assert [json.loads(line)["sample"] for line in first.stdout.splitlines()] == [0, 1, 2]
    text = llmctl(*args, env={"LLMCTL_GENERATE_SEED": "9"}).stdout
    rows = [json.loads(line) for line in first.stdout.splitlines()]
    assert text == "---\n".join(f"ab{row['completion']}\n" for row in rows)


def test_jsonl_keeps_order_rows_keep_their_settings(llmctl, checkpoint):
    rows = [{"prompt": "x" * n, "id": n, "max-new-tokens": 2 + n % 3, "seed": 5} for n in (9, 1, 30, 4, 4)]
    rows[1]["logprobs"] = 2
    lines = "\n\n".join(json.dumps(row) for row in rows)
    result = llmctl("generate", checkpoint, "--jsonl", "--batch-size", 2, "--ignore-eos", input=lines)
    out = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(row["index"], row["id"], row["prompt"]) for row in out] == [
        (i, row["id"], row["prompt"]) for i, row in enumerate(rows)
    ]
    assert [row["completion_tokens"] for row in out] == [row["max-new-tokens"] for row in rows]
    assert out[3]["completion"] == out[4]["completion"], "the same prompt and seed of its own, the same text"
    assert [len(entry["top"]) for entry in out[1]["logprobs"]] == [2, 2, 2] and "logprobs" not in out[0]


@pytest.mark.parametrize(
    "line, complaint",
    [
        ("{", "line 2: not valid JSON"),
        ('{"text": "a"}', "line 2: expected an object"),
        ('{"prompt": "a", "temprature": 1}', "did you mean 'temperature'"),
        ('{"prompt": "a", "top_p": 2}', "line 2: top-p is 2; expected at most 1"),
        ('{"prompt": "%s"}' % ("a" * 65), "line 2 has 65 tokens; the model's context is 64"),
    ],
)
def test_a_row_that_cannot_be_is_named(llmctl, checkpoint, line, complaint):
    good = '{"prompt": "a", "max_new_tokens": 1}\n'
    assert complaint in llmctl("generate", checkpoint, "--jsonl", input=good + line, code=1).stderr


@pytest.mark.parametrize(
    "args, stdin, code, complaint",
    [
        (["absent", "a"], "", 1, "no such checkpoint"),
        (["MODEL", "a" * 65], "", 1, "65 tokens; the model's context is 64"),
        (["MODEL"], "", 1, "standard input is empty"),
        (["MODEL", "--jsonl"], "", 1, "standard input is empty"),
        (["MODEL", "-"], b"ab\xff", 1, "not UTF-8: byte 0xff at offset 2"),
        (["MODEL", "ab\udcff"], "", 1, "the prompt is not UTF-8: byte 0xff at offset 2"),
        (["MODEL", "--jsonl"], '{"prompt": "é\\ud83d"}', 1, "line 1 has half of a surrogate pair at character 1"),
        (["-", "-"], "", 2, "give --prompt"),
        (["-", "-p", "a"], "", 1, "a checkpoint path was expected"),
        (["MODEL", "a", "-p", "b"], "", 2, "one of them is enough"),
        (["MODEL", "a", "--top-p", "2"], "", 2, "at most 1"),
        (["MODEL", "a", "--logprobs", "2"], "", 2, "add --jsonl"),
        (["MODEL", "a", "--device", "nowhere"], "", 2, "nowhere"),
        (["MODEL", "a", "--temprature", "2"], "", 2, "--temperature"),
    ],
)
def test_a_wrong_call_gets_one_line(llmctl, checkpoint, args, stdin, code, complaint):
    args = [checkpoint if arg == "MODEL" else arg for arg in args]
    result = llmctl("generate", *args, input=stdin, code=code)
    message = result.stderr if isinstance(result.stderr, str) else result.stderr.decode()
    assert complaint in message and len(message.splitlines()) <= 2 and not result.stdout


def test_stopping_at_the_context_is_noted(llmctl, checkpoint):
    result = llmctl("generate", checkpoint, "a", "-n", 500, "--ignore-eos")
    assert "note: the completion stopped where the model's context ends" in result.stderr


def test_stop_text_ends_the_output(llmctl, checkpoint):
    whole = llmctl("generate", checkpoint, "a", "-n", 30, "--temperature", 0, "--no-echo", "--ignore-eos").stdout
    stop = whole[3:5]
    cut = llmctl("generate", checkpoint, "a", "-n", 30, "--temp", 0, "--no-echo", "--ignore-eos", "--stop", stop)
    assert cut.stdout == whole[: whole.index(stop)] + "\n"


def test_text_streams_and_a_reader_that_leaves_ends_it_quietly(data, tmp_path):
    path = data / "models" / "stories260K"
    command = [sys.executable, "-m", "llmctl", "generate", path, "Once", "-n", "500", "--ignore-eos"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path)
    assert process.stdout.read(8).startswith(b"Once")
    assert process.poll() is None, "text came before the end"
    process.stdout.close()
    assert process.wait(60) == 0 and process.stderr.read() == b""
