"""What there is to know of a data set before a model is trained on it. Pure functions of surveys.

Chance is the accuracy of a uniform guess, majority that of always giving the most frequent letter;
both are over the prompts with options, as fractions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from medrl.actors.types import Prompt
from medrl.data import names
from medrl.data.gold import plain
from medrl.data.survey import SurveyedSplit


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Numbers of a set of prompts."""

    n: int
    by_modality: dict[str, int]
    by_question_type: dict[str, int]
    option_counts: dict[str, int]  # "4": how many prompts have 4 options; "0": open questions
    chance: float | None  # None: no prompt has options
    majority: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Leakage:
    """What two sets of prompts, one for training and one for testing, have in common."""

    compared: str  # "train and test"
    shared_images: int  # different images
    shared_questions: int  # different question texts
    prompts: int  # of the test set
    prompts_of_shared_images: int  # of them
    prompts_of_shared_questions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LintReport:
    """All of it. `problems` are to be mended; `notes` are worth a look."""

    total: Counts
    splits: dict[str, Counts]  # where the data set is divided
    modalities: dict[str, Counts]
    question_types: dict[str, Counts]
    leakage: Leakage | None  # None: nothing to compare with
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The contract: n to problems. After it: splits, leakage in prompts, notes."""
        leakage = self.leakage
        return {
            **_as_json(self.total),
            "shared_images": leakage.shared_images if leakage else 0,
            "shared_questions": leakage.shared_questions if leakage else 0,
            "problems": list(self.problems),
            "notes": list(self.notes),
            "splits": {name: _as_json(counts) for name, counts in self.splits.items()},
            "test_prompts_of_shared_images": leakage.prompts_of_shared_images if leakage else 0,
            "test_prompts_of_shared_questions": (
                leakage.prompts_of_shared_questions if leakage else 0
            ),
        }


def lint(splits: Sequence[SurveyedSplit], against: Sequence[SurveyedSplit] = ()) -> LintReport:
    """Report on a data set. Leakage is between its train and test, or, with `against`, to that."""
    prompts = [prompt for split in splits for prompt in split.prompts]
    leakage = _leakage(splits, against)
    problems = [sentence for split in splits for sentence in split.problems]
    problems += [f"(other) {sentence}" for split in against for sentence in split.problems]
    problems += [sentence for split in splits for sentence in _duplicate_options(split)]
    if leakage and leakage.shared_images:
        problems.append(
            f"{leakage.compared} share {leakage.shared_images} images: "
            f"{leakage.prompts_of_shared_images} of {leakage.prompts} prompts of the latter"
        )
    return LintReport(
        total=count(prompts),
        splits={s.name: count(s.prompts) for s in splits} if len(splits) > 1 else {},
        modalities={m: count(p for p in prompts if p.modality == m) for m in _modalities(prompts)},
        question_types={
            t: count(p for p in prompts if p.question_type == t) for t in _types(prompts)
        },
        leakage=leakage,
        problems=tuple(problems),
        notes=(*(note for split in (*splits, *against) for note in split.notes), *_notes(splits)),
    )


def count(prompts: Iterable[Prompt]) -> Counts:
    """Count a set of prompts."""
    prompts = list(prompts)
    choices = [prompt for prompt in prompts if prompt.options]
    letters = Counter(prompt.answer for prompt in choices)
    chance = sum(1 / len(prompt.options) for prompt in choices)
    option_counts = Counter(len(prompt.options) for prompt in prompts)
    return Counts(
        n=len(prompts),
        by_modality=dict(Counter(sorted(prompt.modality for prompt in prompts))),
        by_question_type=dict(Counter(sorted(prompt.question_type for prompt in prompts))),
        option_counts={str(size): n for size, n in sorted(option_counts.items(), reverse=True)},
        chance=chance / len(choices) if choices else None,
        majority=max(letters.values()) / len(choices) if choices else None,
    )


def _as_json(counts: Counts) -> dict[str, Any]:
    return {name: getattr(counts, name) for name in Counts.__slots__}


def _modalities(prompts: Iterable[Prompt]) -> list[str]:
    return sorted({prompt.modality for prompt in prompts})


def _types(prompts: Iterable[Prompt]) -> list[str]:
    return sorted({prompt.question_type for prompt in prompts})


def _leakage(splits: Sequence[SurveyedSplit], against: Sequence[SurveyedSplit]) -> Leakage | None:
    if against:
        train, test, compared = against, splits, "the other data set and this one"
    elif len(splits) == 2:
        train, test, compared = splits[:1], splits[1:], "train and test"
    else:
        return None
    images = _images(train) & _images(test)
    questions = _questions(train) & _questions(test)
    of_test = [(split, prompt) for split in test for prompt in split.prompts]
    return Leakage(
        compared=compared,
        shared_images=len(images),
        shared_questions=len(questions),
        prompts=len(of_test),
        prompts_of_shared_images=sum(
            any(split.images[path] in images for path in prompt.images) for split, prompt in of_test
        ),
        prompts_of_shared_questions=sum(prompt.question in questions for _, prompt in of_test),
    )


def _images(splits: Sequence[SurveyedSplit]) -> set[str]:
    return {identity for split in splits for identity in split.images.values()}


def _questions(splits: Sequence[SurveyedSplit]) -> set[str]:
    return {prompt.question for split in splits for prompt in split.prompts}


def _duplicate_options(split: SurveyedSplit) -> list[str]:
    found = []
    for prompt, where in zip(split.prompts, split.where, strict=True):
        times = Counter(plain(option) for option in prompt.options)
        twice = [option for option in prompt.options if times[plain(option)] > 1]
        if twice:
            found.append(f"{where}: option {twice[0]!r} stands there {len(twice)} times")
    return found


def _notes(splits: Sequence[SurveyedSplit]) -> list[str]:
    """Names that are none of ours: kept as they are, and told."""
    prompts = [prompt for split in splits for prompt in split.prompts]
    of_omnimedvqa = [p for s in splits if s.format in ("omnimedvqa", "med_r1") for p in s.prompts]
    modalities = {*_modalities(prompts)} - {*names.MODALITIES, names.UNKNOWN}
    types = {*_types(prompts)} - {*names.QUESTION_TYPES, names.UNKNOWN}
    sets = {prompt.source for prompt in of_omnimedvqa}
    others = sorted(name for name in sets if not names.is_omnimedvqa_set(name))
    notes = []
    if modalities:
        notes.append(f"modalities kept as written: {', '.join(sorted(modalities))}")
    if types:
        notes.append(f"question types kept as written: {', '.join(sorted(types))}")
    if others:
        notes.append(f"none of OmniMedVQA's 42 sets: {', '.join(others)}")
    return notes
