"""Votes between models, and the ratings that they come to."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from llmctl.arena import votes
from llmctl.arena.rating import SCALE, bradley_terry, rate
from llmctl.arena.votes import Vote
from llmctl.errors import UserError


def some_votes(strengths, n, seed=0):
    choose = random.Random(seed)
    names = sorted(strengths)
    for _ in range(n):
        first, second = choose.sample(names, 2)
        chance = 1 / (1 + 10 ** ((strengths[second] - strengths[first]) / 400))
        yield Vote(first, second, float(choose.random() < chance))


def test_two_players_have_the_odds_of_their_wins():
    found = rate([Vote("a", "b", 1.0)] * 30 + [Vote("b", "a", 1.0)] * 10, 10)
    assert [row.model for row in found] == ["a", "b"]
    assert found[0].rating - found[1].rating == pytest.approx(400 * np.log10(3), abs=0.5)
    assert found[0].wins == 30 and found[0].votes == found[1].votes == 40


def test_the_likeliest_strengths_expect_the_wins_that_were():
    wins = np.array([[0, 8, 9], [2, 0, 6], [1, 4, 0]], float)
    strengths = bradley_terry(wins)
    expected = (wins + wins.T) / (1 + np.exp(strengths[None, :] - strengths[:, None]))
    assert expected.sum(1) == pytest.approx(wins.sum(1), abs=0.05) and strengths.mean() == pytest.approx(0)


def test_known_strengths_are_found_within_their_intervals():
    truth = {"a": 1200.0, "b": 1000.0, "c": 900.0, "d": 900.0}
    found = {row.model: row for row in rate(list(some_votes(truth, 2000)), 200)}
    for name, rating in truth.items():
        assert found[name].low - 15 <= rating <= found[name].high + 15
        assert found[name].high - found[name].low < 120
    wide = {row.model: row for row in rate(list(some_votes(truth, 100)), 200)}
    assert wide["a"].high - wide["a"].low > found["a"].high - found["a"].low


def test_who_never_loses_has_a_finite_rating_and_ties_are_halves():
    found = rate([Vote("a", "b", 1.0)] * 5, 20)
    assert np.isfinite(found[0].rating) and found[0].rating > found[1].rating
    tied = rate([Vote("a", "b", 0.5)] * 6, 20)
    assert tied[0].rating == pytest.approx(1000) == tied[1].rating and SCALE > 0


def test_votes_are_read_back(tmp_path):
    path = tmp_path / "votes.jsonl"
    for said in votes.CHOICES:
        votes.append(path, [{"role": "user", "content": "q"}], ["m", "n"], ["x", "y"], said)
    assert [vote.score for vote in votes.read(path)] == [1.0, 0.0, 0.5, 0.5]
    path.write_text(path.read_text() + '{"models": ["m", "n"], "vote": "3"}\n')
    with pytest.raises(UserError, match="line 5: the vote is '3'"):
        votes.read(path)


def test_the_command(llmctl, llmctl_here, data, tmp_path):
    model = data / "models" / "stories260K"
    (tmp_path / "other").symlink_to(model)
    (tmp_path / "prompts.jsonl").write_text(
        '{"prompt": "hi"}\n{"messages": [{"role": "user", "content": "you"}]}\nplain\n'
    )
    flags = ("arena", model, "other", "--prompts", "prompts.jsonl", "-n", 5, "--seed", 1)
    result = llmctl(*flags, input="1\n2\n")
    assert "2 of 3 questions have a vote" in result.stderr
    rows = [json.loads(line) for line in (tmp_path / "votes.jsonl").read_text().splitlines()]
    assert sorted(rows[0]["models"]) == sorted([str(model), "other"]) and len(rows[0]["answers"]) == 2
    table = llmctl_here("arena", "--table", "--bootstrap", 50)
    assert {json.loads(line)["model"] for line in table.stdout.splitlines()} == {str(model), "other"}
    assert "Elo" in table.stderr
    assert "no such file" in llmctl_here("arena", "--table", "--votes", "none", code=1).stderr
    assert "one model, which nobody" in llmctl_here("arena", "other", "./other", "--prompts", "x", code=2).stderr
    (tmp_path / "none.txt").write_text("\n")
    assert "no questions" in llmctl_here("arena", model, "other", "--prompts", "none.txt", code=1).stderr
    assert "expected two models" in llmctl_here("arena", model, code=2).stderr
