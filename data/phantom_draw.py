"""Draws a scene as one of eight modalities would show it, in a toy way. numpy and Pillow only.

Every modality has its own background, texture, noise and palette (`_BACKGROUNDS`, `_PALETTES`);
organ and lesions are the same shapes in all of them, so a model that sees can answer anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from medrl.data.phantom_scene import Modality, Scene, Shape, Side

Plane = NDArray[np.float32]  # [size, size], rows downwards
Picture = NDArray[np.float32]  # [size, size, 3], 0 to 255

_REFERENCE = 84  # lengths below are in pixels of an image of this size
_SMALL, _LARGE = 21.0, 29.0  # organ radius
_LESION = 5.4  # lesion radius
_TOWARDS: dict[Side, tuple[float, float]] = {
    "Left": (-1, 0),
    "Right": (1, 0),
    "Upper": (0, -1),
    "Lower": (0, 1),
}


@dataclass(frozen=True, slots=True)
class _Palette:
    """RGB of what is drawn over the background."""

    organ: tuple[int, int, int]
    dark: tuple[int, int, int]
    bright: tuple[int, int, int]
    softness: float = 0.8  # pixels over which an organ's edge fades


_PALETTES: dict[Modality, _Palette] = {
    "CT": _Palette((128, 128, 128), (38, 38, 38), (245, 245, 245)),
    "MR": _Palette((150, 150, 150), (45, 45, 45), (250, 250, 250), 1.2),
    "X-Ray": _Palette((165, 165, 168), (75, 75, 78), (252, 252, 252), 2.0),
    "Ultrasound": _Palette((112, 116, 120), (14, 14, 16), (240, 242, 245), 1.2),
    "Dermoscopy": _Palette((150, 92, 62), (52, 24, 20), (240, 205, 200), 1.6),
    "Fundus": _Palette((228, 168, 70), (110, 18, 12), (255, 250, 205), 1.2),
    "OCT": _Palette((118, 122, 118), (18, 20, 22), (240, 246, 240)),
    "Microscopy": _Palette((196, 128, 188), (74, 34, 122), (252, 246, 250)),
}


def draw(scene: Scene, rng: np.random.Generator, size: int = _REFERENCE) -> NDArray[np.uint8]:
    """An RGB picture [size, size, 3] of the scene; jitter, texture and noise come from `rng`."""
    scale = size / _REFERENCE
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / scale
    centre = _REFERENCE / 2 + rng.uniform(-3, 3, 2)
    radius = (_LARGE if scene.large else _SMALL) * rng.uniform(0.96, 1.04)
    palette = _PALETTES[scene.modality]
    picture = _BACKGROUNDS[scene.modality](x, y, rng)
    distance = _organ(scene.shape, (x - centre[0]) / radius, (y - centre[1]) / radius, rng) * radius
    picture = _paint(picture, palette.organ, _inside(distance, palette.softness))
    for at in _places(scene, centre, radius, rng):
        picture = _lesion(picture, scene, palette, np.hypot(x - at[0], y - at[1]), rng)
    picture = _FINISHES[scene.modality](picture, x, y, rng)
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def _organ(shape: Shape, x: Plane, y: Plane, rng: np.random.Generator) -> Plane:
    """Signed distance to the organ's edge, about in units of its radius; negative inside."""
    angle = rng.uniform(-0.2, 0.2)
    flip = rng.choice((-1.0, 1.0))
    x, y = x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle)
    if shape == "Round":
        return _plane(np.hypot(x, y) - 0.95)
    if shape == "Bean":
        body = (np.hypot(x / 0.78, y / 1.08) - 1) * 0.78
        return _plane(np.maximum(body, 0.55 - np.hypot(x * flip - 0.85, y)))
    if shape == "Wedge":  # a triangle standing on its base
        sides = np.maximum(np.abs(x) * 0.9 - y * 0.436 - 0.36, y - 0.72)
        return _plane(sides)
    lobe = np.hypot((np.abs(x) - 0.58) / 0.5, y / 0.95) - 1
    return _plane(lobe * 0.5)


def _places(
    scene: Scene, centre: NDArray[np.float64], radius: float, rng: np.random.Generator
) -> list[tuple[float, float]]:
    """Centres of the lesions: in a row across the side they lie on, never touching."""
    towards = _TOWARDS[scene.side]
    across = (towards[1], towards[0])
    gap = 2 * _LESION + 2.6
    places = []
    for i in range(scene.lesions):
        along = 0.52 * radius + rng.uniform(-1.5, 1.5)
        offset = (i - (scene.lesions - 1) / 2) * gap + rng.uniform(-0.7, 0.7)
        dx, dy = (towards[k] * along + across[k] * offset for k in (0, 1))
        places.append((centre[0] + dx, centre[1] + dy))
    return places


