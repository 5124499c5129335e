"""Whole runs on the real Ray, vLLM and DeepSpeed: what is promised of a run directory, of an
interruption, of `--resume`, of `medrl eval`, and of a job on a cluster."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from real_runs import ROOT, files_with, finish, listening, medrl, wait_for

from medrl.reports.lines import read_lines

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]

STOP_WITHIN_S = 20.0
SECRET = "0123456789abcdef0123456789planted0123456"  # a key for W&B has 40 letters
SECRETS = {
    **dict.fromkeys(("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"), SECRET),
    **{"DATABASE_URL": f"postgres://me:{SECRET}@host/db", "WANDB_MODE": "offline"},
    "NETRC": "netrc",  # in the folder the run is started in
}
NOT_YET = ("Failed to connect", "ConnectionError", "No available agent")  # a head that just started


@pytest.fixture(scope="module")
def whole(folder: Path, config: Path) -> tuple[Path, str]:
    """A finished run of three steps: its directory and what it printed."""
    out = finish(medrl("train", config, cwd=folder))
    return folder / "runs" / "whole", out


def test_a_run_writes_all_it_promises(whole: tuple[Path, str]) -> None:
    run, out = whole
    steps = read_lines(run / "metrics.jsonl")
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert max(line["logprob_gap.max"] for line in steps) <= 1e-4
    assert all(line["staleness.max"] == 0 and line["failed_completions"] == 0 for line in steps)
    assert any(line["gradient_norm"] > 0 for line in steps)
    assert [e["step"] for e in read_lines(run / "evals.jsonl")] == [0, 3]
    receipts = read_lines(run / "syncs.jsonl")
    assert [receipt["version"] for receipt in receipts] == [0, 1, 2, 3]
    assert all(r["digests_equal"] and r["canary_gap"] <= 1e-4 for r in receipts)
    assert {path.name for path in (run / "plots").iterdir()} == {
        "accuracy.png",
        "learning.png",
        "seconds.png",
    }
    assert (run / "checkpoints" / "step_3" / "driver.json").exists()
    assert len(out.splitlines()) < 100
    assert out.count("held out, step 3") == 1  # due and last at once


def test_engines_hold_the_weights_the_learner_saved(whole: tuple[Path, str]) -> None:
    """The last step's weights differ from the first's, and are those of export and checkpoint."""
    from safetensors.torch import load_file

    run, _ = whole
    export = load_file(run / "export" / "model.safetensors")
    saved = load_file(run / "checkpoints" / "step_3" / "learner" / "model" / "model.safetensors")
    start = load_file(ROOT / "starter" / "model.safetensors")
    assert export.keys() == saved.keys() == start.keys()
    assert all(export[name].equal(saved[name]) for name in export)
    assert any(not export[name].equal(start[name].to(export[name].dtype)) for name in export)


def test_the_export_loads_in_transformers_and_gives_the_sampled_logprobs(
    whole: tuple[Path, str], folder: Path, phantom_folder: Path
) -> None:
    """The first step's completions, scored by plain transformers on the starting model."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from medrl.actors.chat import forbidden_token_ids, render_chat
    from medrl.data.images import ImageStore

    run, _ = whole
    AutoModelForImageTextToText.from_pretrained(run / "export")
    rows = pq.read_table(run / "completions" / "step_000001.parquet").to_pylist()
    model = AutoModelForImageTextToText.from_pretrained(ROOT / "starter", dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(run / "export")
    forbidden = list(forbidden_token_ids(processor.tokenizer))
    store = ImageStore(phantom_folder, 401_408, 28)
    for row in rows[::5]:
        loaded = store.load(row["images"][0])
        assert loaded.sha256 == row["image_hashes"][0]
        text = render_chat(processor, row["prompt"], 1)
        inputs = processor(text=[text], images=[loaded.image], return_tensors="pt")
        tokens = torch.tensor([row["token_ids"]])
        prompt_length = inputs["input_ids"].shape[1]
        types = inputs["mm_token_type_ids"]
        inputs["mm_token_type_ids"] = torch.cat([types, torch.zeros_like(tokens)], 1)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], tokens], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.no_grad():
            logits = model(**inputs).logits[0, prompt_length - 1 : -1]
        logits[:, forbidden] = float("-inf")
        expected = logits.log_softmax(-1).gather(1, tokens[0][:, None])[:, 0]
        assert torch.allclose(expected, torch.tensor(row["logprobs"]), atol=1e-4)


