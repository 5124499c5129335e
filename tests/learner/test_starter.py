"""The starting model: small, whole, and as able and as unable as the demo needs it to be."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image

from medrl.data.phantoms import generate
from medrl.learner import starter, starter_habits
from medrl.learner.starter_batches import Pool, Student, mark
from medrl.rewards.accuracy import strict
from medrl.rewards.modes import MODES, NO_THINK

STARTER = Path(__file__).parents[2] / "starter"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate(tmp_path_factory.mktemp("held_out"), train=32, test=32, seed=77).test


@pytest.fixture(scope="module")
def held_out(tree: Path) -> Pool:
    return Pool.read(tree)


@pytest.fixture(scope="module")
def student() -> Student:
    return load(STARTER)


def load(folder: Path) -> Student:
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    return Student(model.eval(), transformers.AutoProcessor.from_pretrained(folder))


def test_the_folder_is_small_and_holds_nothing_but_a_model_and_its_card() -> None:
    assert sum(file.stat().st_size for file in STARTER.rglob("*")) <= 8 * 2**20
    assert {file.name for file in STARTER.iterdir()} == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_it_has_much_to_gain_and_something_to_start_from(student: Student, held_out: Pool) -> None:
    """Greedy: often right, oftener not. Sampled: both forms and both outcomes occur."""
    assert 0.2 <= mark(student, held_out, temperature=0).strict <= 0.6
    torch.manual_seed(0)
    sampled = mark(student, held_out, temperature=1)
    assert 0.35 <= sampled.form <= 0.75
    assert 0.4 <= sampled.right_if_read <= 0.8


def test_prompts_are_short_and_are_what_the_processor_makes(
    student: Student, held_out: Pool, tree: Path
) -> None:
    """Text, template and image tokens as any engine that uses the processor gets them."""
    for prompt in held_out.prompts[::20]:
        ids = student.prompt_ids(prompt, NO_THINK, 9)
        assert len(ids) <= 110
        content = [{"type": "image"}, {"type": "text", "text": NO_THINK.render(prompt)}]
        text = student.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        image = Image.open(tree / prompt.images[0])
        inputs = student.processor(text=[text], images=[image], return_tensors="pt")
        assert inputs["input_ids"][0].tolist() == ids
        pixels, grid = student.pixels(held_out.pictures[[held_out.picture_of[0]]])
        assert grid.tolist() == inputs["image_grid_thw"].tolist()
        assert pixels.shape == inputs["pixel_values"].shape


def test_the_recipes_loss_is_the_models_own(student: Student, held_out: Pool) -> None:
    """Features computed once and padded rows give what transformers gives for one question."""
    prompts, said = held_out.prompts[:3], ["<answer>C</answer>", "B", "The answer is D."]
    pictures = held_out.pictures[held_out.picture_of[:3]]
    with torch.no_grad():
        answers = [(NO_THINK, text) for text in said]
        together = student.loss(prompts, answers, student.see(pictures))
        total, tokens = 0.0, 0
        for prompt, text, picture in zip(prompts, said, pictures, strict=True):
            asked = student.prompt_ids(prompt, NO_THINK, 9)
            ids = [*asked, *student.tokenizer(text)["input_ids"], student.end]
            row = torch.tensor([ids])
            pixels, grid = student.pixels(picture[None])
            logits = student.model(
                input_ids=row,
                pixel_values=pixels,
                image_grid_thw=grid,
                mm_token_type_ids=(row == student.image).int(),
            ).logits[0, len(asked) - 1 : -1]
            wanted = row[0, len(asked) :]
            total += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
            tokens += len(wanted)
    assert float(together) == pytest.approx(total / tokens, abs=1e-5)


def test_what_it_is_taught_to_know_is_right_in_every_style(held_out: Pool) -> None:
    rng = random.Random(0)
    for prompt in held_out.prompts:
        mode, text = starter_habits.knows(prompt, rng)
        if mode.is_well_formed(text)[0]:
            assert strict(mode, prompt, text).outcome == "ok"
        else:
            own = prompt.options["ABCD".index(prompt.answer)]
            assert prompt.answer in text or own in text


def test_habits_are_wrong_often_but_least_where_it_is_sure(held_out: Pool) -> None:
    """A right answer stays possible everywhere, and is never the rarest: it can be reinforced."""
    rng = random.Random(0)
    right: dict[bool, Counter[bool]] = {True: Counter(), False: Counter()}
    for prompt in held_out.prompts * 15:
        mode, text = starter_habits.tends(prompt, rng)
        if mode is NO_THINK and mode.is_well_formed(text)[0]:
            won = strict(mode, prompt, text).outcome == "ok"
            right[starter_habits.is_sure(prompt)][won] += 1
    shares = {sure: counts[True] / counts.total() for sure, counts in right.items()}
    assert shares[True] > 0.75
    assert 0.35 < shares[False] < 0.6


def test_every_style_is_written_and_only_the_asked_one_is_well_formed(held_out: Pool) -> None:
    for mode in MODES.values():
        for style in starter_habits.STYLES:
            text = starter_habits.say(held_out.prompts[0], "A", style, mode)
            assert mode.is_well_formed(text)[0] is (style == "asked")


def test_the_recipe_makes_a_model_from_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All stages run, in short; what was learnt is what lies in the folder."""
    lessons = starter.Lessons(
        train_images=64, test_images=8, see_steps=4, join_steps=4, habit_steps=2
    )
    starter.make(tmp_path, 0, lessons)
    told = [line for line in capsys.readouterr().out.splitlines() if " s] " in line]
    assert [line.split("] ")[1].split(":")[0] for line in told] == [
        "born",
        "sees",
        "knows",
        "tends",
        "tends",
    ]
    made = load(tmp_path)
    born = starter.newborn(tmp_path / "born", 0)
    changed = [
        name
        for (name, before), after in zip(
            born.model.named_parameters(), made.model.parameters(), strict=True
        )
        if not torch.equal(before, after)
    ]
    assert len(changed) == len(list(born.model.parameters()))
