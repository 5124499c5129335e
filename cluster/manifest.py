"""What a folder must hold, by size and digest: shows later what a disk or a crash did to it.

    manifest.json    {"files": {"learner/learner.json": {"bytes": 512, "sha256": "..."}, ...}}

It is written last, once the disk has everything else. It is no proof against malice: who can change
the files can change it as well; nothing a checkpoint holds is ever executed, see `learner`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

FILE = "manifest.json"
WORKERS = 4  # SHA-256 takes about a core to 2 GB/s, and lets go of the interpreter's lock


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A file as it was written."""

    bytes: Annotated[int, Field(ge=0)]
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The files of a folder by their path in it."""

    files: dict[str, Entry]


manifest_type = TypeAdapter(Manifest)


def seal(folder: Path) -> None:
    """Have the disk hold every file of `folder`, then what they are. Blocks; raises `OSError`."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = manifest_of(folder, paths)
    for path in paths:
        flush(path)
    (folder / FILE).write_bytes(manifest_type.dump_json(manifest, indent=1))
    flush(folder / FILE)
    for path in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
        flush(path)


def manifest_of(folder: Path, paths: Sequence[Path]) -> Manifest:
    """What the files at `paths`, all in `folder`, are. Blocks; raises `OSError`."""
    with ThreadPoolExecutor(WORKERS) as pool:
        entries = list(pool.map(_entry, paths))
    names = [path.relative_to(folder).as_posix() for path in paths]
    return Manifest(files=dict(zip(names, entries, strict=True)))


def damage(folder: Path, *, digests: bool = True) -> str:
    """What of `folder` is not as it was sealed, "" where nothing is. Blocks.

    Without `digests` only sizes are looked at. A file that was added is no damage: nothing reads a
    file of a checkpoint that it did not write."""
    try:
        manifest = manifest_type.validate_json((folder / FILE).read_bytes())
    except FileNotFoundError:
        return f"it has no {FILE}"
    except (OSError, ValidationError) as error:
        return f"{FILE} cannot be read: {_short(error)}"
    return other_than(folder, manifest, digests=digests)


def other_than(folder: Path, manifest: Manifest, *, digests: bool = True) -> str:
    """What of `folder` is not as `manifest` says, "" where nothing is. Blocks."""
    files = manifest.files.items()
    sizes = (_other_size(folder, name, entry) for name, entry in files)
    if found := next(filter(None, sizes), ""):
        return found
    return _other_digest(folder, list(files)) if digests else ""


def flush(path: Path) -> None:
    """Have the disk hold a file's bytes, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _entry(path: Path) -> Entry:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return Entry(bytes=file.tell(), sha256=digest)


def _other_size(folder: Path, name: str, entry: Entry) -> str:
    try:
        size = (folder / name).stat().st_size
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        return f"{name} is missing" if missing else f"{name} cannot be read: {_short(error)}"
    return "" if size == entry.bytes else f"{name} has {size} bytes of {entry.bytes}"


def _other_digest(folder: Path, files: Sequence[tuple[str, Entry]]) -> str:
    def problem(one: tuple[str, Entry]) -> str:
        name, entry = one
        try:
            return "" if _entry(folder / name) == entry else f"{name} has another SHA-256"
        except OSError as error:
            return f"{name} cannot be read: {_short(error)}"

    with ThreadPoolExecutor(WORKERS) as pool:
        return next(filter(None, pool.map(problem, files)), "")


def _short(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or type(error).__name__