def test_vllm_loads_the_export_and_eval_gives_the_numbers_of_the_run(
    whole: tuple[Path, str], folder: Path, config: Path
) -> None:
    run, _ = whole
    checkpoint = run / "export"
    out = folder / "eval.json"
    one = "placement.engines=1"  # the run had two
    finish(medrl("eval", config, one, "--checkpoint", checkpoint, "--out", out, cwd=folder))
    again, of_run = json.loads(out.read_text()), read_lines(run / "evals.jsonl")[-1]
    for key in ("n", "accuracy", "lenient", "format", "by_modality", "by_question_type"):
        assert again[key] == of_run[key]
    assert again["blind"] < again["accuracy"]  # the starter sees
    recounted, names = {}, {"accuracy": "predictions", "blind": "blind_predictions"}
    scoring = [
        medrl("score", folder / again[name], "--out", folder / f"{name}.jsonl", cwd=folder)
        for name in names.values()
    ]
    for process, (key, name) in zip(scoring, names.items(), strict=True):
        finish(process)
        right = [line["scores"]["accuracy"] for line in read_lines(folder / f"{name}.jsonl")]
        recounted[key] = sum(right) / len(right)
    assert recounted == {key: again[key] for key in ("accuracy", "blind")}


def test_interrupted_it_stops_cleanly_and_resumes(folder: Path, config: Path) -> None:
    """Asynchronous, with a reference model and two updates a batch, for good measure. While it
    runs nobody can reach it from elsewhere, and it keeps no secret of its environment; and the
    checkpoint it left is damaged before it resumes."""
    overrides = [
        "run.name=stopped",
        "rollout.staleness=1",
        "learner.importance_cap=2.0",
        "learner.kl_coefficient=0.04",
        "learner.updates_per_batch=2",
        "eval.max_prompts=8",
        "run.wandb_project=medrl-test",
        "run.checkpoint_every=1",
    ]
    (folder / "netrc").write_text(f"machine api.wandb.ai login user password {SECRET}\n")
    process = medrl("train", config, *overrides, "run.steps=500", cwd=folder, **SECRETS)
    run = folder / "runs" / "stopped"
    wait_for(lambda: len(read_lines(run / "metrics.jsonl")) >= 2, process)
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) > 6
    assert listening(family) == {"127.0.0.1", "::ffff:127.0.0.1"}
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)  # what Ctrl-C does: every process of the group gets it
    out = finish(process, status=130)
    assert time.monotonic() - began < STOP_WITHIN_S
    assert not [one for one in family if one.is_running() and one.status() != "zombie"]

    stopped_at = len(read_lines(run / "metrics.jsonl"))
    weights = run / "checkpoints" / f"step_{stopped_at}" / "learner" / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    goal = stopped_at + 2
    again = medrl(
        *("train", config, *overrides, f"run.steps={goal}", "--resume"), cwd=folder, **SECRETS
    )
    out += finish(again)
    assert re.search(
        rf"step_{stopped_at} is damaged: .* has another SHA-256; it is now .*\.damaged", out
    )
    assert re.search(rf"resuming from .*step_{stopped_at - 1}\b", out)
    assert SECRET not in out
    assert files_with(folder, SECRET) == [folder / "netrc"]
    lines = read_lines(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, goal + 1))
    assert max(line["staleness.max"] for line in lines) <= 1
    assert all(line["kl"] >= 0 for line in lines)
    assert any(line["kl"] > 0 for line in lines)
    assert list((run / "wandb").glob("offline-run-*/*.wandb"))
    draws = [
        draw
        for file in sorted((run / "completions").glob("*.parquet"))
        for draw in pq.read_table(file, columns=["draw"]).column("draw").to_pylist()[::4]
    ]
    assert sorted(draws) == list(range(4 * goal))


