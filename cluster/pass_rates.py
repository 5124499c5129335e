"""`medrl data pass-rates`: sample every training prompt as a run would, and count what is right.

A line is written as soon as its prompt is done, so an interruption loses only what was in flight;
the same command then goes on with the prompts that are missing.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table

from medrl.actors.sampler import Sampler
from medrl.actors.types import Prompt, ScoredGroup
from medrl.cluster.engines import engines_and_scorer
from medrl.cluster.interrupt import Interrupt
from medrl.cluster.placement import cluster, placed
from medrl.cluster.preflight import Checked, check_inputs
from medrl.cluster.requests import Requests, requests_of
from medrl.configs.errors import UserError
from medrl.configs.schema import Config
from medrl.data.pass_rates import ABOUT, SAMPLING, PassRates, read_pass_rates
from medrl.rewards.scorer import Scorer

BAR = 40  # characters of the longest


def measure_pass_rates(
    config: Config, out: Path, *, checkpoint: Path | None, samples: int, say: Callable[[str], None]
) -> PassRates:
    """Measure what `out` does not hold yet, with `samples` completions a prompt at the run's
    temperature, scored strictly; returns all of it. Raises `UserError`, `Interrupted`."""
    if checkpoint and not checkpoint.exists():
        raise UserError(f"--checkpoint: {checkpoint} does not exist")
    if out.is_dir() or not out.parent.is_dir():
        raise UserError(f"--out: {out} needs to be a file in a folder that exists")
    inside = checkpoint / "learner" / "model" if checkpoint else Path()
    model = str(inside if checkpoint and inside.exists() else checkpoint or config.model.path)
    # All training prompts: these keys are for what comes out of this.
    all_of_them = {"pass_rates": "", "order": "shuffled", "test": ""}
    config = config.model_copy(update={"data": config.data.model_copy(update=all_of_them)})
    about = about_of(config, model, samples)
    done = measured_already(out, about)
    checked = check_inputs(config, model)
    for note in checked.notes:
        say(f"note: {note}")
    left = [(n, prompt) for n, prompt in enumerate(checked.train) if prompt.id not in done]
    if done:
        say(f"{out} has {len(done)} prompts already, {len(left)} are left")
    if left:
        asyncio.run(_measure_with_engines(config, checked, model, left, out, about))
    return read_pass_rates(out)


def about_of(config: Config, model: str, samples: int) -> dict[str, Any]:
    """What is written of a measurement with every line, by the keys of `ABOUT`."""
    return {
        "model": model,
        "mode": config.data.mode,
        "instruction": config.data.instruction,
        **{key: getattr(config.rollout, key) for key in SAMPLING},
        "samples": samples,
    }


def measured_already(out: Path, about: Mapping[str, Any]) -> set[str]:
    """The ids in a file of an earlier call, whose last line may be cut off and is taken back.
    Raises `UserError` where it was measured in another way."""
    if not out.exists():
        return set()
    text = out.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if whole != text:
        out.write_bytes(whole)
    found = read_pass_rates(out)
    for other in found.about:
        different = [key for key in ABOUT if other.get(key) != about[key]]
        if different:
            raise UserError(
                f"--out: {out} was measured with "
                + ", ".join(f"{key} {other.get(key)!r} (now {about[key]!r})" for key in different)
                + "; name another file, or delete it"
            )
    return set(found.by_id)


async def measure(
    left: Sequence[tuple[int, Prompt]],
    requests: Requests,
    sampler: Sampler,
    scorer: Scorer,
    out: Path,
    about: Mapping[str, Any],
) -> None:
    """Append a line to `out` for each (number, prompt), as they are done."""
    with out.open("a", encoding="utf-8") as file:

        async def one(number: int, prompt: Prompt) -> None:
            request = requests.sampled(number, prompt, about["samples"])
            scored = await scorer.score_group(await sampler.sample(request))
            file.write(json.dumps(_line(scored, about), ensure_ascii=False) + "\n")
            file.flush()

        try:
            async with asyncio.TaskGroup() as tasks:
                for number, prompt in left:
                    tasks.create_task(one(number, prompt))
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None


async def _measure_with_engines(
    config: Config,
    checked: Checked,
    model: str,
    left: Sequence[tuple[int, Prompt]],
    out: Path,
    about: Mapping[str, Any],
) -> None:
    interrupt = Interrupt()
    requests = requests_of(config, checked.train)
    with cluster(config.placement), interrupt.listening():
        async with (
            placed(config) as placement,
            engines_and_scorer(config, checked, placement, model, interrupt) as (sampler, scorer),
        ):
            await interrupt.cancels(measure(left, requests, sampler, scorer, out, about))


def _line(scored: ScoredGroup, about: Mapping[str, Any]) -> dict[str, Any]:
    prompt = scored.group.request.prompt
    return {
        "id": prompt.id,
        "pass_rate": fmean(score.components["accuracy"] for score in scored.scores),
        "modality": prompt.modality,
        "question_type": prompt.question_type,
        **about,
    }


def histogram(rates: Sequence[float]) -> Table:
    """How many prompts have which pass rate; those at either end teach nothing."""
    table = Table(title=f"pass rates of {len(rates)} prompts, mean {fmean(rates):.3f}")
    for heading in ("solved", "prompts", ""):
        table.add_column(heading, justify="right" if heading == "prompts" else "left")
    counts = {"never": sum(rate == 0 for rate in rates)}
    for low, high in ((0, 25), (25, 50), (50, 75), (75, 100)):
        inside = sum(low / 100 < r <= high / 100 and r < 1 for r in rates)
        counts[f"to {high} %" if high < 100 else "below 100 %"] = inside
    counts["always"] = sum(rate == 1 for rate in rates)
    most = max(counts.values())
    for name, count in counts.items():
        table.add_row(name, str(count), "█" * round(BAR * count / most))
    return table
