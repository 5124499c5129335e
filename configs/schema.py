"""The typed tree of a run: every key, its default, its bounds, its unit. Imports nothing heavy.

A value exists once, and a component takes its own section. Read a file with `configs.loader`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, PlainValidator, model_validator

from medrl.configs.algorithms import with_preset
from medrl.configs.counts import Count, bounds, checked_count

Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True
    )


class RunConfig(Section):
    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """The run directory is DIR/NAME."""
    dir: str = "runs"
    """Where run directories are made. On a cluster, a folder all nodes share."""
    method: Literal["grpo", "sft"] = "grpo"
    """sft: imitate the answers (section sft); what `medrl sft` sets."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Order of prompts and every sampling stream derive from it."""
    deterministic: bool = False
    """The same seed gives the same completions and losses, whatever the timing, and in a run that
    was killed and resumed too; with rollout.staleness above 0, where timing decides which version
    samples a group, `medrl replay` does. An engine works on one group at a time: slower."""
    steps: int = Field(100, ge=0)
    """Optimiser batches to train; 0 evaluates the starting model only."""
    epochs: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Passes over the training prompts; above 0 it wins over `steps`."""
    checkpoint_every: int = Field(50, ge=0)
    """Steps between checkpoints; 0 keeps only the one at the end or at an interruption."""
    keep_checkpoints: int = Field(2, ge=1)
    """Older ones are deleted."""
    wandb_project: str = ""
    """Weights & Biases project; empty: not used. Offline where there is no key or network."""


class ModelConfig(Section):
    path: str = Field(min_length=1)
    """A Hugging Face folder of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL model, or a name on the hub."""
    trust_remote_code: str = ""
    """`path` once more, where the model brings code of its own that may run, on every node; else no
    such code is run."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on GPUs, float32 on CPUs. Engines and learner share it."""
    freeze_vision: bool = False
    """Leave the vision tower as it is."""
    vision_cache_gib: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 2.0
    """What a vision tower that is not trained makes of an image is kept, so much of it in each
    rank's main memory, GiB; the least recently used is made again. 0: made anew in every step."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more work."""
    lora_rank: int = Field(0, ge=0)
    """Train low-rank adapters (PEFT's LoRA) of this rank instead of the weights; 0: all weights."""
    lora_alpha: Positive = 32.0
    """Adapters count lora_alpha / lora_rank times."""
    lora_vision: bool = False
    """Adapters in the vision tower too; else it stays as it is."""

    @property
    def runs_code(self) -> bool:
        """Whether the model's own code may run."""
        return self.trust_remote_code == self.path


class DataConfig(Section):
    format: Literal["omnimedvqa", "med_r1", "jsonl", "huggingface"] = "omnimedvqa"
    train: str = Field(min_length=1)
    """Folder or file of training prompts."""
    test: str = ""
    """Held-out prompts; empty: no evaluation."""
    images: str = ""
    """Folder the image paths are relative to; empty: the folder of `train` (of the data set)."""
    columns: dict[str, str] = Field(default_factory=dict)
    """For jsonl and huggingface: our field name -> your column name."""
    modalities: tuple[str, ...] = ()
    """Keep only prompts of these modalities when training; empty: all."""
    question_types: tuple[str, ...] = ()
    """Keep only prompts of these question types when training; empty: all."""
    mode: str = Field("no-think", min_length=1)
    """How the model is asked to answer, in one: template, format rule and answer extraction.
    think-before, no-think, think-after, or the import path of your own `rewards.modes.Mode`,
    my_lab.modes:DESCRIBE."""
    instruction: str = ""
    """Last line of every question instead of the mode's own; {answer} becomes "letter" or "answer".
    `medrl data lint` shows the result."""
    order: Literal["shuffled", "easy_first"] = "shuffled"
    """Of training prompts: a new order each epoch, or by pass rate (needs `pass_rates`)."""
    pass_rates: str = ""
    """File of `medrl data pass-rates`: share of right completions of each training prompt."""
    min_pass_rate: Fraction = 0.0
    """Leave out training prompts below; those never solved teach nothing."""
    max_pass_rate: Fraction = 1.0
    """Leave out training prompts above; those always solved teach nothing."""
    max_pixels: int = Field(401_408, ge=28 * 28)
    """Larger images are scaled down to this many pixels, for engine and learner alike."""
    on_bad_image: Literal["error", "skip"] = "error"
    """What an unreadable image does at start-up: stop, or leave its prompts out and count them."""


