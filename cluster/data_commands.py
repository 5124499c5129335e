"""`medrl data ...`. Exit status of lint: 0 no problems, 1 some, 2 no data."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from medrl.cluster.console import make_console
from medrl.configs.errors import UserError

if TYPE_CHECKING:
    from medrl.actors.types import Prompt
    from medrl.data.lint import Counts, Leakage, LintReport

SHOWN = 50  # problems in the table; --json has all

DataSet = Annotated[
    Path,
    typer.Argument(
        metavar="PATH",
        help="OmniMedVQA's folder, Med-R1's split file or folder, .jsonl, Parquet, a save_to_disk "
        "folder, or a folder that holds train and test of these.",
    ),
]
Root = Annotated[
    Path | None, typer.Option(help="Folder the image paths are relative to; else PATH's own.")
]
SkipBad = Annotated[
    bool, typer.Option("--skip-bad", help="Leave rows with problems out and count them.")
]


def phantom(
    out: Annotated[Path, typer.Option(help="A new folder: OUT/train and OUT/test.")],
    train: Annotated[int, typer.Option(min=1, help="Training images.")] = 1536,
    test: Annotated[int, typer.Option(min=1, help="Held-out images.")] = 96,
    seed: Annotated[int, typer.Option(min=0, help="The same seed draws the same set.")] = 0,
    size: Annotated[int, typer.Option(min=56, max=1024, help="Pixels a side.")] = 84,
    options: Annotated[
        str, typer.Option(help="ordered (easier) or shuffled: how a question's options stand.")
    ] = "ordered",
) -> int:
    """Draw a phantom data set in OmniMedVQA's layout: eight modalities, five question types."""
    from medrl.data.phantoms import Options, generate

    if options not in ("ordered", "shuffled"):
        raise UserError(f"--options: got {options!r}, needs ordered or shuffled")
    if out.exists():
        raise UserError(f"--out: {out} exists already; name a new folder, or delete it")
    aside = out.with_name(f".{out.name}.{os.getpid()}")
    wanted: Options = "ordered" if options == "ordered" else "shuffled"
    try:
        made = generate(aside, train=train, test=test, seed=seed, size=size, options=wanted)
        aside.rename(out)
    except OSError as error:
        raise UserError(f"--out: {out} cannot be written: {error.strerror}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    make_console().print(
        f"{out}/train: {made.train_questions} questions, {out}/test: {made.test_questions}, "
        "without a common image",
        highlight=False,
    )
    return 0


def lint(
    path: DataSet,
    root: Root = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with all problems.")] = False,
    mode: Annotated[str, typer.Option(help="Mode of the example prompt.")] = "no-think",
    instruction: Annotated[
        str, typer.Option(help="Its last line instead of the mode's, as data.instruction.")
    ] = "",
    against: Annotated[
        Path | None, typer.Option(help="Another data set, to look for what both share.")
    ] = None,
) -> int:
    """Say what a data set holds and what is wrong with it. Exit status: 0 nothing, 1 something.

    Counts, chance and majority accuracy, images missing or broken, answers that are no option,
    options that stand there twice, images and questions shared by train and test.
    """
    from medrl.data.lint import lint as make_report
    from medrl.data.survey import survey
    from medrl.rewards.modes import get_mode, odd_words

    asked = get_mode(mode, instruction)
    splits = survey(path, root)
    report = make_report(splits, survey(against, root) if against else ())
    if as_json:
        print(json.dumps(report.to_json(), indent=2, ensure_ascii=False))
    else:
        example = next((prompt for split in splits for prompt in split.prompts), None)
        shown = (example, asked.render(example)) if example else None
        _show(report, f"{path}", shown, mode, make_console())
        for sentence in odd_words(asked):
            print(f"note: {sentence}")
    return 1 if report.problems else 0


def split(
    path: DataSet,
    out: Annotated[Path, typer.Option(help="A new folder: OUT/train.jsonl, OUT/test.jsonl.")],
    test: Annotated[float, typer.Option(help="Share of the test set, between 0 and 1.")] = 0.2,
    seed: Annotated[int, typer.Option(min=0, help="The same seed makes the same split.")] = 0,
    root: Root = None,
    skip_bad: SkipBad = False,
) -> int:
    """Divide a data set (its own train and test together, where it has them) by images.

    No image is in both parts; modalities and question types are in both in equal shares.
    """
    from medrl.data.divide import divide

    if out.exists():
        raise UserError(f"--out: {out} exists already; name a new folder, or delete it")
    made = divide(path, out, fraction=test, seed=seed, root=root, skip_bad=skip_bad)
    console = make_console()
    for sentence in made.notes:
        console.print(f"note: {sentence}", highlight=False, soft_wrap=True, markup=False)
    _say_left_out(made.left_out, console)
    images = f'"{made.image_root}"' if made.image_root else "the folder of their images"
    console.print(
        f"{out}/train.jsonl: {made.train} prompts, {out}/test.jsonl: {made.test}, without a common "
        f'image; read them with data.format = "jsonl" and data.images = {images}',
        highlight=False,
        soft_wrap=True,
        markup=False,
    )
    return 0


