"""Has a ratio been lost? Short forms against the committed figures. Seconds are never compared."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from medrl.bench import records
from medrl.bench.frame import RATIO, Benchmark, Options
from medrl.reports.markdown import Table

MOST_LOST = 0.2  # of a committed ratio
TRIES = 2  # a loss is measured again before it is said: others may use the machine


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """A case, now and as committed."""

    case: str
    committed: float  # median ratio
    now: float

    @property
    def lost(self) -> bool:
        return self.now < (1 - MOST_LOST) * self.committed


def check(benchmark: Benchmark, record: dict[str, Any], options: Options) -> list[Compared]:
    """The cases of the short form that the record has, too. Raises `Refused`."""
    committed = {case["name"]: case["ratio"]["median"] for case in record.get("cases", ())}
    best: dict[str, float] = {}
    for _ in range(TRIES):
        for case in benchmark.run(options):
            best[case.name] = max(case.number(RATIO), best.get(case.name, 0.0))
        found = [
            Compared(case=name, committed=committed[name], now=now)
            for name, now in best.items()
            if name in committed
        ]
        if not any(one.lost for one in found):
            break
    return found


def check_all(benchmarks: Iterable[Benchmark], options: Options) -> tuple[Table, bool]:
    """A line a case, and whether none is lost. What was never measured here is left out."""
    accelerator = str(records.machine()["accelerator"])
    rows, whole = [], True
    for benchmark in benchmarks:
        record = records.last_of_each_accelerator(benchmark.name).get(accelerator)
        for one in check(benchmark, record, options) if record else ():
            verdict = f"lost more than {MOST_LOST:.0%}" if one.lost else "kept"
            cells = (f"{one.committed:.3g}", f"{one.now:.3g}", verdict)
            rows.append((f"{benchmark.name}: {one.case}", *cells))
            whole = whole and not one.lost
    headings = ("", "committed ratio", "now", "")
    return Table(title="bench-check", headings=headings, rows=tuple(rows)), whole