def _lesion(
    picture: Picture, scene: Scene, palette: _Palette, far: Plane, rng: np.random.Generator
) -> Picture:
    """Paint one lesion; `far` is each pixel's distance from its centre, in pixels."""
    radius = _LESION * rng.uniform(0.92, 1.08)
    # Tissue around it: without it a dark lesion at the organ's edge is lost in a dark background.
    picture = _paint(picture, palette.organ, _inside(far - radius - 2.5, 0.8))
    if scene.kind == "Cyst":
        return _paint(picture, palette.dark, _inside(far - radius, 0.5))
    if scene.kind == "Nodule":
        return _paint(picture, palette.bright, _inside(far - radius, 0.5))
    picture = _paint(picture, palette.bright, _inside(far - radius - 0.8, 0.4))
    return _paint(picture, palette.dark, _inside(far - 0.55 * radius, 0.4))


def _plane(values: NDArray[np.floating[Any]]) -> Plane:
    return values.astype(np.float32)


def _inside(distance: Plane, softness: float) -> Plane:
    """1 well inside, 0 well outside of an edge at distance 0."""
    return _plane(1 / (1 + np.exp(np.clip(distance / softness * 2, -30, 30))))


def _paint(picture: Picture, colour: tuple[int, int, int], cover: Plane) -> Picture:
    return picture + (np.array(colour, dtype=np.float32) - picture) * cover[..., None]


def _flat(x: Plane, colour: tuple[float, float, float]) -> Picture:
    return np.broadcast_to(np.array(colour, dtype=np.float32), (*x.shape, 3)).copy()


def _grey(plane: Plane) -> Picture:
    return np.repeat(plane[..., None], 3, axis=2).astype(np.float32)


def _noise(picture: Picture, sigma: float, rng: np.random.Generator, grey: bool = True) -> Picture:
    channels = 1 if grey else 3
    return picture + rng.normal(0, sigma, (*picture.shape[:2], channels)).astype(np.float32)


def _blur(picture: Picture, radius: float) -> Picture:
    image = Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(radius)), dtype=np.float32)


def _middle(x: Plane, y: Plane) -> Plane:
    """Distance from the picture's middle, in reference pixels."""
    half = (_REFERENCE - 1) / 2
    return _plane(np.hypot(x - half, y - half))


# Backgrounds: (x, y, rng) -> picture, before the organ is painted.


def _ct_ground(x: Plane, y: Plane, rng: np.random.Generator) -> Picture:
    """A body in air, in a bright ring of bone."""
    half = (_REFERENCE - 1) / 2
    far = np.hypot((x - half) / 1.02, (y - half) / 0.98)
    picture = _paint(_flat(x, (4, 4, 4)), (235, 235, 235), _inside(far - 40, 0.5))
    return _paint(picture, (84, 84, 84), _inside(far - 36.5, 0.5))


def _mr_ground(x: Plane, y: Plane, rng: np.random.Generator) -> Picture:
    """Soft tissue with folds, fading away from the coil, no bone."""
    phase = rng.uniform(0, 6.3, 2)
    folds = np.sin(x / 3.1 + 2 * np.sin(y / 9 + phase[0]) + phase[1])
    return _grey(62 + 14 * folds) * _inside(_middle(x, y) - 37, 3.0)[..., None]


def _xray_ground(x: Plane, y: Plane, rng: np.random.Generator) -> Picture:
    """A projection: ribs arching over a field that darkens downwards."""
    shift = rng.uniform(0, 14)
    arch = y + ((x - _REFERENCE / 2) ** 2) / 110 + shift
    ribs = np.clip(np.sin(arch * 2 * math.pi / 14) * 1.6, 0, 1)
    spine = np.exp(-(((x - _REFERENCE / 2) / 5) ** 2))
    return _grey(70 + 42 * ribs + 34 * spine - 0.25 * y)


def _ultrasound_ground(x: Plane, y: Plane, rng: np.random.Generator) -> Picture:
    waves = np.sin(np.hypot(x - _REFERENCE / 2, y + 12) / 2.6 + rng.uniform(0, 6.3))
    return _grey(52 + 9 * waves)


def _dermoscopy_ground(x: Plane, y: Plane, rng: np.random.Generator) -> Picture:
    tone = rng.uniform(-8, 8)
    return _flat(x, (226 + tone, 172 + tone, 150 + tone))


def _fundus_ground(x: Plane, y: Plane, rng: np.random.Generator) -> Picture:
    """An orange retina with dark branching vessels."""
    picture = _flat(x, (206, 92, 34))
    root = rng.uniform(26, 58)
    for sign in (-1, 1):
        for bend in (0.010, 0.022):
            path = root + sign * (6 + bend * (x - 8) ** 2 + 2 * np.sin(x / 7 + bend * 300))
            picture = _paint(picture, (128, 26, 14), _inside(np.abs(y - path) - 1.1, 0.5))
    return picture


