"""A checkpoint's files are data: what else is in them is not executed; and what one rank cannot
write, all ranks hear of and none waits for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rank_jobs import STAGES, run_ranks
from storage_jobs import Hostile, pickled, plant, storage_jobs

from medrl.configs.errors import CheckpointError
from medrl.learner.state_files import StateFiles


def test_what_is_planted_here_would_run(tmp_path: Path) -> None:
    """Else the tests below prove nothing."""
    plant(tmp_path / "file.pt", tmp_path / "mark")
    torch.load(tmp_path / "file.pt", weights_only=False)
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize("form", ["zip", "old", "plain pickle"])
def test_no_form_of_a_pickle_runs(tmp_path: Path, form: str) -> None:
    path, mark = tmp_path / "file.pt", tmp_path / "mark"
    if form == "plain pickle":
        path.write_bytes(pickled(mark))
    else:
        torch.save(Hostile(mark), path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(CheckpointError, match=r"file\.pt .*nothing of it was executed"):
        StateFiles(None, [dict]).load(path)
    assert not mark.exists()


@pytest.fixture(scope="module")
def results(
    tiny_models: dict[str, Path], image_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("storage")
    wait = run_ranks(2, tiny_models["qwen2_vl"], image_root, out, timeout_s=180, jobs=storage_jobs)
    found: dict[str, Any] = wait()
    return found


@pytest.mark.engines
@pytest.mark.parametrize("stage", STAGES)
def test_a_hostile_checkpoint_is_refused_and_not_executed(
    stage: int, results: dict[str, Any]
) -> None:
    found = results[f"planted {stage}"]
    assert found["refused"].keys() == ({"rng", "model", "optim"} if stage else {"rng", "model"})
    for sentence in found["refused"].values():
        assert "mkdir" in sentence
        assert "nothing of it was executed" in sentence
    assert not found["ran"]


@pytest.mark.engines
def test_a_checkpoint_holds_no_program(results: dict[str, Any]) -> None:
    assert not any(results[f"planted {stage}"]["programs"] for stage in STAGES)


@pytest.mark.engines
@pytest.mark.timeout(400)
@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("on", [0, 1])
def test_a_rank_that_cannot_write_fails_all_and_they_stay_together(
    stage: int, on: int, results: dict[str, Any]
) -> None:
    """They train, save and load afterwards: the job would have hung."""
    for saving, exporting in results[f"full {stage} {on}"]["heard"]:
        if stage == 0 and on == 1:
            assert saving == ""  # it has only its random state to write
        else:
            assert f"could not be written: rank {on}: " in saving
        assert bool(exporting) == (on == 0)
