"""Sample questions for a report: for each modality some that a method got right and some it got
wrong, with what every method said to the same prompt. The choice is seeded, not a selection."""

from __future__ import annotations

import base64
import io
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from medrl.actors.types import LETTERS
from medrl.configs.errors import UserError
from medrl.data.image_files import ImageProblem, decode, locate
from medrl.reports.results import Result, methods_of

A_SIDE = 2  # samples right and samples wrong, for each modality
THUMBNAIL = 192  # pixels, the longer side
LONGEST_TEXT = 4000  # characters of a completion or question

UNPRINTABLE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)

LINE_KEYS = frozenset(
    {"id", "completion", "answer", "question", "images", "image_root", "modality", "tokens"}
    | {"question_type", "finish_reason", "strict", "lenient", "format", "reason"}
)

Line = Mapping[str, Any]  # of predictions.jsonl; `LINE_KEYS` and, unless open, "options"


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleAnswer:
    """One method's completion of a sample's prompt, and its scores in [0, 1]."""

    method: str
    run: str  # which of its runs: "trained on CT, seed 0"
    completion: str
    strict: float
    lenient: float
    format: float
    tokens: int
    remark: str  # why no answer was read, that it was cut off; "": nothing to say


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A held-out prompt and the answers to it."""

    id: str
    modality: str
    question_type: str
    question: str
    options: tuple[tuple[str, str, bool], ...]  # letter, text, whether it is the right one
    answer: str  # gold
    image: str  # data URI of a small PNG; "": none can be shown, `image_problem` says why
    image_problem: str
    right: bool  # whether the reference method was
    answers: tuple[SampleAnswer, ...]  # one a method, the reference's last


def choose_samples(results: Sequence[Result], seed: int = 0) -> list[Sample]:
    """Samples by modality; [] where no run kept its predictions.

    The reference is the last of the methods that kept any. In each modality one source is drawn,
    and each method is shown by its run on that source, for methods are compared like with like.
    """
    kept = [result for result in results if result.predictions.is_file()]
    if not kept:
        return []
    methods = methods_of(kept)
    reference = sorted(
        (result for result in kept if result.method == methods[-1]), key=lambda r: r.label
    )
    index = cache(_index)
    wanted: dict[str, list[str]] = {}  # label of a run -> ids of the prompts it is shown with
    chosen: list[tuple[str, bool, list[Result]]] = []  # id, right, a run of each method
    for modality in sorted({modality for _, modality, _ in index(reference[0].predictions)}):
        rng = random.Random(f"{seed} {modality}")
        main = rng.choice(reference)
        runs = [_like(main, [r for r in kept if r.method == method]) for method in methods]
        for right in (True, False):
            ours = [
                name
                for name, its_modality, its_right in index(main.predictions)
                if its_modality == modality and its_right is right
            ]
            for name in rng.sample(ours, min(A_SIDE, len(ours))):
                chosen.append((name, right, runs))
                for run in runs:
                    wanted.setdefault(run.label, []).append(name)
    found = {run.label: _lines_of(run, wanted[run.label]) for run in kept if run.label in wanted}
    return [_sample(name, right, runs, found) for name, right, runs in chosen]


def _index(predictions: Path) -> list[tuple[str, str, bool]]:
    """Id, modality and whether it is right, of every line; a test set can have 20,000."""
    return [(line["id"], line["modality"], line["strict"] == 1) for line in _lines(predictions)]


def _lines_of(run: Result, ids: Sequence[str]) -> dict[str, Line]:
    wanted = set(ids)
    return {line["id"]: line for line in _lines(run.predictions) if line["id"] in wanted}


def _lines(predictions: Path) -> Iterator[Line]:
    with predictions.open(encoding="utf-8") as file:
        for number, text in enumerate(file, start=1):
            try:
                line = json.loads(text)
                complete = line.keys() >= LINE_KEYS
            except (ValueError, AttributeError):
                complete = False
            if not complete:
                raise UserError(
                    f"{predictions}, line {number}: not a prediction; evaluate that run again"
                )
            yield line


def _like(main: Result, runs: Sequence[Result]) -> Result:
    """The run nearest to `main`: the same source and seed, the same source, any."""
    return min(runs, key=lambda r: (r.source != main.source, r.seed != main.seed, r.source, r.seed))


def _answer(run: Result, line: Line) -> SampleAnswer:
    where = f"trained on {run.source or 'all data'}, seed {run.seed}"
    remarks = [line["reason"], "cut off" if line["finish_reason"] == "length" else ""]
    return SampleAnswer(
        method=run.method,
        run="" if run.train == "none" else where,
        completion=cleaned(line["completion"]),
        strict=line["strict"],
        lenient=line["lenient"],
        format=line["format"],
        tokens=line["tokens"],
        remark="; ".join(cleaned(remark) for remark in remarks if remark),
    )


def _sample(
    name: str, right: bool, runs: Sequence[Result], found: Mapping[str, Mapping[str, Line]]
) -> Sample:
    line = found[runs[-1].label][name]  # the reference's
    image, problem = _thumbnail(line)
    options = zip(LETTERS, line.get("options") or (), strict=False)
    return Sample(
        id=cleaned(line["id"]),
        modality=cleaned(line["modality"]),
        question_type=cleaned(line["question_type"]),
        question=cleaned(line["question"]),
        options=tuple((letter, cleaned(o), letter == line["answer"]) for letter, o in options),
        answer=cleaned(line["answer"]),
        image=image,
        image_problem=problem,
        right=right,
        answers=tuple(
            _answer(run, found[run.label][name]) for run in runs if name in found[run.label]
        ),
    )


def cleaned(text: str) -> str:
    """Text that a page can hold: `printable`, and not endless."""
    cut = len(text) - LONGEST_TEXT
    kept = text if cut <= 0 else f"{text[:LONGEST_TEXT]} … ({cut} characters more)"
    return printable(kept)


def printable(text: str) -> str:
    """No control character, half of a surrogate pair, or mark that turns the text around."""
    return UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)


def _thumbnail(line: Line) -> tuple[str, str]:
    """The first image as a data URI, or "" and why there is none. Never outside the image root."""
    if not line["images"]:
        return "", "no image"
    path = line["images"][0]
    try:
        image = decode(locate(Path(line["image_root"]), path))
    except (ImageProblem, OSError) as problem:
        return "", f"image {cleaned(path)} {cleaned(str(problem))}"
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}", ""
