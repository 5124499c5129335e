"""Let torchvision's CUDA wheel import beside a CPU build of torch.

PyPI's torchvision for x86-64 Linux is compiled against CUDA; with a CPU torch its `_C.so` does not
load, and `import torchvision` fails on two operators (`nms`, `qnms`) that nobody here calls. The
processors of transformers only need its pure-torch transforms. Declaring the two schemas before the
first import is enough, and it must hold in every process, those that vLLM starts included: so
`python -m medrl.actors.torchvision_cpu` (part of `make setup`) copies this file next to
site-packages' other modules with a `.pth` line that arms an import hook. The hook costs nothing
until torchvision is imported, and does nothing where the operators exist.

Remove when torchvision ships a CPU wheel on the default index.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

HOOK_MODULE = "_medrl_torchvision_cpu"
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_keep_alive: list[object] = []  # a torch.library.Library undefines its schemas when collected


def declare_missing_operators() -> None:
    """Declare `torchvision::nms` and `::qnms` where torch is a CPU build."""
    import torch

    if torch.version.cuda is None and torch.version.hip is None and not _keep_alive:
        library: Any = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        library.define(f"nms{_SCHEMA}")
        library.define(f"qnms{_SCHEMA}")
        _keep_alive.append(library)


class Hook(importlib.abc.MetaPathFinder):
    """Declares the operators at the first import of torchvision, then steps aside."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            declare_missing_operators()
        return None


def arm() -> None:
    """Put the hook in front; once a process."""
    if not any(type(finder).__name__ == "Hook" for finder in sys.meta_path):
        sys.meta_path.insert(0, Hook())


def install() -> None:
    """Copy this file and its `.pth` line into the running environment's site-packages."""
    import shutil
    import sysconfig
    from pathlib import Path

    site = Path(sysconfig.get_path("purelib"))
    shutil.copyfile(__file__, site / f"{HOOK_MODULE}.py")
    (site / f"{HOOK_MODULE}.pth").write_text(f"import {HOOK_MODULE}; {HOOK_MODULE}.arm()\n")


if __name__ == "__main__":
    install()
