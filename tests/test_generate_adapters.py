"""llmctl generate --adapter: peft's tokens, weighted sums, and adapters that belong to another base."""

from __future__ import annotations

import json

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from test_adapters import randomize  # noqa: E402

from llmctl import lineage  # noqa: E402
from llmctl.errors import CalledWrongly, UserError  # noqa: E402
from llmctl.finetune.assembly import Assembly  # noqa: E402
from llmctl.generation.session import Session  # noqa: E402
from llmctl.generation.settings import Sampling  # noqa: E402
from llmctl.tokenizer import Tokenizer  # noqa: E402

PROMPT = "Once upon a time"
GREEDY = Sampling(temperature=0.0, max_new_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "base"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    Tokenizer.bytes().save(path)
    return path


@pytest.fixture
def make_adapter(base, tmp_path):
    def make(name, seed):
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
        theirs = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), config)
        randomize(theirs, seed)
        theirs.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


def our_ids(*where, adapters=(), force=False):
    session = Session.open(*where, None, "cpu", adapters, force)
    completion = session.begin(PROMPT, GREEDY)
    list(session.stream(completion))
    return completion.ids


def their_ids(model):
    prompt = torch.tensor([Tokenizer.bytes().encode(PROMPT)])
    made = model.eval().generate(
        input_ids=prompt, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return made[0, prompt.shape[1] :].tolist()


def test_the_text_is_pefts(base, make_adapter):
    adapter = make_adapter("one", 1)
    theirs = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), adapter)
    assert our_ids(base, adapters=[str(adapter)]) == their_ids(theirs)
    assert our_ids(base, adapters=[str(adapter)]) != our_ids(base)
    assert our_ids(adapter) == their_ids(theirs), "an adapter names its base"


def test_several_count_as_much_as_their_weights_say(base, make_adapter):
    first, second = make_adapter("first", 1), make_adapter("second", 2)
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(base), first, adapter_name="first"
    )
    theirs.load_adapter(second, "second")
    theirs.add_weighted_adapter(["first", "second"], [0.3, 0.6], "both", combination_type="cat")
    theirs.set_adapter("both")
    assert our_ids(base, adapters=[f"{first}:0.3", f"{second}:0.6"]) == their_ids(theirs)


def test_an_adapter_of_another_base_is_refused(base, make_adapter, tmp_path):
    adapter = make_adapter("one", 1)
    lineage.write(adapter, lineage.Lineage("finetune", parent_sha256="0" * 64))
    with pytest.raises(UserError, match="another base"):
        our_ids(base, adapters=[str(adapter)])
    assert our_ids(base, adapters=[str(adapter)], force=True)
    lineage.write(adapter, lineage.Lineage("finetune", parent_sha256=lineage.weights_sha256(base)))
    assert our_ids(base, adapters=[str(adapter)])
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "some/where"}))
    with pytest.raises(UserError, match="some/where"):
        our_ids(adapter)
    with pytest.raises(UserError, match="no adapter_config.json"):
        our_ids(base, adapters=[str(base)])
    with pytest.raises(CalledWrongly, match="heavy"):
        our_ids(base, adapters=[f"{adapter}:heavy"])


def test_the_adapters_own_template_and_marks_count(base, make_adapter):
    adapter, plain = make_adapter("one", 1), make_adapter("two", 2)
    tokenizer = Tokenizer.bytes()
    Tokenizer.from_json(tokenizer.json, {**tokenizer.config, "chat_template": "{{ messages }}"}).save(adapter)
    (adapter / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    session = Session.open(base, None, "cpu", [str(adapter), str(plain)])
    assert session.tokenizer.chat_template == "{{ messages }}" and session.marks.ends == {7}
    assert Session.open(base).tokenizer.chat_template is None


def test_the_command_streams_with_adapters(base, make_adapter, llmctl):
    adapter = make_adapter("one", 1)
    words = ["-p", PROMPT, "--temperature", "0", "-n", "8", "--ignore-eos", "--no-echo"]
    beside = llmctl("generate", base, *words, "--adapter", adapter)
    alone = llmctl("generate", adapter, *words)
    assert beside.stdout == alone.stdout != llmctl("generate", base, *words).stdout
    assert "is an adapter of" in alone.stderr
    assert "no-such" in llmctl("generate", base, *words, "--adapter", "no-such", code=1).stderr


def test_the_base_stays_as_it_was(base, make_adapter):
    before = lineage.weights_sha256(base)
    Assembly.find(base, [str(make_adapter("one", 1))]).load()
    assert lineage.weights_sha256(base) == before
