"""The run directory: one line a step with every promised key, whole after any stop."""

import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from builders import make_receipt, make_score, make_scored, make_update
from made_checkpoints import in_process

from medrl.cluster.journal import Journal
from medrl.cluster.metrics import refuse_failures
from medrl.configs.errors import RewardError
from medrl.reports.lines import read_lines

PROMISED = [
    "step",
    "version",
    "reward.mean",
    "reward.format",
    "reward.accuracy",
    "loss",
    "kl",
    "entropy",
    "clip_fraction",
    "logprob_gap.mean",
    "logprob_gap.max",
    "staleness.max",
    "groups",
    "zero_variance_groups",
    "replaced_groups",
    "failed_completions",
    "tokens.prompt",
    "tokens.completion",
    "tokens.visual",
    "seconds.step",
    "seconds.rollout",
    "seconds.reward",
    "seconds.learn",
    "seconds.sync",
    "seconds.idle_learner",
    "seconds.idle_rollout",
    "memory.driver_bytes",
]


def record(journal: Journal, step: int) -> None:
    batch = [make_scored(0, version=step - 1), make_scored(1, version=step - 1)]
    journal.record_step(step, batch, make_update(batch), make_receipt(step), idle_rollout=0.1)


def test_a_step_has_every_promised_key(tmp_path: Path) -> None:
    record(Journal(tmp_path), 1)
    (line,) = read_lines(tmp_path / "metrics.jsonl")
    assert set(PROMISED) <= set(line)
    assert line["reward.mean"] == 0.5
    assert line["reward.format"] == 1.0
    assert line["tokens.completion"] == 12
    assert line["staleness.max"] == 0
    assert line["seconds.rollout"] == 0.25
    assert line["memory.driver_bytes"] > 2**20


def test_failed_completions_are_counted_and_left_out_of_the_means(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    batch = [make_scored(0, scores=(make_score(1.0), make_score(0.0, "timeout")))]
    journal.record_step(1, batch, make_update(batch), make_receipt(1), 0.0)
    (line,) = read_lines(tmp_path / "metrics.jsonl")
    assert (line["failed_completions"], line["reward.mean"]) == (1, 1.0)


def test_completions_keep_text_image_scores_advantage_and_version(tmp_path: Path) -> None:
    record(Journal(tmp_path), 3)
    rows = pq.read_table(tmp_path / "completions" / "step_000003.parquet").to_pylist()
    assert len(rows) == 4
    first = rows[0]
    assert (first["images"], first["version"], first["advantage"]) == (["a.png"], 2, 1.0)
    assert {s["name"]: s["value"] for s in first["scores"]} == {"format": 1.0, "accuracy": 1.0}
    assert first["completion"] == "<answer>0</answer>"


def test_replaced_groups_are_kept_and_counted_but_in_no_mean(tmp_path: Path) -> None:
    """Their tokens were paid for; they are not what was trained."""
    batch = [make_scored(0)]
    same = make_scored(1, scores=(make_score(1.0), make_score(1.0)))
    update, receipt = make_update(batch), make_receipt(1)
    Journal(tmp_path).record_step(1, batch, update, receipt, 0.1, [same])
    (line,) = read_lines(tmp_path / "metrics.jsonl")
    assert (line["groups"], line["replaced_groups"]) == (1, 1)
    assert (line["tokens.completion"], line["tokens.replaced"]) == (6, 6)
    assert line["reward.mean"] == 0.5
    rows = pq.read_table(tmp_path / "completions" / "step_000001.parquet").to_pylist()
    assert [(row["draw"], row["advantage"]) for row in rows] == [
        (0, 1.0),
        (0, -1.0),
        (1, None),
        (1, None),
    ]


def test_rewinding_takes_back_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for step in (1, 2, 3):
        record(journal, step)
        journal.record_eval({"step": step, "split": "test", "accuracy": 0.5})
    journal.rewind(2)
    for name in ("metrics", "syncs", "evals"):
        assert [line["step"] for line in read_lines(tmp_path / f"{name}.jsonl")] == [1, 2]
    assert len(list((tmp_path / "completions").iterdir())) == 2


def test_a_line_cut_off_by_a_crash_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_lines(path) == [{"step": 1}, {"step": 2}]


def test_too_many_failures_stop_the_run_with_their_rewards_and_examples() -> None:
    slow = make_score(0.0, "timeout", "lesion_iou: took longer than 5 s")
    bad = make_score(0.0, "error", "cites: KeyError: 'x'")
    batch = [make_scored(7, scores=(slow, make_score(), slow, bad, slow, make_score()))]
    refuse_failures(batch, limit=4 / 6)
    with pytest.raises(RewardError) as caught:
        refuse_failures(batch, limit=0.5)
    first, *examples = str(caught.value).split("\n")
    assert first.startswith("4 of 6 completions could not be scored, above the limit of 50%")
    assert ": lesion_iou failed 3, cites failed 1. " in first
    assert examples == [
        "  prompt p7, '<answer>0</answer>': timeout, lesion_iou: took longer than 5 s",
        "  prompt p7, '<answer>2</answer>': timeout, lesion_iou: took longer than 5 s",
        "  prompt p7, '<answer>3</answer>': error, cites: KeyError: 'x'",
    ]


def test_a_line_cut_off_by_a_crash_is_taken_back_before_the_next_is_written(
    tmp_path: Path,
) -> None:
    journal = Journal(tmp_path)
    record(journal, 1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "versi')
    journal = Journal(tmp_path)
    journal.rewind(1)
    record(journal, 2)
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2]


def test_whenever_the_driver_is_killed_every_file_of_completions_can_be_read(
    tmp_path: Path,
) -> None:
    def write_for_ever(_: int) -> None:
        journal = Journal(tmp_path)
        batch = [make_scored(draw) for draw in range(500)]
        for step in range(1, 10_000):
            journal.record_step(step, batch, make_update(batch), make_receipt(step), 0.0)

    completions, cut_off = tmp_path / "completions", 0
    for _ in range(15):
        process, reading = in_process(write_for_ever)
        os.close(reading)
        while not list(completions.glob("*.tmp")):  # it is writing one just now
            assert process.is_alive()
        process.kill()
        process.join()
        for path in completions.glob("*.parquet"):
            assert pq.read_table(path).num_rows == 1000
        cut_off += bool(list(completions.glob("*.tmp")))
        Journal(tmp_path).rewind(0)
        assert not list(completions.iterdir())
    assert cut_off  # else no file was met in the middle
