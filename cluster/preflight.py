"""Everything of a run that can be wrong before an engine starts: model, data, rewards, lengths.

Ends in one `UserError` with all problems, or in what the run needs.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from medrl.actors.chat import render_chat
from medrl.actors.types import Prompt
from medrl.configs.errors import UserError
from medrl.configs.schema import Config, LearnerConfig, RewardTerm
from medrl.data.image_files import locate
from medrl.data.images import fit, pixel_limits
from medrl.data.load import LoadedPrompts, load_prompts, share_root
from medrl.rewards.check import check_rewards
from medrl.rewards.modes import get_mode, odd_words

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
SHOWN = 5  # prompts of one kind of problem named in full


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """A run whose inputs are right."""

    train: tuple[Prompt, ...]
    test: tuple[Prompt, ...]
    image_root: Path
    max_images: int  # most images of one prompt
    notes: tuple[str, ...] = field(default=())  # what a person should know: skipped rows, ...


def check_inputs(config: Config, model: str, *, evaluation_only: bool = False) -> Checked:
    """Load and check data, rewards and the model folder `model`. Raises `UserError`."""
    problems: list[str] = []
    with _collected(problems):
        check_model(model, trust=_trusts(config, model))
    train, test = _load(config, problems, evaluation_only)
    if problems:
        raise UserError(*dict.fromkeys(problems))  # train and test may share one
    prompts = (*train.prompts, *test.prompts)
    with _collected(problems):
        check_rewards(
            reward_terms(config),
            config.data.mode,
            prompts,
            config.reward.timeout_s,
            policy=config.reward.policy,
        )
    with _collected(problems):
        _check_lengths(config, model, prompts, train.image_root)
    if problems:
        raise UserError(*dict.fromkeys(problems))  # rewards and lengths may miss one mode
    mode = get_mode(config.data.mode, config.data.instruction)
    return Checked(
        train=train.prompts,
        test=test.prompts[: config.eval.max_prompts or None],
        image_root=train.image_root,
        max_images=max(1, *(len(prompt.images) for prompt in prompts)),
        notes=(
            *_notes(train, test),
            *odd_words(mode),
            *_idle_keys(config),
            *_trusted(config, model),
        ),
    )


def reward_terms(config: Config) -> tuple[RewardTerm, ...]:
    """The configured terms; `format` and `accuracy`, where missing, are measured at weight 0."""
    terms = config.reward.terms
    used = {term.use for term in terms}
    extra = (name for name in ("format", "accuracy") if name not in used)
    return (*terms, *(RewardTerm(use=name, weight=0.0) for name in extra))


def check_model(path: str, *, trust: bool = False) -> None:
    """`trust`: run code of the model's own, where it has any, here and below.

    Raises `UserError` where `path` is neither a folder of a known family nor on the hub."""
    from transformers import AutoConfig

    folder = Path(path)
    if folder.exists() and not (folder / "config.json").is_file():
        raise UserError(f"model.path: {path} has no config.json; it is not a Hugging Face folder")
    try:
        family = AutoConfig.from_pretrained(path, trust_remote_code=trust).model_type
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise UserError(
                f"model.path: {path} brings code of its own, and none of it was run; where you "
                f"have read it and trust it, set model.trust_remote_code = {path!r}"
            ) from None
        where = "" if folder.exists() else f": no such folder here, and from the hub: {error}"
        detail = where or f": config.json cannot be read: {error}"
        raise UserError(f"model.path: {path}{' '.join(detail.split())}") from None
    if family not in FAMILIES:
        raise UserError(f"model.path: {path} is a {family} model; known: {', '.join(FAMILIES)}")
    if folder.exists():
        _check_weights(folder)
    load_processor(path, trust=trust)


def _check_weights(folder: Path) -> None:
    """Refuse missing and cut-off weight files; reads their headers only."""
    from safetensors import SafetensorError, safe_open

    named = set(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    problems = []
    if index.is_file():
        try:
            weight_map = json.loads(index.read_bytes())["weight_map"]
            named |= {folder / name for name in weight_map.values()}
        except (ValueError, KeyError, TypeError, AttributeError):
            problems.append(f"model.path: {index} is not an index of weight files")
    if not named:
        raise UserError(f"model.path: {folder} holds no *.safetensors weights")
    for file in sorted(named):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            reason = "is missing" if not file.exists() else f"is cut off or broken: {error}"
            problems.append(f"model.path: {file} {reason}; fetch the model again (git lfs pull?)")
    if problems:
        raise UserError(*problems)


def load_processor(path: str, *, trust: bool = False) -> Any:
    """The tokenizer and image processor in `path`. Raises `UserError`."""
    from transformers import AutoConfig, AutoProcessor

    try:
        processor: Any = AutoProcessor.from_pretrained(path, trust_remote_code=trust)
        flaw = "" if processor.image_processor else "no image processor"
        flaw = flaw or ("" if processor.chat_template else "no chat template")
        # Where the files are missing, transformers may make up a tokenizer that knows no word.
        known = processor.tokenizer.get_vocab().get(processor.image_token)
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust)
        if known != config.image_token_id:
            flaw = flaw or f"a tokenizer for which {processor.image_token} is {known}"
    except Exception as error:  # whatever is missing, the libraries raise anything
        flaw = " ".join(str(error).split()) or type(error).__name__
    if flaw:
        raise UserError(
            f"model.path: {path} has no whole processor (tokenizer, image processor, chat "
            f"template): {flaw}"
        )
    return processor


@contextmanager
def _collected(problems: list[str]) -> Iterator[None]:
    """Within the block, a `UserError` adds to `problems` instead of ending the check."""
    try:
        yield
    except UserError as error:
        problems.extend(error.problems)


def _load(
    config: Config, problems: list[str], evaluation_only: bool
) -> tuple[LoadedPrompts, LoadedPrompts]:
    nothing = LoadedPrompts(prompts=(), image_root=Path(), skipped=())
    train, test = nothing, nothing
    if not evaluation_only:
        with _collected(problems):
            train = load_prompts(config.data, "train")
    if config.data.test or evaluation_only:
        with _collected(problems):
            test = load_prompts(config.data, "test")
    if problems:
        return nothing, nothing
    loaded = [one for one in (train, test) if one.prompts]
    shared = dict(zip(map(id, loaded), share_root(*loaded), strict=True))
    root = next(iter(shared.values())).image_root
    empty = LoadedPrompts(prompts=(), image_root=root, skipped=())
    return shared.get(id(train), empty), shared.get(id(test), empty)


def _check_lengths(config: Config, model: str, prompts: Sequence[Prompt], root: Path) -> None:
    """Refuse prompts that leave no room for a completion of `rollout.max_tokens`."""
    from transformers import AutoConfig

    trust = _trusts(config, model)
    text_config = AutoConfig.from_pretrained(model, trust_remote_code=trust).get_text_config()
    limit = min(config.rollout.max_model_len, text_config.max_position_embeddings)
    room = limit - config.rollout.max_tokens
    processor = load_processor(model, trust=trust)
    limits = pixel_limits(processor.image_processor, config.data.max_pixels)
    mode = get_mode(config.data.mode, config.data.instruction)
    texts = [render_chat(processor, mode.render(p), len(p.images)) for p in prompts]
    # A tokenizer call over all of them is some hundred times faster than one each.
    lengths = [len(ids) for ids in processor.tokenizer(texts)["input_ids"]]
    too_long = []
    for prompt, length in zip(prompts, lengths, strict=True):
        visual = sum(_visual_tokens(root, path, *limits) for path in prompt.images)
        total = length - len(prompt.images) + visual
        if total > room:
            too_long.append(
                f"prompt {prompt.id}: {total} tokens ({visual} visual), but only {room} fit before "
                f"a completion of {config.rollout.max_tokens} (limit {limit}); raise "
                "rollout.max_model_len or lower data.max_pixels; prompts are never cut"
            )
    if too_long:
        more = [f"... and {len(too_long) - SHOWN} more"] if len(too_long) > SHOWN else []
        raise UserError(*too_long[:SHOWN], *more)


def _visual_tokens(root: Path, path: str, factor: int, least: int, most: int) -> int:
    with Image.open(locate(root, path)) as image:  # reads the header only
        width, height = fit(*image.size, factor, least, most)
    return width * height // factor**2


def _notes(*loaded: LoadedPrompts) -> tuple[str, ...]:
    return tuple(_each_note(loaded))


def _idle_keys(config: Config) -> Iterator[str]:
    learner, usual = config.learner, LearnerConfig()
    if config.run.method == "sft" or learner.updates_per_batch > 1:
        return
    names = ("ratio", "surrogate", "clip_low", "clip_high")
    idle = [name for name in names if getattr(learner, name) != getattr(usual, name)]
    if idle:
        yield (
            f"learner.{', learner.'.join(idle)} change nothing while learner.updates_per_batch is "
            "1: a batch is one step, and the ratio it would clip is 1"
        )


def _trusts(config: Config, model: str) -> bool:
    """Whether `model`, the config's own or a checkpoint, may run code that lies beside it."""
    return config.model.trust_remote_code == model


