"""Beam search against transformers': the same texts and scores, for decoders and encoder-decoders, in any batch."""

from __future__ import annotations

import json

import pytest
import torch

transformers = pytest.importorskip("transformers")

from family_checks import Reference, reference, token_ids  # noqa: E402

from llmctl.errors import CalledWrongly  # noqa: E402
from llmctl.generation.complete import complete, prepare  # noqa: E402
from llmctl.generation.records import Row  # noqa: E402
from llmctl.generation.session import Session  # noqa: E402
from llmctl.generation.settings import Marks, Sampling, resolve, sampling_from  # noqa: E402
from llmctl.tokenizer import Tokenizer  # noqa: E402

VOCAB, EOS, START = 23, 1, 2
# So few tokens, and so many end tokens among them, that texts end at every length.
DECODER = transformers.LlamaConfig(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
ENCODER_DECODER = transformers.BartConfig(
    vocab_size=VOCAB,
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    max_position_embeddings=64,
    decoder_start_token_id=START,
    eos_token_id=EOS,
    forced_eos_token_id=None,
    pad_token_id=0,
)
SETTINGS = {
    "plain": {},
    "longer": {"length_penalty": 2.0},
    "shorter": {"length_penalty": -1.0},
    "early": {"early_stopping": True},
    "penalized": {"repetition_penalty": 1.7, "early_stopping": True},
    "no repeats": {"no_repeat_ngram_size": 2, "min_new_tokens": 5},
}


@pytest.fixture(scope="module", params=["decoder", "encoder-decoder"])
def both(request, tmp_path_factory) -> Reference:
    config, auto = {
        "decoder": (DECODER, transformers.AutoModelForCausalLM),
        "encoder-decoder": (ENCODER_DECODER, transformers.AutoModelForSeq2SeqLM),
    }[request.param]
    made = reference(config, tmp_path_factory.mktemp("model"), auto, spread=0.3)
    with torch.no_grad():  # flat enough for several texts to be likely
        made.model.get_output_embeddings().weight.mul_(0.5)
        if made.model.config.is_encoder_decoder:
            made.model.final_logits_bias.normal_()
    made.model.save_pretrained(made.directory)
    return made


def prompts(*lengths: int) -> list[list[int]]:
    return [token_ids(VOCAB - 3, 1, length, seed=length)[0].add(3).tolist() for length in lengths]


def their_search(model, prompts, new_tokens, ends, **settings) -> tuple[list[list[int]], list[float]]:
    """Texts and scores of one call; decoders get their prompts padded on the left."""
    is_decoder = not model.config.is_encoder_decoder
    length = max(map(len, prompts))
    pad = [[0] * (length - len(prompt)) for prompt in prompts]
    ids = torch.tensor([p + prompt if is_decoder else prompt + p for p, prompt in zip(pad, prompts)])
    result = model.generate(
        ids,
        attention_mask=(ids != 0).long(),
        do_sample=False,
        max_new_tokens=new_tokens,
        eos_token_id=ends,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        **settings,
    )
    texts = [text[length if is_decoder else 1 :].tolist() for text in result.sequences]
    return [cut(text, ends) for text in texts], result.sequences_scores.tolist()


def cut(text: list[int], ends: list[int]) -> list[int]:
    """Up to the end token, which transformers pads behind."""
    return next((text[: i + 1] for i, token in enumerate(text) if token in ends), text)


def our_search(model, prompts, new_tokens, ends, n_best=1, batch_size=64, **settings):
    sampling = resolve(Sampling(max_new_tokens=new_tokens, **settings))
    marks = Marks(frozenset(ends), START)
    completions = [prepare(model, ids, sampling, marks=marks) for ids in prompts]
    for completion in completions:
        completion.n_best = n_best
    done = [one for first in complete(model, completions, batch_size) for one in (first, *first.runners_up)]
    return [one.ids for one in done], [one.score for one in done]


@pytest.mark.parametrize("named", list(SETTINGS))
def test_texts_and_scores_are_those_of_transformers(both, named):
    ours = both.ours()
    for prompt in prompts(1, 4, 9, 12):
        for num_beams in (2, 5):
            settings = {"num_beams": num_beams, **SETTINGS[named]}
            texts, scores = their_search(both.model, [prompt], 12, [EOS], num_return_sequences=num_beams, **settings)
            found, found_scores = our_search(ours, [prompt], 12, [EOS], n_best=num_beams, **settings)
            assert found == texts
            assert found_scores == pytest.approx(scores, rel=1e-5, abs=1e-4)


def test_the_settings_make_a_difference(both):
    ours = both.ours()
    texts = {
        name: str(our_search(ours, prompts(3, 4, 9, 12), 12, [EOS], num_beams=4, **settings)[0])
        for name, settings in SETTINGS.items()
    }
    assert len(set(texts.values())) >= len(texts) - 1
    lengths = {len(text) for text in our_search(ours, prompts(1, 4, 9, 12), 12, [EOS], n_best=4, num_beams=4)[0]}
    assert len(lengths) > 2, "texts should end at different lengths"


def test_several_end_tokens_and_none(both):
    ours = both.ours()
    for ends in ([EOS, 7, 11], [EOS, 4]):
        texts, scores = their_search(both.model, prompts(6), 10, ends, num_beams=3, num_return_sequences=3)
        found, found_scores = our_search(ours, prompts(6), 10, ends, num_beams=3, n_best=3)
        assert found == texts and found_scores == pytest.approx(scores, rel=1e-5, abs=1e-4)
    for text in our_search(ours, prompts(6), 10, [EOS], num_beams=3, n_best=3, ignore_eos=True)[0]:
        assert len(text) == 10


def test_a_padded_batch_gives_what_each_prompt_gives_alone(both):
    ours, several = both.ours(), prompts(2, 5, 9, 3, 12)
    expected, scores = their_search(both.model, several, 12, [EOS], num_beams=3)
    for batch_size in (1, 6, 64):
        found, found_scores = our_search(ours, several, 12, [EOS], num_beams=3, batch_size=batch_size)
        assert found == expected
        assert found_scores == pytest.approx(scores, rel=1e-5, abs=1e-4)


def test_one_beam_is_greedy(both):
    ours = both.ours()
    texts = our_search(ours, prompts(5), 8, [EOS], num_beams=1, temperature=0.0)[0]
    theirs = both.model.generate(
        torch.tensor(prompts(5)), do_sample=False, max_new_tokens=8, eos_token_id=EOS, pad_token_id=0
    )[0]
    assert texts == [cut(theirs[1 if both.model.config.is_encoder_decoder else 5 :].tolist(), [EOS])]


def test_forced_tokens_are_those_of_transformers(both):
    if not both.model.config.is_encoder_decoder:
        pytest.skip("only texts of their own begin and end so")
    forced = {"forced_bos_token_id": 9, "forced_eos_token_id": EOS}
    ours, several = both.ours(), prompts(2, 7)
    for num_beams in (1, 4):
        theirs = both.model.generate(
            torch.tensor([several[1]]),
            do_sample=False,
            max_new_tokens=6,
            eos_token_id=EOS,
            num_beams=num_beams,
            **forced,
        )
        sampling = resolve(Sampling(max_new_tokens=6, num_beams=num_beams, temperature=0.0))
        marks = Marks(frozenset([EOS]), START, first=9, last=EOS)
        done = list(complete(ours, [prepare(ours, ids, sampling, marks=marks) for ids in several], 8))
        assert done[1].ids == cut(theirs[0, 1:].tolist(), [EOS])
        assert all(one.ids[0] == 9 and one.ids[-1] == EOS for one in done)


def test_drawn_texts_keep_the_rules(both):
    ours = both.ours()
    sampling = resolve(Sampling(max_new_tokens=20, no_repeat_ngram_size=2, min_new_tokens=9, seed=3, temperature=1.0))
    marks = Marks(frozenset([EOS]), START)
    for one in complete(ours, [prepare(ours, [5, 6, 7], sampling, sequence=i, marks=marks) for i in range(8)], 8):
        text = [*one.continued, *one.ids]
        runs = list(zip(text, text[1:]))
        assert len(runs) == len(set(runs))
        assert EOS not in one.ids[:9]


def test_a_search_and_a_draw_exclude_each_other():
    with pytest.raises(CalledWrongly, match="num-beams 3 is a search.*temperature"):
        Sampling(num_beams=3, temperature=0.5)
    recommended = sampling_from({"num_beams": 4, "length_penalty": 2.0})
    assert resolve(Sampling(), recommended).num_beams == 4 and resolve(Sampling(), recommended).is_greedy
    drawn = resolve(Sampling(temperature=0.7), recommended)
    assert (drawn.num_beams, drawn.temperature) == (1, 0.7)
    assert resolve(Sampling(num_beams=2), sampling_from({"do_sample": True, "top_p": 0.9})).top_p == 1.0
    assert sampling_from({"do_sample": True, "num_beams": 4}).num_beams is None


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    config = transformers.LlamaConfig(**{**DECODER.to_dict(), "vocab_size": 257})
    made = reference(config, tmp_path_factory.mktemp("checkpoint"))
    Tokenizer.bytes().save(made.directory)
    return made.directory


def test_samples_of_a_search_are_its_best(checkpoint):
    session = Session.open(checkpoint)
    rows = [Row("ab"), Row("c", Sampling(num_beams=1, temperature=0.0))]
    answers = list(session.answer(rows, Sampling(num_beams=3, max_new_tokens=5, ignore_eos=True), num_samples=2))
    assert [(answer.index, answer.sample) for answer in answers] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    first, second, *drawn = [answer.completion for answer in answers]
    assert first.score > second.score and first.ids != second.ids
    assert [completion.score for completion in drawn] == [None, None]
    with pytest.raises(CalledWrongly, match="num-samples 4 is more than num-beams 3"):
        list(session.answer([Row("ab")], Sampling(num_beams=3), num_samples=4))


def test_log_probabilities_of_a_search_are_the_models_own(checkpoint):
    session = Session.open(checkpoint)
    sampling = Sampling(num_beams=3, max_new_tokens=6, logprobs=2, ignore_eos=True, repetition_penalty=1.3)
    (answer,) = session.answer([Row("abc")], sampling)
    completion = answer.completion
    ids = torch.tensor([[*completion.prompt_ids, *completion.ids]])
    with torch.no_grad():
        logprobs_TV = session.model(ids).log_softmax(-1)[0, len(completion.prompt_ids) - 1 : -1]
    assert len(completion.logprobs) == 6
    for entry, token, logprobs_V in zip(completion.logprobs, completion.ids, logprobs_TV):
        best = logprobs_V.topk(2)
        assert entry.token == token and entry.logprob == pytest.approx(logprobs_V[token].item(), abs=1e-4)
        assert [i for i, _ in entry.top] == best.indices.tolist()


def test_a_stop_text_cuts_what_was_found(checkpoint):
    session = Session.open(checkpoint)
    whole = session.begin("abc", Sampling(num_beams=2, max_new_tokens=8, ignore_eos=True))
    text = "".join(session.stream(whole))
    stop = whole.text[2]
    cut_off = session.begin("abc", Sampling(num_beams=2, max_new_tokens=8, ignore_eos=True, stop=(stop,)))
    assert "".join(session.stream(cut_off)) == text[: text.index(stop)] and cut_off.finish_reason == "stop"


def test_the_command_reports_scores(llmctl, checkpoint):
    lines = llmctl(
        *(
            "generate",
            checkpoint,
            "--jsonl",
            "--num-beams",
            3,
            "--num-samples",
            2,
            "-n",
            4,
            "--no-repeat-ngram-size",
            2,
        ),
        input='{"prompt": "ab"}\n{"prompt": "xyz", "length_penalty": 0.5}\n',
    ).stdout.splitlines()
    records = [json.loads(line) for line in lines]
    assert [(record["index"], record["sample"]) for record in records] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert records[0]["score"] > records[1]["score"]
    wrong = llmctl("generate", checkpoint, "ab", "--num-beams", 3, "--temperature", 0.5, code=2)
    assert "num-beams 3 is a search" in wrong.stderr
