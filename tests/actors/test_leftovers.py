"""Whatever an engine that was killed leaves on the machine is found by the name of its folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import pytest

from medrl.actors.leftovers import SHARED, clear, clear_all

SHARES = """
import multiprocessing, sys
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from medrl.actors.leftovers import name_shared_memory

def work(out):
    name_shared_memory()  # as in a process that vLLM starts
    memory = SharedMemory(create=True, size=4096)
    out.send(memory.name)
    out.recv()

if __name__ == "__main__":
    name_shared_memory(Path(sys.argv[1]))
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=work, args=(theirs,))
    child.start()
    lock, memory = context.Lock(), SharedMemory(create=True, size=4096)
    print(ours.recv(), memory.name, lock._semlock.name, flush=True)
    sys.stdin.read()
"""


def shares_and_is_killed(script: Path, folder: Path) -> list[Path]:
    """All of its processes are, also the one of Python's that would delete what they share."""
    process = subprocess.Popen(
        [sys.executable, script, folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout
    one, other, semaphore = process.stdout.readline().split()
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return [SHARED / one, SHARED / other, SHARED / f"sem.{semaphore.lstrip('/')}"]


@pytest.mark.skipif(not SHARED.exists(), reason="not Linux")
def test_shared_memory_of_killed_processes_is_deleted_with_their_folder(tmp_path: Path) -> None:
    """Theirs alone: not another engine's, and not what anybody else shares."""
    script = tmp_path / "shares.py"
    script.write_text(SHARES)
    engines = [tmp_path / "run" / str(number) for number in range(2)]
    for folder in engines:
        folder.mkdir(parents=True)
    first, second = (shares_and_is_killed(script, folder) for folder in engines)
    others = SharedMemory(create=True, size=4096)
    try:
        assert all(path.exists() for path in (*first, *second))
        clear(engines[0])
        assert not any(path.exists() for path in (*first, engines[0]))
        assert all(path.exists() for path in (*second, engines[1]))
        clear_all(tmp_path / "run")
        assert not any(path.exists() for path in (*second, tmp_path / "run"))
        assert (SHARED / others.name).exists()
    finally:
        others.close()
        others.unlink()


def test_a_folder_that_is_not_there_is_no_matter(tmp_path: Path) -> None:
    clear(tmp_path / "none")
    clear_all(tmp_path / "none")
