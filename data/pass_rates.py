"""How often a model solves each training prompt: measured once, then used to filter and to order.

A file of JSON lines, a prompt each, as `medrl data pass-rates` writes it:

    {"id", "pass_rate", "modality", "question_type", and the keys of `ABOUT`}
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medrl.actors.types import Prompt
from medrl.configs.errors import UserError
from medrl.configs.schema import DataConfig

SHOWN = 5  # bad lines named in full


@dataclass(frozen=True, slots=True, kw_only=True)
class PassRates:
    """What a file says."""

    by_id: Mapping[str, float]  # share of right completions, 0 to 1
    about: tuple[Mapping[str, Any], ...]  # different "model", "mode", "temperature", ... of lines


@dataclass(frozen=True, slots=True, kw_only=True)
class Selected:
    """The training prompts that are left, in the order they are to be trained or shuffled from."""

    prompts: tuple[Prompt, ...]
    notes: tuple[str, ...]


SAMPLING = ("temperature", "top_p", "top_k", "max_tokens")  # keys of section rollout
ABOUT = ("model", "mode", "instruction", *SAMPLING, "samples")
"""What a rate depends on; lines of one file agree in all of it."""


def read_pass_rates(path: Path) -> PassRates:
    """Raises `UserError` with the lines that are no pass rates."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.pass_rates: {path} cannot be read: {error}") from None
    rates: dict[str, float] = {}
    about: dict[str, dict[str, Any]] = {}
    problems = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        record = _object(line)
        flaw = _flaw(record)
        if not flaw and record["id"] in rates:
            flaw = f"id {record['id']!r} stands there twice"
        if flaw:
            problems.append(f"data.pass_rates: {path}, line {number}: {flaw}")
            continue
        rates[record["id"]] = float(record["pass_rate"])
        found = {key: record[key] for key in ABOUT if key in record}
        about[json.dumps(found)] = found
    if problems:
        more = [f"... and {len(problems) - SHOWN} more lines"] if len(problems) > SHOWN else []
        raise UserError(*problems[:SHOWN], *more)
    return PassRates(by_id=rates, about=tuple(about.values()))


def select(config: DataConfig, prompts: Sequence[Prompt]) -> Selected:
    """Keep the prompts within `min_pass_rate` and `max_pass_rate`, and for order "easy_first" sort
    them: highest rate first, then by id. Raises `UserError`: no rate for a prompt, none left."""
    path = Path(config.pass_rates)
    measured = read_pass_rates(path)
    rates = measured.by_id
    missing = [prompt.id for prompt in prompts if prompt.id not in rates]
    if missing:
        raise UserError(
            f"data.pass_rates: {path} lacks {len(missing)} of {len(prompts)} training prompts, "
            f"first {missing[0]}; measure them with `medrl data pass-rates CONFIG --out {path}`, "
            "which goes on where it stopped"
        )
    low, high = config.min_pass_rate, config.max_pass_rate
    kept = [prompt for prompt in prompts if low <= rates[prompt.id] <= high]
    if not kept:
        raise UserError(
            f"data.pass_rates: none of {len(prompts)} training prompts has a pass rate from {low:g}"
            f" to {high:g} (data.min_pass_rate, data.max_pass_rate); they have "
            f"{min(rates[p.id] for p in prompts):g} to {max(rates[p.id] for p in prompts):g}"
        )
    if config.order == "easy_first":
        kept.sort(key=lambda prompt: (-rates[prompt.id], prompt.id))
    return Selected(
        prompts=tuple(kept),
        notes=(*_left_out([rates[p.id] for p in prompts], low, high), *_others(config, measured)),
    )


def _left_out(rates: Sequence[float], low: float, high: float) -> list[str]:
    out = [rate for rate in rates if not low <= rate <= high]
    if not out:
        return []
    never, always = sum(rate == 0 for rate in out), sum(rate == 1 for rate in out)
    return [
        f"left out {len(out)} of {len(rates)} training prompts by their pass rates: {never} never "
        f"solved, {always} always, {len(out) - never - always} between (data.min_pass_rate "
        f"{low:g}, data.max_pass_rate {high:g})"
    ]


def _others(config: DataConfig, measured: PassRates) -> list[str]:
    """Say where the rates are of another way to ask."""
    notes = []
    for key, now in (("mode", config.mode), ("instruction", config.instruction)):
        others = sorted({str(found[key]) for found in measured.about if found.get(key, now) != now})
        if others:
            notes.append(
                f"the pass rates in {config.pass_rates} were measured with data.{key} "
                f"{', '.join(map(repr, others))}, now it is {now!r}; they may not hold"
            )
    return notes


def _object(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _flaw(record: Any) -> str:
    if not isinstance(record, dict):
        return 'no JSON object; needs {"id": "...", "pass_rate": 0.5}'
    if not isinstance(record.get("id"), str):
        return f'"id" is {record.get("id")!r}, needs the id of a prompt'
    rate = record.get("pass_rate")
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate <= 1:
        return f'"pass_rate" is {rate!r}, needs a number from 0 to 1'
    return ""
