"""Images on the learner's side: read once while they stay in the cache, known by their hash."""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

from medrl.actors.types import RolloutRequest
from medrl.configs.errors import LearnerError
from medrl.learner.vision import ImageInputs

_THREADS = 4  # that decode; Pillow and hashlib let go of Python's lock
_TRIM_EVERY = 16  # images read
_AT_ONCE = 2 * _THREADS  # decoded images held


class LoadedImage(Protocol):
    """An image as `data.images.ImageStore` loads it."""

    @property
    def image(self) -> Any: ...
    @property
    def sha256(self) -> str: ...


class ImageSource(Protocol):
    """Decodes the image at a path relative to the image root. Thread-safe."""

    def load(self, path: str, /) -> LoadedImage: ...

    def small(self, path: str, /) -> LoadedImage:
        """With about as few pixels as the model takes."""
        ...


class Seen(NamedTuple):
    """An image as a request has it seen."""

    path: str
    small: bool


def seen_by(request: RolloutRequest) -> list[Seen]:
    """The images of a request, in order."""
    return [Seen(path, request.small) for path in request.prompt.images]


class ImageCache:
    """Processed images by hash; the least recently used are dropped first."""

    def __init__(
        self, source: ImageSource, process: Callable[[Any], ImageInputs], max_bytes: int
    ) -> None:
        self.source = source
        self.max_bytes = max_bytes
        self._process = process
        self._hashes: dict[Seen, str] = {}
        self._seen: dict[str, Seen] = {}  # by hash
        self._kept: OrderedDict[str, ImageInputs] = OrderedDict()
        self._bytes = 0
        self._read = 0
        self._threads = ThreadPoolExecutor(_THREADS, "image")

    @property
    def nbytes(self) -> int:
        return self._bytes

    def read(self, images: Iterable[Seen]) -> None:
        """Have these in the cache, as far as it holds them; files are decoded side by side. Raises
        `UserError` for a file that is no image, `LearnerError` for one that is another than it
        was."""
        wanted = list(dict.fromkeys(images))
        absent = [one for one in wanted if not self._use(self._hashes.get(one, ""))]
        for seen, loaded in self._loaded(absent):
            hash = loaded.sha256
            if self._hashes.setdefault(seen, hash) != hash:
                raise LearnerError(f"image {seen.path} changed while the run was using it")
            self._seen[hash] = seen
            if hash not in self._kept:  # two files may show the same
                self._keep(hash, self._process(loaded.image))
            self._read += 1
            if self._read % _TRIM_EVERY == 0:
                # What stays of an image lies in the hole that its processing left, so the next
                # needs a new one: three times the memory of what is kept was seen to be taken.
                ctypes.CDLL(None).malloc_trim(0)

    def hash(self, seen: Seen) -> str:
        """Of an image that was read, or is now."""
        if seen not in self._hashes:
            self.read([seen])
        return self._hashes[seen]

    def get(self, hash: str) -> ImageInputs:
        """The image of a hash that was met; where it left the cache, its file is read again."""
        if not self._use(hash):
            self.read([self._seen[hash]])
        return self._kept[hash]

    def _use(self, hash: str) -> bool:
        """Whether it is kept; then it is the last to be dropped."""
        if hash not in self._kept:
            return False
        self._kept.move_to_end(hash)
        return True

    def _loaded(self, images: list[Seen]) -> Iterator[tuple[Seen, LoadedImage]]:
        """In order; files are decoded side by side, few at a time."""
        for start in range(0, len(images), _AT_ONCE):
            some = images[start : start + _AT_ONCE]
            yield from zip(some, self._threads.map(self._load, some), strict=True)

    def _load(self, seen: Seen) -> LoadedImage:
        return (self.source.small if seen.small else self.source.load)(seen.path)

    def _keep(self, hash: str, image: ImageInputs) -> None:
        self._kept[hash] = image
        self._bytes += image.pixels.nbytes
        while self._bytes > self.max_bytes and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1].pixels.nbytes
