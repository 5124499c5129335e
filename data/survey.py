"""Read a data set whatever is wrong with it: prompts, images, and every problem, none raised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from medrl.actors.types import Prompt
from medrl.configs.errors import UserError
from medrl.configs.schema import DataConfig
from medrl.data.detect import FoundSplit, detect
from medrl.data.image_files import PathProblem, identify_images
from medrl.data.load import read_rows
from medrl.data.rows import Row


@dataclass(frozen=True, slots=True, kw_only=True)
class SurveyedSplit:
    """What could be read of one split, and a sentence for each row or image that could not."""

    name: str  # "train", "test", or "" where the data set is not divided
    format: str
    prompts: tuple[Prompt, ...]
    where: tuple[str, ...]  # [len(prompts)] file and row
    image_root: Path
    images: Mapping[str, str]  # image path -> identity: equal pixels, equal identity
    images_found: bool  # at least one is in `image_root`: it is the right folder
    bad_prompts: frozenset[str]  # ids of prompts whose images cannot be used
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()


def survey(path: Path, root: Path | None = None) -> tuple[SurveyedSplit, ...]:
    """Read all splits at `path`, decode every image below `root` (else the data set's own root).

    Raises `UserError` only where `path` is no data set, or `root` no folder.
    """
    if root and not root.is_dir():
        raise UserError(f"--root: no such folder: {root}")
    return tuple(_survey(found, root) for found in detect(path))


def _survey(found: FoundSplit, root: Path | None) -> SurveyedSplit:
    config = DataConfig(format=found.format, train=found.path, test=found.path)
    read = read_rows(config, found.side)
    problems = list(read.problems)
    notes: list[str] = []
    image_root = root if root and not read.holds_images else read.root
    paths = list(dict.fromkeys(path for _, prompt in read.kept for path in prompt.images))
    if not read.kept and not problems:
        problems.append(f"{found.path}: no prompts in it")
    identities: dict[str, str] = {path: path for path in paths}
    bad: frozenset[str] = frozenset()
    images_found = any((image_root / path).exists() for path in paths)
    if images_found:
        identities, bad = _check_images(read.kept, image_root, paths, problems, notes)
    elif paths and root:
        bad = frozenset(prompt.id for _, prompt in read.kept if prompt.images)
        problems.append(f"none of the {len(paths)} images is in {root} (first: {paths[0]})")
    elif paths:
        notes.append(
            f"images not checked: none of the {len(paths)} is in {image_root} (first: {paths[0]}); "
            "name their folder with --root"
        )
    return SurveyedSplit(
        name=found.name,
        format=found.format,
        prompts=tuple(prompt for _, prompt in read.kept),
        where=tuple(row.where for row, _ in read.kept),
        image_root=image_root,
        images=identities,
        images_found=images_found,
        bad_prompts=bad,
        problems=tuple(problems),
        notes=tuple(notes),
    )


def _check_images(
    kept: tuple[tuple[Row, Prompt], ...],
    root: Path,
    paths: list[str],
    problems: list[str],
    notes: list[str],
) -> tuple[dict[str, str], frozenset[str]]:
    """Identity of each image (its own path where it cannot be read), and ids it makes unusable."""
    good, bad = identify_images(root, paths)
    unusable: set[str] = set()
    excused = 0
    for row, prompt in kept:
        for path in (path for path in prompt.images if path in bad):
            unusable.add(prompt.id)
            if row.images_may_miss and not isinstance(bad[path], PathProblem):
                excused += 1
            else:
                problems.append(f"{row.where}: image {path!r} {bad[path]}")
    if excused:
        notes.append(f"{excused} prompts without the images their publisher may not pass on")
    identities = {path: good.get(path, str(root / path)) for path in paths}
    return identities, frozenset(unusable)
