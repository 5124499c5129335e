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

OMNIMEDVQA_SETS = (
    "ACRIMA",
    "ALL Challenge",
    "Adam Challenge",
    "BioMediTech",
    "Blood Cell",
    "BreakHis",
    "COVIDx CXR-4",
    "CRC100k",
    "Chest CT Scan",
    "Chest X-Ray PA",
    "CoronaHack",
    "Covid CT",
    "Covid-19 tianchi",
    "Covid19 heywhale",
    "DRIMDB",
    "DeepDRiD",
    "Diabetic Retinopathy",
    "Fitzpatrick 17k",
    "HuSHeM",
    "ISBI2016",
    "ISIC2018",
    "ISIC2019",
    "ISIC2020",
    "JSIEC",
    "Knee Osteoarthritis",
    "MAlig Lymph",
    "MHSMA",
    "MIAS",
    "Monkeypox Skin Image 2022",
    "Mura",
    "NLM- Malaria Data",
    "OCT & X-Ray 2017",
    "OLIVES",
    "PAD-UFES-20",
    "PALM2019",
    "Pulmonary Chest MC",
    "Pulmonary Chest Shenzhen",
    "RUS CHN",
    "RadImageNet",
    "Retinal OCT-C8",
    "SARS-CoV-2 CT-scan",
    "Yangxi",
)
"""The 42 data sets of OmniMedVQA's open-access part, as its records and folders name them."""


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


_OMNIMEDVQA_KEYS = {_key(name) for name in OMNIMEDVQA_SETS}


def is_omnimedvqa_set(raw: str) -> bool:
    """Is it one of the 42? Case, spaces and punctuation do not matter."""
    return _key(raw) in _OMNIMEDVQA_KEYS
