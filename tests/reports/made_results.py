"""Experiments written by hand: folders that look as if runs had been made; and a page's reader."""

import json
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from PIL import Image

MODALITIES = ("CT", "MRI", "X-ray")


def numbers(kind: str, name: str, n: int, correct: int, **changes: object) -> dict[str, Any]:
    """A row of an evaluation's breakdown."""
    return {
        "kind": kind,
        "name": name,
        "n": n,
        "correct": correct,
        "accuracy": correct / n,
        "low": max(0.0, correct / n - 0.1),
        "high": min(1.0, correct / n + 0.1),
        "lenient": correct / n,
        "format": 1.0,
        "chance": 0.25,
        "tokens_per_completion": 7.0,
        "truncated": 0.0,
        "blind_n": n,
        "blind": 0.25,
        **changes,
    }


def evaluation(
    correct: Mapping[str, int], n: int = 10, kind: str = "modality", **changes: object
) -> dict[str, Any]:
    """An evaluation by one kind of target: the number right of `n` for each name."""
    rows = [numbers(kind, name, n, right, **changes) for name, right in correct.items()]
    total = numbers("all", "all", n * len(correct), sum(correct.values()), **changes)
    return {"breakdown": [total, *rows], "accuracy": total["accuracy"]}


def prediction(name: str, modality: str, *, right: bool, **changes: object) -> dict[str, Any]:
    """A line of predictions.jsonl."""
    return {
        "id": name,
        "completion": f"<answer>{'A' if right else 'B'}</answer>",
        "answer": "A",
        "options": ["CT", "MRI"],
        "mode": "no-think",
        "question": "Which modality is this?",
        "images": ["a.png"],
        "image_root": "/nowhere",
        "modality": modality,
        "question_type": "Modality Recognition",
        "blind": False,
        "tokens": 7,
        "finish_reason": "stop",
        "strict": float(right),
        "lenient": float(right),
        "format": 1.0,
        "outcome": "ok" if right else "wrong",
        "reason": "",
        **changes,
    }


def add_run(
    experiment: Path,
    label: str,
    *,
    method: str,
    train: str = "grpo",
    source: str = "",
    found: Mapping[str, Any],
    predictions: Sequence[Mapping[str, Any]] = (),
    **changes: object,
) -> Path:
    """Write runs/<label> of a finished run, with the journal of six steps where it trained."""
    folder = experiment / "runs" / label
    folder.mkdir(parents=True)
    result = {
        "method": method,
        "train": train,
        "mode": "no-think",
        "source": source,
        "source_kind": "modality" if source else "",
        "seed": 0,
        "steps": 6 if train != "none" else 0,
        "seconds": 12.5 if train != "none" else 0.0,
        "evaluation": found,
        **changes,
    }
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "config.toml").write_text(f'[data]\nmodalities = ["{source}"]\n[run]\nseed = 0\n')
    if train != "none":
        write_lines(folder / "metrics.jsonl", journal(train))
    if predictions:
        write_lines(folder / "predictions.jsonl", predictions)
    return folder


def journal(train: str, steps: int = 6) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl, as GRPO and SFT write them."""
    if train == "sft":
        return [{"step": s, "loss": 1 / s, "seconds.step": 0.5} for s in range(1, steps + 1)]
    return [
        {
            "step": step,
            "reward.mean": step / steps,
            "reward.accuracy": step / steps / 2,
            "tokens.per_completion": 7.0 + step,
            "loss": 0.0,
            "seconds.step": 0.5,
        }
        for step in range(1, steps + 1)
    ]


def write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_image(path: Path, size: tuple[int, int] = (84, 84)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (40, 90, 140)).save(path)


def small_experiment(folder: Path) -> Path:
    """Three sources; zero-shot, SFT and GRPO with two seeds on the first source. Right of 10:

                 CT MRI X-ray              CT MRI X-ray                     CT MRI X-ray
        zero      4   3     2   SFT CT      8   4     3   GRPO CT   seed 0   9   5     4
                                SFT MRI     4   9     2             seed 1   7   7     6
                                SFT X-ray   3   2     9   GRPO MRI           5  10     5
    GRPO on X-ray is not done.
    """
    (folder / "runs").mkdir(parents=True)
    (folder / "experiment.toml").write_text('[experiment]\nname = "small"\n')
    rows: list[tuple[str, str, str, int, tuple[int, int, int]]] = [
        ("zero-shot", "none", "", 0, (4, 3, 2)),
        ("SFT", "sft", "CT", 0, (8, 4, 3)),
        ("SFT", "sft", "MRI", 0, (4, 9, 2)),
        ("SFT", "sft", "X-ray", 0, (3, 2, 9)),
        ("GRPO no-think", "grpo", "CT", 0, (9, 5, 4)),
        ("GRPO no-think", "grpo", "CT", 1, (7, 7, 6)),
        ("GRPO no-think", "grpo", "MRI", 0, (5, 10, 5)),
    ]
    for method, train, source, seed, right in rows:
        add_run(
            folder,
            f"{method}-{source}-s{seed}",
            method=method,
            train=train,
            source=source,
            seed=seed,
            found=evaluation(dict(zip(MODALITIES, right, strict=True))),
        )
    return folder


class Page(HTMLParser):
    """What a browser would make of a report: its tags with their attributes, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data
