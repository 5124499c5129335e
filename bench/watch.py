"""Run a command and say what it took: wall seconds, and the peak memory of all its processes.

    python bench/watch.py make demo

Memory is the sum over all descendants of their proportional set size (PSS): a page that several
processes share counts once. Processes that leave the family (a daemon) are counted while they live.
Prints one JSON object as its last line; exits with the command's status.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time

import psutil

EVERY_S = 1.0


def family_pss(root: psutil.Process, known: dict[int, psutil.Process]) -> int:
    """Bytes of `root`, its descendants, and those of them that were seen before, now."""
    for process in (root, *root.children(recursive=True)):
        known.setdefault(process.pid, process)
    total = 0
    for pid, process in list(known.items()):
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            del known[pid]
    return total


def main() -> int:
    began = time.monotonic()
    command = subprocess.Popen(sys.argv[1:])
    root = psutil.Process(command.pid)
    known: dict[int, psutil.Process] = {}
    peak = 0
    while command.poll() is None:
        try:
            peak = max(peak, family_pss(root, known))
        except psutil.NoSuchProcess:
            break
        time.sleep(EVERY_S)
    status = command.wait()
    took = {"seconds": round(time.monotonic() - began, 1), "peak_gib": round(peak / 2**30, 2)}
    print(json.dumps(took | {"left_running": sum(p.is_running() for p in known.values())}))
    return status


if __name__ == "__main__":
    sys.exit(main())
