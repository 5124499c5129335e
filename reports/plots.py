"""Pictures of a run, drawn from its journal: RUN/plots/*.png."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from medrl.reports.lines import read_lines

SMOOTHED_OVER = 9  # steps, of the dark line over the pale one


def draw_plots(run_dir: Path) -> list[Path]:
    """Draw what the journal holds; returns the files."""
    steps, evals = read_lines(run_dir / "metrics.jsonl"), read_lines(run_dir / "evals.jsonl")
    folder = run_dir / "plots"
    folder.mkdir(exist_ok=True)
    drawn = []
    if steps and "reward.mean" in steps[0]:
        drawn += [_learning(steps, evals, folder), _seconds(steps, folder)]
    elif steps:
        drawn.append(_imitation(steps, evals, folder))
    if evals:
        drawn.append(_accuracy(evals, folder))
    return drawn


def _learning(steps: Sequence[dict[str, Any]], evals: Sequence[dict[str, Any]], to: Path) -> Path:
    figure, axes = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
    for key in [k for k in steps[0] if k.startswith("reward.") and k != "reward.mean"]:
        _line(axes[0, 0], steps, key, key.removeprefix("reward."))
    if evals:
        at = [e["step"] for e in evals]
        axes[0, 0].plot(at, [e["accuracy"] for e in evals], "k*", ms=9, label="held-out accuracy")
    axes[0, 0].set(title="rewards (sampled) and held-out accuracy (greedy)", ylim=(-0.03, 1.03))
    axes[0, 0].legend()
    _line(axes[0, 1], steps, "entropy", "entropy")
    axes[0, 1].set(title="entropy, nats a token", ylim=(0, None))
    _line(axes[0, 2], steps, "tokens.per_completion", "tokens")
    axes[0, 2].set(title="tokens a completion", ylim=(0, None))
    _line(axes[1, 0], steps, "gradient_norm", "norm")
    axes[1, 0].set(title="gradient norm before clipping", ylim=(0, None))
    _line(axes[1, 1], steps, "zero_variance_groups", "equal rewards")
    axes[1, 1].axhline(steps[0]["groups"], color="grey", lw=0.8, ls="--")
    axes[1, 1].set(title="groups without a gradient (of the dashed line)", ylim=(0, None))
    for key, style in (("logprob_gap.max", "-"), ("sync.canary_gap", ":")):
        axes[1, 2].semilogy(*_xy(steps, key), style, label=key)
    axes[1, 2].set(title="sampler against learner, nats")
    axes[1, 2].legend()
    for axis in axes.flat:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    return _save(figure, to / "learning.png")


def _imitation(steps: Sequence[dict[str, Any]], evals: Sequence[dict[str, Any]], to: Path) -> Path:
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.7), layout="constrained")
    _line(axes[0], steps, "loss", "loss")
    axes[0].set(title="-log p of the answers, nats a token", ylim=(0, None))
    _line(axes[1], steps, "gradient_norm", "norm")
    axes[1].set(title="gradient norm before clipping", ylim=(0, None))
    axes[2].plot(*_xy(evals, "accuracy"), "k*-", ms=9)
    axes[2].set(title="held-out accuracy (greedy)", ylim=(-0.03, 1.03))
    for axis in axes:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    return _save(figure, to / "learning.png")


def _seconds(steps: Sequence[dict[str, Any]], to: Path) -> Path:
    figure, axis = plt.subplots(figsize=(9, 4), layout="constrained")
    for key in ("step", "rollout", "reward", "learn", "sync", "idle_learner", "idle_rollout"):
        _line(axis, steps, f"seconds.{key}", key)
    ordered = sorted(s["seconds.step"] for s in steps)
    axis.set(
        title="seconds a step",
        xlabel="step",
        # A few slow steps (the first, one with a checkpoint) would flatten all the others.
        ylim=(0, 1.5 * ordered[int(0.95 * (len(ordered) - 1))]),
    )
    axis.grid(alpha=0.3)
    axis.legend(ncols=4)
    return _save(figure, to / "seconds.png")


def _accuracy(evals: Sequence[dict[str, Any]], to: Path) -> Path:
    figure, axes = plt.subplots(1, 2, figsize=(13, 4.5), layout="constrained")
    shown = [evals[0], evals[-1]] if len(evals) > 1 else [evals[0]]
    for axis, kind in zip(axes, ("modality", "question_type"), strict=True):
        names = list(shown[0][f"by_{kind}"])
        width = 0.8 / len(shown)
        for number, evaluation in enumerate(shown):
            values = [evaluation[f"by_{kind}"].get(name, 0.0) for name in names]
            at = [i + number * width for i in range(len(names))]
            axis.bar(at, values, width, label=f"step {evaluation['step']}")
        middle = width * (len(shown) - 1) / 2
        axis.set_xticks([i + middle for i in range(len(names))], names, rotation=30, ha="right")
        axis.set(title=f"held-out accuracy by {kind.replace('_', ' ')}", ylim=(0, 1.18))
        axis.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])
        axis.grid(axis="y", alpha=0.3)
        axis.legend(loc="upper center", ncols=len(shown), frameon=False)  # above the bars
    return _save(figure, to / "accuracy.png")


def _xy(steps: Sequence[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    return [s["step"] for s in steps], [s.get(key, 0.0) for s in steps]


def _line(axis: Axes, steps: Sequence[dict[str, Any]], key: str, label: str) -> None:
    x, y = _xy(steps, key)
    half = SMOOTHED_OVER // 2
    windows = [y[max(0, i - half) : i + half + 1] for i in range(len(y))]
    (line,) = axis.plot(x, [sum(w) / len(w) for w in windows], label=label)
    axis.plot(x, y, color=line.get_color(), alpha=0.25, lw=0.8)


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
