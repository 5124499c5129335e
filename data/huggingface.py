"""Hugging Face data sets: a `save_to_disk` folder, Parquet files, or a name on the hub.

Images inside a data set are written once into a cache, named by their content, so that a prompt
holds paths whatever its format. `datasets` is imported when a data set is read, not before.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medrl.data.rows import Problems, RowError, Source
from medrl.data.tables import Table

_BATCH = 256
"""Rows in memory at a time: their images are."""


def cache_folder() -> Path:
    """Folder of images taken out of data sets: $MEDRL_CACHE/images, else ~/.cache/medrl/images.

    On a cluster, set MEDRL_CACHE to a folder that all nodes share.
    """
    cache = os.environ.get("MEDRL_CACHE")
    return (Path(cache) if cache else Path.home() / ".cache" / "medrl") / "images"


@dataclass(frozen=True, slots=True)
class OpenedRows:
    """A data set opened for reading."""

    columns: list[str]
    batches: Iterator[list[dict[str, Any]]]
    folder: Path  # what image paths in it are relative to


def read(name: str, split: str, columns: Mapping[str, str], problems: Problems) -> Source:
    """Read a data set; `name` may end in ":split" where that is not `split`."""
    opened = open_rows(name, split, problems)
    if opened is None:
        return Source(rows=(), root=Path())
    saved: set[str] = set()

    def save(cell: Any) -> str:
        path = save_image(cell, opened.folder)
        saved.add(path)
        return path

    table = Table(name, Path(name).stem, columns, save)
    if not table.check(opened.columns, problems):
        return Source(rows=(), root=opened.folder)
    records = (record for batch in opened.batches for record in batch)
    numbered = ((f"{name}: row {n}", record) for n, record in enumerate(records, 1))
    try:
        rows = table.rows(numbered, problems)
    except (OSError, ValueError) as error:  # damaged files show when their rows are read
        problems.add(name, f"cannot be read to its end: {error}")
        return Source(rows=(), root=opened.folder)
    if saved and any(path not in saved for row in rows for path in row.images):
        problems.add(name, "holds some images itself and others as paths: choose one column")
    if saved:
        return Source(rows=tuple(rows), root=cache_folder(), holds_images=True)
    return Source(rows=tuple(rows), root=opened.folder)


def open_rows(name: str, split: str, problems: Problems) -> OpenedRows | None:
    """Open a data set; None where it is none, which is a problem then."""
    path = Path(name)
    if not path.exists() and ":" in name:
        name, split = name.rsplit(":", 1)
        path = Path(name)
    if path.is_file() or (path.is_dir() and any(path.glob("*.parquet"))):
        return _open_parquet([path] if path.is_file() else sorted(path.glob("*.parquet")), problems)
    return _open_data_set(name, split, problems)


def _open_parquet(files: list[Path], problems: Problems) -> OpenedRows | None:
    import pyarrow.parquet as parquet

    try:
        opened = [parquet.ParquetFile(file) for file in files]
    except (OSError, ValueError) as error:
        problems.add(files[0].parent, f"no Parquet that can be read: {error}")
        return None
    batches = (
        batch.to_pylist() for file in opened for batch in file.iter_batches(batch_size=_BATCH)
    )
    return OpenedRows(opened[0].schema_arrow.names, batches, files[0].parent)


def _open_data_set(name: str, split: str, problems: Problems) -> OpenedRows | None:
    import datasets

    local = Path(name).is_dir()
    try:
        found: Any = datasets.load_from_disk(name) if local else datasets.load_dataset(name)
    # The hub, the network and the file system fail in some forty ways; the sentence is the same.
    except Exception as error:
        kind = "a folder written by save_to_disk" if local else "a folder here, or found on the hub"
        reason = str(error).strip().splitlines()
        problems.add(name, f"is not {kind}: {reason[0] if reason else type(error).__name__}")
        return None
    if isinstance(found, dict):
        if split not in found:
            have, first = ", ".join(found), next(iter(found), "SPLIT")
            problems.add(name, f"no split {split!r}, only {have}: name one, as in {name}:{first}")
            return None
        found = found[split]
    class_names = {
        column: feature.names
        for column, feature in found.features.items()
        if isinstance(feature, datasets.ClassLabel)
    }
    return OpenedRows(
        found.column_names, _batches(found, class_names), Path(name) if local else Path()
    )


def _batches(found: Any, class_names: Mapping[str, list[str]]) -> Iterator[list[dict[str, Any]]]:
    """Rows as Arrow stores them: images stay the bytes of their files; class labels as names."""
    for batch in found.with_format("arrow").iter(batch_size=_BATCH):
        rows: list[dict[str, Any]] = batch.to_pylist()
        for row in rows:
            for column, of_index in class_names.items():
                index = row[column]
                row[column] = of_index[index] if index is not None and index >= 0 else None
        yield rows


def save_image(cell: Any, folder: Path, into: Path | None = None) -> str:
    """Write an image cell, {"bytes", "path"}, into a folder, else the cache; return its path in it.

    `folder` is what the cell's own path is relative to.
    """
    content = cell.get("bytes") if isinstance(cell, dict) else None
    path = cell.get("path") if isinstance(cell, dict) else None
    if content is None and path:
        try:
            content = (folder / path).read_bytes()
        except OSError as error:
            raise RowError(f"image {path!r} cannot be read: {error.strerror}") from None
    if not isinstance(content, bytes):
        raise RowError(f"an image must be a path or an Image feature, got {type(cell).__name__}")
    digest = hashlib.sha256(content).hexdigest()
    relative = f"{digest[:2]}/{digest}{Path(path or '').suffix.lower()}"
    target = (into or cache_folder()) / relative
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        # Written aside and renamed: a run that starts at the same time never sees half a file.
        with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as aside:
            aside.write(content)
        os.replace(aside.name, target)
    return relative
