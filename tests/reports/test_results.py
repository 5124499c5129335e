"""Results are read as they are written, and a cell that is not there is never a number."""

import csv
import io
import json
import os
from pathlib import Path

import pytest
from made_results import add_run, evaluation, journal, numbers, small_experiment, write_lines

from medrl.configs.errors import UserError
from medrl.reports import matrices
from medrl.reports.markdown import MISSING, Table, markdown, points
from medrl.reports.matrices import ALL_DATA, Matrix, difference, matrix, spread
from medrl.reports.results import PlannedRun, methods_of, read_plan, read_results
from medrl.reports.tables import (
    CSV_COLUMNS,
    by_target_table,
    matrix_tables,
    methods_table,
    methods_tables,
    named_matrices,
    results_csv,
    zero_shot_table,
)

NEAR = pytest.approx

PAPER = [  # Med-R1's heat map of no-think less think, percentage points, trained on x tested on
    [1.24, 7.75, -0.61, -5.69, 7.96, 7.11, 5.54, 4.23],
    [16.94, 0.43, 0.99, -10.32, 4.90, 8.93, 9.08, 2.79],
    [-1.30, 1.65, 1.24, -2.89, 0.00, 4.10, -0.47, 2.88],
    [3.94, 2.57, 2.84, 0.14, 5.82, 5.01, 4.71, 7.75],
    [2.53, 0.58, 0.56, -3.76, 2.90, -0.55, 3.42, -0.36],
    [4.57, 2.67, -1.86, 2.51, 1.07, 1.55, 7.31, 3.96],
    [15.99, 2.70, 0.06, -3.57, -7.81, -2.46, 0.83, 0.36],
    [3.18, 3.31, 1.92, 0.57, 4.36, 7.29, 6.61, 5.05],
]


def test_means_of_the_papers_heat_map() -> None:
    names = ("CT", "MRI", "X-Ray", "US", "Der", "Fundus", "OCT", "Micro")
    cells = tuple(tuple(row) for row in PAPER)
    paper = Matrix(kind="modality", sources=names, targets=names, cells=cells)
    assert paper.mean == NEAR(2.57, abs=0.005)
    assert paper.in_domain == NEAR(1.67, abs=0.005)
    assert paper.transfer == NEAR(2.70, abs=0.005)
    assert paper.source_means[0] == NEAR(3.44, abs=0.005)
    assert paper.target_means[3] == NEAR(-2.88, abs=0.005)


def test_a_matrix_is_the_mean_over_seeds_and_what_is_missing_stays_missing(tmp_path: Path) -> None:
    results = read_results(small_experiment(tmp_path / "e"))
    grpo = matrix(results, "GRPO no-think", "modality")
    assert grpo.sources == grpo.targets == ("CT", "MRI", "X-ray")
    assert grpo.cells[0] == NEAR((0.8, 0.6, 0.5))
    assert grpo.cells[1] == NEAR((0.5, 1.0, 0.5))
    assert grpo.cells[2] == (None, None, None)
    assert grpo.source_means == (NEAR(1.9 / 3), NEAR(2 / 3), None)
    assert grpo.target_means == NEAR((0.65, 0.8, 0.5))
    assert grpo.in_domain == NEAR(0.9)
    assert grpo.transfer == NEAR(2.1 / 4)
    assert grpo.missing == 3


def test_a_difference_is_there_where_both_are(tmp_path: Path) -> None:
    shown = named_matrices(read_results(small_experiment(tmp_path / "e")))
    assert [m.title for m in shown] == [
        "SFT: accuracy by modality",
        "GRPO no-think: accuracy by modality",
        "GRPO no-think − SFT by modality",
    ]
    less = shown[2].matrix
    assert less.cells[1] == NEAR((0.1, 0.1, 0.3))
    assert less.cells[2] == (None, None, None)
    assert less.in_domain == NEAR(0.05)
    other = Matrix(kind="modality", sources=("CT",), targets=("CT",), cells=((0.5,),))
    with pytest.raises(ValueError, match="same sources"):
        difference(less, other)