class RolloutConfig(Section):
    prompts: int = Field(8, ge=1)
    """P: prompts (groups) a step."""
    completions: int = Field(8, ge=2)
    """G: completions a prompt; at least 2, since one has no group to be compared with."""
    max_tokens: int = Field(256, ge=1)
    """Longest completion, in tokens."""
    temperature: Positive = 1.0
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 1.0
    top_k: int = Field(0, ge=0)
    """0: off."""
    staleness: int = Field(0, ge=0)
    """Most updates a completion may be behind the learner; 0 is on-policy."""
    max_replaced: int = Field(0, ge=0)
    """Dynamic sampling (DAPO): so many groups a step whose rewards are all equal are replaced by
    the next prompts'; those past the bound are kept, so a step always ends. 0: off."""
    max_model_len: int = Field(2048, ge=16)
    """Longest prompt plus completion, in tokens. A longer prompt is refused, never cut."""
    memory_fraction: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] = 0.85
    """Share of a GPU an engine may fill (placement.colocate: about 0.5)."""
    cpu_cache_gib: int = Field(1, ge=1)
    """Key-value cache of an engine on the CPU, GiB."""
    timeout_s: Positive = 600.0
    """A group not finished by then is an engine failure."""


class RewardTerm(Section):
    use: str = Field(min_length=1)
    """`format`, `accuracy`, `yes_no`, `numeric`, `text_match`, `token_f1`, `box_iou`, `length`,
    `repetition`, or an import path `my_lab.rewards:lesion_iou`."""
    weight: Finite = 1.0
    options: dict[str, JsonValue] = Field(default_factory=dict)
    """Keyword arguments of the reward, e.g. {tolerance = 0.5} of `numeric`."""


class RewardConfig(Section):
    terms: tuple[RewardTerm, ...] = Field(
        default=(RewardTerm(use="format"), RewardTerm(use="accuracy")), min_length=1
    )
    policy: Literal["strict", "lenient", "graded", "medr1"] = "strict"
    """What `accuracy` and `format` reward in training: one answer tag, its answer written as people
    write it; also bare answers; half the points for a letter with other text (MedVLM-R1); Med-R1's
    released code, quirk for quirk. Evaluation is always strict."""
    processes: int = Field(2, ge=1)
    """Size of the pool of killable processes."""
    timeout_s: Positive = 5.0
    """Longest a reward may take on one completion."""
    max_failed_fraction: Fraction = 0.1
    """More failed completions than this in one step stop the run."""
    overlong_tokens: int = Field(0, ge=0)
    """DAPO's soft punishment: the reward falls by 0 to 1 over the last so many tokens before
    rollout.max_tokens. 0: off."""


class LearnerConfig(Section):
    algorithm: Literal["grpo", "dr_grpo", "rloo", "gspo", "cispo", "dapo"] = "grpo"
    """Sets those keys below that the file leaves out; see `configs.algorithms`. dapo also sets
    rollout.max_replaced, to rollout.prompts, and reward.overlong_tokens, to a fifth of
    rollout.max_tokens."""
    learning_rate: Positive = 1e-6
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Decay to 0 at run.steps, after the warm-up."""
    warmup_steps: int = Field(0, ge=0)
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    max_gradient_norm: Positive = 1.0
    updates_per_batch: int = Field(1, ge=1)
    """Optimiser steps a batch: it is split into that many equal parts."""
    zero_stage: int = Field(3, ge=0, le=3)
    """DeepSpeed ZeRO stage."""
    tokens_per_micro_batch: int = Field(16_384, ge=1)
    """Most tokens (padding included) of one forward pass on a rank; a group is never split."""
    advantage: Literal["standardized", "centered", "leave_one_out"] = "standardized"
    """GRPO's (r - mean) / std, Dr. GRPO's r - mean, or RLOO's."""
    ratio: Literal["token", "sequence"] = "token"
    """Importance ratio a token (GRPO) or a completion (GSPO)."""
    surrogate: Literal["clipped", "cispo"] = "clipped"
    """PPO's clipped ratio times advantage, or CISPO's clipped ratio, a constant, times advantage
    times log-prob."""
    clip_low: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 0.2
    """The ratio is bounded by 1 - clip_low (1: no bound) and 1 + clip_high."""
    clip_high: Positive = 0.2
    aggregation: Literal["completion_mean", "token_mean", "constant"] = "completion_mean"
    """Mean over a completion's tokens and then over completions (GRPO); over all tokens of the
    batch (DAPO); or the sum over rollout.max_tokens (Dr. GRPO)."""
    kl_coefficient: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Weight of KL to the starting model (k3 estimate); 0 loads no reference."""
    kl_gradient: Literal["unbiased", "paper"] = "unbiased"
    """k3 times the ratio, whose gradient is the KL's own (TRL's default), or k3 alone (GRPO)."""
    mask_truncated: bool = False
    """Do not train completions cut off at rollout.max_tokens (DAPO's overlong filtering); their
    rewards still count in their group."""
    importance_cap: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Truncation of the sampler-to-learner importance weight; 0: off. Needed for staleness > 0."""

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, keys: object) -> object:
        return with_preset(keys)


