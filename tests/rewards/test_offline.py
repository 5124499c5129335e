"""A file of completions is scored whole and in order, or refused with every problem it has."""

from __future__ import annotations

import json
import re
import time

import pytest

from medrl.configs.errors import UserError
from medrl.rewards.offline import score_file

OPTIONS = ["CT", "MRI", "超声"]


def write(path, *lines):
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def row(completion="<answer>C</answer>", answer="C", **more):
    return {"id": "1", "completion": completion, "answer": answer, "options": OPTIONS} | more


def test_lines_come_back_in_order_with_their_scores(tmp_path):
    source = write(
        tmp_path / "in.jsonl",
        row(note={"kept": [1, None]}),
        row("<answer>A</answer>", id="1"),
        row("<answer>超声</answer>", "超声", id=7),
        "",
        row("C"),
        row("<think>x</think><answer>C</answer>", mode="think-before"),
        row("<answer>C</answer><think>x</think>", mode="think-after"),
        {"id": "open", "completion": "<answer>Left lung.</answer>", "answer": "left lung"},
    )
    out = tmp_path / "out.jsonl"
    summary = score_file(source, out)
    lines = read(out)
    assert lines[0] == row(
        note={"kept": [1, None]}, scores={"format": 1.0, "accuracy": 1.0}, outcome="ok"
    )
    assert [line["id"] for line in lines] == ["1", "1", 7, "1", "1", "1", "open"]
    assert [line["outcome"] for line in lines] == ["ok", "wrong", "ok", "unparsed", *["ok"] * 3]
    assert [line["scores"]["format"] for line in lines] == [1, 1, 1, 0, 1, 1, 1]
    assert "no answer tag" in lines[3]["reason"]
    assert "超声" in out.read_text(encoding="utf-8")
    assert summary["n"] == 7
    assert summary["outcomes"] == {"ok": 5, "wrong": 1, "unparsed": 1}
    assert summary["scores"]["accuracy"] == pytest.approx(5 / 7)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["in.jsonl", "out.jsonl"]


@pytest.mark.parametrize(
    ("answer", "outcome"), [("C", "ok"), (" c ", "ok"), ("超声", "ok"), ("ct", "wrong")]
)
def test_the_gold_answer_is_a_letter_or_an_options_text(tmp_path, answer, outcome):
    out = tmp_path / "out.jsonl"
    score_file(write(tmp_path / "in.jsonl", row(answer=answer)), out)
    assert read(out)[0]["outcome"] == outcome
    assert read(out)[0]["answer"] == answer


def test_lenient_and_a_users_reward(tmp_path):
    out = tmp_path / "out.jsonl"
    rewards = ("accuracy", "hostile_rewards:length")
    score_file(write(tmp_path / "in.jsonl", row("C")), out, policy="lenient", rewards=rewards)
    assert read(out)[0]["scores"] == {"accuracy": 1.0, "length": 1.0}


def test_a_reward_that_hangs_or_crashes_costs_its_line(tmp_path):
    out = tmp_path / "out.jsonl"
    lines = [row(text) for text in ("fine", "spin", "fine", "exit", "raise", "fine")]
    summary = score_file(
        write(tmp_path / "in.jsonl", *lines),
        out,
        rewards=("hostile_rewards:behave",),
        timeout_s=0.5,
    )
    outcomes = ["ok", "timeout", "ok", "error", "error", "ok"]
    assert [line["outcome"] for line in read(out)] == outcomes
    assert read(out)[1]["scores"] == {}
    assert read(out)[1]["reason"] == "behave: took longer than 0.5 s"
    assert summary["scores"] == {"behave": 1.0}


def test_scoring_an_output_again_replaces_its_scores(tmp_path):
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    score_file(write(tmp_path / "in.jsonl", row("C")), first)
    score_file(first, second, policy="lenient", rewards=("accuracy",))
    assert read(second)[0] == row("C", scores={"accuracy": 1.0}, outcome="ok")
    score_file(second, second)  # in place
    assert read(second) == read(first)


