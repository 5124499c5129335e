"""Keep the libraries' chatter out of the user's terminal: warnings and progress bars."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

SETTINGS = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_DISABLE_USAGE_STATS": "1",
    "RAY_DEDUP_LOGS": "1",
    "GLOG_minloglevel": "2",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "WANDB_SILENT": "true",
}
"""Read by the libraries when they are imported, also in the processes a run starts."""


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Only errors of libraries are shown within the block. What the user set himself stays."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    for name in ("ray", "transformers", "deepspeed", "vllm", "datasets", "filelock"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def silence_ray() -> None:
    """Once connected: Ray prints a page for each process that dies, and has no setting against it.
    The run says so itself, in a sentence."""
    import ray._private.worker

    ray._private.worker.print_to_stdstream = lambda *arguments, **options: None