def test_no_think_less_think_as_in_the_paper(tmp_path: Path) -> None:
    for mode in ("no-think", "think-before"):
        for source in ("CT", "MRI"):
            add_run(
                tmp_path,
                f"{mode}-{source}",
                method=f"A {mode}",  # by name alone, the order would be the other one
                mode=mode,
                source=source,
                found=evaluation({"CT": 5, "MRI": 5}),
            )
    results = read_results(tmp_path)
    assert methods_of(results) == ["A think-before", "A no-think"]
    assert named_matrices(results)[-1].title == "A no-think − A think-before by modality"


def test_the_methods_table_has_the_hand_computed_numbers(tmp_path: Path) -> None:
    results = read_results(small_experiment(tmp_path / "e"))
    plan = [
        PlannedRun(
            label=f"{n}", method="GRPO no-think", source="CT", source_kind="modality", seed=n
        )
        for n in range(6)
    ]
    table = methods_table(results, "modality", plan)
    rows = {row[0]: dict(zip(table.headings, row, strict=True)) for row in table.rows}
    assert list(rows) == ["zero-shot", "SFT", "GRPO no-think"]
    zero, sft, grpo = rows.values()
    assert (zero["in-domain"], zero["transfer"], zero["all"]) == (MISSING, MISSING, "30.0")
    # On the diagonal 80, 90, 90; off it (40+30)/2, (40+20)/2, (30+20)/2.
    assert (sft["runs"], sft["± over"]) == ("3", "3 sources")
    assert (sft["in-domain"], sft["transfer"]) == ("86.7 ± 5.8", "30.0 ± 5.0")
    # CT's two seeds are averaged first: 80 and 100; transfer 55 and 50.
    assert (grpo["runs"], grpo["± over"]) == ("3/6", "2 sources")
    assert (grpo["in-domain"], grpo["transfer"]) == ("90.0 ± 14.1", "52.5 ± 3.5")
    assert (grpo["format"], grpo["chance"], grpo["blind"]) == ("100.0", "25.0", "25.0")
    assert (grpo["tokens"], grpo["s/run"], grpo["n"]) == ("7.0", "12", "30")


def test_of_one_source_the_deviation_is_over_the_seeds(tmp_path: Path) -> None:
    results = read_results(small_experiment(tmp_path / "e"))
    ct = [r for r in results if r.method == "GRPO no-think" and r.source == "CT"]
    found = spread(ct, matrices.in_domain)
    assert found is not None
    assert (found.mean, found.deviation) == (NEAR(0.8), NEAR(0.2 / 2**0.5))
    assert (found.over, found.count) == ("seeds", 2)
    assert spread(ct, lambda run: None) is None


def test_strict_and_lenient_stand_side_by_side(tmp_path: Path) -> None:
    rows = [
        numbers("all", "all", 10, 4, lenient=0.7, low=0.17, high=0.69),
        numbers("modality", "CT", 10, 4, lenient=0.7, blind=None, chance=None),
    ]
    add_run(tmp_path, "z", method="zero-shot", train="none", found={"breakdown": rows})
    table = zero_shot_table(read_results(tmp_path))
    assert table.rows[0][2:6] == ("10", "40.0", "17.0 to 69.0", "70.0")
    assert table.rows[1][-2:] == (MISSING, MISSING)


def test_the_csv_reads_back_as_what_was_written(tmp_path: Path) -> None:
    small = small_experiment(tmp_path / "e")
    odd = 'X, "Y"\nZ'
    add_run(small, "odd", method=odd, found=evaluation({"CT": 1, "=1+1": 2}, blind=None))
    results = read_results(small)
    lines = list(csv.DictReader(io.StringIO(results_csv(results))))
    assert tuple(lines[0]) == CSV_COLUMNS
    assert len(lines) == sum(len(result.targets) for result in results) == 7 * 4 + 3
    told = {(x["method"], x["source"], x["seed"], x["target"]): x for x in lines}
    cell = told["GRPO no-think", "CT", "1", "MRI"]
    assert float(cell["accuracy"]) == 0.7
    assert (cell["n"], cell["correct"], cell["target_kind"]) == ("10", "7", "modality")
    assert (cell["steps"], cell["seconds"], cell["train"]) == ("6", "12.5", "grpo")
    assert told[odd, "", "0", "=1+1"]["blind"] == ""