def _oct_ground(x: Plane, y: Plane, rng: np.random.Generator) -> Picture:
    """Layers of a retina seen from the side, over black."""
    wave = y + 2.5 * np.sin(x / 13 + rng.uniform(0, 6.3)) + rng.uniform(-2, 2)
    layers = 58 + 34 * np.sin(wave * 2 * math.pi / 9) + 24 * np.sin(wave * 2 * math.pi / 23)
    return _grey(layers * _inside(np.abs(wave - 42) - 33, 1.0) + 8)


def _microscopy_ground(x: Plane, y: Plane, rng: np.random.Generator) -> Picture:
    """A stained slide: a crowd of small purple nuclei."""
    cells = np.full(x.shape, 99, dtype=np.float32)
    for cx, cy in rng.uniform(0, _REFERENCE, (80, 2)):
        cells = _plane(np.minimum(cells, np.hypot(x - cx, y - cy)))
    return _paint(_flat(x, (244, 226, 238)), (132, 84, 160), _inside(cells - 1.1, 0.5) * 0.8)


_Ground = Callable[[Plane, Plane, np.random.Generator], Picture]
_BACKGROUNDS: dict[Modality, _Ground] = {
    "CT": _ct_ground,
    "MR": _mr_ground,
    "X-Ray": _xray_ground,
    "Ultrasound": _ultrasound_ground,
    "Dermoscopy": _dermoscopy_ground,
    "Fundus": _fundus_ground,
    "OCT": _oct_ground,
    "Microscopy": _microscopy_ground,
}


# Finishes: (picture, x, y, rng) -> picture, after the lesions are painted.


def _ct_finish(p: Picture, x: Plane, y: Plane, rng: np.random.Generator) -> Picture:
    return _noise(p, 7, rng)


def _mr_finish(p: Picture, x: Plane, y: Plane, rng: np.random.Generator) -> Picture:
    """A bias field and Rician noise: it lifts the black, and never goes below it."""
    angle = rng.uniform(0, 6.3)
    bias = 1 + 0.22 * (
        np.cos(angle) * (x / _REFERENCE - 0.5) + np.sin(angle) * (y / _REFERENCE - 0.5)
    )
    noise = rng.normal(0, 6, (2, *x.shape, 1)).astype(np.float32)
    return np.asarray(np.hypot(p * bias[..., None] + noise[0], noise[1]), dtype=np.float32)


def _xray_finish(p: Picture, x: Plane, y: Plane, rng: np.random.Generator) -> Picture:
    return _noise(_blur(p, 0.5), 4, rng)


def _ultrasound_finish(p: Picture, x: Plane, y: Plane, rng: np.random.Generator) -> Picture:
    """Speckle multiplies; only the probe's fan is seen."""
    speckle = _blur(rng.gamma(9, 9.8, (*x.shape, 1)).astype(np.float32).repeat(3, 2), 0.6) / 88
    fan = np.abs(np.arctan2(x - _REFERENCE / 2, y + 22)) - 0.60
    reach = np.maximum(fan * 50, np.hypot(x - _REFERENCE / 2, y + 22) - 103)
    return np.asarray(p * speckle * _inside(reach, 0.7)[..., None] + 2, dtype=np.float32)


def _dermoscopy_finish(p: Picture, x: Plane, y: Plane, rng: np.random.Generator) -> Picture:
    """Hairs, mottled skin, and the dark corners of the lens."""
    for _ in range(3):
        slope, start, bend = rng.uniform(-0.5, 0.5), rng.uniform(0, _REFERENCE), rng.uniform(-4, 4)
        hair = _plane(np.abs(y - start - slope * x - bend * np.sin(x / 17)))
        p = _paint(p, (58, 34, 28), _inside(hair - 0.3, 0.3) * 0.6)
    lens = 0.35 + 0.65 * _inside(_middle(x, y) - 47, 4.0)
    return _noise(p * lens[..., None], 6, rng, grey=False)


def _fundus_finish(p: Picture, x: Plane, y: Plane, rng: np.random.Generator) -> Picture:
    return _noise(p * _inside(_middle(x, y) - 40.5, 0.8)[..., None], 4, rng, grey=False)


def _oct_finish(p: Picture, x: Plane, y: Plane, rng: np.random.Generator) -> Picture:
    """Speckle in streaks along the scan lines."""
    streaks = rng.normal(0, 13, (*x.shape, 1)).astype(np.float32)
    streaks = (streaks + np.roll(streaks, 1, 1) + np.roll(streaks, 2, 1)) / 1.7
    return p + streaks


def _microscopy_finish(p: Picture, x: Plane, y: Plane, rng: np.random.Generator) -> Picture:
    return _noise(p, 6, rng, grey=False)


_Finish = Callable[[Picture, Plane, Plane, np.random.Generator], Picture]
_FINISHES: dict[Modality, _Finish] = {
    "CT": _ct_finish,
    "MR": _mr_finish,
    "X-Ray": _xray_finish,
    "Ultrasound": _ultrasound_finish,
    "Dermoscopy": _dermoscopy_finish,
    "Fundus": _fundus_finish,
    "OCT": _oct_finish,
    "Microscopy": _microscopy_finish,
}
