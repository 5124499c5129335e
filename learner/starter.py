"""The recipe of `starter/`: a tiny Qwen2-VL that stands in for a pretrained model.

    python -m medrl.learner.starter --out starter --seed 0

Four stages, from nothing: a tokenizer; the vision tower, taught to see phantoms with linear heads
(the language loss alone is a poor teacher of sight); the language model, taught to say what the
tower sees; and last its habits (`starter_habits`), which make it a model worth training: like a
zero-shot VLM it answers in several styles and leans to a favourite letter. Plain PyTorch.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor, nn

from medrl.actors.types import LETTERS, Prompt
from medrl.data.phantoms import generate, texts
from medrl.learner import starter_habits, tiny
from medrl.learner.starter_batches import IGNORED, Answer, Pool, Student, mark
from medrl.rewards.modes import MODES

_SEED_APART = 1_000_003  # keeps these phantoms apart from those of a demo of the same seed
_BATCH = 64
_HIDDEN, _LAYERS, _VISION_HIDDEN, _VISION_LAYERS = 128, 2, 96, 3
_VOCABULARY = 600  # byte values, and whole words for all that phantoms and modes say

Teacher = Callable[[Prompt, random.Random], Answer]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lessons:
    """How long each stage lasts."""

    train_images: int = 12288
    test_images: int = 192
    see_steps: int = 2600
    see_rate: float = 1.5e-3
    join_steps: int = 800
    join_rate: float = 2e-3
    habit_steps: int = 250
    habit_rate: float = 5e-4


def make(out: Path, seed: int, lessons: Lessons) -> None:
    """Make the starter in folder `out`, from nothing. Prints a line a stage."""
    began = time.monotonic()

    def say(line: str) -> None:
        print(f"[{time.monotonic() - began:5.0f} s] {line}", flush=True)

    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        phantoms = generate(
            Path(folder),
            train=lessons.train_images,
            test=lessons.test_images,
            seed=seed + _SEED_APART,
        )
        train, test = Pool.read(phantoms.train), Pool.read(phantoms.test)
    student = newborn(out, seed)
    size = sum(parameter.numel() for parameter in student.model.parameters())
    say(f"born: {size:,} parameters, {len(train.prompts):,} questions to learn from")
    accuracy = teach_to_see(student, train, test, lessons, seed)
    say("sees: held-out accuracy " + ", ".join(f"{k} {v:.3f}" for k, v in accuracy.items()))
    rates = lessons.join_steps, lessons.join_rate
    teach_to_say(student, train, starter_habits.knows, *rates, seed)
    say(f"knows: greedy {mark(student, test, temperature=0)}")
    rates = lessons.habit_steps, lessons.habit_rate
    teach_to_say(student, train, starter_habits.tends, *rates, seed + 1)
    say(f"tends: greedy {mark(student, test, temperature=0)}")
    say(f"tends: sampled {mark(student, test, temperature=1)}")
    student.model.save_pretrained(out)


def newborn(out: Path, seed: int) -> Student:
    """A random model with a tokenizer of its own, written to `out` and loaded from there."""
    tiny.build(
        "qwen2_vl",
        out,
        corpus=corpus(),
        seed=seed,
        hidden=_HIDDEN,
        layers=_LAYERS,
        vision_hidden=_VISION_HIDDEN,
        vision_layers=_VISION_LAYERS,
        vocabulary=_VOCABULARY,
    )
    model = transformers.AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32)
    return Student(model, transformers.AutoProcessor.from_pretrained(out))


def corpus() -> Iterator[str]:
    """What the tokenizer is trained on: every word once common, no letter glued to a tag."""
    instructions = [mode.instruction.format(answer="letter") for mode in MODES.values()]
    for _ in range(20):
        yield from texts()
        yield from (f" {text}" for text in texts())
        yield from instructions
        yield from ("<answer", "</answer", "<think", "</think", "user", "assistant")
        yield from ("The answer is", "The image shows", ".</")


def teach_to_see(
    student: Student, train: Pool, test: Pool, lessons: Lessons, seed: int
) -> dict[str, float]:
    """Train the tower under linear heads, one a list of options, on the mean visual token; the
    heads are thrown away. Returns held-out accuracy by first option."""
    asked = sorted({prompt.options for prompt in train.prompts})
    heads = nn.ModuleList(nn.Linear(_HIDDEN, len(options)) for options in asked)
    tower = student.model.model.visual
    targets = _targets(train, asked)
    step = _stepper([*tower.parameters(), *heads.parameters()], lessons.see_steps, lessons.see_rate)
    order, shifts = torch.Generator().manual_seed(seed), random.Random(seed)
    for _ in range(lessons.see_steps):
        chosen = torch.randint(len(train.pictures), (_BATCH,), generator=order)
        mean = student.see(_shifted(train.pictures[chosen.numpy()], shifts)).mean(1)
        losses = [
            nn.functional.cross_entropy(head(mean), target[chosen], ignore_index=IGNORED)
            for head, target in zip(heads, targets, strict=True)
            if (target[chosen] != IGNORED).any()
        ]
        step(torch.stack(losses).sum())
    with torch.no_grad():
        mean = student.see(test.pictures).mean(1)
        right = {
            options[0]: (head(mean).argmax(-1) == target)[target != IGNORED].float().mean().item()
            for head, target, options in zip(heads, _targets(test, asked), asked, strict=True)
        }
    return right


def _shifted(pictures: NDArray[np.uint8], rng: random.Random) -> NDArray[np.uint8]:
    """The same pictures, each moved by up to 3 pixels: fewer have to be drawn."""
    moves = [(rng.randint(-3, 3), rng.randint(-3, 3)) for _ in pictures]
    return np.stack(
        [np.roll(picture, move, (0, 1)) for picture, move in zip(pictures, moves, strict=True)]
    )


def _targets(pool: Pool, asked: list[tuple[str, ...]]) -> Tensor:
    """[option lists, images]: the right option's index, IGNORED where it was not asked."""
    targets = torch.full((len(asked), len(pool.pictures)), IGNORED)
    for prompt, picture in zip(pool.prompts, pool.picture_of, strict=True):
        targets[asked.index(prompt.options), picture] = LETTERS.index(prompt.answer)
    return targets


