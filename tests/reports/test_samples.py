"""The samples of a report: fairly chosen, from inside the image root, and never a crash."""

import json
from pathlib import Path

import pytest
from made_results import MODALITIES, Page, add_run, evaluation, prediction, write_image

from medrl.configs.errors import UserError
from medrl.reports.report_files import write_report
from medrl.reports.results import read_results
from medrl.reports.samples import A_SIDE, choose_samples


def sampled(tmp_path: Path, **changes: object) -> Path:
    """Zero-shot right on every third, GRPO on every other; eight prompts a modality."""
    write_image(tmp_path / "images" / "a.png", (640, 320))
    changes = {"image_root": str(tmp_path / "images"), **changes}
    for method, train, every in (("zero-shot", "none", 3), ("GRPO", "grpo", 2)):
        lines = [
            prediction(f"{name} {n}", name, right=n % every == 0, **changes)
            for name in MODALITIES
            for n in range(8)
        ]
        found = evaluation(dict.fromkeys(MODALITIES, 5))
        add_run(tmp_path, method, method=method, train=train, found=found, predictions=lines)
    return tmp_path


def test_samples_are_right_and_wrong_of_each_modality_by_a_seed(tmp_path: Path) -> None:
    results = read_results(sampled(tmp_path))
    samples = choose_samples(results)
    for name in MODALITIES:
        ours = [sample for sample in samples if sample.modality == name]
        assert [sample.right for sample in ours] == [True] * A_SIDE + [False] * A_SIDE
    for sample in samples:
        number = int(sample.id.split()[-1])
        assert [answer.method for answer in sample.answers] == ["zero-shot", "GRPO"]
        assert [a.strict for a in sample.answers] == [number % 3 == 0, number % 2 == 0]
        assert sample.options == (("A", "CT", True), ("B", "MRI", False))
        assert sample.image.startswith("data:image/png;base64,")
    assert choose_samples(results) == samples
    assert choose_samples(results, seed=1) != samples


@pytest.mark.parametrize(
    ("images", "said"),
    [
        ([], "no image"),
        (["gone.png"], "does not exist"),
        (["../secret.png"], "leaves the image root"),
        (["/etc/passwd"], "is absolute"),
        (["link.png"], "link to a file outside"),
        (["text.png"], "is not an image"),
        (["."], ""),
    ],
)
def test_an_image_that_cannot_be_shown_says_why(
    tmp_path: Path, images: list[str], said: str
) -> None:
    small = sampled(tmp_path, images=images)
    write_image(tmp_path / "secret.png")
    (tmp_path / "images" / "link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "images" / "text.png").write_text("no picture")
    for sample in choose_samples(read_results(small)):
        assert not sample.image
        assert said in sample.image_problem
    assert said in Page(write_report(small)).text


def test_open_questions_show_their_answer(tmp_path: Path) -> None:
    small = sampled(tmp_path, options=[], answer="left lung")
    assert choose_samples(read_results(small))[0].options == ()
    assert "left lung ✓" in Page(write_report(small)).text


def test_a_broken_prediction_is_named(tmp_path: Path) -> None:
    small = sampled(tmp_path)
    path = small / "runs" / "GRPO" / "predictions.jsonl"
    path.write_text(path.read_text() + '{"id": "x"}\n')
    with pytest.raises(UserError, match=r"predictions\.jsonl, line 25"):
        write_report(small)


def test_an_evaluation_names_its_predictions(tmp_path: Path) -> None:
    """`medrl eval` writes NAME.json and beside it NAME.predictions.jsonl."""
    small = sampled(tmp_path)
    for folder in (small / "runs").iterdir():
        result = json.loads((folder / "result.json").read_text())
        result["evaluation"]["predictions"] = "../final.predictions.jsonl"  # only its name counts
        (folder / "result.json").write_text(json.dumps(result))
        (folder / "evals").mkdir()
        (folder / "predictions.jsonl").rename(folder / "evals" / "final.predictions.jsonl")
    assert choose_samples(read_results(small))