def test_half_a_surrogate_pair_and_odd_line_ends_survive(tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [json.dumps(row("\ud800 x")), json.dumps(row("a\u2028b\x85c"), ensure_ascii=False)]
    source.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    score_file(source, out)
    assert [line["completion"] for line in read(out)] == ["\ud800 x", "a\u2028b\x85c"]


BAD = [
    ('{"id": "1", "completion": }', "column 27: broken JSON: Expecting value"),
    ('{"id": "1"', "column 11: broken JSON"),
    ("[" * 100_000, "broken JSON"),
    ('{"id": NaN}', "NaN is not a JSON number"),
    ("[1]", "needs a JSON object, got a list"),
    ("null", "needs a JSON object, got null"),
    ({"id": "1", "answer": "C"}, "key 'completion' is missing"),
    (row(completion=3), "'completion' needs to be a string, got a number"),
    (row(answer=None), "'answer' needs to be a string, got null"),
    (row(id=True), "'id' needs to be a string, got a boolean"),
    (row(answer="D"), "answer 'D' is not among the options"),
    (row(answer="PET"), "answer 'PET' is not among the options"),
    (row(answer=""), "answer '' is not among the options"),
    (row(options=["CT", "ct"], answer="Ct"), "answer 'Ct' is not among the options"),
    ({"id": "1", "completion": "x", "answer": " "}, "answer ' ' is not an answer"),
    (row(options="CT"), "'options' needs to be a list of strings"),
    (row(options=["CT", 2]), "'options' needs to be a list of strings"),
    (row(options=["CT"]), "1 option(s), needs 2 to 10"),
    (row(options=list("abcdefghijk")), "11 option(s), needs 2 to 10"),
    (row(mode="think"), "unknown mode 'think': choose one of think-before, no-think, think-after"),
    (row(mode=1), "'mode' needs to be a string, got a number"),
]


@pytest.mark.parametrize(("line", "problem"), BAD)
def test_a_bad_line_is_named_and_nothing_is_written(tmp_path, line, problem):
    source = write(tmp_path / "in.jsonl", row(), line)
    with pytest.raises(UserError, match="in.jsonl, line 2: .*" + re.escape(problem)):
        score_file(source, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_all_bad_lines_are_reported_at_once(tmp_path):
    source = write(tmp_path / "in.jsonl", *(line for line, _ in BAD), {"id": []})
    with pytest.raises(UserError) as caught:
        score_file(source, tmp_path / "out.jsonl")
    assert len(caught.value.problems) == len(BAD) + 3  # the last lacks two keys, and its id is odd


def test_files_that_cannot_be_read_or_written_are_the_users_mistake(tmp_path):
    good, out = write(tmp_path / "in.jsonl", row()), tmp_path / "out.jsonl"
    (tmp_path / "empty.jsonl").write_text("\n \n")
    (tmp_path / "latin.jsonl").write_bytes(b'{"id": "\xe9"}')
    for source, target, problem in [
        (tmp_path / "gone.jsonl", out, "cannot be read: No such file"),
        (tmp_path, out, "cannot be read: Is a directory"),
        (tmp_path / "empty.jsonl", out, "is empty"),
        (tmp_path / "latin.jsonl", out, "line 1: is not UTF-8 (byte 9)"),
        (good, tmp_path, "is a folder"),
        (good, tmp_path / "no" / "out.jsonl", "there is no folder"),
    ]:
        with pytest.raises(UserError, match=re.escape(problem)):
            score_file(source, target)
    for options in ({"mode": "x"}, {"policy": "x"}, {"rewards": ("x",)}, {"rewards": ()}):
        with pytest.raises(UserError):
            score_file(good, out, **options)
    assert not out.exists()


def test_ten_thousand_lines_take_seconds(tmp_path):
    text = json.dumps(row("<think>" + "why " * 50 + "</think><answer>C</answer>"))
    source = write(tmp_path / "in.jsonl", *[text] * 10_000)
    begin = time.monotonic()
    assert score_file(source, tmp_path / "out.jsonl", mode="think-before")["n"] == 10_000
    assert time.monotonic() - begin < 6
