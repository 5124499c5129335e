"""What a reward may know of the driver's environment: what programs need to run, and no more.

A list of what is allowed, for secrets have no list: `DATABASE_URL` holds a password as well. A
variable that a reward is to have is given a name that begins with `REWARD_`.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping

_NEEDED = re.compile(
    r"PATH|HOME|USER|LOGNAME|SHELL|LANG|LANGUAGE|LC_\w+|TZ|TMPDIR|TERM|VIRTUAL_ENV|XDG_\w+"
    r"|LD_LIBRARY_PATH|LD_PRELOAD|DYLD_\w+|PYTHON\w+|CONDA_\w+|JAVA_HOME"  # finding programs
    r"|\w+_NUM_THREADS|OMP_\w+|KMP_\w+|CUDA_\w+|NVIDIA_\w+|TOKENIZERS_PARALLELISM"  # computing
    r"|HF_HOME|HF_\w+_CACHE|HF_\w*OFFLINE|TRANSFORMERS_OFFLINE|TORCH_HOME|NLTK_DATA"  # caches
    r"|COVERAGE_\w+|REWARD_\w+"
)
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL|AUTH", re.IGNORECASE)


def reward_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What of `environment` reward processes get, with our import path."""
    kept = {
        name: value
        for name, value in environment.items()
        if _NEEDED.fullmatch(name) and (name.startswith("REWARD_") or not _SECRET.search(name))
    }
    path = [entry for entry in sys.path if entry] + [os.getcwd()]
    return {"OMP_NUM_THREADS": "1"} | kept | {"PYTHONPATH": os.pathsep.join(path)}
