"""What vLLM's own loaders do with each weight, found out once. Runs in vLLM's process.

They are asked of tensors without data where each goes (`record`); what they would copy is the plan.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.reload.layerwise import (
    _place_kernel_tensors,
    get_layerwise_info,
)
from vllm.model_executor.model_loader.reload.meta import restore_layer_on_meta
from vllm.model_executor.model_loader.reload.utils import get_layer_params_buffers

from medrl.actors.types import WeightMeta

KNOWN_METHODS = (type(None), UnquantizedLinearMethod, UnquantizedEmbeddingMethod)
"""vLLM's `quant_method` of layers whose weights are copied and, at most, packed."""


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
    names = {storage_of(source): name for name, source in sources.items()}
    plan: dict[str, list[Copy]] = {name: [] for name in sources}
    for target, source in copies:
        name, place = names[storage_of(source)], places[storage_of(target)]
        if source.dtype != sources[name].dtype:
            raise LookupError(f"{name} is not taken as what it is")
        plan[name].append(Copy(source=Part.of(source), place=place, target=Part.of(target)))
    return plan


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
                places[storage_of(parameter)] = Place(layer=layer, name=name, shape=parameter.shape)
                if loader := getattr(parameter, "weight_loader", None):
                    # A layerwise reload leaves its own loader there, which loads nothing after it.
                    parameter.weight_loader = inspect.unwrap(loader)  # type: ignore[attr-defined]
        yield places
    finally:
        for layer, info in infos.items():
            if info.kernel_tensors is not None:
                _place_kernel_tensors(layer, info)
            info.reset()


def storage_of(tensor: Tensor) -> int:
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
