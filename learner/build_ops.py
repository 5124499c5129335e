"""Compile what DeepSpeed would compile on first use on a CPU; two ranks at once would race for it.

Part of `make setup`: `python -m medrl.learner.build_ops`. Takes half a minute once; needs g++.
"""

import shutil
import sys

from medrl.configs.errors import UserError


def build() -> None:
    """Raises `UserError` where there is no compiler."""
    if shutil.which("g++") is None:
        raise UserError(
            "g++ is missing; DeepSpeed compiles its CPU collectives with it: install it"
        )
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    ShareMemCommBuilder().load(verbose=False)


if __name__ == "__main__":
    try:
        build()
    except UserError as error:
        sys.exit(f"error: {error}")
