"""Med-R1's split files: JSON lists of {image, problem, solution}. Standard library only.

The options stand in the problem: "What is this? A)CT, B)MRI, C)X-ray". The solution is
"<answer> C </answer>". What a file is about stands in its name: "Lesion Grading_test.json".
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from medrl.actors.types import LETTERS
from medrl.data import names
from medrl.data.rows import Problems, Row, RowError, Source, read_json_rows, require, text_of

_SOLUTION = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_SPLIT = re.compile(r"_(train|test)$")


def read(path: Path, split: Literal["train", "test"], problems: Problems) -> Source:
    """Read a split file, or all of a folder (of both splits' files in it, only this split's)."""
    files = [path] if path.is_file() else _of_split(sorted(path.glob("*.json")), split)
    if not files:
        problems.add(path, "no .json file here: give a split file or a folder of them")
    rows: list[Row] = []
    for file in files:
        for number, (where, record) in enumerate(read_json_rows(file, problems)):
            try:
                rows.append(_row(record, where, file.stem, number))
            except RowError as error:
                problems.add(where, str(error))
    return Source(rows=tuple(rows), root=path.parent if path.is_file() else path)


def _of_split(files: list[Path], split: str) -> list[Path]:
    """Never train on what is tested: of a folder that holds both splits, take one."""
    of_split = {file: found.group(1) for file in files if (found := _SPLIT.search(file.stem))}
    if split not in of_split.values():
        return files
    return [file for file in files if of_split.get(file, split) == split]


def _row(record: dict[str, Any], where: str, stem: str, number: int) -> Row:
    question, options = split_problem(text_of(require(record, "problem"), "problem"))
    solution = text_of(require(record, "solution"), "solution")
    tagged = _SOLUTION.search(solution)
    image = text_of(require(record, "image"), "image")
    subject = _SPLIT.sub("", stem)
    modality = names.modality(subject)
    question_type = names.question_type(subject)
    parts = Path(image).parts
    return Row(
        where=where,
        id=f"{stem}/{number:05d}",
        question=question,
        options=options,
        gold=(tagged.group(1) if tagged else solution).strip(),
        gold_kind="label",
        images=(image,),
        modality=modality if modality in names.MODALITIES else names.UNKNOWN,
        question_type=question_type if question_type in names.QUESTION_TYPES else names.UNKNOWN,
        source=parts[1] if len(parts) > 2 and parts[0] == "Images" else stem,
    )


def split_problem(problem: str) -> tuple[str, tuple[str, ...]]:
    """Split "question A)x, B)y" into the question and its options. Raises `RowError`.

    The list starts at the last " A)" from which options can be read, and each option ends at the
    first ", B)" (", C)" ...). Labels inside an open bracket, as in "(type A)", do not count unless
    there are no others: brackets that never close exist too.
    """
    starts = [match.start() for match in re.finditer(r"\sA\)", problem)]
    outside = [start for start in starts if not _in_bracket(problem[:start])]
    for start in [*reversed(outside), *reversed(starts)]:
        options = _split_options(problem[start + 3 :])
        if len(options) > 1 and all(options):
            return problem[:start].strip(), options
    raise RowError('fewer than two options in the problem: "question A)first, B)second" expected')


def _split_options(text: str) -> tuple[str, ...]:
    options: list[str] = []
    for letter in LETTERS[1:]:
        ends = [match.span() for match in re.finditer(rf",\s*{letter}\)", text)]
        if not ends:
            break
        outside = [end for end in ends if not _in_bracket(text[: end[0]])]
        start, stop = (outside or ends)[0]
        options.append(text[:start].strip())
        text = text[stop:]
    return (*options, text.strip())


def _in_bracket(text: str) -> bool:
    depth = 0
    for bracket in re.findall(r"[()]", text):
        # A label closes a bracket that was never opened: that is not below 0.
        depth = depth + 1 if bracket == "(" else max(0, depth - 1)
    return depth > 0
