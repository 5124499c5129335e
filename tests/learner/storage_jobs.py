"""What the processes of `test_state_files` do: hostile checkpoints, disks that are full."""

from __future__ import annotations

import os
import pickle
import resource
import shutil
from pathlib import Path
from typing import Any

import torch
from made_groups import mixed_batch
from rank_jobs import STAGES, Ranks

from medrl.configs.errors import CheckpointError

ALWAYS_READ = ("rng_0.pt", "rng_1.pt")


class Hostile:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def planted(ranks: Ranks, folder: Path, stage: int) -> dict[str, Any]:
    """A checkpoint that is right, then one in which all files of a kind are hostile."""
    rank = ranks.make(zero_stage=stage)
    rank.save(folder)
    names = {path.name for path in (folder / "state").iterdir()}
    kinds: dict[str, list[Path]] = {"rng": [folder / name for name in ALWAYS_READ]}
    for name in sorted(names):
        kinds.setdefault(name.rpartition("_")[0][-5:], []).append(folder / "state" / name)
    refused, mark = {}, folder / "mark"
    for kind, paths in kinds.items():
        kept = {path: path.read_bytes() for path in paths}
        torch.distributed.barrier()
        if ranks.rank == 0:
            for path in paths:
                plant(path, mark)
        torch.distributed.barrier()
        refused[kind] = error_of(rank.load, folder)
        torch.distributed.barrier()
        if ranks.rank == 0:
            for path, data in kept.items():
                path.write_bytes(data)
        torch.distributed.barrier()
    rank.load(folder)
    return {"refused": refused, "ran": mark.exists(), "programs": list(folder.rglob("*.py"))}


def plant(path: Path, mark: Path) -> None:
    """In the place where DeepSpeed has an object of its own, among data."""
    torch.save({"optimizer_state_dict": {"loss_scaler": Hostile(mark)}}, path)


def full_disk(ranks: Ranks, folder: Path, stage: int, on: int) -> dict[str, Any]:
    """Rank `on` may write no file beyond 20 kB; later it may."""
    rank = ranks.make(zero_stage=stage)
    folder.mkdir(exist_ok=True)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if ranks.rank == on:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        errors = [error_of(rank.save, folder), error_of(rank.export, folder / "export")]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    heard: list[list[str]] = [[], []]
    torch.distributed.all_gather_object(heard, errors)
    rank.update(mixed_batch(rank._reader))
    if ranks.rank == 0:
        shutil.rmtree(folder)
        folder.mkdir()
    torch.distributed.barrier()
    rank.save(folder)
    rank.load(folder)
    return {"heard": heard}


def error_of(call: Any, folder: Path) -> str:
    try:
        call(folder)
    except CheckpointError as error:
        return str(error)
    return ""


def storage_jobs(ranks: Ranks, out: Path) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for stage in STAGES:
        (out / f"planted{stage}").mkdir(exist_ok=True)
        results[f"planted {stage}"] = planted(ranks, out / f"planted{stage}", stage)
    for stage in (0, 3):
        for on in (0, 1):
            results[f"full {stage} {on}"] = full_disk(ranks, out / f"full{stage}{on}", stage, on)
    return results


def pickled(mark: Path) -> bytes:
    return pickle.dumps(Hostile(mark))
