"""Rank files give the ids of the tiktoken package."""

from __future__ import annotations

import base64
import json

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from llmctl.errors import UserError
from llmctl.tokenization import decoding
from llmctl.tokenizer import Tokenizer

# As the tiktoken package spells them (tiktoken_ext/openai_public.py).
PATTERNS = {
    "gpt2": r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""",
    "cl100k": r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s""",
    "o200k": "|".join(
        [
            r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
            r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
            r"""\p{N}{1,3}""",
            r""" ?[^\s\p{L}\p{N}]+[\r\n/]*""",
            r"""\s*[\r\n]+""",
            r"""\s+(?!\S)""",
            r"""\s+""",
        ]
    ),
}
SAMPLE = "The HTTPServer's 'quoted' names — don't, DON'T! — cost 12345.67 € //\n\n\tnaïve Ǆ ʰǅ über ｄ́ 你好 🦙 x_y=z;\r\n   end   "
# tiktoken brings its own version of Unicode, so it is asked about characters that Python knows too.
TEXT = st.lists(
    st.sampled_from(SAMPLE.split(" ") + [" ", "  ", "'s", "'LL"]) | st.characters(exclude_categories=["Cs", "Cn", "Co"])
)


@pytest.fixture(scope="module")
def ranks(some_texts) -> dict[bytes, int]:
    """Ranks learnt from a little text, the bytes among them in no special order."""
    trained = json.loads(Tokenizer.train_bpe([SAMPLE * 9, *some_texts], 700).json)
    spelled = sorted(trained["model"]["vocab"], key=trained["model"]["vocab"].get)
    tokens = [token for text in spelled if (token := decoding.spelled_bytes(text)) is not None]
    return {token: rank for rank, token in enumerate(token for token in tokens if token != b"<|endoftext|>")}


def write(path, ranks: dict[bytes, int]):
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
    return path


@pytest.mark.parametrize("name", PATTERNS)
def test_ids_are_tiktokens(name, ranks, tmp_path):
    ours = Tokenizer.load(write(tmp_path / f"{name}_base.tiktoken", ranks))
    theirs = tiktoken.Encoding(name, pat_str=PATTERNS[name], mergeable_ranks=ranks, special_tokens={})

    @settings(max_examples=150, deadline=None)
    @given(text=TEXT.map("".join))
    def check(text):
        expected = theirs.encode_ordinary(text)
        assert ours.encode(text) == expected
        assert ours.encode_documents([text])[0].tolist() == [*expected, ours.eos_id]
        assert ours.decode(expected) == text

    check()
    assert ours.encode(SAMPLE * 3) == theirs.encode_ordinary(SAMPLE * 3)


def test_special_tokens_stand_behind_the_ranks(ranks, tmp_path):
    cl100k = Tokenizer.load(write(tmp_path / "cl100k_base.tiktoken", ranks))
    n = len(ranks)
    # In the real file: 100256 ranks, 100257 <|endoftext|>, 100258 <|fim_prefix|>, 100276 <|endofprompt|>.
    assert cl100k.encode("<|endoftext|><|fim_prefix|>a<|endofprompt|>")[:2] == [n + 1, n + 2]
    assert (cl100k.eos_id, cl100k.vocab_size) == (n + 1, n + 21)
    o200k = Tokenizer.load(write(tmp_path / "o200k_base.tiktoken", ranks))
    assert (o200k.eos_id, o200k.encode("<|endofprompt|>")) == (n + 1, [n + 20])
    qwen = Tokenizer.load(write(tmp_path / "qwen.tiktoken", ranks))
    assert qwen.encode("<|im_start|>") == [n + 1] and qwen.vocab_size == n + 208


def test_llama_3_calls_its_ranks_a_model(ranks, tmp_path):
    write(tmp_path / "tokenizer.model", ranks)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Llama3Tokenizer"}')
    tokenizer = Tokenizer.load(tmp_path)
    n = len(ranks)
    assert tokenizer.adds_bos and tokenizer.document_edges == ([n], [n + 1]) and tokenizer.vocab_size == n + 256
    assert tokenizer.encode("<|start_header_id|>", add_special_tokens=False) == [n + 6]
    assert tokenizer.encode("<|eot_id|>", add_special_tokens=False) == [n + 9]
    assert tokenizer.encode("<|reserved_special_token_247|>", add_special_tokens=False) == [n + 255]


def test_a_hole_among_the_ranks_is_the_end_of_text(ranks, tmp_path):
    """p50k_base has 50281 ids, with <|endoftext|> 24 in front of the last."""
    hole = len(ranks) - 24
    moved = {token: rank + (rank >= hole) for token, rank in ranks.items()}
    tokenizer = Tokenizer.load(write(tmp_path / "p50k_base.tiktoken", moved))
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (hole, len(ranks) + 1)
    assert tokenizer.encode("<|endoftext|>") == [hole]
    theirs = tiktoken.Encoding("p50k", pat_str=PATTERNS["gpt2"], mergeable_ranks=moved, special_tokens={})
    assert tokenizer.encode(SAMPLE) == theirs.encode_ordinary(SAMPLE)


def test_a_configuration_names_the_special_tokens_itself(ranks, tmp_path):
    write(tmp_path / "some.tiktoken", ranks)
    tokens = {str(len(ranks) + 3): {"content": "<|im_end|>", "special": True}}
    config = {"added_tokens_decoder": tokens, "eos_token": "<|im_end|>", "add_bos_token": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.vocab_size) == (len(ranks) + 3, None, len(ranks) + 4)


def test_an_unknown_name_is_said(ranks, tmp_path, caplog):
    with caplog.at_level("INFO", logger="llmctl"):
        Tokenizer.load(write(tmp_path / "mine.tiktoken", ranks))
    assert "taking cl100k's way" in caplog.text


def test_ranks_with_a_hole_are_refused(ranks, tmp_path):
    holey = {token: rank + 2 * (rank > 300) for token, rank in ranks.items()}
    with pytest.raises(UserError, match="the vocabulary has a hole: no token has the id 301"):
        Tokenizer.load(write(tmp_path / "gpt2.tiktoken", holey))
