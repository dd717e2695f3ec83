"""The chat as a library and through pipes: prompts, the cache that is kept, contexts that fill up, sessions, corrections."""

from __future__ import annotations

import codecs
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

transformers = pytest.importorskip("transformers")

from llmctl.chat import corrections, sessions  # noqa: E402
from llmctl.chat.conversation import Conversation  # noqa: E402
from llmctl.chat.desk import Desk  # noqa: E402
from llmctl.chat.engine import Answer, ContextFull, Engine  # noqa: E402
from llmctl.chat.events import Done, Piece, Remark  # noqa: E402
from llmctl.chat.prompt import ChatPrompt, defused, fitting  # noqa: E402
from llmctl.chat.settings import ChatSettings  # noqa: E402
from llmctl.chat.talk import Talk  # noqa: E402
from llmctl.chat_view import lines  # noqa: E402
from llmctl.errors import UserError  # noqa: E402
from llmctl.finetune.data.template import with_template  # noqa: E402
from llmctl.generation.settings import Sampling  # noqa: E402
from llmctl.model_settings import EngineSettings  # noqa: E402
from llmctl.retrieval.quoting import question_with  # noqa: E402
from llmctl.tokenizer import Tokenizer  # noqa: E402

CPU = EngineSettings(device="cpu")
GREEDY = Sampling(temperature=0.0, max_new_tokens=8, seed=0, ignore_eos=True)
CHATML = (
    "{% for message in messages %}{% if message.role not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('unknown role ' + message.role) }}{% endif %}"
    "<|{{ message.role }}|>{{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def save_model(path, kind="llama", positions=256, **more):
    """A small random model over bytes."""
    torch.manual_seed(0)
    if kind == "mamba":
        config = transformers.MambaConfig(vocab_size=257, hidden_size=32, num_hidden_layers=2, state_size=4)
        transformers.MambaForCausalLM(config).save_pretrained(path)
    else:
        config = transformers.LlamaConfig(
            vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.3, max_position_embeddings=positions, **more,
        )  # fmt: skip
        transformers.LlamaForCausalLM(config).save_pretrained(path)
    with_template(Tokenizer.bytes(), CHATML).save(path)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture
def engine(model):
    return Engine.open(model, CPU)


def said(events):
    return "".join(event.text for event in events if isinstance(event, Piece))


def ask(talk, question):
    return said(talk.ask(question))


# --- the cache ---


@pytest.mark.parametrize("kind", ["llama", "mamba"])
def test_a_turn_costs_only_its_new_tokens(tmp_path, kind):
    engine = Engine.open(save_model(tmp_path / kind, kind), CPU)
    talk = Talk(engine, Conversation(), GREEDY)
    total = 0
    for question in ("hi", "how are you?", "a third question"):
        ask(talk, question)
        prompt, answer = talk.last.prompt_tokens, talk.last.ids
        new = prompt - talk.last.reused_tokens
        # All but the last token of an answer has been read; that one, the end, and the next question are new.
        assert new == (prompt if total == 0 else prompt - total)
        total = prompt + len(answer) - 1
        assert engine.model.n_read == total


def test_answers_with_a_kept_cache_are_those_without(engine, model):
    talk = Talk(engine, Conversation(), GREEDY)
    for question in ("hi", "and then?", "why"):
        ask(talk, question)
    fresh = Engine.open(model, CPU)
    for upto in (1, 3, 5):
        messages = talk.conversation.messages[:upto]
        assert (
            said(Piece(*pair) for pair in fresh.answer(messages, GREEDY)) == talk.conversation.messages[upto]["content"]
        )
        fresh.model.forget()


def test_undo_and_edit_reuse_what_they_share(engine):
    talk = Talk(engine, Conversation(), GREEDY)
    ask(talk, "the same beginning")
    first = ask(talk, "one")
    talk.conversation.undo()
    before = engine.model.n_read
    assert ask(talk, "one") == first  # the cache was cut back, and goes on as it did
    assert engine.model.n_read - before < 2 * GREEDY.max_new_tokens
    talk.conversation.undo()
    ask(talk, "two")
    assert talk.last.reused_tokens > talk.last.prompt_tokens - 20


def test_a_recurrent_state_cannot_go_back(tmp_path):
    engine = Engine.open(save_model(tmp_path / "mamba", "mamba"), CPU)
    talk = Talk(engine, Conversation(), GREEDY)
    first = ask(talk, "one")
    talk.conversation.undo()
    assert ask(talk, "one") == first and talk.last.reused_tokens == 0


def test_a_position_rule_that_jumps_is_read_again(tmp_path):
    """LongRoPE's angles beyond the switch are others: a text cut back below it must be read anew."""
    scaling = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "factor": 4.0}
    path = save_model(tmp_path / "long", rope_scaling={**scaling, "original_max_position_embeddings": 64})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "original_max_position_embeddings": 64}))
    engine = Engine.open(path, CPU)
    talk = Talk(engine, Conversation(), GREEDY)
    short = ask(talk, "short")
    ask(talk, "x" * 80)
    talk.conversation.undo()
    talk.conversation.undo()
    assert ask(talk, "short") == short


