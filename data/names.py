"""Canonical names of modalities and question types, and what users and data sets call them."""

from __future__ import annotations

from functools import cache

UNKNOWN = "unknown"
"""Modality or question type of a prompt whose data set does not say."""

MODALITIES: dict[str, tuple[str, ...]] = {
    "CT": ("CT(Computed Tomography)", "Computed Tomography"),
    "MRI": (
        "MR (Mag-netic Resonance Imaging)",
        "MR",
        "MR (Magnetic Resonance)",
        "Magnetic Resonance",
        "Magnetic Resonance Imaging",
        "Magnetic Resonance Imaging (MRI)",
    ),
    "X-ray": ("X-Ray Imaging", "X-Ray Radiography"),
    "Ultrasound": ("Ultrasonography", "US"),
    "Dermoscopy": ("Dermatoscopy",),
    "Fundus": ("Fundus Photography", "Color Fundus Photography"),
    "OCT": ("OCT (Optical Coherence Tomography", "Optical Coherence Tomography"),
    "Microscopy": ("Microscopy Images",),
}
"""Canonical name -> other spellings; case, spaces and punctuation do not matter."""

QUESTION_TYPES = (
    "Anatomy Identification",
    "Disease Diagnosis",
    "Lesion Grading",
    "Modality Recognition",
    "Other Biological Attributes",
)


def _key(name: str) -> str:
    return "".join(filter(str.isalnum, name.casefold()))


_MODALITY_OF = {
    _key(name): canonical
    for canonical, others in MODALITIES.items()
    for name in (canonical, *others)
}
_QUESTION_TYPE_OF = {_key(name): name for name in QUESTION_TYPES}


@cache
def modality(raw: str) -> str:
    """Return the canonical name, or `raw` as it is where it is none of the eight."""
    return _MODALITY_OF.get(_key(raw), raw.strip() or UNKNOWN)


@cache
def question_type(raw: str) -> str:
    """Return the canonical name, or `raw` as it is where it is none of the five."""
    return _QUESTION_TYPE_OF.get(_key(raw), raw.strip() or UNKNOWN)
