"""Make the soak's part of docs/reliability.md, and its picture, of what `make chaos` wrote.

python tests/chaos/report.py REPORT.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

DOCS = Path(__file__).parents[2] / "docs"
BEGIN, END = "<!-- the soak: begin -->", "<!-- the soak: end -->"
ALLOWANCE_S = 10.0  # of the issue: back within the start-up time and this
MARKS = {"engine": "tab:blue", "learner": "tab:red", "driver": "black", "reward": "tab:green"}
Report = dict[str, Any]


def main() -> None:
    report = json.loads(Path(sys.argv[1]).read_text())
    draw(report, DOCS / "reliability" / "soak.png")
    page = DOCS / "reliability.md"
    before, _, rest = page.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    page.write_text(f"{before}{BEGIN}\n{told(report)}{END}{after}")


def told(report: Report) -> str:
    """The report in words and tables."""
    return "\n".join([*_head(report), "", *_kinds(report), "", *_limits(report), *_checks(report)])


def _head(report: Report) -> Iterator[str]:
    faults, machine = report["faults"], report["machine"]
    kills = sum(it["is_kill"] for it in faults)
    synced = sum(it["in_a_sync"] for it in faults)
    packages = ", ".join(f"{name} {version}" for name, version in report["packages"].items())
    lives = sum(len(it["incarnations"]) for it in report["phases"].values())
    steps = " + ".join(str(it["steps"]) for it in report["phases"].values())
    yield (
        f"Seed {report['seed']}; {machine['cores']} cores, {machine['memory_gib']} GiB, Python "
        f"{machine['python']}, {packages}. **{len(faults)} faults, {kills} of them kills of "
        f"engines, ranks or the driver, in {report['seconds'] / 60:.0f} minutes** (the undisturbed "
        f"runs included), over {steps} steps and {lives} starts of the driver. "
        f"{sum(bool(it['out']) for it in faults)} came while something else was out of service, "
        f"and {synced} ended an engine or a rank in the middle of a sync."
    )
    if not report.get("may_mount"):
        yield "\nMounting was not allowed there, so no disk was full."


def _kinds(report: Report) -> Iterator[str]:
    yield "| fault | what is done | count | recovered | overtaken | median s | most s |"
    yield "|---|---|---:|---:|---:|---:|---:|"
    for name, what in report["kinds"].items():
        of = [it for it in report["faults"] if it["name"] == name]
        if not of:
            continue
        seconds = [it["seconds"] for it in of if it["outcome"] == "recovered"]
        times = (f"{median(seconds):.1f}", f"{max(seconds):.1f}") if seconds else ("", "")
        other = len(of) - len(seconds)
        yield f"| {name} | {what} | {len(of)} | {len(seconds)} | {other} | {' | '.join(times)} |"


def _limits(report: Report) -> Iterator[str]:
    lives = [life for phase in report["phases"].values() for life in phase["incarnations"]]
    start_s = median(life["up"] - life["began"] for life in lives if life["up"])
    yield (
        "Seconds are from the fault to the end of the outage: an engine or the learner is back in "
        "service, or, for the others, the next step is done. *Overtaken*: another fault ended the "
        "driver, or the run was done, before it was noticed or mended."
    )
    yield ""
    for who, title in (("engine", "engines"), ("learner", "the learner")):
        mine = [it for it in report["faults"] if it["who"] == who and it["outcome"] == "recovered"]
        times = [it["served_after_s"] for it in mine]
        late = [it for it in mine if it["served_after_s"] > start_s + ALLOWANCE_S]
        if times:
            yield (
                f"- Out of service, {title}: median {median(times):.1f} s, most "
                f"{max(times):.1f} s; {len(times) - len(late)} of {len(times)} within the "
                f"{start_s:.0f} s that a start of the whole run takes (median) and "
                f"{ALLOWANCE_S:g} s.{_excuse(late, report['faults'])}"
            )
    unasked = sum(len(it["unasked"]) for it in report["phases"].values())
    yield f"- Outages that no fault accounts for: {unasked}."
    yield ""


def _excuse(late: Sequence[Report], faults: Sequence[Report]) -> str:
    """How many of the late ones were hit again, or had others come back on the same cores."""
    if not late:
        return ""
    shared = sum(any(_overlap(it, other) for other in faults) for it in late)
    return (
        f" Of the {len(late)} others {shared} were hit again meanwhile, or shared the cores with "
        "others that came back."
    )


def _overlap(one: Report, other: Report) -> bool:
    if other["number"] == one["number"] or other["who"] not in ("engine", "learner"):
        return False
    ends = [it["time"] + (it["seconds"] or 0.0) for it in (one, other)]
    return bool(other["time"] < ends[0] and one["time"] < ends[1])


def _checks(report: Report) -> Iterator[str]:
    yield "| at the end | equal | noise |"
    yield "|---|---|---|"
    names = dict.fromkeys(name.partition(": ")[2] for name in report["checks"])
    for name in names:
        cells = (_verdict(report["checks"].get(f"{phase}: {name}")) for phase in ("equal", "noise"))
        yield f"| {name} | {' | '.join(cells)} |"
    yield ""
    numbers = report["numbers"]
    if "largest_loss_difference" in numbers:
        most = numbers["largest_loss_difference"]
        yield f"- Largest difference of a step's loss in *equal*: {most:.1e}."
    if "accuracy" in numbers:
        hurt, whole = numbers["accuracy"]
        yield (
            f"- Held-out accuracy in *noise*: {hurt:.3f}, undisturbed {whole:.3f} "
            f"(n {numbers['held_out']} each)."
        )
    yield from _memory(report)
    yield ""


def _verdict(problems: Sequence[str] | None) -> str:
    if problems is None:
        return ""
    return f"**{len(problems)} wrong**" if problems else "holds"


def _memory(report: Report) -> Iterator[str]:
    growth = [it for phase in report["phases"].values() for it in phase["growth"]]
    parts = []
    for kind in ("driver", "engine actor", "vLLM", "learner rank", "reward actor"):
        of = [it for it in growth if it[0] == kind]
        if of:
            _, _, before, after, _, slope = max(of, key=lambda it: it[3] - it[2])
            parts.append(
                f"{kind} {before / 2**20:.0f} -> {after / 2**20:.0f} MiB "
                f"({slope * 60 / 2**20:+.2f} MiB a minute)"
            )
    if parts:
        yield (
            "- Memory, of each kind the process that grew most, the first and the last third of "
            f"its life: {'; '.join(parts)}."
        )


def draw(report: Report, to: Path) -> None:
    """Steps against time with the faults on it, and memory over time, a column a phase."""
    phases = report["phases"]
    figure, axes = plt.subplots(
        2, len(phases), figsize=(7 * len(phases), 8), layout="constrained", squeeze=False
    )
    for column, (name, phase) in enumerate(phases.items()):
        faults = [it for it in report["faults"] if it["phase"] == name]
        _progress(axes[0, column], name, phase, faults)
        _memories(axes[1, column], phase)
    to.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(to, dpi=90)
    plt.close(figure)


def _progress(axis: Axes, name: str, phase: Report, faults: Sequence[Report]) -> None:
    began = phase["incarnations"][0]["began"]
    times, steps = zip(
        *((((time - began) / 60), step) for time, step in phase["ticks"]), strict=True
    )
    axis.plot(times, steps, color="grey", lw=1.2)
    for who, colour in MARKS.items():
        of = [it for it in faults if it["who"] == who or (who == "driver" and it["who"] == "disk")]
        at = [(it["time"] - began) / 60 for it in of]
        axis.plot(at, [it["step"] for it in of], "o", color=colour, ms=4, label=f"{who}: {len(of)}")
    for life in phase["incarnations"]:
        axis.axvline((life["began"] - began) / 60, color="black", lw=0.5, ls=":")
    axis.set(title=f"{name}: steps, faults, starts of the driver (dotted)", ylabel="step")
    axis.set_xlabel("minutes")
    axis.legend(loc="upper left")
    axis.grid(alpha=0.3)


def _memories(axis: Axes, phase: Report) -> None:
    began = phase["incarnations"][0]["began"]
    kinds = list(dict.fromkeys(kind for _, _, kind, _ in phase["memory"]))
    for number, kind in enumerate(kinds):
        lives: dict[int, list[tuple[float, float]]] = {}
        for time, pid, of, size in phase["memory"]:
            if of == kind:
                lives.setdefault(pid, []).append(((time - began) / 60, size / 2**20))
        for count, life in enumerate(lives.values()):
            label = kind if count == 0 else None
            axis.plot(*zip(*life, strict=True), color=f"C{number}", lw=1.0, label=label)
    axis.set(title="resident memory, MiB, a line a process", xlabel="minutes", ylim=(0, None))
    axis.legend(loc="center right", fontsize="small")
    axis.grid(alpha=0.3)


if __name__ == "__main__":
    main()
