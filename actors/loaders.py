"""How weights that arrived become what vLLM computes with. Runs in vLLM's process.

On CPUs most of a sync is this. vLLM's layerwise reload makes every layer anew, in Python, and
copies it twice before it packs it. `PlannedLoader` knows where vLLM's own loaders put each weight
(`copy_plan`), copies it there and packs what vLLM packs. Where there is no such plan, and on GPUs,
`LayerwiseLoader` loads.

One of the three traps of a sync is mended here: on CPUs a head keeps a packed copy beside its
weight, and a tied one's weight is loaded as the embedding's, so no loader thinks of the copy
(`pack_kept`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import Module
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.platforms import current_platform

from medrl.actors.copy_plan import Copy, Place, Plan, record, storage_of
from medrl.actors.types import WeightMeta

AT_ONCE = 2
"""Threads that load, where torch may use as many. They do not wait for each other, as threads that
share a computation would."""

_CHOOSING = 2**18  # elements are packed while oneDNN chooses a layout for a weight
_CALLING = 2**15  # are copied while Python calls for it

Note = Callable[[str, Tensor], None]
"""Is told of a weight by name, once, in whatever thread is about to load it."""


class Loader(Protocol):
    """An update is `begin`, any number of `load`, `end`; one that broke off is begun again."""

    def begin(self) -> None: ...

    def load(self, weights: Sequence[tuple[str, Tensor]], note: Note) -> None:
        """By name; the tensors may change once the next `load`, or `end`, returns."""
        ...

    def end(self) -> None: ...


def make_loader(
    model: Module,
    model_config: Any,
    device: torch.device,
    weights: Sequence[WeightMeta],
    threads: int,
) -> Loader:
    """The quickest that is right for `model`, where every update brings `weights`. `threads`: see
    `PlannedLoader`."""
    # zentorch may compute with the weight itself in place of a packed copy.
    packs = device.type == "cpu" and not current_platform.is_zen_cpu()
    if packs and (plan := record(model, weights)):
        return PlannedLoader(model, plan, threads)
    return LayerwiseLoader(model, model_config, device)


class LayerwiseLoader:
    """vLLM's own reload."""

    def __init__(self, model: Module, model_config: Any, device: torch.device) -> None:
        self._model: Any = model
        self._model_config = model_config
        self._on_cpu = device.type == "cpu"
        self._reloading = False

    def begin(self) -> None:
        if self._reloading:  # the last update broke off: forget the part that arrived
            self.end()
        initialize_layerwise_reload(self._model)
        self._reloading = True

    def load(self, weights: Sequence[tuple[str, Tensor]], note: Note) -> None:
        for name, tensor in weights:
            note(name, tensor)
        # It keeps tensors until all of a layer's are there; GPU transports make each anew.
        self._model.load_weights((n, t.clone() if t.is_cpu else t) for n, t in weights)

    def end(self) -> None:
        finalize_layerwise_reload(self._model, self._model_config)
        self._reloading = False
        if self._on_cpu:
            pack_kept(self._model)


class Piece(NamedTuple):
    """What a place gets from a weight."""

    copy: Copy
    weight: Tensor
    name: str  # of the weight; empty: another piece tells of it


class PlannedLoader:
    """Copies weights to where vLLM's loaders would, and packs what vLLM packs."""

    def __init__(self, model: Module, plan: Plan, threads: int = 1) -> None:
        """`threads`: what torch may compute with, but for those now spared."""
        self._model, self._plan = model, plan
        self._copies = Counter(copy.place for copies in plan.values() for copy in copies)
        self._outstanding: Counter[Place] = Counter()
        self._gathered: dict[Place, Tensor] = {}  # of which parts are outstanding
        self._filling: list[Future[None]] = []  # by the last `load`
        at_once = min(AT_ONCE, threads)
        self._thread_of = _dealt(self._copies, at_once)
        self._threads = [
            ThreadPoolExecutor(
                1,
                "medrl-load",
                initializer=_use_threads,
                initargs=(max(1, torch.get_num_threads() // at_once),),
            )
            for _ in range(at_once)
        ]

    def begin(self) -> None:
        wait(self._filling)  # the last update may have broken off
        self._filling = []
        self._outstanding = self._copies.copy()
        self._gathered = {}

    def load(self, weights: Sequence[tuple[str, Tensor]], note: Note) -> None:
        work: list[dict[Place, list[Piece]]] = [{} for _ in self._threads]
        for name, weight in weights:
            for number, copy in enumerate(self._plan[name]):
                piece = Piece(copy, weight, "" if number else name)
                work[self._thread_of[copy.place]].setdefault(copy.place, []).append(piece)
        before, self._filling = self._filling, []
        for thread, mine in zip(self._threads, work, strict=True):
            self._filling.append(thread.submit(self._fill, mine, note))
        _finish(before)

    def end(self) -> None:
        _finish(self._filling)
        pack_kept(self._model)

    @torch.no_grad()
    def _fill(self, work: Mapping[Place, Sequence[Piece]], note: Note) -> None:
        for place, pieces in work.items():
            for _, weight, name in pieces:
                if name:
                    note(name, weight)
            if not place.is_packed:
                _copy(pieces, place.parameter)
            elif len(pieces) < self._copies[place] or (whole := _whole(place, pieces)) is None:
                self._gather(place, pieces)
            else:
                place.pack(whole)

    def _gather(self, place: Place, pieces: Sequence[Piece]) -> None:
        gathered = self._gathered.get(place)
        if gathered is None:
            gathered = torch.empty(place.shape, dtype=place.parameter.dtype)
            self._gathered[place] = gathered
        _copy(pieces, gathered)
        self._outstanding[place] -= len(pieces)
        if not self._outstanding[place]:
            place.pack(self._gathered.pop(place))


def _copy(pieces: Iterable[Piece], target: Tensor) -> None:
    for copy, weight, _ in pieces:
        copy.target(target).copy_(copy.source(weight))


def _whole(place: Place, pieces: Iterable[Piece]) -> Tensor | None:
    """Of all pieces of a place, where they lie side by side: weights that vLLM joins arrive so."""
    found = set()
    for copy, weight, _ in pieces:
        if copy.shift is None:
            return None
        found.add((storage_of(weight), weight.dtype, weight.storage_offset() + copy.shift))
    if len(found) > 1:
        return None
    ((_, _, offset),) = found
    return weight.as_strided(place.shape, place.whole.stride, offset)


def _dealt(places: Iterable[Place], number: int) -> dict[Place, int]:
    """One of `number` threads for each place: no two work on one, and all have as much to do."""

    def cost(place: Place) -> int:
        return place.shape.numel() + (_CHOOSING if place.is_packed else _CALLING)

    loads = [0] * number
    threads = {}
    for place in sorted(places, key=cost, reverse=True):
        threads[place] = loads.index(min(loads))
        loads[threads[place]] += cost(place)
    return threads


def _use_threads(number: int) -> None:
    torch.get_num_threads()  # else a thread's first computation takes another's number
    torch._C.set_num_threads(number)


def _finish(filling: Collection[Future[None]]) -> None:
    """Return, or raise, when all are done."""
    wait(filling)
    for one in filling:
        one.result()


def pack_kept(model: Module) -> None:
    """Pack anew the heads whose weight is kept beside its packed copy."""
    for layer in model.modules():
        if isinstance(layer, ParallelLMHead) and layer.weight.numel():
            dispatch_cpu_unquantized_gemm(layer, remove_weight=False)
