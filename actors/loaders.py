"""How weights that arrived become what vLLM computes with. Runs in vLLM's process.

On CPUs most of a sync is this. vLLM's layerwise reload makes every layer anew, in Python, and
copies it twice before it packs it. `PlannedLoader` asks vLLM's own loaders once, of tensors without
data, where each weight goes; from then on it copies it there and packs what vLLM packs. Where it
does not know a layer, or a loader does more than copy, and on GPUs, `LayerwiseLoader` loads.

One of the three traps of a sync is mended here: on CPUs a head keeps a packed copy beside its
weight, and a tied one's weight is loaded as the embedding's, so no loader thinks of the copy
(`pack_kept`).
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
)
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.model_executor.model_loader.reload.layerwise import (
    _place_kernel_tensors,
    get_layerwise_info,
)
from vllm.model_executor.model_loader.reload.meta import restore_layer_on_meta
from vllm.model_executor.model_loader.reload.utils import get_layer_params_buffers
from vllm.platforms import current_platform

from medrl.actors.types import WeightMeta

KNOWN_METHODS = (type(None), UnquantizedLinearMethod, UnquantizedEmbeddingMethod)
"""vLLM's `quant_method` of layers whose weights are copied and, at most, packed."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A parameter of vLLM's model. Its tensor is asked for anew each time: packing replaces it."""

    layer: Module
    name: str
    shape: torch.Size  # before packing

    def __hash__(self) -> int:
        return hash((id(self.layer), self.name))

    @property
    def parameter(self) -> Parameter:
        return self.layer.get_parameter(self.name)

    @property
    def whole(self) -> Part:
        """All of it, as the loaders see it."""
        return Part.of(torch.empty(self.shape, device="meta"))

    @property
    def is_packed(self) -> bool:
        """vLLM computes with a packed copy alone, and keeps a parameter without elements."""
        return not self.parameter.numel()

    def pack(self, weight: Tensor) -> None:
        """Make the packed copy anew. `weight`, of `shape`, is not kept."""
        empty = self.parameter
        # Frees the old copy, whose memory the new one then takes.
        self.layer.__dict__.pop("cpu_linear", None)
        whole = Parameter(weight.to(empty.dtype), requires_grad=False)
        self.layer.register_parameter(self.name, whole)
        try:
            dispatch_cpu_unquantized_gemm(self.layer, remove_weight=True)
        finally:
            self.layer.register_parameter(self.name, empty)  # this one knows its loader


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Elements of a tensor, as `torch.as_strided` takes them."""

    size: torch.Size
    stride: tuple[int, ...]
    offset: int  # from the tensor's first element

    @classmethod
    def of(cls, tensor: Tensor) -> Part:
        """Of a tensor that begins where `tensor`'s storage does."""
        return cls(size=tensor.size(), stride=tensor.stride(), offset=int(tensor.storage_offset()))

    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor.as_strided(self.size, self.stride, tensor.storage_offset() + self.offset)


@dataclass(frozen=True, kw_only=True)
class Copy:
    """Where a part of a weight goes."""

    source: Part  # of the weight
    place: Place
    target: Part  # of the parameter

    @cached_property
    def shift(self) -> int | None:
        """Where the place would begin in the weight, in elements, if all of it lay there as this
        part does; None: this part does not lie there in one piece, as it will in the place."""
        piece = Part.of(torch.empty(self.source.size, device="meta"))
        straight = piece.stride == self.source.stride == self.target.stride
        if not straight or self.source.size != self.target.size:
            return None
        return self.source.offset - self.target.offset


Plan = Mapping[str, Sequence[Copy]]
"""By the weight's name."""


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
        found.add((_storage(weight), weight.dtype, weight.storage_offset() + copy.shift))
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


