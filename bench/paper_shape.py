"""A step at the paper's shape, here and in TRL, on the same machine, model and data.

    python bench/paper_shape.py [--steps 4] [--folder /tmp/paper_shape]

A random Qwen2-VL of 31 million parameters; images of 392 x 392 (196 visual tokens); 4 prompts x
8 completions of 64 tokens (a random model never ends by itself, so both do the same work). TRL
generates with transformers, since its vLLM mode does not run on a CPU. Prints one JSON object:
seconds a step, the first one (warm-up) left out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean
from typing import Any

PROMPTS, COMPLETIONS, TOKENS, SIDE = 4, 8, 64, 392


def prepare(folder: Path) -> tuple[Path, Path]:
    """The model and the data, made once."""
    from medrl.bench.shapes import SIZES
    from medrl.data import phantoms
    from medrl.learner import tiny

    model, data = folder / "model", folder / "phantoms"
    if not model.exists():
        words = list(phantoms.texts())
        tiny.build("qwen2_vl", model, corpus=words, **SIZES)
    if not data.exists():
        phantoms.generate(data, train=64, test=8, seed=0, size=SIDE)
    return model, data


def here(model: Path, data: Path, folder: Path, steps: int) -> dict[str, float]:
    """Mean seconds of a step and its parts, by `medrl train`."""
    from medrl.reports.lines import read_lines

    config = folder / "run.toml"
    name = f"run-{int(time.time())}"
    config.write_text(f"""
[run]
name = "{name}"
dir = "{folder / "runs"}"
steps = {steps}
[model]
path = "{model}"
[data]
train = "{data / "train"}"
[rollout]
prompts = {PROMPTS}
completions = {COMPLETIONS}
max_tokens = {TOKENS}
max_model_len = 512
[placement]
engines = 2
learners = 2
device = "cpu"
cpus_per_process = 0.4
""")
    subprocess.run(
        [sys.executable, "-m", "medrl.cluster", "train", str(config)],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    lines = read_lines(folder / "runs" / name / "metrics.jsonl")[1:]
    keys = ("step", "rollout", "learn", "sync")
    found = {key: round(fmean(line[f"seconds.{key}"] for line in lines), 2) for key in keys}
    return found | {"row_sharing": round(fmean(line["row_sharing"] for line in lines), 2)}


def trl(model: Path, data: Path, folder: Path, steps: int) -> dict[str, float]:
    """Mean seconds of a step of TRL's GRPOTrainer."""
    import torch
    from datasets import Dataset, Image
    from transformers import AutoProcessor, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from medrl.configs.schema import DataConfig
    from medrl.data.load import load_prompts
    from medrl.rewards.modes import get_mode

    loaded = load_prompts(DataConfig(train=str(data / "train")), "train")
    mode = get_mode("no-think")
    rows = [
        {
            "prompt": [{"role": "user", "content": mode.render(prompt)}],
            "image": str(loaded.image_root / prompt.images[0]),
        }
        for prompt in loaded.prompts[: PROMPTS * steps]
    ]
    began: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            began.append(time.perf_counter())

    torch.set_num_threads(2)
    config = GRPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=COMPLETIONS,
        gradient_accumulation_steps=PROMPTS,
        num_generations=COMPLETIONS,
        max_completion_length=TOKENS,
        max_steps=steps,
        beta=0.0,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1000,
        disable_tqdm=True,
        model_init_kwargs={"dtype": "float32"},
    )
    trainer = GRPOTrainer(
        model=str(model),
        reward_funcs=lambda completions, **_: [float(i % 2) for i in range(len(completions))],
        args=config,
        processing_class=AutoProcessor.from_pretrained(model, padding_side="left"),
        train_dataset=Dataset.from_list(rows).cast_column("image", Image()),
        callbacks=[Clock()],
    )
    trainer.train()
    ends = [*began[2:], time.perf_counter()]
    return {"step": round(fmean(b - a for a, b in zip(began[1:], ends, strict=True)), 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/paper_shape"))
    chosen = parser.parse_args()
    model, data = prepare(chosen.folder)
    ours = here(model, data, chosen.folder, chosen.steps)
    theirs = trl(model, data, chosen.folder, chosen.steps)
    ratio = round(theirs["step"] / ours["step"], 1)
    print(json.dumps({"medrl_seconds": ours, "trl_seconds": theirs, "ratio": ratio}))


if __name__ == "__main__":
    main()
