"""Phantoms: drawn images with questions, in OmniMedVQA's layout. A task a tiny model can learn.

One hidden scene is drawn in one of eight modalities and asked all five question types. By default
the options of a question stand in one order, so that the letter follows from picture and question
alone: seeing is enough. `options="shuffled"` asks for looking an option up too, a harder skill.
numpy and Pillow only; the same arguments give the same bytes.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from medrl.actors.types import LETTERS
from medrl.data.phantom_draw import draw
from medrl.data.phantom_scene import KINDS, MODALITIES, SHAPES, SIDES, Modality, Scene, deal

Options = Literal["ordered", "shuffled"]

QUESTION_TYPES = (
    "Modality Recognition",
    "Anatomy Identification",
    "Disease Diagnosis",
    "Lesion Grading",
    "Other Biological Attributes",
)

# The strings OmniMedVQA itself writes, slips included: readers must cope with them.
RAW_MODALITIES: dict[Modality, str] = {
    "CT": "CT(Computed Tomography)",
    "MR": "MR (Mag-netic Resonance Imaging)",
    "X-Ray": "X-Ray",
    "Ultrasound": "ultrasound",
    "Dermoscopy": "Dermoscopy",
    "Fundus": "Fundus Photography",
    "OCT": "OCT (Optical Coherence Tomography",
    "Microscopy": "Microscopy Images",
}

_RADIOLOGY, _OPTICS = MODALITIES[:4], MODALITIES[4:]
_GRADES = ("None", "One", "Two", "Three")
_DISEASES = {"None": "Healthy", "Cyst": "Cyst", "Ring": "Abscess", "Nodule": "Nodule"}

_WORDINGS: dict[str, tuple[str, ...]] = {
    "modality": (
        "What imaging modality is this?",
        "How was this image taken?",
        "Which kind of imaging is shown?",
    ),
    "shape": (
        "What shape is the organ?",
        "Which organ shape is shown?",
        "What form does the organ have?",
    ),
    "kind": (
        "What is the diagnosis?",
        "Which disease is shown?",
        "What abnormality does the organ have?",
    ),
    "present": (
        "Is there a lesion?",
        "Does this image show a lesion?",
    ),
    "count": (
        "How many lesions are there?",
        "What is the number of lesions?",
        "Grade the organ by its lesions.",
    ),
    "side": (
        "Where in the organ is the lesion?",
        "Which side is affected?",
        "On which side does the disease lie?",
    ),
    "size": (
        "How large is the organ?",
        "What size is the organ?",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Phantoms:
    """What `generate` wrote: `train` and `test` are OmniMedVQA trees, without a common image."""

    train: Path
    test: Path
    train_questions: int
    test_questions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Question:
    question_type: str
    asks: str  # key of _WORDINGS
    options: tuple[str, ...]
    answer: str  # one of the options


def generate(
    out: Path,
    *,
    train: int = 1536,
    test: int = 96,
    seed: int = 0,
    size: int = 84,
    options: Options = "ordered",
) -> Phantoms:
    """Draw `train` and `test` images of `size` pixels, five questions each, into OUT/train and
    OUT/test. In multiples of 32, questions are balanced over modalities and types."""
    written = []
    for split, (name, count) in enumerate((("train", train), ("test", test))):
        folder = out / name
        written.append((folder, _write_tree(folder, count, (seed, split), size, options)))
    (train_folder, train_questions), (test_folder, test_questions) = written
    return Phantoms(
        train=train_folder,
        test=test_folder,
        train_questions=train_questions,
        test_questions=test_questions,
    )


def _write_tree(
    folder: Path, count: int, seeds: tuple[int, int], size: int, options: Options
) -> int:
    """One OmniMedVQA tree; returns how many questions it holds."""
    rng = random.Random(f"phantoms {seeds}")
    pixels = np.random.default_rng(seeds)
    records: dict[Modality, list[dict[str, str]]] = {modality: [] for modality in MODALITIES}
    for index, scene in enumerate(deal(count, rng)):
        dataset = dataset_name(scene.modality)
        path = Path("Images") / dataset / f"{index:05d}.png"
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        # Level 1: a phantom is mostly noise, and deflating it harder gains nothing.
        Image.fromarray(draw(scene, pixels, size)).save(folder / path, compress_level=1)
        of_modality = records[scene.modality]
        for question in _questions(scene, rng):
            of_modality.append(
                {
                    "dataset": dataset,
                    "question_id": f"{dataset}_{len(of_modality):05d}",
                    "image_path": path.as_posix(),
                    "modality_type": RAW_MODALITIES[scene.modality],
                }
                | _ask(question, rng, options)
            )
    information = folder / "QA_information" / "Open-access"
    information.mkdir(parents=True, exist_ok=True)
    for modality, of_modality in records.items():
        text = json.dumps(of_modality, indent=1)
        (information / f"{dataset_name(modality)}.json").write_text(text + "\n", encoding="utf-8")
    return sum(map(len, records.values()))


def dataset_name(modality: Modality) -> str:
    """The data set a phantom of this modality belongs to; one a modality."""
    return f"Phantom {modality}"


def texts() -> Iterator[str]:
    """Every wording and every option: what a tokenizer of phantoms must know."""
    for wordings in _WORDINGS.values():
        yield from wordings
    yield from (*MODALITIES, *SHAPES, *SIDES, *_GRADES, *_DISEASES.values())
    yield from ("Yes", "No", "Small", "Large")


def _questions(scene: Scene, rng: random.Random) -> tuple[_Question, ...]:
    """The scene's five questions, one a type, in the order of QUESTION_TYPES."""
    modalities = _RADIOLOGY if scene.modality in _RADIOLOGY else _OPTICS
    asked: tuple[tuple[str, tuple[str, ...], str], ...] = (
        ("modality", modalities, scene.modality),
        ("shape", SHAPES, scene.shape),
        _disease_question(scene, rng),
        ("count", _GRADES, _GRADES[scene.lesions]),
        ("side", SIDES, scene.side)
        if scene.lesions
        else ("size", ("Small", "Large"), "Large" if scene.large else "Small"),
    )
    return tuple(
        _Question(question_type=question_type, asks=asks, options=options, answer=answer)
        for question_type, (asks, options, answer) in zip(QUESTION_TYPES, asked, strict=True)
    )


def _disease_question(scene: Scene, rng: random.Random) -> tuple[str, tuple[str, ...], str]:
    # Three in four scenes have lesions: asked so, as many answers are Yes as No.
    if rng.random() < (1 / 6 if scene.lesions else 1 / 2):
        return "present", ("Yes", "No"), "Yes" if scene.lesions else "No"
    return "kind", tuple(_DISEASES[kind] for kind in KINDS), _DISEASES[scene.kind]


def _ask(question: _Question, rng: random.Random, options: Options) -> dict[str, str]:
    """The record's fields that hold the question, its options and its answer (a text)."""
    shown = list(question.options)
    if options == "shuffled":
        rng.shuffle(shown)
    return {
        "question_type": question.question_type,
        "question": rng.choice(_WORDINGS[question.asks]),
        "gt_answer": question.answer,
    } | {f"option_{letter}": text for letter, text in zip(LETTERS, shown, strict=False)}