class GapConfig(Section):
    """|engine's log-prob - learner's| over a batch's tokens of the learner's own version, nats.
    Above is an alarm; three steps in a row, or ten times as much, stop the run."""

    mean: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Largest mean; 0: 1e-4 in float32, 0.05 in bfloat16."""
    max: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Largest of one token; 0: 0.01 in float32, 5 in bfloat16."""


class SftConfig(Section):
    """`medrl sft` takes these in place of run.steps, rollout.prompts and the learner's."""

    steps: int = Field(0, ge=0)
    """Optimiser steps; 0: one epoch."""
    prompts: int = Field(32, ge=1)
    """Prompts a step, over all ranks."""
    learning_rate: Positive = 2e-5
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Decay to 0 at `steps`, after the warm-up."""
    warmup_steps: int = Field(0, ge=0)


class PlacementConfig(Section):
    engines: Annotated[Count, PlainValidator(checked_count)] = 1
    """A number, or from and to, such as "2..8": the run starts with the first and grows and shrinks
    with the room that the cluster has."""
    gpus_per_engine: int = Field(1, ge=1)
    """Tensor-parallel size of an engine; on CPUs ignored."""
    learners: int = Field(1, ge=1)
    """W: ZeRO ranks."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """auto: gpu where the cluster has any."""
    cpus_per_process: float = Field(1.0, gt=0, allow_inf_nan=False)
    """CPU cores reserved for each engine and rank, in Ray's count."""
    transport: Literal["auto", "gloo", "nccl", "ipc"] = "auto"
    """How weights travel. auto: gloo for CPU engines, ipc when colocated, nccl otherwise."""
    colocate: bool = False
    """Engines and ranks take turns on the same GPUs; engines sleep while the learner works."""
    address: str = ""
    """Ray cluster: empty starts a local one (inside a Ray job: joins it), else its address."""
    deadline_s: Positive = 300.0
    """Longest wait for the cluster's resources."""
    start_timeout_s: Positive = 600.0
    """Longest wait for engines and ranks to load."""
    sync_timeout_s: Positive = 300.0
    """Longest wait for any one phase of a sync."""
    heartbeat_s: Positive = 60.0
    """An engine that serves, a learner rank or a reward actor at work that does not answer a ping
    for so long is ended and started again. More than the longest step of an engine's model takes;
    ranks that read or write files have ten times as long."""

    @property
    def min_engines(self) -> int:
        return bounds(self.engines)[0]

    @property
    def max_engines(self) -> int:
        return bounds(self.engines)[1]


class EvalConfig(Section):
    every: int = Field(0, ge=0)
    """Steps between evaluations; 0: before the first and after the last step only."""
    max_prompts: int = Field(0, ge=0)
    """Evaluate on the first so many held-out prompts; 0: all."""
    blind: bool = True
    """`medrl eval` also asks every prompt with its images blanked."""


class Config(Section):
    """A whole run."""

    run: RunConfig
    model: ModelConfig
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    learner: LearnerConfig = LearnerConfig()
    gap: GapConfig = GapConfig()
    sft: SftConfig = SftConfig()
    placement: PlacementConfig = PlacementConfig()
    eval: EvalConfig = EvalConfig()

    @property
    def run_dir(self) -> Path:
        return Path(self.run.dir) / self.run.name
