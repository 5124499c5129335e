"""The command line of a careless user who is right in the end."""

import json
import os
import sys
from importlib import metadata
from pathlib import Path

import pytest
import ray

from medrl.cluster import cli
from medrl.configs.errors import UserError
from medrl.configs.loader import load_config
from medrl.rewards.offline import score_file


def status_of(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["medrl", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return int(exit_.value.code or 0)


def test_help_is_no_error_and_tells_the_exit_statuses(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(monkeypatch, "--help") == 0
    assert "130 stopped" in " ".join(capsys.readouterr().out.split())
    for command in ("train", "eval", "score"):
        assert status_of(monkeypatch, command, "--help") == 0
    assert "Relative paths" in capsys.readouterr().out


def test_the_versions_are_those_of_what_is_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(monkeypatch, "--version") == 0
    shown = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert shown["medrl"] == metadata.version("medrl")
    assert shown["ray"] == ray.__version__


def test_a_usage_error_goes_to_stderr(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(monkeypatch, "train") == 2
    printed = capsys.readouterr()
    assert "Missing argument" in printed.err
    assert not printed.out


def test_a_resumed_run_says_where_it_stands(tmp_path: Path) -> None:
    state = {"step": 3, "fixed": {}}
    state["buffer"] = {"version": 3, "next_draw": 12, "started": {}, "ready": []}
    (tmp_path / "driver.json").write_text(json.dumps(state))
    assert cli._where_it_stands(tmp_path, 5) == "going on after step 3 of 5"
    assert "all 3 steps are done" in cli._where_it_stands(tmp_path, 3)
    with pytest.raises(UserError, match=r"run\.steps: got 2, but the run has 3 behind it"):
        cli._where_it_stands(tmp_path, 2)


def test_a_home_or_a_trailing_slash_in_a_path_changes_nothing(
    tmp_path: Path, config_text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run compares paths as text."""
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "run.toml"
    file.write_text("\ufeff" + config_text, encoding="utf-8")  # as Windows' editors write it
    config = load_config(file, ["model.path=~/starter/", "data.test=~/held/out/", "run.dir=/"])
    assert config.model.path == str(tmp_path / "starter")
    assert config.data.test == str(tmp_path / "held" / "out")
    assert config.run.dir == "/"


ROW = {"id": 1, "completion": "<answer>A</answer>", "answer": "A", "options": ["x", "y"]}
LINE = json.dumps(ROW)


def test_scores_never_take_the_place_of_a_device_or_a_link(tmp_path: Path) -> None:
    """A rename over /dev/stdout would replace it for the whole machine."""
    source = tmp_path / "in.jsonl"
    source.write_text(LINE)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(UserError, match="is not an ordinary file"):
        score_file(source, pipe)
    assert pipe.is_fifo()
    link = tmp_path / "link.jsonl"
    link.symlink_to(tmp_path / "real.jsonl")
    score_file(source, link)
    assert link.is_symlink()
    assert json.loads((tmp_path / "real.jsonl").read_text())["outcome"] == "ok"


def test_a_reward_in_the_working_directory_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_own_lab.py").write_text("def half(completion, prompt):\n    return 0.5\n")
    (tmp_path / "in.jsonl").write_text(LINE)
    monkeypatch.chdir(tmp_path)
    arguments = ("in.jsonl", "--out", "o.jsonl", "--rewards", "format,my_own_lab:half")
    assert status_of(monkeypatch, "score", *arguments) == 0
    scored = json.loads(Path("o.jsonl").read_text())
    assert scored["scores"] == {"format": 1.0, "half": 0.5}