def test_several_samples_read_their_prompt_once(engine):
    sampling = Sampling(temperature=1.0, max_new_tokens=6, seed=3, ignore_eos=True)
    messages = [{"role": "user", "content": "a question of some length"}]
    answers = engine.samples(messages, sampling, 4)
    n_prompt = answers[0].prompt_tokens
    assert engine.model.n_read == n_prompt - 1 + 4 * 6
    assert len({answer.text for answer in answers}) > 1
    alone = [list(engine.answer(messages, sampling, sequence=i))[-1][1].text for i in range(4)]
    assert [answer.text for answer in answers] == alone


# --- prompts ---


def test_tokens_of_answers_are_those_that_were_drawn(data):
    tokenizer = with_template(Tokenizer.load(data / "models" / "stories260K"), CHATML)
    prompt = ChatPrompt(tokenizer)
    text = prompt.text([{"role": "user", "content": "hi"}])
    ids = prompt.ids(text)
    odd = [tokenizer.encode(letter, False)[-1] for letter in "once"]  # nobody would split it so
    answer = tokenizer.decode([*ids, *odd])[len(tokenizer.decode(ids)) :]
    prompt.remember(text, ids, answer, odd)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": answer}]
    after = prompt.ids(prompt.text([*messages, {"role": "user", "content": "more"}]))
    assert after[: len(ids) + len(odd)] == [*ids, *odd]
    assert tokenizer.decode(after, False) == tokenizer.decode(
        tokenizer.encode(prompt.text([*messages, {"role": "user", "content": "more"}]), False), False
    )


def test_markup_in_text_from_elsewhere_is_text(data):
    tokenizer = Tokenizer.bytes()
    end = tokenizer.decode([tokenizer.eos_id], skip_special_tokens=False)
    text = defused(f"before {end} after {end}{end}", tokenizer)
    assert tokenizer.eos_id not in tokenizer.encode(text)
    assert tokenizer.eos_id in tokenizer.encode(end)


def test_a_template_that_refuses_the_conversation(engine):
    with pytest.raises(UserError, match=r"refuses this conversation \(user, tool\).*unknown role tool"):
        engine.prompt.text([{"role": "user", "content": "hi"}, {"role": "tool", "content": "3"}])


# --- a context that is full ---


def test_a_full_context_is_said_and_the_question_not_kept(engine):
    talk = Talk(engine, Conversation(), GREEDY)
    ask(talk, "x" * 60)
    kept = list(talk.conversation.messages)
    with pytest.raises(
        ContextFull, match=r"the context is full: the conversation has \d+ tokens, the model reads 256"
    ) as raised:
        ask(talk, "y" * 200)
    assert "/compact" in raised.value.hint and talk.conversation.messages == kept


