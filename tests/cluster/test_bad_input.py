"""Wrong input ends in clear sentences and exit status 2, before Ray or any engine starts."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from medrl.cluster import cli, manifest


class Result:
    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err
        self.lines = [line for line in err.splitlines() if line]


@pytest.fixture
def medrl(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run the command line; Ray must not be started by it."""

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["medrl", *map(str, arguments)])
        import ray

        monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was started"))
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = capsys.readouterr()
        return Result(exit_.value.code or 0, captured.out, captured.err)

    return run


@pytest.fixture
def config(tmp_path: Path, config_text: str) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(config_text)
    return path


@pytest.fixture
def data(tmp_path: Path, phantom_folder: Path) -> Path:
    """A copy of the training phantoms that a test may spoil."""
    return Path(shutil.copytree(phantom_folder / "train", tmp_path / "spoiled"))


def records(data: Path) -> Path:
    return sorted(data.glob("QA_information/**/*.json"))[0]


def check(result: Result, *patterns: str) -> None:
    assert result.status == 2, result.err
    assert "Traceback" not in result.err
    for pattern in patterns:
        assert re.search(pattern, result.err), (pattern, result.err)


CONFIG_MISTAKES = [
    ("rollout.promts=4", r"rollout\.promts: unknown key; did you mean 'prompts'\?"),
    ("rollout.prompts='4'", r'rollout\.prompts: got "4", needs'),
    ("rollout.completions=1", r"rollout\.completions: got 1, needs greater than or equal to 2"),
    ("learner.learning_rate=nan", r"learner\.learning_rate: got nan, needs a finite number"),
    ("rollout.prompts=3", r"rollout\.prompts: got 3, needs a multiple of 2"),
    ("data.mode='no-thnik'", r"data\.mode: got \"no-thnik\", needs"),
    ("run.name=lab/first", r"run\.name: got \"lab/first\", needs only letters, digits"),
    ("reward.terms=[]", r"reward\.terms: got \[\], needs at least one\n"),
    ("data.modalities=CT", r"data\.modalities: got \"CT\", needs a list"),
]


@pytest.mark.parametrize(("override", "said"), CONFIG_MISTAKES)
def test_a_wrong_key_or_value(medrl, config: Path, override: str, said: str) -> None:
    check(medrl("train", config, override), said)


def test_several_mistakes_are_told_one_a_line(medrl, config: Path) -> None:
    result = medrl("train", config, *(override for override, _ in CONFIG_MISTAKES[:4]))
    # The first two name the same section and key twice; all four are told.
    assert len(result.lines) == 4
    check(result, *(said for _, said in CONFIG_MISTAKES[:4] if "prompts: got" not in said))


def test_missing_config_model_data_and_images(medrl, config: Path, tmp_path: Path) -> None:
    check(medrl("train", tmp_path / "none.toml"), r"none\.toml does not exist")
    result = medrl(
        "train", config, f"model.path={tmp_path / 'nomodel'}", f"data.train={tmp_path / 'nodata'}"
    )
    check(result, r"model\.path: .*nomodel", r"data\.train: no such file or folder")
    assert len(result.lines) == 2
    result = medrl("train", config, f"data.images={tmp_path / 'noimages'}")
    check(result, r"no such folder")
    assert len(result.lines) == 1  # train and test share the root: told once
    check(medrl("train", tmp_path), "is a folder; name a TOML file")


def test_a_model_of_another_family_and_a_folder_without_a_model(
    medrl, config: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    check(medrl("train", config, f"model.path={tmp_path / 'empty'}"), "has no config.json")
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "bert"}')
    check(medrl("train", config, f"model.path={tmp_path / 'empty'}"), "is a bert model; known")


