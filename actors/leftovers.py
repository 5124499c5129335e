"""What an engine that is killed leaves on the machine, and how whoever ends it finds that.

vLLM's processes share memory. Python gives it random names and has a process that deletes it in the
end; killed with the engine, that deletes nothing. So an engine's shared memory and semaphores bear
the name of the folder for its temporary files: who clears the folder deletes them too.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from contextlib import suppress
from multiprocessing import process, shared_memory
from pathlib import Path

VARIABLE = "MEDRL_SHARED_MEMORY"  # for the processes that vLLM starts
SHARED = Path("/dev/shm")  # where Linux shows them
_RANDOM_BYTES = 4


def name_shared_memory(folder: Path | None = None) -> None:
    """Have what this process and those it starts share be named after `folder`; None: after the
    one that the process which started this one named, if any."""
    if folder:
        os.environ[VARIABLE] = _name(folder)
    if name := os.environ.get(VARIABLE):
        # Neither has a public way to say it.
        shared_memory._SHM_NAME_PREFIX = f"/{name}-"  # type: ignore[attr-defined]
        shared_memory._SHM_SAFE_NAME_LENGTH = len(name) + 2 + 2 * _RANDOM_BYTES  # type: ignore[attr-defined]
        process.current_process()._config["semprefix"] = f"/{name}"  # type: ignore[attr-defined]


def clear(folder: Path) -> None:
    """Delete an engine's temporary files and shared memory; its processes have ended."""
    name = _name(folder)
    for path in (*SHARED.glob(f"{name}-*"), *SHARED.glob(f"sem.{name}-*")):
        with suppress(OSError):
            path.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def clear_all(folder: Path) -> None:
    """Of all engines whose folders lie in `folder`, and it."""
    for one in folder.glob("*"):
        clear(one)
    shutil.rmtree(folder, ignore_errors=True)


def _name(folder: Path) -> str:
    return "medrl-" + hashlib.blake2b(os.fsencode(folder.absolute()), digest_size=8).hexdigest()