def test_the_oldest_turns_go_where_that_is_wanted(engine):
    talk = Talk(engine, Conversation([{"role": "system", "content": "be short"}]), GREEDY, "drop-oldest")
    for _ in range(3):
        ask(talk, "x" * 60)
    events = list(talk.ask("y" * 60))
    assert any(isinstance(event, Remark) and "oldest messages were dropped" in event.text for event in events)
    assert talk.conversation.system == "be short"
    assert [message["role"] for message in talk.conversation.messages[1:3]] == ["user", "assistant"]
    with pytest.raises(ContextFull):
        ask(talk, "z" * 300)


def test_compacting(engine):
    from llmctl.chat.shortening import compact

    talk = Talk(engine, Conversation(), GREEDY)
    for question in ("one", "two", "three"):
        ask(talk, question)
    line = compact(talk)
    assert "4 messages became a summary" in line
    assert [message["role"] for message in talk.conversation.messages] == ["system", "user", "assistant"]
    assert talk.conversation.system.startswith("Summary")


def test_compacting_drops_whole_turns_and_never_all_that_was_said(engine, monkeypatch):
    from llmctl.chat.shortening import compact

    asked = {"role": "user", "content": "x" * 40}
    turns = [asked, *({"role": "assistant", "content": "y" * 20} for _ in range(2))]
    talk = Talk(engine, Conversation([*turns, *turns, asked]), GREEDY)
    before = list(talk.conversation.messages)
    requests = []

    def answered(text):
        def answer(messages, sampling, *more, **named):
            requests.append(list(messages))
            if len(messages) > 4:
                raise ContextFull(300, 256)
            yield text, Answer(1, text=text, finish_reason="stop")

        return answer

    monkeypatch.setattr(engine, "answer", answered(" "))
    with pytest.raises(UserError, match="wrote no summary"):
        compact(talk)
    assert talk.conversation.messages == before
    monkeypatch.setattr(engine, "answer", answered("short"))
    assert "the 3 oldest did not fit" in compact(talk)
    assert [message["role"] for message in requests[-1]] == ["user", "assistant", "assistant", "user"]


def test_compacting_can_be_stopped(engine):
    from llmctl.chat.shortening import compact

    talk = Talk(engine, Conversation(), GREEDY)
    for question in ("one", "two"):
        ask(talk, question)
    before, answer = list(talk.conversation.messages), engine.answer

    def stopped(*args, **named):
        for pair in answer(*args, **named):
            talk.should_stop = True
            yield pair

    engine.answer = stopped
    with pytest.raises(UserError, match="stopped"):
        compact(talk)
    assert talk.conversation.messages == before


def test_compacting_where_the_template_takes_no_system_message(tmp_path):
    from llmctl.chat.shortening import compact

    path = save_model(tmp_path / "strict")
    with_template(Tokenizer.bytes(), CHATML.replace("'system', ", "")).save(path)
    talk = Talk(Engine.open(path, CPU), Conversation(), GREEDY)
    for question in ("one", "two"):
        ask(talk, question)
    compact(talk)
    assert [message["role"] for message in talk.conversation.messages] == ["user", "assistant"]
    assert talk.conversation.messages[0]["content"].startswith("Summary") and ask(talk, "more") is not None


def test_an_answer_that_the_context_cuts_says_so(engine):
    talk = Talk(engine, Conversation(), Sampling(temperature=0.0, max_new_tokens=1000, seed=0, ignore_eos=True))
    events = list(talk.ask("hi"))
    assert any(isinstance(event, Remark) and "context ends" in event.text for event in events)
    assert talk.last.context == 257  # the last token is not read back


def test_an_answer_that_never_came_leaves_no_question(engine, tmp_path):
    talk = Talk(engine, Conversation(), GREEDY)
    ask(talk, "one")
    before = list(talk.conversation.messages)
    next(talk.ask("two"))  # and then nobody wants the rest
    assert talk.conversation.messages == before
    talk.conversation.messages.append({"role": "assistant", "content": ""})
    sessions.save(talk.conversation, tmp_path / "s.jsonl", "model", "")
    again, _ = sessions.load(tmp_path / "s.jsonl", "")
    assert again.messages[:2] == before and again.messages[-1]["content"] == ""