def test_trained_on_everything_is_a_row_of_its_own(tmp_path: Path) -> None:
    small = small_experiment(tmp_path / "e")
    found = evaluation({"CT": 10, "MRI": 10, "X-ray": 10})
    add_run(small, "all", method="SFT", train="sft", found=found)
    sft = matrix(read_results(small), "SFT", "modality")
    assert sft.sources[-1] == ALL_DATA
    assert sft.cells[-1] == (1.0, 1.0, 1.0)
    assert sft.transfer == NEAR(0.3)  # it was trained on what it is tested on


def test_runs_without_sources_have_no_matrix_and_one_table(tmp_path: Path) -> None:
    for seed in (0, 1):
        found = evaluation({"CT": 4 + 2 * seed, "MRI": 4})
        add_run(tmp_path, f"{seed}", method="GRPO", seed=seed, found=found)
    results = read_results(tmp_path)
    assert matrix_tables(results) == []
    (table,) = methods_tables(results)
    assert dict(zip(table.headings, table.rows[0], strict=True))["all"] == "45.0 ± 7.1"
    assert by_target_table(results, "modality").rows[0] == ("GRPO", "50.0", "40.0", "45.0")


def test_the_plan_tells_what_is_missing(tmp_path: Path) -> None:
    small = small_experiment(tmp_path / "e")
    assert read_plan(small, ()) == ()  # a file that is no whole experiment
    (small / "experiment.toml").write_text("""
[run]
dir = "x"
[model]
path = "starter"
[data]
train = "t"
test = "t"
[experiment]
name = "small"
sources = "modality"
seeds = [0, 1]
[[experiment.methods]]
name = "zero-shot"
train = "none"
[[experiment.methods]]
name = "GRPO no-think"
train = "grpo"
""")
    results = read_results(small)
    plan = read_plan(small, results)
    assert [one.source for one in plan if one.method == "zero-shot"] == [""]
    told = {(one.source, one.seed) for one in plan if one.method != "zero-shot"}
    assert told == {(source, seed) for source in ("CT", "MRI", "X-ray") for seed in (0, 1)}
    alone = [result for result in results if result.source in ("CT", "")]
    assert matrix(alone, "GRPO no-think", "modality", plan).missing == 6


def run_directory(folder: Path, **data: object) -> Path:
    """As `medrl train` leaves it."""
    folder.mkdir(parents=True)
    lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in data.items())
    (folder / "config.toml").write_text(f'[data]\nmode = "no-think"\n{lines}[run]\nseed = 3\n')
    write_lines(folder / "metrics.jsonl", journal("grpo"))
    old = {"n": 10, "accuracy": 0.5, "format": 1.0}
    old |= {"by_modality": {"CT": 0.5}, "n_by_modality": {"CT": 10}}
    old |= {"by_question_type": {}, "n_by_question_type": {}}
    write_lines(folder / "evals.jsonl", [{"accuracy": 0.0}, old])
    return folder


def test_a_run_directory_is_a_result(tmp_path: Path) -> None:
    run = run_directory(tmp_path / "demo", modalities=["CT"])
    (result,) = read_results(run)
    assert (result.method, result.source, result.source_kind) == ("GRPO no-think", "CT", "modality")
    assert (result.seed, result.steps, result.seconds) == (3, 6, 3.0)
    assert (result.overall.accuracy, result.overall.low) == (0.5, None)
    (run / "evals").mkdir()
    (run / "evals" / "final.json").write_text(json.dumps(evaluation({"CT": 7})))
    (result,) = read_results(run)
    assert result.overall.accuracy == NEAR(0.7)