def record(model: Module, weights: Sequence[WeightMeta]) -> Plan | None:
    """What `model.load_weights` does with each of `weights`; None where that is more than copies
    that fill what is packed, or a layer is of another kind. Leaves the model as it was."""
    methods = (getattr(layer, "quant_method", None) for layer in model.modules())
    if not all(type(method) in KNOWN_METHODS for method in methods):
        return None
    sources = {
        meta.name: torch.empty(meta.shape, dtype=getattr(torch, meta.dtype), device="meta")
        for meta in weights
    }
    try:
        with _before_packing(model) as places, _Copies() as copies:
            model.load_weights(list(sources.items()))  # type: ignore[operator]
        plan = _plan(sources, places, copies.made)
        return plan if _is_whole(plan) and not copies.more else None
    except Exception:  # it looks at numbers, say; what is wrong besides, vLLM's reload will tell
        return None


def _plan(
    sources: Mapping[str, Tensor],
    places: Mapping[int, Place],
    copies: Iterable[tuple[Tensor, Tensor]],
) -> Plan:
    """Raises `LookupError` where one of `copies`, target and source, is of anything else."""
    names = {_storage(source): name for name, source in sources.items()}
    plan: dict[str, list[Copy]] = {name: [] for name in sources}
    for target, source in copies:
        name, place = names[_storage(source)], places[_storage(target)]
        if source.dtype != sources[name].dtype:
            raise LookupError(f"{name} is not taken as what it is")
        plan[name].append(Copy(source=Part.of(source), place=place, target=Part.of(target)))
    return plan


def pack_kept(model: Module) -> None:
    """Pack anew the heads whose weight is kept beside its packed copy."""
    for layer in model.modules():
        if isinstance(layer, ParallelLMHead) and layer.weight.numel():
            dispatch_cpu_unquantized_gemm(layer, remove_weight=False)


class _Copies(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what is copied where, and whether more is done to it. Changes nothing."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: list[tuple[Tensor, Tensor]] = []  # target, source
        self.more = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if not func._schema.is_mutable:
            return func(*args, **(kwargs or {}))
        if func is torch.ops.aten.copy_.default:
            self.made.append((args[0], args[1]))
        elif func is not torch.ops.aten.fill_.Scalar:  # the padding's zeros are there already
            self.more = True
        return args[0]


@contextmanager
def _before_packing(model: Module) -> Iterator[Mapping[int, Place]]:
    """The model's parameters as its loaders want them, without data; by their storage."""
    infos = {layer: get_layerwise_info(layer) for layer in model.modules()}
    places = {}
    try:
        for layer, info in infos.items():
            info.kernel_tensors = get_layer_params_buffers(layer)
            info.kernel_non_persistent_buffers = set(layer._non_persistent_buffers_set)
            restore_layer_on_meta(layer, info)
            for name, parameter in layer.named_parameters(recurse=False):
                places[_storage(parameter)] = Place(layer=layer, name=name, shape=parameter.shape)
                if loader := getattr(parameter, "weight_loader", None):
                    # A layerwise reload leaves its own loader there, which loads nothing after it.
                    parameter.weight_loader = inspect.unwrap(loader)  # type: ignore[attr-defined]
        yield places
    finally:
        for layer, info in infos.items():
            if info.kernel_tensors is not None:
                _place_kernel_tensors(layer, info)
            info.reset()


def _storage(tensor: Tensor) -> int:
    """What tells storages without data from each other."""
    where: int = tensor.untyped_storage()._cdata
    return where


def _is_whole(plan: Plan) -> bool:
    """Every weight goes somewhere, and no two to the same; what is packed is filled, and what is
    not lies as it did."""
    targets: dict[Place, list[Part]] = {}
    for copies in plan.values():
        for copy in copies:
            targets.setdefault(copy.place, []).append(copy.target)
    kept = [place.parameter.data_ptr() for place in targets if not place.is_packed]
    return (
        all(plan.values())
        and all(len({*parts}) == len(parts) for parts in targets.values())
        and len({*kept}) == len(kept)
        and all(
            sum(part.size.numel() for part in parts) == place.shape.numel()
            if place.is_packed
            else (place.parameter.shape, place.parameter.stride())
            == (place.shape, place.whole.stride)
            for place, parts in targets.items()
        )
    )
