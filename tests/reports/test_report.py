"""Reports: whole in one file, harmless whatever completions say, quick enough to make every run."""

import json
import re
import sys
from pathlib import Path

import pytest
from made_results import (
    Page,
    add_run,
    evaluation,
    prediction,
    small_experiment,
    write_image,
)
from PIL import Image

from medrl.cluster import cli
from medrl.reports.comparison_plots import curve_groups, draw_bars, draw_curves
from medrl.reports.heatmaps import draw_heatmap, file_name, shorten
from medrl.reports.html_report import config_tables
from medrl.reports.report_files import write_report
from medrl.reports.results import PlannedRun, read_results
from medrl.reports.samples import LONGEST_TEXT
from medrl.reports.tables import named_matrices

HOSTILE = '</pre><script>alert("x")</script><img src=http://evil.example/x onerror=alert(1)>'


def hostile_experiment(folder: Path) -> Path:
    """Odd names everywhere, and completions that would run a script."""
    root = folder / "images"
    write_image(root / "a.png")
    names = ("CT", "a/b\\c <b>$x^$ $", "超音波 " + "very long " * 20)
    for train, method in (("sft", "SFT"), ("grpo", f"GRPO {HOSTILE} 'x'/../..\\y\x1b[31m\n|$a$")):
        for source in names:
            found = evaluation(dict.fromkeys(names, 5))
            lines = [
                prediction(
                    f"q{number}",
                    name,
                    right=number % 2 == 0,
                    completion=f"{HOSTILE}\ud800\x00\u202e" + "x" * 9000,
                    question=HOSTILE,
                    options=[HOSTILE, "b"],
                    reason=HOSTILE,
                    image_root=str(root),
                )
                for number, name in enumerate(names * 4)
            ]
            label = f"{train}-{names.index(source)}"
            add_run(
                folder,
                label,
                method=method,
                train=train,
                source=source,
                found=found,
                predictions=lines,
            )
    return folder


def test_hostile_text_is_inert_and_the_page_needs_nothing_beside_it(tmp_path: Path) -> None:
    page = Page(write_report(hostile_experiment(tmp_path / "e"), title=HOSTILE))
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "iframe", "object", "embed", "link", "base", "form"}
    sources = [attributes.get("src") or "" for tag, attributes in page.tags if tag == "img"]
    assert len(sources) > 9
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    attributes = {name for _, found in page.tags for name in found}
    assert not [name for name in attributes if name.startswith("on")]
    links = [found.get("href") or "" for _, found in page.tags if "href" in found]
    assert all(link.startswith("#") for link in links)
    assert '<script>alert("x")</script>' in page.text  # shown, as text
    assert not set(page.text) & {"\x00", "\u202e", "\x1b"}
    assert f"({9000 + len(HOSTILE) + 3 - LONGEST_TEXT} characters more)" in page.text


def test_odd_names_make_plain_file_names(tmp_path: Path) -> None:
    write_report(hostile_experiment(tmp_path / "e"), tmp_path / "out")
    files = [path.name for path in (tmp_path / "out" / "plots").iterdir()]
    assert len(files) == 3 + 1 + 2  # matrices and their difference, bars, curves
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]{5,110}", name) for name in files)
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"plots", "report.html", "results.csv", "tables.md"}


def test_other_titles_have_other_files() -> None:
    titles = ["a b", "a-b", "a_b", "a/b", "a\\b", "A b", "ä b", "é b", "x" * 99, "x" * 100]
    titles += ["a − b", "b − a", "a: b"]
    assert len({file_name(title) for title in titles}) == len(titles) - 1  # "a: b" is "a b"
    assert file_name("../../etc") == file_name("../../etc")
    assert shorten("a\n$b$\x1b" + "c" * 50) == r"a \$b\$ " + "c" * 21 + "…"


@pytest.mark.parametrize("size", [2, 8, 20])
def test_pictures_are_pictures(tmp_path: Path, size: int) -> None:
    names = [f"Source {number:02}" for number in range(size)]
    for method, train in (("SFT", "sft"), ("GRPO", "grpo")):
        for source in names[:-1]:  # one is missing
            found = evaluation({name: (len(name) + size) % 10 for name in names})
            label = f"{method} {source}"
            add_run(tmp_path, label, method=method, train=train, source=source, found=found)
    results = read_results(tmp_path)
    drawn = [draw_heatmap(shown, tmp_path) for shown in named_matrices(results)]
    drawn.append(draw_bars(results, "modality", tmp_path))
    groups = curve_groups(results)
    drawn += [path for t, runs in groups.items() if (path := draw_curves(runs, t, tmp_path))]
    for path in drawn:
        with Image.open(path) as image:
            assert 300 < image.width < 3000
            assert 200 < image.height < 3000
    assert len(drawn) == 3 * (size > 2) + 1 + 2


