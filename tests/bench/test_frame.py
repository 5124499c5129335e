"""A benchmark reports ratios of pairs, and nothing of a run that did not do its work."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from medrl.bench import records, tables
from medrl.bench.__main__ import NAMES, load
from medrl.bench.check import check
from medrl.bench.facts import Count, Equal, Fact, Gradients, Lengths, Moved, Refused
from medrl.bench.frame import RATIO, Benchmark, Case, Options, Target, paired
from medrl.bench.page import PAGE, make_page

DONE = Count(what="groups", asked=4, done=4)


def make_case(
    ours: tuple[float, ...] = (1.0, 2.0, 4.0),
    other: tuple[float, ...] = (3.0, 4.0, 20.0),
    name: str = "a",
    facts: tuple[Fact, ...] = (DONE,),
) -> Case:
    return Case(
        name=name,
        ours=ours,
        other=other,
        unit="s",
        facts=facts,
        settings={"G": 8},
        numbers={"groups/s": 500.0},
    )


def make_benchmark(cases: list[Case], *targets: Target) -> Benchmark:
    return Benchmark(
        name="loop",
        title="A title",
        ours="ours",
        other="theirs",
        text="Text.",
        measure=lambda options: cases,
        targets=targets,
    )


@pytest.mark.parametrize(
    "fact",
    [
        Gradients(whose="learner", norms=()),
        Gradients(whose="learner", norms=(0.3, 0.0)),
        Gradients(whose="learner", norms=(math.nan,)),
        Lengths(whose="engine", asked=64, found=(64, 63)),
        Lengths(whose="engine", asked=64, found=()),
        Moved(whose="sync", bytes=0, before={}, after={"w": "1"}),
        Moved(whose="sync", bytes=4, before={"w": "1"}, after={}),
        Moved(whose="sync", bytes=8, before={"w": "1", "v": "2"}, after={"w": "1", "v": "3"}),
        Count(what="groups", asked=4, done=3),
        Count(what="groups", asked=0, done=0),
        Equal(what="loss", ours=0.5, other=0.51, within=1e-4),
        Equal(what="loss", ours=0.5, other=math.nan, within=1e-4),
    ],
    ids=lambda fact: type(fact).__name__,
)
def test_a_run_that_did_not_do_its_work_is_not_reported(fact: Fact) -> None:
    """Zero gradients, short completions, a sync that moved nothing, work left out or another's."""
    with pytest.raises(Refused):
        make_case(facts=(DONE, fact))


def test_a_run_that_did_its_work_is_reported() -> None:
    make_case(
        facts=(
            Gradients(whose="learner", norms=(0.1,)),
            Lengths(whose="engine", asked=8, found=(8, 9)),
            Moved(whose="sync", bytes=4, before={"w": "1"}, after={"w": "2"}),
            Equal(what="loss", ours=0.5, other=0.50001, within=1e-4),
        )
    )


def test_without_three_pairs_or_a_fact_nothing_is_reported() -> None:
    with pytest.raises(Refused, match="pairs"):
        make_case(ours=(1.0, 1.0), other=(2.0, 2.0))
    with pytest.raises(Refused, match="pairs"):
        make_case(other=(2.0, 2.0))
    with pytest.raises(Refused, match="above 0"):
        make_case(ours=(0.0, 1.0, 1.0))
    with pytest.raises(Refused, match="nothing shows"):
        make_case(facts=())


def test_the_ratio_is_the_median_of_pairs_and_not_a_ratio_of_medians() -> None:
    assert make_case().number(RATIO) == 3.0  # of 3, 2 and 5; the medians' would be 2
    assert records.make_record(make_benchmark([]), [make_case()])["cases"][0]["ratio"] == {
        "median": 3.0,
        "least": 2.0,
        "most": 5.0,
    }


def test_pairs_alternate_and_the_warm_up_is_not_counted() -> None:
    said: list[str] = []

    def side(name: str) -> float:
        said.append(name)
        return float(len(said))

    ours, other = paired(lambda: side("a"), lambda: side("b"), 3)
    assert said == ["a", "b", "a", "b", "b", "a", "a", "b"]
    assert ours == (3.0, 6.0, 7.0)
    assert other == (4.0, 5.0, 8.0)


def test_a_side_without_a_cost_is_timed() -> None:
    ours, other = paired(lambda: None, lambda: sum(range(200_000)) and None, 3)
    assert all(b > a > 0 for a, b in zip(ours, other, strict=True))


def test_a_target_without_its_case_is_refused_and_only_a_number_that_is_there_is_judged() -> None:
    missing = make_benchmark([make_case()], Target(case="b", at_least=2))
    with pytest.raises(Refused, match="'b'"):
        missing.run(Options())
    assert missing.run(Options(short=True))
    with pytest.raises(ValueError, match="at_least or at_most"):
        Target(case="a")
    judged = make_benchmark(
        [make_case()],
        Target(case="a", at_least=3.0),
        Target(case="a", number="groups/s", at_most=499.0),
        Target(case="b", at_least=1.0),
    )
    found = tables.targets(judged, records.make_record(judged, [make_case()]))
    assert found
    assert [row[-1] for row in found.rows] == ["met", "not met", "not measured"]


def test_a_record_is_appended_and_the_page_shows_the_last_one(tmp_path: Path) -> None:
    benchmark = make_benchmark([], Target(case="a", at_least=100))
    for ours in ((1.0, 2.0, 4.0), (0.01, 0.02, 0.04)):
        record = records.make_record(benchmark, [make_case(ours=ours)])
        path = records.append(record, tmp_path)
    lines = path.read_text().splitlines()
    assert len(lines) == 2
    assert json.loads(lines[1])["machine"]["cores"] > 0
    page = make_page([benchmark, replace(benchmark, name="none")], tmp_path)
    assert page.count("## A title") == 1
    assert "| a | s | 0.02 | 4 | 300 (200 to 500) | groups/s 500 |" in page
    assert "| a | ratio | &gt;= 100 | 300 | met |" in page.replace(">=", "&gt;=")
    assert "Settings: G 8." in page


@pytest.mark.parametrize(("now", "lost"), [(2.5, False), (2.3, True)])
def test_a_ratio_that_lost_more_than_a_fifth_is_said(now: float, lost: bool) -> None:
    """After two tries; a slower machine alone loses nothing."""
    committed = records.make_record(make_benchmark([]), [make_case()])
    tries: list[int] = []

    def measure(options: Options) -> list[Case]:
        tries.append(1)
        slower = (10.0, 10.0, 10.0)
        return [
            make_case(ours=slower, other=tuple(10 * now for _ in slower)),
            make_case(name="of the short form alone"),
        ]

    found = check(replace(make_benchmark([]), measure=measure), committed, Options(short=True))
    assert [(one.case, one.lost) for one in found] == [("a", lost)]
    assert len(tries) == (2 if lost else 1)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_holds_the_benchmark_of_its_name(name: str) -> None:
    assert load(name).name == name


def test_the_page_is_what_the_records_say() -> None:
    """Nothing on it was typed: `python -m medrl.bench page` makes it again."""
    assert PAGE.read_text() == make_page(map(load, NAMES))
