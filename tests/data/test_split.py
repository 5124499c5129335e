"""Our own split: no image in both parts, equal shares, the same every time, read back the same."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from medrl.actors.types import Prompt
from medrl.configs.errors import UserError
from medrl.configs.schema import DataConfig
from medrl.data.divide import divide
from medrl.data.lines import write_prompts
from medrl.data.load import load_prompts
from medrl.data.phantoms import generate
from medrl.data.split import split_by_image


def prompt(number: int, images: tuple[str, ...] = (), **cells: Any) -> Prompt:
    default: dict[str, Any] = {
        "id": str(number),
        "question": "What?",
        "options": ("x", "y"),
        "answer": "A",
        "images": images,
        "modality": "CT",
        "question_type": "Lesion Grading",
        "source": "made",
    }
    return Prompt(**{**default, **cells})


def by_path(prompt: Prompt, path: str) -> str:
    return path


def load(path: Path) -> tuple[Prompt, ...]:
    config = DataConfig(format="jsonl", train=str(path), test=str(path))
    return load_prompts(config, "test", images=False).prompts


prompts_of_few_images = st.lists(
    st.tuples(st.sets(st.integers(0, 12), max_size=3), st.sampled_from(["CT", "MRI", "OCT"])),
    min_size=2,
    max_size=60,
).map(
    lambda rows: [
        prompt(n, tuple(f"{i}.png" for i in sorted(images)), modality=modality)
        for n, (images, modality) in enumerate(rows)
    ]
)


@given(prompts_of_few_images, st.floats(0.05, 0.95), st.integers(0, 5))
@settings(deadline=None)
def test_no_image_is_in_both_parts_and_no_prompt_is_lost(
    prompts: list[Prompt], fraction: float, seed: int
) -> None:
    try:
        train, test = split_by_image(prompts, fraction, seed, by_path)
    except ValueError:
        return
    in_train = {image for one in train for image in one.images}
    assert not in_train & {image for one in test for image in one.images}
    assert sorted((*train, *test), key=lambda one: int(one.id)) == prompts
    assert train
    assert test
    assert split_by_image(prompts, fraction, seed, by_path) == (train, test)


def test_shares_of_modalities_and_question_types_are_those_of_the_whole() -> None:
    """Images of one to four questions, three modalities, two question types."""
    prompts = [
        prompt(
            number,
            (f"{number // (1 + number % 4)}-{number % 4}.png",),
            modality=("CT", "MRI", "OCT")[number % 3],
            question_type=("Lesion Grading", "Disease Diagnosis")[number % 7 == 0],
        )
        for number in range(3000)
    ]
    _, test = split_by_image(prompts, 0.2, 0, by_path)
    whole = Counter((one.modality, one.question_type) for one in prompts)
    for stratum, n in Counter((one.modality, one.question_type) for one in test).items():
        assert n == pytest.approx(0.2 * whole[stratum], abs=3)
    assert split_by_image(prompts, 0.2, 1, by_path)[1] != test


def test_images_of_many_questions_are_no_likelier_in_the_test_set() -> None:
    prompts = [prompt(n, (f"many{n // 5}.png",)) for n in range(500)]
    prompts += [prompt(500 + n, (f"one{n}.png",)) for n in range(500)]
    _, test = split_by_image(prompts, 0.2, 0, by_path)
    assert sum(one.images[0].startswith("many") for one in test) == 100
    assert len(test) == 200


def test_images_chained_by_prompts_of_several_cannot_be_split() -> None:
    chain = [prompt(n, (f"{n}.png", f"{n + 1}.png")) for n in range(5)]
    with pytest.raises(ValueError, match="hang together"):
        split_by_image(chain, 0.5, 0, by_path)


@pytest.mark.parametrize(
    ("options", "answer"),
    [
        (("x", "y"), "B"),
        (("B", "A", "C"), "B"),  # letters for texts, in another order
        (("1", "2", "0"), "B"),  # indices for texts
        (("A) one", "B) two"), "A"),  # labels of their own
        (("A: x", "y"), "A"),
        ((), "a cyst, not B"),
        (("ja\u2028nein", '"\\'), "A"),
        (("Yes", "yes."), "B"),
    ],
)
def test_what_is_written_is_read_back_the_same(
    tmp_path: Path, options: tuple[str, ...], answer: str
) -> None:
    made = prompt(1, ("Images/a (1) & b.png", "c.png"), options=options, answer=answer)
    assert write_prompts(tmp_path / "rows.jsonl", [made]) == 1
    assert load(tmp_path / "rows.jsonl") == (made,)


texts = st.text(st.sampled_from("ABCab01 ).:"), min_size=1, max_size=4).map(str.strip).filter(bool)


@given(st.lists(texts, min_size=2, max_size=5, unique_by=lambda text: text.lower()), st.data())
@settings(deadline=None)
def test_options_that_look_like_labels_are_read_back_the_same(
    tmp_path_factory: pytest.TempPathFactory, options: list[str], data: st.DataObject
) -> None:
    answer = "ABCDE"[data.draw(st.integers(0, len(options) - 1))]
    made = prompt(1, options=tuple(options), answer=answer)
    path = tmp_path_factory.mktemp("lines") / "rows.jsonl"
    write_prompts(path, [made])
    assert load(path) == (made,)


def test_a_data_set_is_divided_and_read_back(tmp_path: Path) -> None:
    """Phantoms: train and test use the same ids and image paths for different images."""
    generate(tmp_path / "set", train=40, test=8, seed=0, size=56, options="ordered")
    made = divide(tmp_path / "set", tmp_path / "out", fraction=0.25, seed=0)
    config = DataConfig(
        format="jsonl",
        train=str(tmp_path / "out" / "train.jsonl"),
        test=str(tmp_path / "out" / "test.jsonl"),
        images=str(made.image_root),
    )
    train, test = load_prompts(config, "train"), load_prompts(config, "test")
    assert (len(train.prompts), len(test.prompts)) == (made.train, made.test) == (180, 60)
    again = divide(tmp_path / "set", tmp_path / "again", fraction=0.25, seed=0)
    assert again == made
    for name in ("train.jsonl", "test.jsonl"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_a_copy_under_another_name_stays_with_its_image(tmp_path: Path) -> None:
    lines = []
    for number in range(10):
        Image.new("L", (60, 60), number // 2).save(tmp_path / f"{number}.png")
        cells = {"id": number, "question": "What?", "answer": "x", "image": f"{number}.png"}
        lines.append(json.dumps(cells))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    divide(tmp_path / "rows.jsonl", tmp_path / "out", fraction=0.4, seed=3)
    test = load(tmp_path / "out" / "test.jsonl")
    numbers = sorted(int(one.id) for one in test)
    assert len(numbers) == 4
    assert [n // 2 for n in numbers[::2]] == [n // 2 for n in numbers[1::2]]


def test_problems_stop_a_split_unless_their_rows_are_to_be_left_out(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"id": n, "question": "What?", "answer": "x", "image": f"{n}.png"} for n in range(6)
    ]
    for number in (0, 1, 2, 3):
        Image.new("L", (60, 60), number).save(tmp_path / f"{number}.png")
    (tmp_path / "4.png").write_bytes(b"")
    rows[5]["image"] = "../5.png"
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError) as caught:
        divide(path, tmp_path / "out", fraction=0.5, seed=0)
    assert len(caught.value.problems) == 3
    assert not (tmp_path / "out").exists()
    made = divide(path, tmp_path / "out", fraction=0.5, seed=0, skip_bad=True)
    assert (made.train, made.test, len(made.left_out)) == (2, 2, 2)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0, float("nan")])
def test_a_share_that_is_none_is_refused(tmp_path: Path, fraction: float) -> None:
    with pytest.raises(UserError, match="between 0 and 1"):
        divide(tmp_path, tmp_path / "out", fraction=fraction, seed=0)