def test_curves_need_steps(tmp_path: Path) -> None:
    small = small_experiment(tmp_path / "e")
    groups = curve_groups(read_results(small))
    assert {title: len(runs) for title, runs in groups.items()} == {"SFT": 3, "GRPO no-think": 3}
    assert draw_curves(groups["SFT"], "SFT", tmp_path)
    for path in small.glob("runs/*/metrics.jsonl"):
        path.write_text("")
    assert draw_curves(groups["SFT"], "SFT", tmp_path) is None


def test_methods_of_one_run_each_are_drawn_together(tmp_path: Path) -> None:
    for rate in ("1e-3", "1e-4"):
        for train in ("sft", "grpo"):
            method = f"{train} {rate}"
            add_run(tmp_path, method, method=method, train=train, found=evaluation({"CT": 5}))
    groups = curve_groups(read_results(tmp_path))
    assert {title: [run.method for run in runs] for title, runs in groups.items()} == {
        "SFT": ["sft 1e-3", "sft 1e-4"],
        "GRPO": ["grpo 1e-3", "grpo 1e-4"],
    }
    later = PlannedRun(label="", method="sft 1e-3", source="", source_kind="", seed=1)
    assert len(curve_groups(read_results(tmp_path), [later])) == 4  # files keep their names


def test_config_differences_are_by_method(tmp_path: Path) -> None:
    small = small_experiment(tmp_path / "e")
    for folder in (small / "runs").iterdir():
        result = json.loads((folder / "result.json").read_text())
        text = f'[run]\nname = "{folder.name}"\nseed = {result["seed"]}\nsteps = 6\n'
        rate = 1e-4 if result["train"] == "sft" else 1e-3
        text += f'[learner]\nlearning_rate = {rate}\n[data]\nmodalities = ["{result["source"]}"]\n'
        (folder / "config.toml").write_text(text)
    shared, differing = config_tables(read_results(small))
    assert shared.rows == (("run.steps", "6"),)
    assert differing.headings == ("key", "zero-shot", "SFT", "GRPO no-think")
    assert differing.rows == (
        ("data.modalities", "['']", "varies", "varies"),
        ("learner.learning_rate", "0.001", "0.0001", "0.001"),
    )


def test_a_report_of_24_runs_is_small_and_of_one_picture_a_comparison(tmp_path: Path) -> None:
    names = [f"Modality {number}" for number in range(8)]
    for method, train in (("SFT", "sft"), ("GRPO a", "grpo"), ("GRPO b", "grpo")):
        for source in names:
            found = evaluation(dict.fromkeys(names, 5))
            label = f"{method} {source}"
            add_run(tmp_path, label, method=method, train=train, source=source, found=found)
    page = write_report(tmp_path)
    assert page.stat().st_size < 4_000_000
    assert len(list((tmp_path / "plots").iterdir())) == 3 + 3 + 1 + 3


def status_of(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["medrl", "report", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return int(exit_.value.code or 0)


def test_the_command_writes_into_the_experiment_and_prints_the_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = small_experiment(tmp_path / "e")
    assert status_of(monkeypatch, small) == 0
    printed = capsys.readouterr().out
    assert "90.0 ± 14.1" in printed
    assert str(small / "report.html") in printed
    assert "## Methods, by modality" in (small / "tables.md").read_text()


def test_one_run_has_its_report_inside_and_several_need_a_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = small_experiment(tmp_path / "e")
    one, two = small / "runs" / "SFT-CT-s0", small / "runs" / "SFT-MRI-s0"
    assert status_of(monkeypatch, one) == 0
    assert (one / "report" / "report.html").is_file()
    assert status_of(monkeypatch, one, two) == 2
    assert "--out: name a folder" in capsys.readouterr().err
    assert status_of(monkeypatch, one, two, "--out", tmp_path / "new" / "out") == 0
    assert (tmp_path / "new" / "out" / "results.csv").read_text().count("SFT") == 2 * 4


def test_wrong_input_is_exit_status_2_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "experiment.toml").write_text("")
    (tmp_path / "file").write_text("")
    small = small_experiment(tmp_path / "e")
    for arguments, said in (
        ([tmp_path / "nowhere"], "neither an experiment"),
        ([empty], "neither an experiment"),
        ([tmp_path / "begun"], "no run is finished yet"),
        ([small, "--out", tmp_path / "file"], "is a file"),
        ([small, "--out", tmp_path / "file" / "below"], "cannot be written"),
    ):
        assert status_of(monkeypatch, *arguments) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert said in line
