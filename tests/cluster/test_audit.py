"""`medrl score RUN` says of every recorded score which answer it read, and comes out the same."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import make_group, make_prompt, make_receipt, make_update

from medrl.actors.types import Completion, ScoredGroup
from medrl.cluster import cli
from medrl.cluster.audit import score_any, score_journal
from medrl.cluster.journal import Journal
from medrl.cluster.preflight import reward_terms
from medrl.configs.errors import UserError
from medrl.configs.loader import dump_config, load_config
from medrl.configs.schema import Config
from medrl.reports.lines import read_lines
from medrl.rewards.compose import build_rewards
from medrl.rewards.overlong import punish_overlong

TEXTS = (
    "<answer>A</answer>",
    "<answer>B) MRI</answer>",
    "<answer>the liver</answer>",
    "The answer is A.",
    "<think>x</think><answer>(a)</answer>",
)
PARSED = {
    "strict": ["A", "B", "the liver", "", "A"],
    "lenient": ["A", "B", "the liver", "A", "A"],
    "medr1": ["A", "B) MRI", "the liver", "", "(a)"],
}


def make_run(folder: Path, config_text: str, **settings: str) -> tuple[Config, Path]:
    """A run of two steps, scored as its config says and written by the journal itself."""
    file = folder / "in.toml"
    file.write_text(config_text)
    overrides = [f"{key.replace('__', '.')}={value}" for key, value in settings.items()]
    config = load_config(file, [f"run.dir={folder}", "run.name=r", *overrides])
    run = config.run_dir
    journal = Journal(run)
    (run / "config.toml").write_text(dump_config(config))
    rewards = build_rewards(reward_terms(config), config.data.mode, policy=config.reward.policy)
    for step in (1, 2):
        batch = []
        for draw in (0, 1):
            prompt = make_prompt(f"p{draw}", answer="AB"[draw], question="Which one?")
            group = make_group(draw, texts=TEXTS, prompt=prompt)
            group = replace(group, completions=tuple(map(lengthened, group.completions)))
            scores = tuple(rewards.score(prompt, text) for text in TEXTS)
            scored = ScoredGroup(group=group, scores=scores, seconds=0.0)
            if config.reward.overlong_tokens:
                scored = punish_overlong(scored, config.reward.overlong_tokens)
            batch.append(scored)
        update = replace(make_update(batch), advantages=((0.0,) * len(TEXTS),) * 2)
        journal.record_step(step, batch, update, make_receipt(step), 0.0)
    return config, run


def lengthened(completion: Completion) -> Completion:
    tokens = 3 + len(completion.text) // 4
    return replace(completion, token_ids=(7,) * tokens, logprobs=(-0.5,) * tokens)


def change(file: Path, **values: Any) -> None:
    """Change the file's first row."""
    table = pq.read_table(file)
    rows = table.to_pylist()
    rows[0] |= values
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), file)


@pytest.mark.parametrize("policy", ["strict", "lenient", "medr1"])
def test_every_score_comes_out_as_recorded_with_the_answer_it_read(
    tmp_path: Path, config_text: str, policy: str
) -> None:
    _, run = make_run(tmp_path, config_text, reward__policy=policy)
    table = pq.read_table(run / "completions" / "step_000001.parquet")
    assert table.column("parsed").to_pylist() == PARSED[policy] * 2
    found = score_journal(run, tmp_path / "out.jsonl")
    assert (found["n"], found["differing"], found["failed"], found["example"]) == (20, 0, 0, "")
    lines = read_lines(tmp_path / "out.jsonl")
    assert [line["parsed"] for line in lines] == PARSED[policy] * 4
    assert {(line["mode"], line["policy"]) for line in lines} == {("no-think", policy)}
    assert all(line["same"] for line in lines)
    assert [line["step"] for line in lines] == [1] * 10 + [2] * 10


def test_weights_options_a_users_reward_and_overlong_completions_are_part_of_it(
    tmp_path: Path, config_text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_audited.py").write_text(
        "def asked(completion, prompt, more=0):\n"
        "    return len(prompt.question) + len(prompt.images) + more\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    terms = "[{use='accuracy', weight=0.3}, {use='my_audited:asked', options={more=5}}]"
    _, run = make_run(
        tmp_path,
        config_text,
        reward__terms=terms,
        reward__overlong_tokens="12",
        rollout__max_tokens="16",
    )
    found = score_journal(run, tmp_path / "out.jsonl")
    assert (found["differing"], found["failed"]) == (0, 0)
    line = read_lines(tmp_path / "out.jsonl")[0]
    assert line["scores"]["asked"] == len("Which one?") + 1 + 5
    assert line["scores"]["overlong"] < 0
    assert line["reward"] == pytest.approx(0.3 + 16 + line["scores"]["overlong"])


def test_a_score_that_is_not_the_rules_is_found(
    tmp_path: Path, config_text: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    _, run = make_run(tmp_path, config_text)
    change(run / "completions" / "step_000002.parquet", reward=7.0)
    out = tmp_path / "out.jsonl"
    monkeypatch.setattr(sys, "argv", ["medrl", "score", str(run), "--out", str(out)])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 1
    told = capsys.readouterr().out
    assert "1 of 20 scores differ from those recorded; step 2, prompt p0" in told
    assert [line["same"] for line in read_lines(out)].index(False) == 10


def test_a_reward_that_failed_is_not_compared(tmp_path: Path, config_text: str) -> None:
    _, run = make_run(tmp_path, config_text)
    file = run / "completions" / "step_000001.parquet"
    change(file, outcome="timeout", scores=[], reward=0.0)
    found = score_journal(file, tmp_path / "out.jsonl")  # one step alone
    assert (found["n"], found["differing"], found["failed"]) == (10, 0, 1)


def test_runs_recorded_before_question_and_answer_were_kept_are_scored_too(
    tmp_path: Path, config_text: str
) -> None:
    _, run = make_run(tmp_path, config_text)
    for file in (run / "completions").iterdir():
        pq.write_table(pq.read_table(file).drop_columns(["question", "source", "parsed"]), file)
    assert score_journal(run / "completions", tmp_path / "out.jsonl")["differing"] == 0


def test_what_is_no_run_is_refused_in_a_sentence(tmp_path: Path, config_text: str) -> None:
    out = tmp_path / "out.jsonl"
    _, run = make_run(tmp_path, config_text)

    def scored(source: Path, **more: str | None) -> dict[str, Any]:
        options = {"mode": None, "policy": None, "rewards": None} | more
        return score_any(source, out, **options)

    with pytest.raises(UserError, match=r"no completions/step_N\.parquet"):
        scored(tmp_path)
    with pytest.raises(UserError, match=r"--mode, --policy, --rewards: .* leave them out"):
        scored(run, policy="lenient")
    (run / "completions" / "step_000001.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"step_000001\.parquet: is no file of completions"):
        scored(run)
    (run / "config.toml").unlink()
    with pytest.raises(UserError, match=r"no config\.toml beside"):
        scored(run)
    assert not out.exists()


def test_json_lines_are_scored_as_before(tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    line = {"id": "1", "completion": "A", "answer": "A", "options": ["CT", "MRI"]}
    source.write_text(json.dumps(line) + "\n")
    found = score_any(source, out, mode=None, policy="lenient", rewards="accuracy")
    assert found == {"n": 1, "outcomes": {"ok": 1}, "scores": {"accuracy": 1.0}}