def _trusted(config: Config, model: str) -> Iterator[str]:
    if _trusts(config, model):
        yield f"code that {model} brings along is run on every node (model.trust_remote_code)"


def _each_note(loaded: Sequence[LoadedPrompts]) -> Iterator[str]:
    for one in loaded:
        yield from one.notes
        blind = sum(not prompt.images for prompt in one.prompts)
        if 0 < blind < len(one.prompts):
            yield f"{blind} of {len(one.prompts)} prompts have no image, first: " + next(
                prompt.id for prompt in one.prompts if not prompt.images
            )
        if one.skipped:
            yield (
                f"left out {len(one.skipped)} prompts for their images (data.on_bad_image), "
                f"first: {one.skipped[0]}"
            )


def refuse_used_directory(run_dir: Path, *, resume: bool) -> None:
    """A run directory belongs to one run; one that failed before its first sync may be used again.
    Raises `UserError`."""
    # The starting model's own sync is the first thing a run writes down.
    used = any((run_dir / name).exists() for name in ("metrics.jsonl", "syncs.jsonl"))
    if used and not resume:
        raise UserError(
            f"{run_dir} already holds a run; go on with --resume, or choose another run.name"
        )
    if resume and not (run_dir / "config.toml").exists():
        raise UserError(f"--resume: {run_dir} holds no run; start it without --resume")
    existing = _nearest_existing(run_dir)
    try:
        # Tried, not asked: root may write everywhere, says os.access, in /proc too.
        with tempfile.TemporaryDirectory(dir=existing, prefix=".medrl"):
            pass
    except OSError as error:
        raise UserError(
            f"run.dir: {run_dir} cannot be made: {existing}: {error.strerror}"
        ) from None


def _nearest_existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
