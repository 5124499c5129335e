"""What the vision tower makes of images: once a micro-batch, or once a run if it is not trained.

A tower whose weights stay as they are gives an image the same features in every step, so they are
kept, by the image's hash; each image is then encoded by itself, so that its features follow from
the image alone and not from what it was encoded with. Whether the tower is trained is asked of its
parameters each time: there is no switch that could say otherwise.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class Pixels(Protocol):
    """[N, patch] float: a tensor, or what becomes one where it is needed (`learner.levels`)."""

    @property
    def nbytes(self) -> int: ...

    def to(self, device: torch.device, /) -> Tensor: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageInputs:
    """A processed image."""

    pixels: Pixels
    grid: Tensor  # [3] time, height, width in patches
    tokens: int  # visual tokens after merging


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """Of one image, [visual tokens, D] each."""

    pooler_output: Tensor  # stands where the image's placeholders are
    deepstack: tuple[Tensor, ...]  # Qwen3-VL: added in the first layers; else none

    @property
    def nbytes(self) -> int:
        return self.pooler_output.nbytes + sum(layer.nbytes for layer in self.deepstack)

    def to(self, device: torch.device) -> Features:
        return Features(
            pooler_output=self.pooler_output.to(device),
            deepstack=tuple(layer.to(device) for layer in self.deepstack),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _EncoderOutputs:
    """Of several images, under the names that transformers' models read."""

    pooler_output: tuple[Tensor, ...]
    deepstack_features: list[tuple[Tensor, ...]]  # [layers][images]


class FeatureCache:
    """Features by image hash, in main memory; the least recently used are dropped first. For
    towers of one and the same weights."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._kept: OrderedDict[str, Features] = OrderedDict()
        self._bytes = 0

    @property
    def nbytes(self) -> int:
        return self._bytes

    def get(self, hash: str) -> Features | None:
        if hash in self._kept:
            self._kept.move_to_end(hash)
        return self._kept.get(hash)

    def put(self, hash: str, features: Features) -> None:
        """Keep what was not there."""
        if features.nbytes > self.max_bytes:
            return
        self._kept[hash] = features.to(torch.device("cpu"))
        self._bytes += features.nbytes
        while self._bytes > self.max_bytes:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        self._kept.clear()
        self._bytes = 0


class VisionEncoder:
    """A model's vision tower, as rows need it."""

    def __init__(self, vlm: Any, cache: FeatureCache) -> None:
        self._vlm = vlm
        self.cache = cache
        self.most: Callable[[int], int] = lambda count: count
        """The largest `count` of all ranks where the tower is in parts (ZeRO-3): it runs on all
        of them or on none."""

    def encode(self, hashes: Sequence[str], images: Sequence[ImageInputs]) -> dict[str, Any]:
        """`mm_encoder_outputs` of the model's forward, in the order of `hashes`; each different
        image of `images`, one for every hash, is encoded at most once."""
        unique = dict(zip(hashes, images, strict=True))
        if self.cache.max_bytes and not self._trained():
            found = self._recalled(unique)
        else:
            found = dict(zip(unique, self._run(unique.values()), strict=True))
        ordered = [found[hash] for hash in hashes]
        layers = zip(*(features.deepstack for features in ordered), strict=True)
        outputs = _EncoderOutputs(
            pooler_output=tuple(features.pooler_output for features in ordered),
            deepstack_features=list(layers),
        )
        return {"image": outputs}

    def _trained(self) -> bool:
        return any(parameter.requires_grad for parameter in self._vlm.model.visual.parameters())

    def _recalled(self, unique: dict[str, ImageInputs]) -> dict[str, Features]:
        kept = {hash: self.cache.get(hash) for hash in unique}
        device = self._vlm.device
        found = {hash: one.to(device) for hash, one in kept.items() if one is not None}
        missing = [hash for hash in unique if hash not in found]
        for i in range(self.most(len(missing))):
            # With nothing of its own to encode, a rank keeps the others company.
            hash = missing[i] if i < len(missing) else next(iter(unique))
            with torch.no_grad():
                (features,) = self._run([unique[hash]])
            if i < len(missing):
                found[hash] = features
                self.cache.put(hash, features)
        return found

    def _run(self, images: Iterable[ImageInputs]) -> list[Features]:
        images, device = list(images), self._vlm.device
        encoded = self._vlm.model.get_image_features(
            torch.cat([image.pixels.to(device) for image in images]),
            torch.stack([image.grid for image in images]).to(device),
            return_dict=True,
        )
        deepstack = encoded.get("deepstack_features") or []
        return [
            Features(pooler_output=tokens, deepstack=tuple(layer[i] for layer in deepstack))
            for i, tokens in enumerate(encoded.pooler_output)
        ]