def test_the_evaluation_of_another_model_or_mode_is_not_the_runs(tmp_path: Path) -> None:
    """`medrl eval` writes there whatever it is given with the run's config."""
    run = run_directory(tmp_path / "demo")
    (run / "evals").mkdir()

    def evaluated(
        name: str, checkpoint: str, right: int, mode: str = "no-think", test: str = ""
    ) -> float:
        about = {"checkpoint": checkpoint, "mode": mode, "test": test}
        file = run / "evals" / f"{name}.json"
        file.write_text(json.dumps(about | evaluation({"CT": right})))
        os.utime(file, (right, right))  # the later, the more of them are right
        return read_results(run)[0].overall.accuracy

    assert evaluated("starter", "starter", 1) == 0.5  # of evals.jsonl
    assert evaluated("step_6", "runs/demo/checkpoints/step_6/learner/model", 2) == NEAR(0.2)
    assert evaluated("export", "/before/it/was/moved/demo/export", 3) == NEAR(0.3)
    assert evaluated("thinking", "runs/demo/export", 4, "think-before") == NEAR(0.3)
    assert evaluated("theirs", "runs/other/export", 5) == NEAR(0.3)
    assert evaluated("elsewhere", "runs/demo/export", 5, test="other/questions") == NEAR(0.3)
    (run / "metrics.jsonl").unlink()  # a run of no step: the starting model is its model
    (run / "config.toml").write_text('[data]\nmode = "no-think"\n[model]\npath = "starter"\n')
    assert evaluated("again", "starter", 6) == NEAR(0.6)


def test_runs_that_nothing_tells_apart_are_not_averaged(tmp_path: Path) -> None:
    """They may differ in anything, such as the learning rate."""
    runs = [run_directory(tmp_path / name) for name in ("a/demo", "b/demo", "c")]
    results = read_results(*runs, runs[0])
    assert len(results) == 3
    labels = [result.label for result in results]
    assert labels == [str(runs[0]), str(runs[1]), "c"]
    assert len(set(methods_of(results))) == 3


def test_only_runs_of_one_setup_are_repetitions(tmp_path: Path) -> None:
    """Seeds of a 2B and of a 7B model are no spread of anything."""

    def run(name: str, model: str, seed: int) -> Path:
        folder = run_directory(tmp_path / name, modalities=["CT"])
        text = f'[run]\nname = "{name}"\nseed = {seed}\n[model]\npath = "{model}"\n'
        (folder / "config.toml").write_text(text)
        return folder

    small = [run("a", "2b", 0), run("b", "2b", 1)]
    assert methods_of(read_results(*small)) == ["GRPO no-think"]
    both = read_results(*small, run("c", "7b", 2))
    assert [result.method for result in both] == [
        "GRPO no-think (as a)",
        "GRPO no-think (as a)",
        "GRPO no-think (as c)",
    ]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("result.json", "{", "cannot be read"),
        ("result.json", "[]", "needs a dict"),
        ("result.json", '{"method": "x"}', "lacks train, mode, source"),
        ("config.toml", "[", "config.toml"),
        ("config.toml", "", "no evaluation yet"),
        ("other", "", "neither an experiment"),
    ],
)
def test_what_is_neither_says_so(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=said):
        read_results(tmp_path)


def test_an_evaluation_that_is_none_says_so(tmp_path: Path) -> None:
    folder = add_run(tmp_path, "a", method="m", found={"breakdown": [{"kind": "all"}]})
    with pytest.raises(UserError, match=r"result\.json: its evaluation is not one"):
        read_results(folder)
    add_run(tmp_path, "b", method="m", found={"accuracy": 1})
    with pytest.raises(UserError) as caught:
        read_results(tmp_path, tmp_path / "nowhere")
    assert len(caught.value.problems) == 2


def test_names_cannot_break_out_of_a_markdown_table() -> None:
    name = "a|b\nc <script> [x](y) `*_"
    table = Table(title="T", headings=("h", name), rows=((name, "1"),))
    lines = markdown([table]).splitlines()
    assert lines[0] == "## T"
    assert len([line for line in lines if line.startswith("|")]) == 3
    assert "<script>" not in markdown([table])
    assert r"a\|b c &lt;script> \[x\](y) \`\*\_" in lines[2]


def test_a_difference_that_rounds_to_nothing_has_no_sign() -> None:
    assert [points(x) for x in (-0.0004, 0.0004, 0.0)] == ["0.0"] * 3
    assert [points(x) for x in (-0.012, 0.012, None)] == ["−1.2", "+1.2", MISSING]
