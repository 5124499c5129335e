"""How vLLM is started: its options, its environment, and where its output goes."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from medrl.actors.leftovers import name_shared_memory
from medrl.configs.schema import ModelConfig, RolloutConfig

_GIB = 1024**3
_SOCKET_PATH_BYTES = 107  # Linux's limit
_SOCKET_NAME_BYTES = 36  # vLLM names a socket by a UUID
_CPU_BLOCK_TOKENS = 32  # prefix-cache granule; vLLM's 128 shares nothing of a short prompt
_IN_ONE_PROCESS = "vllm.v1.executor.uniproc_executor.UniProcExecutor"  # "uni" becomes "mp" on CPUs
_MAX_RUNNING = 256  # completions decoded side by side


def engine_options(
    model: ModelConfig,
    rollout: RolloutConfig,
    device: Literal["cpu", "gpu"],
    seed: int,
    max_images: int,
    workers: int,
    deterministic: bool = False,
) -> dict[str, Any]:
    """vLLM's AsyncEngineArgs; each is set here or is a vLLM default that cannot change results."""
    dtype = model.dtype
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    options: dict[str, Any] = {
        "model": model.path,
        "trust_remote_code": model.runs_code,
        "dtype": dtype,
        "seed": seed,
        "max_model_len": rollout.max_model_len,
        "max_num_seqs": min(_MAX_RUNNING, max(16, rollout.prompts * rollout.completions)),
        "limit_mm_per_prompt": {"image": max_images, "video": 0},
        "enable_prefix_caching": True,
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",  # not the model folder's: its sampling defaults would apply
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    if deterministic:
        # Else who is in a step depends on whether the one before it has ended already.
        options["async_scheduling"] = False
    if device == "cpu":
        return options | {
            # Its default has the model in a process more: seconds of start-up, 0.6 GB, and a queue
            # at whose ends both spin. That is there to bind threads to cores, which we do not.
            "distributed_executor_backend": _IN_ONE_PROCESS,
            "enforce_eager": True,
            "skip_mm_profiling": True,
            # A part of a prompt draws a token that is then undone, which a CPU's generator cannot.
            "enable_chunked_prefill": False,
            "block_size": _CPU_BLOCK_TOKENS,
            "kv_cache_memory_bytes": _cache_bytes(model, rollout, options["max_num_seqs"]),
        }
    return options | {
        "tensor_parallel_size": workers,
        "gpu_memory_utilization": rollout.memory_fraction,
    }


def _cache_bytes(model: ModelConfig, rollout: RolloutConfig, running: int) -> int:
    """Key-value cache: what the most completions at their longest can fill, at most the limit.

    vLLM fills all it is given with zeros at once: 1 GiB where a tiny model needs 100 MiB.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model.path, trust_remote_code=model.runs_code)
    text = config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    element_bytes = 2 if model.dtype == "bfloat16" else 4
    token_bytes: int = 2 * text.num_hidden_layers * text.num_key_value_heads * head * element_bytes
    needed: int = token_bytes * running * (rollout.max_model_len + _CPU_BLOCK_TOKENS)
    return min(rollout.cpu_cache_gib * _GIB, needed)


def start(
    options: Mapping[str, Any],
    device: Literal["cpu", "gpu"],
    scratch: Path,
    stat_logger: Any = None,
) -> Any:
    """Start vLLM in processes of its own. Its settings by environment precede its import.

    Its sockets and other temporary files go into the folder `scratch`, and its shared memory is
    named after it, for it leaves them behind when it is killed. `stat_logger` (vLLM's
    `StatLoggerFactory`) is told of each step of the model, the images encoded in it included."""
    name_shared_memory(scratch)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # it warns once a request otherwise
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if device == "cpu":
        # Bound to cores, every engine of a machine would take the same ones.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        # oneDNN keeps a kernel for each shape, 1,024 of them by default: 400 MiB beside a tiny
        # model, in hundreds of steps, for every push makes the layers' kernels anew.
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
        # With the model itself run eagerly, one small function of the sampler is all that is left
        # to compile: 8 s before the first token, by a C++ compiler that has to be there for it.
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    loggers = [stat_logger] if stat_logger else None
    options = {**options, "enable_logging_iteration_details": bool(loggers)}
    with _temporary_files_in(scratch):
        return AsyncLLM.from_engine_args(AsyncEngineArgs(**options), stat_loggers=loggers)


@contextlib.contextmanager
def _temporary_files_in(folder: Path) -> Iterator[None]:
    """Of this process, and for good of those it starts meanwhile."""
    if len(os.fsencode(folder)) + 1 + _SOCKET_NAME_BYTES > _SOCKET_PATH_BYTES:
        yield  # a socket's path would be too long: they stay where they are by default
        return
    before = os.environ.get("TMPDIR"), tempfile.tempdir
    os.environ |= {"TMPDIR": str(folder), "VLLM_RPC_BASE_PATH": str(folder)}
    tempfile.tempdir = str(folder)
    try:
        yield
    finally:
        if before[0] is None:
            del os.environ["TMPDIR"]
        else:
            os.environ["TMPDIR"] = before[0]
        tempfile.tempdir = before[1]


@contextlib.contextmanager
def output_to(path: Path) -> Iterator[None]:
    """Point file descriptors 1 and 2 at `path`; processes started meanwhile keep them so.

    vLLM's processes write through Python's logging, C++ and progress bars: only this silences all.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with path.open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for target, original in zip((1, 2), saved, strict=True):
            os.dup2(original, target)
            os.close(original)