def teach_to_say(
    student: Student, train: Pool, teacher: Teacher, steps: int, rate: float, seed: int
) -> None:
    """Train the language model on what `teacher` answers; the tower stays as it is."""
    rng = random.Random(seed)
    with torch.no_grad():
        pictures = train.pictures
        seen = torch.cat([student.see(pictures[i : i + 256]) for i in range(0, len(pictures), 256)])
    student.model.model.visual.requires_grad_(False)
    step = _stepper([p for p in student.model.parameters() if p.requires_grad], steps, rate)
    for _ in range(steps):
        chosen = [rng.randrange(len(train.prompts)) for _ in range(_BATCH)]
        prompts = [train.prompts[i] for i in chosen]
        answers = [teacher(prompt, rng) for prompt in prompts]
        step(student.loss(prompts, answers, seen[train.picture_of[chosen]]))
    student.model.requires_grad_(True)


def _stepper(parameters: list[nn.Parameter], steps: int, rate: float) -> Callable[[Tensor], None]:
    """A function that takes one optimiser step on a loss; the rate warms up, then decays to 0."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps + 1, pct_start=0.1
    )

    def step(loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()

    return step


def main() -> None:
    """Read the command line and make a starter."""
    parser = argparse.ArgumentParser(description="Make the starting model of the demo.")
    parser.add_argument("--out", type=Path, default=Path("starter"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    make(arguments.out, arguments.seed, Lessons())


if __name__ == "__main__":
    main()