def test_stopping_keeps_what_was_said(engine):
    talk = Talk(engine, Conversation(), GREEDY)
    events = talk.ask("hi")
    pieces = []
    for event in events:
        if isinstance(event, Piece):
            pieces.append(event.text)
            talk.should_stop = len(pieces) >= 3
    assert talk.conversation.messages[-1] == {"role": "assistant", "content": "".join(pieces)}
    assert talk.last.finish_reason == "interrupted"


# --- files ---


def test_sessions_come_back_as_they_were(engine, tmp_path):
    conversation = Conversation()
    conversation.add("user", "hi\nyou")
    conversation.add("assistant", "hello ü")
    conversation.switch("other")
    conversation.add("user", "more")
    path = tmp_path / "s.jsonl"
    sessions.save(conversation, path, "model", "template")
    again, remarks = sessions.load(path, "template")
    assert again == conversation and not remarks
    _, remarks = sessions.load(path, "another template")
    assert "chat template of model" in remarks[0]


@pytest.mark.parametrize(
    ("line", "message"),
    [("{", "line 2: not valid JSON"), ('{"text": "x"}', 'line 2: expected an object with "messages"'),
     ('{"messages": [{"role": "robot", "content": "x"}]}', "line 2: messages.0.: unknown role 'robot'")],
)  # fmt: skip
def test_a_session_that_is_broken_is_named_by_line(tmp_path, line, message):
    path = tmp_path / "s.jsonl"
    path.write_text(f'{{"messages": [{{"role": "user", "content": "x"}}]}}\n{line}\n')
    with pytest.raises(UserError, match=message):
        sessions.load(path, "")


def test_a_correction_is_learned_alone(tmp_path, engine):
    from llmctl.finetune.data.forms import recognize
    from llmctl.finetune.data.rendering import Renderer

    prompt = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "wrong too"},
        {"role": "user", "content": "2+2?"},
    ]
    told, preferred = corrections.append(str(tmp_path / "fixes"), prompt, "5", "4")
    corrections.append(str(tmp_path / "fixes"), prompt[:1], "no", "yes")
    rows = [json.loads(line) for line in told.read_text().splitlines()]
    assert len(rows) == 2
    chat = recognize(rows[0], "sft").build(rows[0])
    (draft,) = Renderer(engine.tokenizer).drafts(chat)
    assert "".join(draft.text[a:b] for a, b in draft.learned).startswith("4") and len(draft.learned) == 1
    pair = json.loads(preferred.read_text().splitlines()[0])
    built = recognize(pair, "dpo").build(pair)
    assert (built.chosen.messages[-1]["content"], built.rejected.messages[-1]["content"]) == ("4", "5")
    assert built.chosen.n_prompt == 3
    with pytest.raises(UserError, match="empty"):
        corrections.append(str(tmp_path / "fixes"), prompt, "5", " ")


# --- through pipes ---


def test_turns_from_a_pipe(llmctl, model):
    lines = 'hi\n\n{"role": "system", "content": "be short"}\n{"role": "user", "content": "again"}\n'
    result = llmctl("chat", model, "-n", 5, "--temperature", 0, input=lines)
    first, second = result.stdout.splitlines()
    assert first and not first.startswith("{")
    answer = json.loads(second)
    assert answer["role"] == "assistant" and answer["completion_tokens"] <= 5


