"""One entry for all formats: `load_prompts`. All that is wrong with a data set is told at once."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from medrl.actors.types import Prompt
from medrl.configs.errors import UserError
from medrl.configs.loader import did_you_mean
from medrl.configs.schema import DataConfig
from medrl.data import huggingface, med_r1, names, omnimedvqa
from medrl.data.image_files import ImageProblem, PathProblem, check_images
from medrl.data.pass_rates import select
from medrl.data.rows import Problems, Row, RowError, Source, to_prompt
from medrl.data.tables import read_json_lines_table


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedPrompts:
    """The prompts of one split, in the order of their files."""

    prompts: tuple[Prompt, ...]
    image_root: Path  # prompts' image paths are relative to it
    skipped: tuple[str, ...]  # a sentence for each row left out for its images
    notes: tuple[str, ...] = ()  # nothing wrong, but worth a look


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadRows:
    """All rows of a split that can be read, and what is wrong with the others."""

    kept: tuple[tuple[Row, Prompt], ...]  # an id once: the first row of it
    root: Path
    holds_images: bool
    problems: tuple[str, ...]


def read_rows(config: DataConfig, split: Literal["train", "test"]) -> ReadRows:
    """Read a split without filters or images; what is wrong is returned, not raised."""
    problems = Problems()
    source = _read(config, split, problems)
    kept = _prompts(source.rows, problems)
    _refuse_duplicates((row for row, _ in kept), problems)
    first: dict[str, tuple[Row, Prompt]] = {}
    for row, prompt in kept:
        first.setdefault(prompt.id, (row, prompt))
    return ReadRows(
        kept=tuple(first.values()),
        root=source.root,
        holds_images=source.holds_images,
        problems=tuple(problems.found),
    )


def load_prompts(
    config: DataConfig, split: Literal["train", "test"], *, images: bool = True
) -> LoadedPrompts:
    """Read a split, map gold answers to letters, filter (train only), check every image.

    `images=False` leaves the check out: nothing below the image root is touched. Raises `UserError`
    with the first problems, each naming its file and row, and their number.
    """
    problems = Problems()
    source = _read(config, split, problems)
    root = source.root
    if config.images and not source.holds_images:
        root = Path(config.images)
    kept = _prompts(source.rows, problems)
    _refuse_duplicates((row for row, _ in kept), problems)
    if split == "train":
        kept = _filtered(config, kept, problems)
    skipped: list[str] = []
    if images and kept:
        kept = _with_good_images(config, kept, root, problems, skipped)
    if not kept and not problems.found:
        left_out = f": {len(skipped)} left out, first {skipped[0]}" if skipped else ""
        problems.add(f"data.{split}", f"no prompts in {getattr(config, split)}{left_out}")
    problems.raise_if_any()
    prompts = tuple(prompt for _, prompt in kept)
    notes = _notes(prompts)
    if split == "train" and config.pass_rates:
        selected = select(config, prompts)
        prompts, notes = selected.prompts, (*notes, *selected.notes)
    return LoadedPrompts(prompts=prompts, image_root=root, skipped=tuple(skipped), notes=notes)


def share_root(*loaded: LoadedPrompts) -> tuple[LoadedPrompts, ...]:
    """Make the image paths of several splits relative to one root, for one `ImageStore`."""
    # Links resolved: below the common root, a linked split would look like a way out of it.
    roots = [os.path.realpath(one.image_root) for one in loaded]
    root = os.path.commonpath(roots)
    return tuple(
        replace(one, image_root=Path(root), prompts=_moved(one.prompts, os.path.relpath(own, root)))
        for one, own in zip(loaded, roots, strict=True)
    )


def _moved(prompts: Iterable[Prompt], prefix: str) -> tuple[Prompt, ...]:
    if prefix == ".":
        return tuple(prompts)
    return tuple(
        replace(prompt, images=tuple(os.path.join(prefix, path) for path in prompt.images))
        for prompt in prompts
    )


def _read(config: DataConfig, split: Literal["train", "test"], problems: Problems) -> Source:
    name: str = getattr(config, split)
    if not name:
        raise UserError(f"data.{split} is empty: name a file or folder of prompts")
    if config.format == "huggingface":
        return huggingface.read(name, split, config.columns, problems)
    path = Path(name)
    if not path.exists():
        raise UserError(f"data.{split}: no such file or folder: {name}{near(path)}")
    if config.format == "jsonl":
        return read_json_lines_table(path, config.columns, problems)
    if config.columns:
        problems.add("data.columns", f"is for jsonl and huggingface, not for {config.format}")
    if config.format == "med_r1":
        return med_r1.read(path, split, problems)
    return omnimedvqa.read(path, problems)


def near(path: Path) -> str:
    """What a path that does not exist may have meant, to be said after it."""
    beside = sorted(other.name for other in path.parent.glob("*"))[:20]
    return f"; in {path.parent}, {did_you_mean(path.name, beside)}" if beside else ""


def _prompts(rows: Iterable[Row], problems: Problems) -> list[tuple[Row, Prompt]]:
    kept: list[tuple[Row, Prompt]] = []
    for row in rows:
        try:
            kept.append((row, to_prompt(row)))
        except RowError as error:
            problems.add(row.where, str(error))
    return kept


def _refuse_duplicates(rows: Iterable[Row], problems: Problems) -> None:
    first: dict[str, str] = {}
    for row in rows:
        if row.id in first:
            problems.add(row.where, f"id {row.id!r} is that of {first[row.id]} already")
        first.setdefault(row.id, row.where)


def _filtered(
    config: DataConfig, kept: list[tuple[Row, Prompt]], problems: Problems
) -> list[tuple[Row, Prompt]]:
    """Keep what `data.modalities` and `data.question_types` ask for; empty: all."""
    modalities = {names.modality(name) for name in config.modalities}
    types = {names.question_type(name) for name in config.question_types}
    have_modalities = {prompt.modality for _, prompt in kept}
    have_types = {prompt.question_type for _, prompt in kept}
    for key, wanted, have in (
        ("data.modalities", modalities, have_modalities),
        ("data.question_types", types, have_types),
    ):
        for name in sorted(wanted - have) if have else ():
            there = ", ".join(sorted(have))
            problems.add(key, f"no prompt has {name!r}; {did_you_mean(name, have)} (have: {there})")
    return [
        (row, prompt)
        for row, prompt in kept
        if prompt.modality in (modalities or have_modalities)
        and prompt.question_type in (types or have_types)
    ]


def _with_good_images(
    config: DataConfig,
    kept: Sequence[tuple[Row, Prompt]],
    root: Path,
    problems: Problems,
    skipped: list[str],
) -> list[tuple[Row, Prompt]]:
    """Check each image once; bad ones are problems, or leave their prompts out."""
    if not root.is_dir():
        problems.add("data.images", f"no such folder: {root}")
        return []
    paths = list(dict.fromkeys(path for _, prompt in kept for path in prompt.images))
    bad = check_images(root, paths)
    if paths and not any((root / path).exists() for path in paths):
        problems.add(
            "data.images",
            f"none of the {len(paths)} images is in {root} (first: {paths[0]}): "
            "give the folder that the paths are relative to",
        )
        return []
    good: list[tuple[Row, Prompt]] = []
    for row, prompt in kept:
        wrong = [path for path in prompt.images if path in bad]
        for path in wrong[:1]:
            sentence = f"image {path!r} {bad[path]}"
            if _may_skip(config, row, bad[path]):
                skipped.append(f"{row.where}: {sentence}")
            else:
                problems.add(row.where, sentence)
        if not wrong:
            good.append((row, prompt))
    return good


def _may_skip(config: DataConfig, row: Row, problem: ImageProblem) -> bool:
    """A path that leaves the root is never skipped: somebody must look at such a data set."""
    if isinstance(problem, PathProblem):
        return False
    return config.on_bad_image == "skip" or row.images_may_miss


def _notes(prompts: Iterable[Prompt]) -> tuple[str, ...]:
    """Say which modalities are none of the eight; they are kept as they are."""
    others = sorted({p.modality for p in prompts} - {*names.MODALITIES, names.UNKNOWN})
    if not others:
        return ()
    return (f"modalities kept as written: {', '.join(others)}",)