def import_(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="vqa_rad, slake, slake_zh, path_vqa, pmc_vqa, mmmu or medxpertqa."
        ),
    ],
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="The data set's file or folder; FOLDER:SPLIT.")
    ],
    out: Annotated[Path, typer.Option(help="A .jsonl file; images it holds go beside it.")],
    skip_bad: SkipBad = False,
) -> int:
    """Write another medical data set as JSON lines that medrl reads; open questions stay open."""
    from medrl.data.import_files import import_prompts
    from medrl.data.importers import IMPORTERS
    from medrl.data.lines import write_prompts

    if out.suffix != ".jsonl" or out.exists():
        raise UserError(f"--out: {out} needs to be a new file that ends in .jsonl")
    read = import_prompts(name, source, out.parent)
    if read.problems and not skip_bad:
        raise UserError(*read.problems, "nothing was written; --skip-bad leaves such rows out")
    if not read.prompts:
        raise UserError(f"{source}: no prompts in it", *read.problems)
    try:
        write_prompts(out, read.prompts)
    except OSError as error:
        raise UserError(f"--out: {out} cannot be written: {error.strerror}") from None
    console, importer = make_console(), IMPORTERS[name]
    _say_left_out(read.problems, console)
    if read.left_out:
        console.print(f"{read.left_out} left out: {importer.left_out}", highlight=False)
    open_questions = sum(not prompt.options for prompt in read.prompts)
    images = out.parent if read.holds_images else Path(source).parent / importer.images
    console.print(
        f"{out}: {len(read.prompts)} prompts, {open_questions} of them open questions; "
        f'read them with data.format = "jsonl" and data.images = "{images}"',
        highlight=False,
        soft_wrap=True,
        markup=False,
    )
    return 0


def pass_rates(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="As for `medrl train`.")],
    out: Annotated[Path, typer.Option(help="JSON lines; an unfinished file is gone on with.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="SECTION.KEY=VALUE", help="Win over the file.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="RUN/checkpoints/step_N or a model folder; else model.path.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Completions a prompt.")] = 16,
) -> int:
    """Measure how often a model solves each training prompt, through the engines of a run.

    At the run's temperature, scored strictly. For data.pass_rates, with data.min_pass_rate,
    data.max_pass_rate and data.order = "easy_first".
    """
    from medrl.cluster.quiet import quiet_libraries
    from medrl.configs.loader import load_config

    console = make_console()
    tree = load_config(config, overrides or [])
    with quiet_libraries(), console.status(f"measuring pass rates, to {out}"):
        from medrl.cluster.pass_rates import histogram, measure_pass_rates

        def say(sentence: str) -> None:
            console.print(sentence, highlight=False, soft_wrap=True, markup=False)

        measured = measure_pass_rates(tree, out, checkpoint=checkpoint, samples=samples, say=say)
    console.print(histogram(list(measured.by_id.values())))
    return 0


def register(app: typer.Typer) -> None:
    """Add the commands to `medrl data`."""
    app.command()(phantom)
    app.command()(lint)
    app.command()(split)
    app.command("import")(import_)
    app.command("pass-rates")(pass_rates)


def _show(
    report: LintReport, path: str, example: tuple[Prompt, str] | None, mode: str, console: Console
) -> None:
    console.print(_counts_table(report, path))
    if report.leakage:
        console.print(_sentence(report.leakage), highlight=False, soft_wrap=True)
    if example:
        prompt, text = example
        console.print(f"\n{mode}, as asked of {prompt.id} ({len(prompt.images)} images before it):")
        for line in [*text.splitlines(), f"gold: {prompt.answer}"]:
            console.print(f"  | {line}", highlight=False, soft_wrap=True, markup=False)
    console.print()
    for note in report.notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True, markup=False)
    for problem in report.problems[:SHOWN]:
        console.print(f"problem: {problem}", highlight=False, soft_wrap=True, markup=False)
    if len(report.problems) > SHOWN:
        console.print(f"... and {len(report.problems) - SHOWN} more; --json has all")
    console.print(f"{len(report.problems)} problems", highlight=False)


def _counts_table(report: LintReport, path: str) -> Table:
    table = Table(title=escape(path))
    for heading in ("", "n", "chance", "majority", "options: prompts"):
        table.add_column(
            heading, justify="right" if heading in ("n", "chance", "majority") else "left"
        )
    groups: Sequence[Mapping[str, Counts]] = (
        report.modalities,
        report.question_types,
        report.splits,
        {"all": report.total},
    )
    for group in groups:
        for name, counts in group.items():
            table.add_row(escape(name), *_cells(counts), style="bold" if name == "all" else None)
        table.add_section()
    return table


def _cells(counts: Counts) -> tuple[str, str, str, str]:
    options = ", ".join(
        f"open: {n}" if size == "0" else f"{size}: {n}" for size, n in counts.option_counts.items()
    )
    return (str(counts.n), _fraction(counts.chance), _fraction(counts.majority), options)


def _fraction(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _sentence(leakage: Leakage) -> str:
    return (
        f"{leakage.compared} share {leakage.shared_images} images "
        f"({leakage.prompts_of_shared_images} of {leakage.prompts} prompts of the latter) and "
        f"{leakage.shared_questions} question texts ({leakage.prompts_of_shared_questions})"
    )


def _say_left_out(sentences: Sequence[str], console: Console) -> None:
    for sentence in sentences[:SHOWN]:
        console.print(f"left out: {sentence}", highlight=False, soft_wrap=True, markup=False)
    if sentences:
        console.print(f"{len(sentences)} problems, their rows left out", highlight=False)