def test_a_pipe_keeps_a_session_and_goes_on_with_it(llmctl_here, model, tmp_path):
    flags = ("-n", 5, "--temperature", 0, "--session", "s.jsonl", "--jsonl")
    llmctl_here("chat", model, *flags, input="hi\n")
    assert "exists already" in llmctl_here("chat", model, *flags, input="hi\n", code=2).stderr
    llmctl_here("chat", model, *flags, "--continue", input="more\n")
    (row,) = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert [message["content"] for message in row["messages"][::2]] == ["hi", "more"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('hi\n{"role": "user"\n', "standard input: line 2: not valid JSON"),
        ('hi\n\n{"role": "boss", "content": "x"}\n', "standard input: line 3: message[0]: unknown role 'boss'"),
        (b"\xff\n", "standard input: line 1: not UTF-8"),
        ("", "standard input is empty"),
        ("y" * 400, "standard input: line 1: the context is full"),
        ('{"role": "tool", "content": "3"}\nhi\n', "line 2: the model's chat template refuses"),
    ],
)  # fmt: skip
def test_turns_that_cannot_be_are_named(engine, text, message):
    with pytest.raises(UserError) as raised:
        from_lines(engine, text)
    assert message in raised.value.message


def from_lines(engine, text):
    """Answers and notes of a chat without a terminal."""
    written, notes = [], []
    data = text if isinstance(text, bytes) else text.encode()
    lines.run(Desk(engine, ChatSettings(), GREEDY), data.splitlines(keepends=True), written.append, notes.append)
    return written, notes


def test_a_byte_order_mark_is_no_part_of_a_question(engine, tmp_path):
    said = []
    for mark in (b"", codecs.BOM_UTF8):
        desk = Desk(engine, ChatSettings(), GREEDY)
        lines.run(desk, [mark + b"hi\r\n", b'{"role": "user", "content": "x"}\r\n'], said.append, print)
        assert [message["content"] for message in desk.conversation.messages[::2]] == ["hi", "x"]
    (tmp_path / "s.jsonl").write_bytes(codecs.BOM_UTF8 + b'{"messages": [{"role": "user", "content": "hi"}]}\r\n')
    assert sessions.load(tmp_path / "s.jsonl", "")[0].messages == [{"role": "user", "content": "hi"}]
    with pytest.raises(UserError, match="a device"):
        sessions.load("/dev/zero", "")


def test_a_broken_turn_ends_a_pipe_after_the_answers_in_front_of_it(llmctl, model):
    result = llmctl("chat", model, "-n", 5, input='hi\n{"role": "user"\n', code=1)
    assert result.stdout.count("\n") >= 1
    assert result.stderr.splitlines()[0].startswith("error: standard input: line 2: not valid JSON")


@pytest.mark.parametrize(
    "flags",
    [["--samples", 3], ["--vote"], ["--best-of", 3], ["--reward", "x"], ["--tools", "shell"], ["--num-beams", 2]],
)
def test_flags_that_contradict_each_other(llmctl_here, model, flags):
    assert len(llmctl_here("chat", model, *flags, input="hi\n", code=2).stderr.splitlines()) <= 2


def test_documents_come_with_the_question(llmctl_here, tmp_path):
    model = save_model(tmp_path / "wide", positions=1024)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.txt").write_text("The ship left Bremen in 1911.\n")
    flags = ("--docs", "docs", "-n", 5, "--temperature", 0, "--session", "s.jsonl")
    result = llmctl_here("chat", model, *flags, input='{"role": "user", "content": "When did the ship leave?"}\n')
    assert json.loads(result.stdout)["sources"] == ["a.txt:1"]
    message = json.loads((tmp_path / "s.jsonl").read_text())["messages"][0]
    assert "> The ship left Bremen" in message["content"] and message["question"] == "When did the ship leave?"
    (tmp_path / "docs" / ".llmctl-index").write_bytes(b"broken")
    assert "no index that can be read" in llmctl_here("chat", model, "--docs", "docs", input="hi\n", code=1).stderr


def test_passages_share_a_small_context():
    tokenizer, sources = Tokenizer.bytes(), [(f"{name}.txt:1", "a line\n" * 100) for name in "abc"]
    numbers = []
    for n_tokens in (3000, 700, 300, 200):
        found = fitting(sources, tokenizer, n_tokens)
        numbers.append(len(found))
        notes = 32 * len(found)  # what is cut is said
        assert len(tokenizer.encode(question_with("", found))) <= n_tokens + notes if found else n_tokens == 200
    assert numbers == [3, 3, 2, 0] and fitting(sources, tokenizer, 3000) == sources