def test_interrupted_while_starting_it_stops_at_once(folder: Path, config: Path) -> None:
    process = medrl("train", config, "run.name=early", cwd=folder)
    wait_for(lambda: len(psutil.Process(process.pid).children(recursive=True)) > 5, process)
    family = psutil.Process(process.pid).children(recursive=True)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    finish(process, status=130)
    assert time.monotonic() - began < STOP_WITHIN_S
    assert not [one for one in family if one.is_running() and one.status() != "zombie"]


def test_what_the_cluster_lacks_is_said(folder: Path, config: Path) -> None:
    process = medrl(
        "train", config, "run.name=large", "placement.cpus_per_process=100.0", cwd=folder
    )
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert re.search(r"asked for 400 CPUs, the cluster has \d+ free of \d+; lower", err), err


@pytest.fixture
def head(folder: Path) -> Iterator[dict[str, str]]:
    """A Ray head on loopback with token authentication: the environment to reach it with."""
    token = folder / "token"
    token.write_text("an-example-token-for-this-test-only")
    environment = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_DISABLE_USAGE_STATS": "1",
    }
    ray = str(Path(sys.executable).with_name("ray"))
    port, dashboard, agent = free_port(), free_port(), free_port()
    process = subprocess.Popen(
        [
            *(ray, "start", "--head", "--block", "--node-ip-address=127.0.0.1"),
            *(f"--port={port}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1"),
            *(
                "--num-cpus=2",
                f"--dashboard-agent-listen-port={agent}",
                f"--temp-dir=/tmp/medrl-ray-{os.getpid()}",
            ),
        ],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    environment["RAY_ADDRESS"] = f"http://127.0.0.1:{dashboard}"
    try:
        yield environment
    finally:
        family = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        _, alive = psutil.wait_procs(family, timeout=15)
        for one in alive:
            one.kill()
        process.wait(timeout=15)


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_the_same_job_on_a_cluster_by_ray_job_submit(
    head: dict[str, str], folder: Path, config: Path
) -> None:
    """The README's four lines: the wheel as py_modules, token authentication, the exit status."""
    wheels = folder / "wheels"
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", wheels, ROOT], check=True
    )
    (wheel,) = wheels.glob("medrl-*.whl")
    ray = str(Path(sys.executable).with_name("ray"))

    def submit(*overrides: str) -> subprocess.CompletedProcess[str]:
        runtime = {"py_modules": [str(wheel)]}
        command = [ray, "job", "submit", "--runtime-env-json", json.dumps(runtime), "--"]
        command += [sys.executable, "-m", "medrl.cluster", "train", str(config), *overrides]
        for _ in range(30):
            done = subprocess.run(command, env=head, capture_output=True, text=True, cwd="/")
            if not any(sign in done.stderr for sign in NOT_YET):
                return done
            time.sleep(1)
        return done

    directory = f"run.dir={folder / 'runs'}"
    wrong = submit("run.name=job", directory, "rollout.promts=3")
    assert "did you mean 'prompts'?" in wrong.stdout + wrong.stderr, wrong
    assert wrong.returncode != 0
    done = submit(
        "run.name=job", directory, "run.steps=1", "eval.max_prompts=8", "placement.colocate=true"
    )
    assert done.returncode == 0, (done.stdout[-3000:], done.stderr[-3000:])
    assert "succeeded" in done.stdout
    assert [line["step"] for line in read_lines(folder / "runs/job/metrics.jsonl")] == [1]
    assert (folder / "runs" / "job" / "export" / "model.safetensors").exists()
