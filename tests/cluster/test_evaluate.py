"""A full evaluation through a fake engine: what it asks, keeps and prints, and that `medrl score`
counts the same."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from builders import make_engine, make_prompt, pool_of
from rich.console import Console

from medrl.actors.fake_engine import FakeEngine
from medrl.actors.sampler import Sampler
from medrl.actors.types import Completion, Group, Prompt, RolloutRequest
from medrl.cluster.evaluate import Evaluation, evaluate, full_evaluation, write
from medrl.cluster.interrupt import Interrupt, Interrupted
from medrl.cluster.report import show_evaluation
from medrl.cluster.requests import Requests
from medrl.configs.schema import RolloutConfig
from medrl.data.schedule import Schedule
from medrl.reports.lines import read_lines
from medrl.rewards.modes import get_mode
from medrl.rewards.offline import score_file
from medrl.rewards.scorer import StrictScorer

FOUR = ("CT", "MRI", "X-ray", "OCT")
PROMPTS = [
    make_prompt("0", options=FOUR, answer="C", modality="X-ray"),
    make_prompt("1", options=FOUR, answer="B", modality="MRI"),
    make_prompt("2", question_type="Lesion [b]"),
    make_prompt("3", options=(), answer="the left lung", images=()),
    make_prompt("4", question="Größe?"),
]
SAID = ("<answer>(c)</answer>", "B", "<answer>B</answer>", "<answer>Left lung.</answer>", "A cyst")
BLIND = ("<answer>A</answer>", "B", "<answer>A</answer>", "", "<answer>A</answer>")


class Scripted(FakeEngine):
    """Says what stands above."""

    async def generate(self, request: RolloutRequest) -> Group:
        group = await super().generate(request)
        text = (BLIND if request.blind else SAID)[int(request.prompt.id)]
        said = Completion(
            token_ids=(7,) * max(1, len(text)),
            logprobs=(0.0,) * max(1, len(text)),
            text=text,
            finish_reason="stop",
            version=0,
        )
        return replace(group, completions=(said,))


def requests(mode: str = "no-think") -> Requests:
    return Requests(
        prompts=PROMPTS,
        schedule=Schedule(len(PROMPTS), seed=0),
        mode=get_mode(mode),
        rollout=RolloutConfig(max_tokens=32),
        seed=0,
    )


async def scripted() -> Sampler:
    engine = await make_engine()
    engine.__class__ = Scripted
    return Sampler(pool_of([engine]), max_sequences=2, timeout_s=5)


async def evaluated(prompts: list[Prompt] = PROMPTS, *, blind: bool = True) -> Evaluation:
    return await full_evaluation(
        prompts,
        requests(),
        await scripted(),
        image_root=Path("images"),
        blind=blind,
        interrupt=Interrupt(),
    )


async def test_strict_lenient_and_blind_are_counted_side_by_side() -> None:
    numbers = (await evaluated()).numbers
    # Strict: "(c)" is C, "Left lung." is not "the left lung". Lenient adds the bare "B".
    assert (numbers["n"], numbers["accuracy"], numbers["lenient"]) == (5, 0.2, 0.4)
    assert numbers["blind"] == 0.5
    assert numbers["blind_difference"]["n"] == 4
    assert numbers["blind_difference"]["difference"] == 0.25 - 0.5


async def test_medrl_score_recounts_the_predictions(tmp_path: Path) -> None:
    out = tmp_path / "evals" / "step_40.json"
    numbers = write(await evaluated(), out, checkpoint="starter")
    assert json.loads(out.read_text()) == numbers
    assert next(iter(numbers)) == "checkpoint"
    predictions = out.parent / numbers["predictions"]
    blind = out.parent / numbers["blind_predictions"]
    assert (predictions.name, blind.name) == ("step_40.predictions.jsonl", "step_40.blind.jsonl")

    def recounted(source: Path, policy: str) -> dict[str, float]:
        # The mode stands in each line: the one given here must not count.
        found = score_file(source, tmp_path / "x", mode="think-after", policy=policy)
        return dict(found["scores"])

    strict = {"format": numbers["format"], "accuracy": numbers["accuracy"]}
    assert recounted(predictions, "strict") == strict
    assert recounted(predictions, "lenient")["accuracy"] == numbers["lenient"]
    assert recounted(blind, "strict")["accuracy"] == numbers["blind"]


async def test_a_prediction_says_what_was_asked_shown_said_and_found(tmp_path: Path) -> None:
    write(await evaluated(), tmp_path / "x.json")
    lines = read_lines(tmp_path / "x.predictions.jsonl")
    assert [line["id"] for line in lines] == ["0", "1", "2", "3", "4"]
    assert lines[1] == {
        "id": "1",
        "completion": "B",
        "answer": "B",
        "options": list(FOUR),
        "mode": "no-think",
        "question": "Which modality is this?",
        "images": ["a.png"],
        "image_root": "images",
        "modality": "MRI",
        "question_type": "Modality Recognition",
        "source": "test",
        "blind": False,
        "tokens": 1,
        "finish_reason": "stop",
        "strict": 0.0,
        "lenient": 1.0,
        "format": 0.0,
        "outcome": "unparsed",
        "reason": lines[1]["reason"],
    }
    assert "answer" in lines[1]["reason"]
    assert "options" not in lines[3]
    blind = read_lines(tmp_path / "x.blind.jsonl")
    assert [(line["id"], line["blind"]) for line in blind] == [
        ("0", True),
        ("1", True),
        ("2", True),
        ("4", True),  # 3 has no image
    ]


async def test_without_the_probe_no_blind_file_is_left(tmp_path: Path) -> None:
    write(await evaluated(), tmp_path / "x.json")
    numbers = write(await evaluated(blind=False), tmp_path / "x.json")
    assert numbers["blind"] is numbers["blind_predictions"] is None
    assert {path.name for path in tmp_path.iterdir()} == {"x.json", "x.predictions.jsonl"}


async def test_a_fake_engine_that_knows_all_knows_nothing_blind() -> None:
    sampler = Sampler(pool_of([await make_engine(skill=0.9)]), max_sequences=2, timeout_s=5)
    evaluation = await full_evaluation(
        PROMPTS[:3],
        requests(),
        sampler,
        image_root=Path("images"),
        blind=True,
        interrupt=Interrupt(),
    )
    assert (evaluation.numbers["accuracy"], evaluation.numbers["blind"]) == (1.0, 0.0)


async def test_an_evaluation_in_a_run_sees(tmp_path: Path) -> None:
    groups = await evaluate(PROMPTS, requests().greedy, await scripted(), StrictScorer("no-think"))
    assert [group.group.request.prompt.id for group in groups] == ["0", "1", "2", "3", "4"]
    assert not any(group.group.request.blind for group in groups)
    assert [group.scores[0].components["accuracy"] for group in groups] == [1, 0, 0, 0, 0]


async def test_a_stop_ends_an_evaluation() -> None:
    interrupt = Interrupt()
    engine = await make_engine(seconds=60)
    work = full_evaluation(
        PROMPTS,
        requests(),
        Sampler(pool_of([engine]), max_sequences=2, timeout_s=90),
        image_root=Path("images"),
        blind=True,
        interrupt=interrupt,
    )
    interrupt._event.set()
    with pytest.raises(Interrupted):
        await work


@pytest.mark.parametrize("width", [80, 100])
@pytest.mark.parametrize("blind", [True, False])
async def test_the_table_fits_and_shows_every_row(width: int, blind: bool) -> None:
    page = io.StringIO()
    numbers = (await evaluated(blind=blind)).numbers | {"notes": ["left out 3 prompts"]}
    show_evaluation(numbers, Console(file=page, width=width))
    lines = page.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    cells = {line[:20].strip(): line.split() for line in lines}
    for name in ("X-ray", "MRI", "CT", "all", "mean of modalities", "Lesion [b]"):
        assert name in cells
    assert lines[-1] == "left out 3 prompts"
    number = ["0.200", "0.04-0.62", "0.400", "0.375", "0.600"]
    assert cells["all"][2:7] == number
    assert ("0.500" in cells["all"]) == blind == any("seeing less blind" in line for line in lines)
    assert not any("…" in line for line in lines)