def test_a_vote(llmctl_here, model):
    flags = ("--samples", 5, "--vote", "-n", 6, "--seed", 1)
    one, two = (llmctl_here("chat", model, *flags, input="hi\n") for _ in range(2))
    assert one.stdout == two.stdout and one.stdout.strip()
    assert "of 5 samples agree" in one.stderr or "none of 5" in one.stderr


def test_the_reward_of_an_answer_is_that_of_its_conversation(tmp_path):
    from llmctl.chat.choosing import BestOf, Reward
    from llmctl.chat.engine import Answer

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_labels=1,
        pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    theirs = transformers.LlamaForSequenceClassification(config).eval()
    theirs.save_pretrained(tmp_path / "reward")
    tokenizer = with_template(Tokenizer.bytes(), CHATML)
    tokenizer.save(tmp_path / "reward")
    messages, texts = [{"role": "user", "content": "hi"}], ["yes", "no, not at all", "perhaps"]
    chosen, words = BestOf(3, Reward(tmp_path / "reward")).choose(messages, [Answer(1, text=text) for text in texts])
    scores = []
    for text in texts:
        ids = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": text}])
        scores.append(theirs(torch.tensor([ids])).logits.item())
    assert chosen.text == texts[max(range(3), key=scores.__getitem__)]
    assert words.endswith(", ".join(f"{score:.3g}" for score in sorted(scores, reverse=True)))
    with pytest.raises(UserError, match="no reward model"):
        Reward(save_model(tmp_path / "plain"))


@pytest.mark.parametrize(
    ("text", "final"),
    [("so it is 4.\n#### 1,234", "1234"), ("\\boxed{7}", "7"), ("The answer is Paris.", "paris"), ("3 and 5 make 8.0", "8"),
     ("yes", "yes"), ("", "")],
)  # fmt: skip
def test_what_an_answer_comes_to(text, final):
    from llmctl.chat.choosing import final_answer

    assert final_answer(text) == final


def test_what_is_attached_waits_until_its_question_is_answered(engine):
    desk = Desk(engine, ChatSettings(), GREEDY)
    desk.attached.append(("a.txt", "z" * 600))
    with pytest.raises(ContextFull):
        list(desk.ask("hi"))
    assert [name for name, _ in desk.attached] == ["a.txt"]
    desk.attached = [("a.txt", "z")]
    with pytest.raises(ContextFull):  # what says that it is data takes its room too
        list(desk.ask("y" * 200))
    assert len(desk.attached) == 1
    wide = replace(engine.session.model.config, max_positions=2048)
    engine.session.model.config = wide
    list(desk.ask("hi"))
    assert desk.attached == [] and "> z" in desk.conversation.messages[0]["content"]


def test_another_model_is_opened_as_this_one_was(monkeypatch, tmp_path):
    opened = []
    monkeypatch.setattr(Engine, "open", lambda *args: opened.append(args))
    settings = ChatSettings(provider="cpu", device="cpu", kv_dtype="int8", threads=1, force=True)
    desk = SimpleNamespace(settings=settings)
    Desk.open(desk, str(tmp_path), ["adapter"])
    assert opened == [(str(tmp_path), settings, ["adapter"], True, None)]
    with pytest.raises(UserError, match="nowhere: no such checkpoint"):
        Desk.open(desk, "nowhere")


def test_the_desk_keeps_a_file_up_to_date(engine, tmp_path):
    desk = Desk(engine, ChatSettings(session=str(tmp_path / "s.jsonl")), GREEDY)
    assert isinstance(list(desk.ask("hi"))[-1], Done)
    assert json.loads((tmp_path / "s.jsonl").read_text())["messages"][0]["content"] == "hi"
