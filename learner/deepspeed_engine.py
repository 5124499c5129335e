"""One ZeRO rank: the weights, their optimiser, and what all ranks do together.

The only file that imports deepspeed. A plain class: `learner.actor` puts it into a Ray process,
tests into a plain one. Every method is a collective: all ranks call it, in the same order.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from medrl.actors.types import (
    Example,
    Group,
    ImitationMetrics,
    ScoredGroup,
    Sent,
    SyncPlan,
    UpdateMetrics,
    WeightMeta,
)
from medrl.actors.wire import open_store
from medrl.configs.errors import CheckpointError, LearnerError
from medrl.data.images import ImageStore
from medrl.learner import lora
from medrl.learner import model as models
from medrl.learner.batch import RowBatch
from medrl.learner.checkpoint import LearnerState
from medrl.learner.determinism import seed_process
from medrl.learner.gathering import PartitionedSource, WholeOnFirst
from medrl.learner.imitate import Imitator
from medrl.learner.optimizer import adamw, gradient_norm
from medrl.learner.settings import LearnerSettings
from medrl.learner.state_files import StateFiles
from medrl.learner.transports import Sender, open_sender
from medrl.learner.update import Updater
from medrl.learner.vision import FeatureCache, ImageInputs
from medrl.learner.weight_source import ModuleSource
from medrl.learner.zero import partitioned_load, silence, zero_config, zero_stage

_EXPORT_BUCKET_BYTES = 2**24
_TAG = "state"  # DeepSpeed's name for the one checkpoint in a folder


class DeepSpeedRank:
    """A learner rank. Construction joins the others and loads the model; it blocks."""

    def __init__(
        self, settings: LearnerSettings, *, rank: int, world: int, address: str, port: int
    ) -> None:
        """`address`, `port`: where rank 0 listens for the others. Raises `UserError`, and
        `LearnerError` where the ranks do not meet."""
        self._settings, self._stage = settings, zero_stage(settings)
        self.rank, self.world = rank, world
        self.device = torch.device("cuda" if settings.device == "gpu" else "cpu")
        path, trust = settings.model.path, settings.model.runs_code
        models.read_config(path, trust=trust)  # before the ranks wait for each other
        self._deepspeed = _join(settings, rank, world, address, port)
        seed_process(settings.seed, deterministic=settings.deterministic)
        self._reader = models.PromptReader(path, _image_store(settings), trust=trust)
        # transformers asks this object, held by a weak reference, how to load the weights.
        self._partitioned_load = partitioned_load(settings) if self._stage == 3 else None
        self._features = FeatureCache(int(settings.model.vision_cache_gib * 2**30))
        policy = models.load_policy(
            path,
            getattr(torch, settings.dtype),
            forbidden=self._reader.forbidden,
            freeze_vision=settings.model.freeze_vision,
            gradient_checkpointing=settings.model.gradient_checkpointing,
            features=self._features,
            trust=trust,
        )
        self._agree_on_vision(policy)
        self._adapters = lora.attach(policy.vlm, settings.model, settings.seed)
        self._engine = self._deepspeed.initialize(
            model=policy, optimizer=adamw(policy, settings.learner), config=zero_config(settings)
        )[0]
        self._source = self._source_of(policy)  # now that the weights lie where DeepSpeed has them
        self._reference = self._load_reference() if settings.learner.kl_coefficient else None
        self._policy = policy
        self._files = _state_files(self._engine)
        self._updater = Updater(self, self._reader, settings)
        self._imitator = Imitator(self, self._reader, settings)
        self._version = 0
        self._sender: Sender | None = None

    # What `learner.learner.Learner` promises.

    def update(self, batch: Sequence[ScoredGroup]) -> UpdateMetrics:
        metrics = self._updater.update(batch, self._version)
        self._version += 1
        return metrics

    def imitate(self, batch: Sequence[Example]) -> ImitationMetrics:
        metrics = self._imitator.imitate(batch, self._version)
        self._version += 1
        return metrics

    def logprobs(self, group: Group) -> tuple[tuple[float, ...], ...]:
        return self._updater.logprobs(group)

    def weights(self) -> tuple[WeightMeta, ...]:
        return self._source.metadata()

    def open_transfer(self, plan: SyncPlan) -> None:
        if self._sender is not None:
            self._sender.close()
            self._sender = None
        if plan.transport == "ipc" and self._stage == 3:  # every rank sends, to its own engine
            self._source.gather = self._deepspeed.zero.GatheredParameters
        self._sender = open_sender(plan, self.rank, self._source)

    def send(self) -> Sent:
        if self._sender is None:
            raise LearnerError("send before open_transfer: no transfer group is open")
        return self._sender.send()

    def save(self, folder: Path) -> None:
        self._write_model(folder / "model")
        self._engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False)
        self._files.save(torch.get_rng_state(), folder / f"rng_{self.rank}.pt")
        if self.rank == 0:
            with self._files.noting():
                self._state().write(folder)
        self._refuse_unwritten(folder)

    def load(self, folder: Path) -> None:
        saved = LearnerState.read(folder)
        if problems := self._state().differences(saved):
            raise CheckpointError(f"checkpoint {folder} does not fit: {'; '.join(problems)}")
        try:
            path, _ = self._engine.load_checkpoint(str(folder), tag=_TAG)
            torch.set_rng_state(self._files.load(folder / f"rng_{self.rank}.pt"))
        except Exception as error:
            raise CheckpointError(f"checkpoint {folder} cannot be read: {error}") from error
        if path is None:
            raise CheckpointError(f"checkpoint {folder} has no state of DeepSpeed's")
        self._features.clear()
        self._version = saved.version

    def export(self, folder: Path) -> None:
        self._write_model(folder)
        self._refuse_unwritten(folder)

    def close(self) -> None:
        if self._sender is not None:
            self._sender.close()
            self._sender = None
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    # What `learner.stepper.Stepper` promises.

    def score(
        self, rows: RowBatch, images: list[ImageInputs], *, reference: bool = False
    ) -> tuple[Tensor, Tensor]:
        module: Any = self._reference if reference else self._engine
        scored: tuple[Tensor, Tensor] = module(rows.to(self.device), images)
        return scored

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed averages over ranks; the loss is to be summed.
        self._engine.backward(loss * self.world)

    def step(self, learning_rate: float) -> float:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        # Without ZeRO DeepSpeed clips but does not say what the norm was.
        norm = gradient_norm(self._policy) if self._stage == 0 else None
        if norm is not None and not norm.isfinite():
            return float(norm)  # with ZeRO, DeepSpeed makes no such step either: the norm is inf
        self._engine.step()
        return float(self._engine.get_global_grad_norm() if norm is None else norm)

    def reduce(self, values: Tensor, how: str) -> Tensor:
        operation = (
            torch.distributed.ReduceOp.SUM if how == "sum" else torch.distributed.ReduceOp.MAX
        )
        torch.distributed.all_reduce(values, operation)
        return values

    def first_error(self, mine: str) -> str:
        errors = [""] * self.world
        torch.distributed.all_gather_object(errors, mine)
        return next((error for error in errors if error), "")

    # The rest is ours.

    def _source_of(self, policy: models.Policy) -> ModuleSource:
        partitioned = self._stage == 3
        if self._adapters:
            gather = WholeOnFirst(policy.vlm.parameters()) if partitioned else None
            return self._adapters.source(gather)
        if partitioned:
            return PartitionedSource(policy.vlm)
        source = ModuleSource(policy.vlm)
        if self.rank == 0 and self.device.type == "cpu":
            source.lay_out()
        return source

    def _write_model(self, folder: Path) -> None:
        state: dict[str, Tensor] = {}
        for metas, tensors in self._source.buckets(_EXPORT_BUCKET_BYTES):
            if self.rank == 0:
                for meta, tensor in zip(metas, tensors, strict=True):
                    state[meta.name] = tensor.detach().to("cpu", copy=True)
        if self.rank == 0:
            with self._files.noting():
                models.save_model(self._policy, state, self._reader, folder)
        if self._adapters:
            with self._files.noting():
                self._adapters.save(folder / "adapter", self._source.gather, write=self.rank == 0)

    def _refuse_unwritten(self, folder: Path) -> None:
        """Wait for all ranks; raises `CheckpointError` on each where any did not write its part."""
        mine, self._files.problem = self._files.problem, ""
        if problem := self.first_error(mine and f"rank {self.rank}: {mine}"):
            raise CheckpointError(f"{folder} could not be written: {problem}")

    def _load_reference(self) -> Any:
        """The starting model, frozen; partitioned like the policy where that is. With
        adapters, the policy itself without them."""
        if self._adapters:
            return self._adapters.without(self._engine)
        frozen = models.load_policy(
            self._settings.model.path,
            getattr(torch, self._settings.dtype),
            forbidden=self._reader.forbidden,
            features=self._features,  # a tower that the policy does not train is this one
            trust=self._settings.model.runs_code,
        ).requires_grad_(False)
        self._agree_on_vision(frozen)
        if self._stage != 3:
            return frozen.to(self.device).eval()
        return self._deepspeed.initialize(model=frozen.eval(), config=zero_config(self._settings))[
            0
        ]

    def _agree_on_vision(self, policy: models.Policy) -> None:
        """Not a method of this rank: DeepSpeed would keep it, with its partitioned load, alive."""
        if self._stage == 3:
            policy.vision.most = partial(_most_of_ranks, device=self.device)

    def _state(self) -> LearnerState:
        return LearnerState.of(
            self._settings,
            version=self._version,
            family=self._reader.config.model_type,
            ranks=self.world,
            zero_stage=self._stage,
            weights=self.weights(),
        )


def _join(settings: LearnerSettings, rank: int, world: int, address: str, port: int) -> Any:
    """Import deepspeed and meet the other ranks; returns the package."""
    os.environ |= {
        "DS_ACCELERATOR": "cuda" if settings.device == "gpu" else "cpu",
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": "0",  # Ray shows a process its own GPU only
        "TQDM_DISABLE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "DEEPSPEED_LOG_LEVEL": "warning",
    }
    # Past its timeout a collective on GPUs ends the process; else it would wait for ever.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3")
    import deepspeed

    silence()
    # Shared-memory collectives would be compiled at the first start, by all ranks at once, and
    # report so on stdout; nothing here uses them.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    timeout = timedelta(seconds=settings.collective_timeout_s)
    backend = "nccl" if settings.device == "gpu" else "gloo"
    try:
        if not torch.distributed.is_initialized():
            store = open_store(address, port, world, is_master=rank == 0, timeout=timeout)
            torch.distributed.init_process_group(
                backend, store=store, rank=rank, world_size=world, timeout=timeout
            )
        deepspeed.init_distributed(backend, auto_mpi_discovery=False, timeout=timeout)
    except Exception as error:
        raise LearnerError(
            f"rank {rank} of {world} did not meet the others at {address}:{port}: {error}"
        ) from error
    return deepspeed


def _most_of_ranks(count: int, device: torch.device) -> int:
    """The largest `count`. A collective."""
    counts = torch.tensor(count, device=device)
    torch.distributed.all_reduce(counts, torch.distributed.ReduceOp.MAX)
    return int(counts)


def _state_files(engine: Any) -> StateFiles:
    """Put between the engine and the disk."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    files = StateFiles(engine.checkpoint_engine, [LossScaler, ZeroStageEnum, fragment_address])
    engine.checkpoint_engine = files
    engine._copy_recovery_script = lambda folder: None  # no programs beside the data
    return files


def _image_store(settings: LearnerSettings) -> ImageStore:
    """Keeps nothing itself: the reader caches what it makes of an image."""
    from transformers import AutoImageProcessor

    model = settings.model
    processor = AutoImageProcessor.from_pretrained(model.path, trust_remote_code=model.runs_code)
    return ImageStore.for_model(settings.image_root, processor, settings.max_pixels, cache_bytes=0)
