"""TRL's GRPOTrainer, a step at a time, in a process of its own. A line of JSON a message.

    -> {"mode": "steps", ...}           a trainer that makes a step whenever it is told to
    <- {"ready": 0}    -> {}            and so on, until its input ends
    <- {"seconds": ..., "gradient_norm": ..., "shortest": ...}    behind each step
    -> {"mode": "loss", ...}            what it makes of completions that are given
    <- {"loss": ..., "gradient_norm": ...}

It generates with transformers, since its vLLM mode does not run on a CPU.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from medrl.bench.shapes import coin


class Lines:
    """Standard input and output, which nobody else may write to."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)

    def say(self, message: Mapping[str, Any]) -> None:
        self._out.write(json.dumps(message) + "\n")

    def hear(self) -> dict[str, Any] | None:
        """None: there is nobody any more."""
        line = sys.stdin.readline()
        return json.loads(line) if line else None


def make_trainer(asked: Mapping[str, Any], reward: Any, **settings: Any) -> Any:
    """`asked`: model, folder, rows (text, image), prompts, completions (G), tokens (C), forbidden,
    checkpointing."""
    from datasets import Dataset, Image
    from transformers import AutoProcessor
    from trl import GRPOConfig, GRPOTrainer

    group = asked["completions"]
    config = GRPOConfig(
        output_dir=asked["folder"],
        per_device_train_batch_size=group,
        gradient_accumulation_steps=asked["prompts"],
        num_generations=group,
        max_completion_length=asked["tokens"],
        max_steps=1_000,
        beta=0.0,
        loss_type="grpo",
        gradient_checkpointing=asked["checkpointing"],
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        model_init_kwargs={"dtype": "float32"},
    )
    rows = [
        {"prompt": [{"role": "user", "content": row["text"]}], "image": row["image"]}
        for row in asked["rows"]
    ]
    trainer = GRPOTrainer(
        model=asked["model"],
        reward_funcs=reward,
        args=config,
        processing_class=AutoProcessor.from_pretrained(asked["model"], padding_side="left"),
        train_dataset=Dataset.from_list(rows).cast_column("image", Image()),
        **settings,
    )
    trainer.model.lm_head.register_forward_hook(_forbid(asked["forbidden"]))
    return trainer


def tossed(completions: Sequence[Any], **_: Any) -> list[float]:
    return [coin(completion[0]["content"]) for completion in completions]


def _forbid(tokens: Sequence[int]) -> Any:
    """What no engine and no learner of ours gives any probability."""
    ids = torch.tensor(tokens)
    never = torch.finfo(torch.float32).min / 2  # -inf would make its entropy nan
    return lambda module, inputs, logits: logits.index_fill(-1, ids, never)


def make_steps(asked: Mapping[str, Any], lines: Lines) -> None:
    """Until nobody asks for one more."""
    from transformers import TrainerCallback

    class Turns(TrainerCallback):  # type: ignore[misc]
        """The other side works between two steps."""

        began = 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            lines.say({"ready": state.global_step})
            if lines.hear() is None:
                os._exit(0)  # in the middle of a training that never ends
            self.began = time.perf_counter()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any, **_: Any) -> None:
            if "grad_norm" in logs:
                lines.say(
                    {
                        "seconds": time.perf_counter() - self.began,
                        "gradient_norm": float(logs["grad_norm"]),
                        "shortest": float(logs["completions/min_length"]),
                    }
                )

    make_trainer(asked, tossed, callbacks=[Turns()]).train()


def tell_loss(asked: Mapping[str, Any], lines: Lines) -> None:
    """Of one batch, a row a prompt: `token_ids` and `rewards` are of its completions in order."""

    def given(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        template = trainer.processing_class.apply_chat_template
        return {
            "prompt_ids": [
                template(prompt, tokenize=True, return_dict=True, add_generation_prompt=True)[
                    "input_ids"
                ][0]
                for prompt in prompts
            ],
            "completion_ids": asked["token_ids"],
            "logprobs": [[0.0] * len(ids) for ids in asked["token_ids"]],
        }

    trainer = make_trainer(asked, lambda **_: asked["rewards"], rollout_func=given)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # what a training loop would have set
    rows = [row for row in trainer.train_dataset for _ in range(asked["completions"])]
    inputs = trainer._generate_and_score_completions(rows)
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    norms = [it.grad.norm() for it in trainer.model.parameters() if it.grad is not None]
    lines.say({"loss": float(loss), "gradient_norm": float(torch.stack(norms).norm())})


def main() -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    lines = Lines()
    while asked := lines.hear():
        {"steps": make_steps, "loss": tell_loss}[asked["mode"]](asked, lines)


if __name__ == "__main__":
    main()
