"""`medrl data` on the command line: exit statuses, JSON for programs, tables for people."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

RECORDS = [
    {"image": f"Images/a/{n}.png", "problem": f"Q{n}? A)x, B)y", "solution": "<answer> A </answer>"}
    for n in range(10)
]


def medrl(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "medrl.cluster", "data", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def write(path: Path, records: Any) -> Path:
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def test_lint_says_by_its_exit_status_whether_there_are_problems(tmp_path: Path) -> None:
    fine = write(tmp_path / "X-Ray_test.json", RECORDS)
    done = medrl("lint", fine, "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, found["n"], found["by_modality"]) == (0, 10, {"X-ray": 10})
    assert (found["chance"], found["majority"]) == (0.5, 1.0)
    bad = write(tmp_path / "CT_test.json", [*RECORDS, {**RECORDS[0], "solution": "Z"}])
    done = medrl("lint", bad, "--json")
    assert done.returncode == 1
    assert "'Z' is not among the options" in json.loads(done.stdout)["problems"][0]
    done = medrl("lint", tmp_path / "gone")
    assert (done.returncode, done.stdout) == (2, "")
    assert "no such file" in done.stderr


def test_lint_shows_a_prompt_of_the_mode_and_what_was_not_checked(tmp_path: Path) -> None:
    done = medrl("lint", write(tmp_path / "X-Ray_test.json", RECORDS), "--mode", "think-before")
    for text in ("Q0?", "A) x", "<think>", "gold: A", "images not checked", "0 problems"):
        assert text in done.stdout, text
    assert medrl("lint", tmp_path, "--mode", "thinking").returncode == 2


def test_lint_shows_a_prompt_with_an_instruction_of_ones_own(tmp_path: Path) -> None:
    path = write(tmp_path / "X-Ray_test.json", RECORDS)
    done = medrl("lint", path, "--instruction", "Name the {answer} {soon}.")
    assert done.returncode == 0
    assert "  | Name the letter {soon}." in done.stdout
    assert "{soon} is sent as it stands" in done.stdout
    assert "does not name <answer>" in done.stdout


def test_a_split_is_written_once_and_lints_well(tmp_path: Path) -> None:
    source, out = write(tmp_path / "X-Ray_test.json", RECORDS), tmp_path / "out"
    assert medrl("split", source, "--out", out, "--test", 0.3).returncode == 0
    found = json.loads(medrl("lint", out, "--json").stdout)
    assert {name: counts["n"] for name, counts in found["splits"].items()} == {
        "train": 7,
        "test": 3,
    }
    assert (found["shared_images"], found["problems"]) == (0, [])
    again = medrl("split", source, "--out", out)
    assert again.returncode == 2
    assert "exists already" in again.stderr


def test_an_import_stops_at_bad_rows_unless_told_otherwise(tmp_path: Path) -> None:
    row = {"qid": 1, "q_lang": "en", "question": "Q?", "answer": "lung", "img_name": "a.jpg"}
    row |= {"modality": "CT", "content_type": "Organ"}
    source = write(tmp_path / "train.json", [row, {**row, "qid": 2, "q_lang": "zh"}, {"qid": 3}])
    out = tmp_path / "slake.jsonl"
    done = medrl("import", "slake", source, "--out", out)
    assert (done.returncode, out.exists()) == (2, False)
    assert "row 3: no key 'q_lang'" in done.stderr
    done = medrl("import", "slake", source, "--out", out, "--skip-bad")
    assert done.returncode == 0
    assert "1 prompts, 1 of them open" in done.stdout
    assert f'data.images = "{tmp_path}/imgs"' in done.stdout
    assert len(out.read_text().splitlines()) == 1
