"""`llmctl eval`: likelihoods in shared batches, windows of texts, resuming and comparing, on tiny models."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from llmctl.errors import CalledWrongly, UserError
from llmctl.evaluate import comparison, perplexity, report, results, summary, task
from llmctl.evaluate.batches import plan
from llmctl.evaluate.encoding import PairEncoder
from llmctl.evaluate.judge import LanguageModelJudge, greedy
from llmctl.evaluate.likelihood import Fork, LikelihoodScorer, _rate
from llmctl.evaluate.run import Evaluation
from llmctl.evaluate.settings import EvalSettings
from llmctl.generation.complete import complete, prepare
from llmctl.generation.session import Session
from llmctl.models import families
from llmctl.models.initialization import new_model
from llmctl.models.loading import save_model
from llmctl.tokenizer import Tokenizer

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
DECODER = {
    **SIZES,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
LONGROPE = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
CONFIGS = {
    "llama": {**DECODER, "model_type": "llama"},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 128, "n_inner": 64},
    "mistral": {**DECODER, "model_type": "mistral", "sliding_window": 8},
    "longrope": {
        **DECODER,
        "model_type": "phi3",
        "num_key_value_heads": 4,
        "original_max_position_embeddings": 16,
        "rope_scaling": LONGROPE,
    },
    "mamba": {
        **SIZES,
        "model_type": "mamba",
        "state_size": 4,
        "time_step_rank": 2,
        "conv_kernel": 4,
        "expand": 2,
        "layer_norm_epsilon": 1e-5,
        "use_bias": False,
        "use_conv_bias": True,
        "hidden_act": "silu",
    },
}
T5 = {
    "model_type": "t5",
    "d_model": 32,
    "d_kv": 8,
    "num_heads": 4,
    "d_ff": 64,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "feed_forward_proj": "relu",
    "layer_norm_epsilon": 1e-6,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
    "is_encoder_decoder": True,
}
COMMON = {"vocab_size": 257, "tie_word_embeddings": True, "eos_token_id": 256, "torch_dtype": "float32"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """`checkpoint(name)`: a directory with random weights and the tokenizer of bytes."""
    made = {}

    def make(name: str = "llama"):
        if name not in made:
            path = tmp_path_factory.mktemp(name)
            hf = {**COMMON, **(T5 if name == "t5" else CONFIGS[name])}
            model = new_model(families.find(hf["model_type"]).config_from_hf(hf), seed=0)
            draws = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for parameter in model.parameters():
                    if (
                        parameter.dim() > 1
                    ):  # a fresh model's branches add nothing: neither attention nor cache would matter
                        parameter.normal_(0.0, 0.25, generator=draws)
            save_model(model, path)
            Tokenizer.bytes().save(path)
            made[name] = path
        return made[name]

    return make


def some_forks(seed: int = 0) -> list[Fork]:
    """Some contexts begin alike, some alone; continuations of one token and of several."""
    draw = random.Random(seed)

    def ids(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw.randrange(256) for _ in range(draw.randint(low, high)))

    first, second = ids(50, 50), ids(40, 40)
    before = [(), first, first, first, second, second, first, second, (), first, second, first] * 3
    return [Fork(each + ids(1, 20), [ids(1, 6) for _ in range(draw.randint(1, 4))]) for each in before]


def scored(model, forks, batch_size):
    found = dict(LikelihoodScorer(model, None, batch_size).score(forks))
    return [found[i] for i in range(len(forks))]


@pytest.mark.parametrize("name", CONFIGS)
def test_likelihoods_are_those_of_each_text_run_alone(checkpoint, name):
    model = Session.open(checkpoint(name)).model
    forks = some_forks()
    for fork, found in zip(forks, scored(model, forks, 8)):
        for ids, likelihood in zip(fork.continuations, found):
            with torch.inference_mode():
                # The last token is not read: where a rope's angles depend on the length, that would be another text.
                logprobs = model(torch.tensor([fork.context + ids[:-1]]))[0].float().log_softmax(-1)
            at = torch.arange(len(fork.context) - 1, len(logprobs))
            expected = logprobs[at, torch.tensor(ids)].sum().item()
            assert likelihood.logprob == pytest.approx(expected, abs=2e-4)
            assert likelihood.is_greedy == (logprobs[at].argmax(-1) == torch.tensor(ids)).all().item()
            assert likelihood.n_tokens == len(ids)


def test_of_equal_logits_the_first_is_the_likeliest():
    logits_NV = torch.tensor([[1.0, 3.0, 3.0, 0.0]] * 3 + [[5.0, 1.0, 2.0, 5.0]])
    targets_N = torch.tensor([1, 2, 0, 0])
    expected = logits_NV.log_softmax(-1)[torch.arange(4), targets_N]
    logprobs_N, hits_N = _rate(logits_NV.clone(), targets_N)
    assert hits_N.tolist() == [True, False, False, True] and logprobs_N.tolist() == pytest.approx(expected.tolist())


def test_an_encoder_reads_the_context_and_its_decoder_the_continuation(checkpoint):
    model, forks = Session.open(checkpoint("t5")).model, some_forks()
    scores = dict(LikelihoodScorer(model, 0, 8).score(forks))
    for number, fork in enumerate(forks):
        for ids, likelihood in zip(fork.continuations, scores[number]):
            with torch.inference_mode():
                logits = model(torch.tensor([fork.context]), input_ids_BT=torch.tensor([[0, *ids[:-1]]]))[0].float()
            expected = logits.log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)].sum().item()
            assert likelihood.logprob == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float32) for name in ("llama", "gpt2", "mistral")), ("llama", torch.bfloat16)]
)
def test_likelihoods_do_not_depend_on_the_batch_size(checkpoint, name, dtype):
    model, forks = Session.open(checkpoint(name), dtype).model, some_forks()
    draw = random.Random(1)
    forks += [Fork((7,), [tuple(draw.choices(range(256), k=draw.randint(1, 100)))]) for _ in range(20)]
    once = scored(model, forks, 32)
    assert all(scored(model, forks, batch_size) == once for batch_size in (1, 3, 7))
    unasked = dict(LikelihoodScorer(model, None, 5).score(forks, asks_greedy=False))
    plain = [[replace(each, is_greedy=None) for each in found] for found in once]
    assert [unasked[number] for number in range(len(forks))] == plain


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16])
def test_a_narrow_cache_is_what_is_measured(checkpoint, dtype):
    """--kv-dtype: of a text that is read in one go, too, the keys and values are those that generation would see."""
    model = Session.open(checkpoint()).model
    forks = [Fork(fork.context, fork.continuations[:n]) for n, fork in enumerate(some_forks()[:6], 1)]
    exact = scored(model, forks, 4)
    model.cache_dtype = dtype
    found = scored(model, forks, 4)
    assert scored(model, forks, 1) == found
    for fork, before, after in zip(forks, exact, found, strict=True):
        for ids, wide, narrow in zip(fork.continuations, before, after, strict=True):
            cache, inputs_1T = model.begin([fork.context], [fork.context], len(ids))
            expected = 0.0
            for token in ids:
                expected += float(model.next_logits(inputs_1T, cache).detach()[0].log_softmax(-1)[token])
                inputs_1T = torch.tensor([[token]])
            assert narrow.logprob == pytest.approx(expected, abs=2e-4)
            assert abs(narrow.logprob - wide.logprob) > 4e-4


def test_what_texts_share_is_run_once(checkpoint, monkeypatch):
    model, forks = Session.open(checkpoint()).model, some_forks()
    assert {len(batch.shared) > 30 for batch in plan([f.context for f in forks], 4, True)} == {True, False}
    widths = []
    for name in ("hidden", "next_logits"):
        run = getattr(model, name)
        counted = lambda ids, *args, run=run, **more: widths.append(ids.numel()) or run(ids, *args, **more)  # noqa: E731
        monkeypatch.setattr(model, name, counted)
    scored(model, forks, 8)
    separate = sum(len(fork.context) + len(ids) for fork in forks for ids in fork.continuations)
    assert sum(widths) < separate / 2


def test_every_text_is_in_one_batch_and_begins_with_what_it_shares():
    texts = [fork.context for fork in some_forks(1)]
    for batch_size in (1, 5, 100):
        batches = list(plan(texts, batch_size, True))
        assert sorted(number for batch in batches for number in batch.numbers) == list(range(len(texts)))
        assert all(len(batch.numbers) <= batch_size for batch in batches)
        for batch in batches:
            assert all(tuple(texts[i][: len(batch.shared)]) == tuple(batch.shared) for i in batch.numbers)
            assert all(len(texts[i]) > len(batch.shared) for i in batch.numbers)


def test_generation_behind_a_shared_prefix_is_that_of_each_prompt_alone(checkpoint):
    session = Session.open(checkpoint())
    prompts = [fork.context for fork in some_forks(2)]
    found = dict(LanguageModelJudge(session, batch_size=8).generate(prompts, greedy(6)))
    alone = complete(session.model, [prepare(session.model, ids, greedy(6)) for ids in prompts], 1)
    assert [found[i].ids for i in range(len(prompts))] == [each.ids for each in alone]


def test_windows_predict_every_token_once_with_enough_before_it():
    ids = list(range(100, 205))
    for window, stride in ((10, 10), (10, 3), (8, 1), (200, 200)):
        forks = list(perplexity.windows(ids, window, stride))
        assert [token for fork in forks for token in fork.continuations[0]] == ids[1:]
        for fork in forks[1:-1]:
            assert len(fork.context) + len(fork.continuations[0]) == window + 1
            assert len(fork.continuations[0]) == stride


def test_each_part_of_a_text_has_its_own_bytes():
    text = "Ein größerer Text, in Stücken. " * 40
    document = perplexity.Document("text", [256, *text.encode()], len(text.encode()))
    parts = list(perplexity.items(iter([document]), 10, 10, Tokenizer.bytes()))
    sizes = [item.fields["_bytes"] for item in parts]
    assert len(parts) > 2 and sum(sizes) == document.n_bytes
    assert all(abs(size - 320) <= 8 for size in sizes[:-1])  # what cuts a character in two counts a little more


@pytest.mark.parametrize("stride", [None, 16])
def test_perplexity_is_that_of_transformers(checkpoint, stride, tmp_path, llmctl_here):
    transformers = pytest.importorskip("transformers")
    text = "A cat sat on the mat. Two dogs looked at it, and nobody said a word for a long while. " * 5
    (tmp_path / "text.txt").write_text(text)
    flags = [] if stride is None else ["--stride", stride]
    result = llmctl_here("eval", checkpoint(), "text.txt", "--json", *flags)
    found = {line["metric"]: line for line in map(json.loads, result.stdout.splitlines())}

    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint())
    ids, nats, done = torch.tensor([256, *text.encode()]), 0.0, 1
    while done < len(ids):
        end = min(len(ids), done + (128 if done == 1 or stride is None else stride))
        start = max(0, end - 1 - 128)
        with torch.no_grad():
            logprobs = model(ids[None, start : end - 1]).logits[0].log_softmax(-1)
        nats -= logprobs[done - 1 - start :].gather(1, ids[done:end, None]).sum().item()
        done = end
    n_tokens = len(ids) - 1
    assert found["nats_per_token"]["value"] == pytest.approx(nats / n_tokens, abs=1e-4)
    assert found["bits_per_byte"]["value"] == pytest.approx(nats / np.log(2) / len(text), abs=1e-4)
    assert found["nats_per_token"]["stderr"] > 0 and found["nats_per_token"]["n"] == n_tokens


def test_perplexity_of_a_stream_is_that_of_its_held_out_texts(
    checkpoint, tmp_path, llmctl, llmctl_here, write_tokens, some_texts
):
    write_tokens(tmp_path / "tokens.arrow", some_texts[:60], held_out=7)
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in some_texts[53:60]))
    streamed = llmctl_here("eval", checkpoint(), "tokens.arrow", "--json", "-o", "a.jsonl").stdout
    piped = llmctl("eval", checkpoint(), "-", "--json", input=(tmp_path / "tokens.arrow").read_bytes()).stdout
    llmctl_here("eval", checkpoint(), "texts.jsonl", "--json", "-o", "b.jsonl")
    assert streamed == piped.decode()
    (ours,), (plain,) = results.read(tmp_path / "a.jsonl"), results.read(tmp_path / "b.jsonl")
    assert [each["bytes"] for each in ours.records] == [each["bytes"] for each in plain.records]
    # a stream's documents end with their end-of-text token, which is predicted too
    assert [each["tokens"] for each in ours.records] == [each["tokens"] + 1 for each in plain.records]


ROWS = [
    {"q": f"word {i} and {'so ' * (i % 7)}", "c": ["left", "right", f"number {i}"], "a": i % 3, "kind": "ab"[i % 2]}
    for i in range(30)
]
CHOICES = {
    "kind": "multiple_choice",
    "prompt": "Q: {{ q }}\nA:",
    "choices": "{{ c }}",
    "answer": "{{ a }}",
    "group": "{{ kind }}",
    "metrics": ["acc", "acc_norm"],
}
TEXTS = {
    "kind": "generation",
    "prompt": "{{ q }}",
    "answer": "{{ c[0] }}",
    "max_new_tokens": 5,
    "metrics": ["exact_match", "f1"],
}


@pytest.fixture
def written(tmp_path):
    """`written(name, content)`: a task file over ROWS, or over `rows`."""

    def write(name: str, content: dict, rows: list[dict] = ROWS):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / f"{name}.yaml").write_text(json.dumps({"data": "rows.jsonl", **content}))
        return task.load(tmp_path / f"{name}.yaml")

    return write


def evaluated(path, one, output=None, **settings):
    evaluation = Evaluation(path, EvalSettings(**settings))
    with results.ResultsFile(output, settings.get("resume", False)) as file:
        return evaluation.run(one, file, lambda text: None, lambda done, note: None)


@pytest.mark.parametrize("content", [CHOICES, TEXTS], ids=["choices", "texts"])
@pytest.mark.parametrize("num_fewshot", [0, 1])
def test_results_do_not_depend_on_the_batch_size(checkpoint, written, content, num_fewshot):
    one = written("mine", content)
    runs = [evaluated(checkpoint(), one, batch_size=size, num_fewshot=num_fewshot) for size in (1, 4, 32)]
    assert all(run.records == runs[0].records and run.numbers == runs[0].numbers for run in runs)
    assert runs[0].numbers[0].n == len(ROWS)


def test_groups_and_standard_errors(checkpoint, written):
    done = evaluated(checkpoint(), written("mine", CHOICES))
    right = np.array([record["scores"]["acc"] for record in done.records])
    whole = next(number for number in done.numbers if number.metric == "acc" and number.group is None)
    assert whole.value == right.mean() and whole.stderr == pytest.approx(right.std(ddof=1) / np.sqrt(len(right)))
    parts = {number.group: number for number in done.numbers if number.metric == "acc" and number.group}
    assert parts["a"].n == 15 and parts["b"].value == right[1::2].mean()


def test_a_stopped_run_goes_on(checkpoint, written, tmp_path):
    one, path = written("mine", CHOICES), str(tmp_path / "out.jsonl")
    whole = evaluated(checkpoint(), one, path, batch_size=2)
    lines = (tmp_path / "out.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "out.jsonl").write_bytes(b"".join(lines[:9]) + lines[9][:17])  # killed in the middle of a line
    again = evaluated(checkpoint(), one, path, batch_size=2, resume=True)
    assert again.records == whole.records and again.numbers == whole.numbers
    assert sorted((tmp_path / "out.jsonl").read_bytes().splitlines()) == sorted(b"".join(lines).splitlines())
    few = evaluated(checkpoint(), one, path, limit=3, resume=True)
    assert [record["id"] for record in few.records] == [0, 1, 2] and few.numbers[0].n == 3


def test_a_run_goes_on_only_as_what_it_was(checkpoint, written, tmp_path):
    one, path = written("mine", CHOICES), str(tmp_path / "out.jsonl")
    evaluated(checkpoint(), one, path)
    with pytest.raises(UserError, match="another model sha256"):
        evaluated(checkpoint("gpt2"), one, path, resume=True)
    with pytest.raises(UserError, match="another num fewshot"):
        evaluated(checkpoint(), one, path, resume=True, num_fewshot=2)
    with pytest.raises(UserError, match="another task sha256"):
        evaluated(checkpoint(), written("mine", {**CHOICES, "prompt": "{{ q }}"}), path, resume=True)
    with pytest.raises(UserError, match="another data sha256"):
        evaluated(checkpoint(), written("mine", CHOICES, ROWS[:9]), path, resume=True)
    with pytest.raises(CalledWrongly, match="exists already"):
        evaluated(checkpoint(), one, path)


def test_prompts_beyond_the_context_are_counted(checkpoint, written):
    rows = [*ROWS[:4], {**ROWS[0], "q": "x" * 200}]
    for content in (CHOICES, TEXTS):
        one = written("mine", content, rows)
        left_out = evaluated(checkpoint(), one)
        assert [record["id"] for record in left_out.records if "overflow" in record] == [4]
        assert left_out.numbers[0].n == 4 and left_out.notes[0].startswith("1 of 5 items did not fit")
        shortened = evaluated(checkpoint(), one, on_long="truncate")
        assert shortened.numbers[0].n == 5 and shortened.notes == [
            "1 of 5 prompts lost their beginning to fit into the context"
        ]
        with pytest.raises(UserError, match="tokens, the model's context is 128"):
            evaluated(checkpoint(), one, on_long="error")
    # few-shot examples are what usually makes a prompt too long
    assert len(evaluated(checkpoint(), written("mine", CHOICES), num_fewshot=8).notes) == 1


def test_paired_significance(tmp_path):
    scipy = pytest.importorskip("scipy.stats")
    for one, other in ((0, 0), (3, 9), (20, 1), (7, 7)):
        expected = 1.0 if one + other == 0 else scipy.binomtest(one, one + other, 0.5).pvalue
        assert comparison.mcnemar(one, other) == pytest.approx(expected)
    draw = np.random.default_rng(0)
    first = draw.random(400) < 0.6
    second = np.where(draw.random(400) < 0.8, first, draw.random(400) < 0.3)
    for name, right in (("a", first), ("b", second)):
        run = {"kind": "run", "task": "t", "task_kind": "multiple_choice", "metrics": ["acc"], "model": name}
        items = [{"kind": "item", "task": "t", "id": i, "scores": {"acc": float(x)}} for i, x in enumerate(right)]
        (tmp_path / name).write_text("".join(json.dumps(each) + "\n" for each in [run, *items]))
    (found,) = comparison.compare(tmp_path / "a", tmp_path / "b")
    assert found.difference == pytest.approx(first.mean() - second.mean()) and found.n == 400
    assert (found.only_first, found.only_second) == ((first > second).sum(), (second > first).sum())
    expected = scipy.bootstrap((first * 1.0 - second,), np.mean, rng=np.random.default_rng(0)).confidence_interval
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.01)
    assert found.bootstrap_p < 0.05 and found.mcnemar_p < 0.05
    same = comparison.compare(tmp_path / "a", tmp_path / "a")[0]
    assert same.mcnemar_p == 1 and same.bootstrap_p == 1 and same.difference == 0


def test_texts_are_compared_with_themselves_alone(tmp_path):
    run = {"kind": "run", "task": "perplexity", "task_kind": "perplexity", "metrics": [], "model": "m"}
    for name, cuts, tokens in (("a", (80, 60), 20), ("b", (80, 60), 40), ("c", (70, 70), 20)):
        items = [
            {"kind": "item", "task": "perplexity", "id": i, "nats": 8.0 * n, "tokens": tokens, "bytes": n, "scores": {}}
            for i, n in enumerate(cuts)
        ]
        (tmp_path / name).write_text("".join(json.dumps(each) + "\n" for each in [run, *items]))
    (found,) = comparison.compare(tmp_path / "a", tmp_path / "b")
    assert found.metric == "bits_per_byte" and found.difference == 0 and found.first == pytest.approx(8 / np.log(2))
    with pytest.raises(UserError, match="item 0 is a text of 80 bytes in the one and of 70 in the other"):
        comparison.compare(tmp_path / "a", tmp_path / "c")


def test_models_of_one_name_are_columns_of_their_own(tmp_path):
    for name, right in (("a", 1.0), ("b", 0.0)):
        run = {"task": "t", "task_kind": "multiple_choice", "metrics": ["acc"], "model": f"runs/{name}/step-9"}
        lines = [{"kind": "run", **run}, {"kind": "item", "task": "t", "id": 0, "scores": {"acc": right}}]
        (tmp_path / name).write_text("".join(json.dumps(each) + "\n" for each in lines))
    report.write(str(tmp_path / "both.md"), [str(tmp_path / "a"), str(tmp_path / "b")])
    assert "1.0000 (1) | 0.0000 (1) |" in (tmp_path / "both.md").read_text()


@pytest.mark.parametrize(
    ("line", "missing"),
    [({"kind": "run"}, "task"), ({"kind": "run", "task": "t"}, "task_kind"), ({"kind": "item"}, "task")],
)
def test_a_line_of_results_that_lacks_something(tmp_path, line, missing):
    (tmp_path / "a").write_text(json.dumps(line) + "\n")
    with pytest.raises(UserError, match=f"a:1: a line of results without '{missing}'"):
        results.read(tmp_path / "a")


def test_the_error_of_a_ratio_is_that_of_resampled_windows():
    draw = np.random.default_rng(0)
    tokens = draw.integers(20, 200, 300)
    windows = [[float(n * draw.normal(3, 0.5)), int(n)] for n in tokens]
    record = {"windows": windows, "scores": {}, "bytes": None, "tokens": int(tokens.sum())}
    number = summary.summarize("p", "perplexity", (), [record])[0]
    array = np.array(windows)
    resampled = [array[rows].sum(0) for rows in draw.integers(0, 300, (2000, 300))]
    assert number.stderr == pytest.approx(np.std([nats / count for nats, count in resampled]), rel=0.1)


def test_the_split_between_context_and_continuation(data):
    tokenizer = Tokenizer.load(data / "models" / "stories260K")
    encoder = PairEncoder(tokenizer)
    (fork,) = encoder.fork("Once upon a ", ["time", "day"], "here")
    assert tokenizer.decode(fork.context) == "Once upon a"
    assert [tokenizer.decode([*fork.context, *ids]) for ids in fork.continuations] == [
        "Once upon a time",
        "Once upon a day",
    ]
    (alone,) = encoder.fork("", ["Once"], "here")
    assert alone.context == (tokenizer.bos_id,) and tokenizer.decode(alone.continuations[0]) == "Once"
    with pytest.raises(UserError, match="adds no token"):
        encoder.fork("Once", [""], "here")


def test_the_command(checkpoint, written, tmp_path, llmctl, llmctl_here):
    written("mine", CHOICES)
    first = llmctl("eval", checkpoint(), "--task", "mine.yaml", "-o", "one.jsonl", "--json")
    lines = [json.loads(line) for line in first.stdout.splitlines()]
    assert {(line["metric"], line.get("group")) for line in lines} >= {("acc", None), ("acc_norm", "a")}
    assert "standard error" in first.stderr
    second = llmctl_here(
        "eval", checkpoint("gpt2"), "rows.jsonl", "--task", "mine.yaml", "-o", "two.jsonl", "--show", 1
    )
    assert second.stdout.strip() == str(tmp_path / "two.jsonl") and "Q: word 0" in second.stderr
    compared = json.loads(llmctl_here("eval", "--compare", "one.jsonl", "two.jsonl", "--json").stdout.splitlines()[0])
    assert compared["n"] == 30 and 0 < compared["mcnemar_p"] <= 1
    assert llmctl_here("eval", "--report", "report.md", "one.jsonl", "two.jsonl").stdout.strip().endswith("/report.md")
    for name in ("report.html", "report.json"):
        report.write(tmp_path / name, [tmp_path / "one.jsonl", tmp_path / "two.jsonl"])
    markdown = (tmp_path / "report.md").read_text()
    assert "| mine |  | acc |" in markdown and "report-1.svg" in markdown
    assert (tmp_path / "report-1.svg").read_text().count("<rect") > 4
    assert "<svg" in (tmp_path / "report.html").read_text()
    assert len(json.loads((tmp_path / "report.json").read_text())) == 2
    with pytest.raises(CalledWrongly, match="no such task"):
        task.find("helaswag")
    assert "where is its data" in llmctl_here("eval", checkpoint(), "--task", "hellaswag", code=2).stderr


def test_what_is_read_is_never_replaced_and_nothing_is_no_measurement(checkpoint, tmp_path, llmctl_here):
    (tmp_path / "text.txt").write_text("some words")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_text("")
    model = checkpoint()
    said = llmctl_here("eval", model, "text.txt", "-o", "text.txt", "--overwrite", code=2).stderr
    assert "would replace text.txt, which is read" in said and (tmp_path / "text.txt").read_text() == "some words"
    llmctl_here("eval", model, "text.txt", "-o", "out.json")
    assert "would replace" in llmctl_here("eval", "--report", "out.json", "out.json", "--overwrite", code=2).stderr
    assert "exists already" in llmctl_here("eval", model, "text.txt", "-o", "out.json", code=2).stderr
    assert "empty.txt: no text in it" in llmctl_here("eval", model, "empty.txt", code=1).stderr
    assert "standard input: no text in it" in llmctl_here("eval", model, "-", code=1).stderr
    assert "disk full" in llmctl_here("eval", model, "text.txt", "-o", "/dev/full", "--overwrite", code=1).stderr
    assert "llmctl tokenize" in llmctl_here("eval", model, "latin.txt", code=1).stderr
