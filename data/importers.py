"""Other medical data sets become JSON lines with our columns: a function a data set.

An importer says what a record's cells are in our names (`tables.FIELDS`), or None where the record
is left out on purpose. Options and gold answers are then read and checked as for any table. Open
questions stay open: their options are empty and their answer is the text as written.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from medrl.data.gold import GoldError, GoldKind, gold_letter
from medrl.data.rows import RowError, require, text_of

Record = Mapping[str, Any]
Cells = dict[str, Any]

MMMU_MEDICAL = (
    "Basic_Medical_Science",
    "Clinical_Medicine",
    "Diagnostics_and_Laboratory_Medicine",
    "Pharmacy",
    "Public_Health",
)
"""MMMU's subjects of health and medicine."""

_INLINE_CHOICES = re.compile(r"\s*Answer Choices:\s*\(A\).*\Z", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Importer:
    """How one data set is read."""

    cells: Callable[[Record], Cells | None]
    gold_kind: GoldKind
    source: str  # name of the data set in the prompts
    left_out: str = ""  # what `cells` leaves out
    images: str = ""  # folder of its images, beside its files; empty: it holds them itself


def vqa_rad(record: Record) -> Cells:
    """VQA-RAD: image, question, answer."""
    return _open_question(record)


def path_vqa(record: Record) -> Cells:
    """PathVQA: image, question, answer; all of it microscopy and gross pathology."""
    return _open_question(record)


def _open_question(record: Record) -> Cells:
    answer = text_of(require(dict(record), "answer"), "answer")
    closed = answer.casefold() in ("yes", "no")
    return {
        "question": require(dict(record), "question"),
        "answer": answer,
        "image": require(dict(record), "image"),
        "question_type": "Yes/no" if closed else "Open",
    }


def slake(record: Record, language: str = "en") -> Cells | None:
    """SLAKE: qid, img_name (below imgs/), question, answer, q_lang, modality, content_type."""
    row = dict(record)
    if require(row, "q_lang") != language:
        return None
    return {
        "id": f"slake/{text_of(require(row, 'qid'), 'qid')}",
        "question": require(row, "question"),
        "answer": require(row, "answer"),
        "image": require(row, "img_name"),
        "modality": require(row, "modality"),
        "question_type": require(row, "content_type"),
    }


def slake_zh(record: Record) -> Cells | None:
    """SLAKE's Chinese questions."""
    return slake(record, "zh")


def pmc_vqa(record: Record) -> Cells:
    """PMC-VQA: Figure_path, Question, Choice A to D ("A: text"), Answer_label or Answer.

    Some of its files spell Answer as Anwser, or put spaces around the names of columns.
    """
    row = {str(name).strip(): cell for name, cell in record.items() if name is not None}
    options = [_without_label(require(row, f"Choice {letter}"), letter) for letter in "ABCD"]
    answer = row.get("Answer_label")
    if not answer:
        text = text_of(require(row, "Anwser" if "Anwser" in row else "Answer"), "Answer")
        try:
            answer = gold_letter(text, options, "either")
        except GoldError as error:
            raise RowError(str(error)) from None
    return {
        "question": require(row, "Question"),
        "options": options,
        "answer": answer,
        "image": require(row, "Figure_path"),
    }


def _without_label(choice: Any, letter: str) -> str:
    return re.sub(rf"^\s*{letter}\s*[:.)]\s*", "", text_of(choice, f"Choice {letter}"))


def mmmu(record: Record) -> Cells | None:
    """MMMU's medical subjects: id, question, options (a list as a text), answer, image_1 to _7.

    Left out: other subjects, and the test split, whose answers are not published ("?").
    """
    row = dict(record)
    name = text_of(require(row, "id"), "id")
    subject = next((subject for subject in MMMU_MEDICAL if subject in name), None)
    answer = text_of(require(row, "answer"), "answer")
    if subject is None or answer == "?":
        return None
    images = [row.get(f"image_{number}") for number in range(1, 8)]
    options = require(row, "options")
    return {
        "id": name,
        "question": require(row, "question"),
        "options": None if options in ("[]", "", []) else options,
        "answer": _first_of(answer),
        "images": [image for image in images if image is not None],
        "question_type": subject.replace("_", " "),
    }


def _first_of(answer: str) -> str:
    """An open question's answers may be a list written as a text: any of them is right."""
    if not answer.startswith("["):
        return answer
    try:
        return str(ast.literal_eval(answer)[0])
    except (ValueError, SyntaxError, IndexError, TypeError, KeyError):
        return answer


def medxpertqa(record: Record) -> Cells:
    """MedXpertQA's MM part: id, question with its choices inline, options by letter, label, images.

    The inline choices are taken off: a mode writes the options itself.
    """
    row = dict(record)
    question = text_of(require(row, "question"), "question")
    return {
        "id": require(row, "id"),
        "question": _INLINE_CHOICES.sub("", question),
        "options": require(row, "options"),
        "answer": require(row, "label"),
        "images": require(row, "images"),
        "question_type": row.get("question_type"),
    }


IMPORTERS = {
    "vqa_rad": Importer(cells=vqa_rad, gold_kind="text", source="VQA-RAD"),
    "slake": Importer(
        cells=slake,
        gold_kind="text",
        source="SLAKE",
        left_out="questions in other languages",
        images="imgs",
    ),
    "slake_zh": Importer(
        cells=slake_zh,
        gold_kind="text",
        source="SLAKE",
        left_out="questions in other languages",
        images="imgs",
    ),
    "path_vqa": Importer(cells=path_vqa, gold_kind="text", source="PathVQA"),
    "pmc_vqa": Importer(cells=pmc_vqa, gold_kind="label", source="PMC-VQA", images="images"),
    "mmmu": Importer(
        cells=mmmu,
        gold_kind="label",
        source="MMMU",
        left_out="other subjects, or without a published answer",
    ),
    "medxpertqa": Importer(
        cells=medxpertqa, gold_kind="label", source="MedXpertQA", images="images"
    ),
}
