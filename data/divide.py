"""Read a data set, split it by images, write both parts: `medrl data split`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from medrl.actors.types import Prompt
from medrl.configs.errors import UserError
from medrl.data.lines import write_prompts
from medrl.data.load import LoadedPrompts, share_root
from medrl.data.split import split_by_image
from medrl.data.survey import SurveyedSplit, survey


@dataclass(frozen=True, slots=True, kw_only=True)
class Divided:
    """What was written."""

    train: int  # prompts
    test: int
    image_root: Path | None  # the image paths are relative to it; None: no image was found
    left_out: tuple[str, ...]  # a sentence a problem
    notes: tuple[str, ...]


def divide(
    path: Path,
    out: Path,
    *,
    fraction: float,
    seed: int,
    root: Path | None = None,
    skip_bad: bool = False,
) -> Divided:
    """Write OUT/train.jsonl and OUT/test.jsonl. Images are the same where their pixels are.

    Without their files, images are told apart by path. Raises `UserError`: problems (unless
    `skip_bad`, which leaves their rows out), nothing to split, a folder that cannot be written.
    """
    if not 0 < fraction < 1:
        raise UserError(f"--test: got {fraction}, needs a share between 0 and 1, e.g. 0.2")
    surveyed = survey(path, root)
    problems = tuple(sentence for split in surveyed for sentence in split.problems)
    if problems and not skip_bad:
        raise UserError(*problems, "nothing was written; --skip-bad leaves such rows out")
    prompts, identities, image_root = _pool(surveyed)
    try:
        train, test = split_by_image(
            prompts, fraction, seed, lambda prompt, image: identities[prompt.id, image]
        )
        write_prompts(out / "train.jsonl", train)
        write_prompts(out / "test.jsonl", test)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    except OSError as error:
        raise UserError(f"--out: {out} cannot be written: {error.strerror}") from None
    return Divided(
        train=len(train),
        test=len(test),
        image_root=image_root,
        left_out=problems,
        notes=tuple(note for split in surveyed for note in split.notes),
    )


def _pool(
    surveyed: tuple[SurveyedSplit, ...],
) -> tuple[list[Prompt], dict[tuple[str, str], str], Path | None]:
    """All prompts that can be used under one image root, and the identity of each one's images.

    An id is unique in a split only: where train and test number alike, the split's name goes first.
    """
    ids = [prompt.id for split in surveyed for prompt in split.prompts]
    named = len(set(ids)) < len(ids)
    loaded = [
        LoadedPrompts(
            prompts=tuple(p for p in split.prompts if p.id not in split.bad_prompts),
            image_root=split.image_root,
            skipped=(),
        )
        for split in surveyed
    ]
    # Where no image was found the roots mean nothing, and the paths stay as they are.
    found = any(split.images_found for split in surveyed)
    shared = share_root(*loaded) if found else loaded
    prompts: list[Prompt] = []
    identities: dict[tuple[str, str], str] = {}
    for split, before, after in zip(surveyed, loaded, shared, strict=True):
        for old, new in zip(before.prompts, after.prompts, strict=True):
            new = replace(new, id=f"{split.name}/{new.id}") if named else new
            prompts.append(new)
            for old_path, new_path in zip(old.images, new.images, strict=True):
                identities[new.id, new_path] = split.images[old_path]
    return prompts, identities, shared[0].image_root if found else None