@pytest.fixture
def model(tmp_path: Path, tiny_model: Path) -> Path:
    """A copy of the tiny model that a test may spoil."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.mark.parametrize("size", [0, 100, 5_000])
def test_weights_that_are_cut_off_are_found_before_an_engine_starts(
    medrl, config: Path, model: Path, size: int
) -> None:
    weights = next(model.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:size])
    result = medrl("train", config, f"model.path={model}")
    check(result, re.escape(weights.name) + " is cut off or broken")


def test_a_weight_file_that_the_index_names_and_is_missing(
    medrl, config: Path, model: Path
) -> None:
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00002-of-00002.safetensors"}}))
    check(medrl("train", config, f"model.path={model}"), r"00002\.safetensors is missing")
    index.write_text("[]")
    check(medrl("train", config, f"model.path={model}"), "is not an index of weight files")


@pytest.mark.parametrize("missing", ["tokenizer*", "*processor*"])
def test_a_model_without_tokenizer_or_image_processor(
    medrl, config: Path, model: Path, missing: str
) -> None:
    files = list(model.glob(missing))
    assert files
    for file in files:
        file.unlink()
    check(medrl("train", config, f"model.path={model}"), "has no whole processor")


def test_broken_json_names_file_and_line(medrl, config: Path, data: Path) -> None:
    lines = records(data).read_text().splitlines()
    records(data).write_text("\n".join([*lines[:5], '"oops', *lines[5:]]))
    check(medrl("train", config, f"data.train={data}"), rf"{records(data).name}.*line 6")


def spoil_record(data: Path, **changes: object) -> None:
    rows = json.loads(records(data).read_text())
    rows[1].update(changes)
    records(data).write_text(json.dumps([{k: v for k, v in r.items() if v} for r in rows]))


def test_gold_not_among_the_options_and_a_single_option(medrl, config: Path, data: Path) -> None:
    spoil_record(data, gt_answer="Banana")
    check(medrl("train", config, f"data.train={data}"), r"Banana")
    spoil_record(data, gt_answer="x", option_A="x", option_B=None, option_C=None, option_D=None)
    check(medrl("train", config, f"data.train={data}"), r"1 option|one option|single option")


@pytest.mark.parametrize("content", [b"", b"this is text", None])
def test_an_unreadable_image_is_named_or_skipped_and_counted(
    medrl, config: Path, data: Path, content: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = sorted(data.glob("Images/**/*.png"))[0]
    whole = image.read_bytes()
    image.write_bytes(whole[: len(whole) // 2] if content is None else content)
    result = medrl("train", config, f"data.train={data}")
    check(result, re.escape(image.name))
    from medrl.cluster.preflight import check_inputs
    from medrl.configs.loader import load_config

    skipping = load_config(config, [f"data.train={data}", "data.on_bad_image='skip'"])
    checked = check_inputs(skipping, skipping.model.path)
    assert len(checked.train) == 155
    assert any("left out 5 prompts" in note for note in checked.notes)


def test_an_empty_data_set(medrl, config: Path, tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").write_text("")
    overrides = ["data.format='jsonl'", f"data.train={tmp_path / 'none.jsonl'}", "data.test=''"]
    check(medrl("train", config, *overrides), r"no prompts|empty")


def test_a_reward_that_does_not_import_or_is_no_function(medrl, config: Path) -> None:
    for use, said in (("no_such_lab:f", "no_such_lab"), ("math:pi", "not callable")):
        result = medrl("train", config, f"reward.terms=[{{use='{use}'}}]")
        check(result, use.partition(":")[0], said)


def test_a_prompt_longer_than_the_model_allows(medrl, config: Path) -> None:
    result = medrl("train", config, "rollout.max_model_len=40", "rollout.max_tokens=8")
    check(result, r"prompt .+?: \d+ tokens \(9 visual\), but only 32 fit", "and 315 more")


def test_a_run_directory_belongs_to_one_run(medrl, config: Path, tmp_path: Path) -> None:
    check(medrl("train", config, "--resume"), "holds no run; start it without --resume")
    used = tmp_path / "runs" / "test"
    used.mkdir(parents=True)
    (used / "syncs.jsonl").write_text("")
    check(medrl("train", config), "already holds a run; go on with --resume")


def test_a_run_that_never_came_up_leaves_its_directory_free(tmp_path: Path) -> None:
    from medrl.cluster.preflight import refuse_used_directory

    (tmp_path / "config.toml").write_text("")
    refuse_used_directory(tmp_path, resume=False)
    refuse_used_directory(tmp_path, resume=True)


@pytest.mark.parametrize("place", ["/proc/runs", "a-file"])
def test_a_run_directory_that_cannot_be_made(
    medrl, config: Path, tmp_path: Path, place: str
) -> None:
    """Root may write everywhere, by permission; still /proc takes no folder, and no file does."""
    (tmp_path / "a-file").write_text("")
    where = tmp_path / place  # an absolute place stays as it is
    check(medrl("train", config, f"run.dir={where}"), rf"run\.dir: {where}/test cannot be made")


def test_a_checkpoint_of_another_run_or_model(medrl, config: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "test"
    (run / "checkpoints" / "step_3").mkdir(parents=True)
    (run / "config.toml").write_text("")
    state = {
        "step": 3,
        "fixed": {"model.path": "another/model", "training prompts": 160},
        "buffer": {"version": 3, "next_draw": 12, "started": {}, "ready": []},
    }
    (run / "checkpoints" / "step_3" / "driver.json").write_text(json.dumps(state))
    manifest.seal(run / "checkpoints" / "step_3")
    result = medrl("train", config, "--resume")
    check(result, r"model\.path: .*step_3 was made with 'another/model', now")


def test_a_checkpoint_of_a_model_with_other_tensors(tmp_path: Path, tiny_model: Path) -> None:
    """The path may be the same and the model in it another."""
    from medrl.cluster.checkpoints import refuse_other_model
    from medrl.configs.errors import UserError
    from medrl.learner import tiny

    saved = tmp_path / "step_1" / "learner" / "model"
    shutil.copytree(tiny_model, saved)
    refuse_other_model(tmp_path / "step_1", str(tiny_model))
    tiny.build("qwen2_vl", tmp_path / "other", corpus=["a b c"], hidden=64)
    with pytest.raises(UserError, match=r"step_1 is of another model than .*\d+ tensors differ"):
        refuse_other_model(tmp_path / "step_1", str(tmp_path / "other"))


def test_an_unknown_option_or_command(medrl, config: Path) -> None:
    check(medrl("train", config, "--resum"), r"[Nn]o such option")
    check(medrl("trian"), "[Nn]o such command")


def test_the_phantom_command_refuses_an_existing_folder(medrl, tmp_path: Path) -> None:
    check(medrl("data", "phantom", "--out", tmp_path), "exists already")


def test_a_phantom_folder_that_cannot_be_made_leaves_nothing(medrl, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    arguments = ("--train", 8, "--test", 8)
    check(medrl("data", "phantom", "--out", tmp_path / "file" / "x", *arguments), "cannot be writ")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_evaluation_names_a_wrong_out_before_it_runs(
    medrl, config: Path, tiny_model: Path, tmp_path: Path
) -> None:
    for out in (tmp_path, tmp_path / "none" / "x.json"):
        check(medrl("eval", config, "--checkpoint", tiny_model, "--out", out), "--out: .* file in")
    (tmp_path / "file").write_text("")
    arguments = ("--checkpoint", tiny_model, f"run.dir={tmp_path / 'file'}")
    check(medrl("eval", config, *arguments), "run.dir: .*/file/test/evals cannot be made: Not a")


def test_a_flood_of_problems_is_cut_with_their_number(medrl, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"id": 1, "completion": 1, "answer": "A"}\n' * 1000)
    result = medrl("score", source, "--out", tmp_path / "out.jsonl")
    check(result, r"line 200: .*\n(.*\n)*error: \.\.\. and 800 more")
    assert len(result.lines) == 201
