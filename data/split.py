"""A split of our own: no image in both parts, modalities and question types in equal shares."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from random import Random

from medrl.actors.types import Prompt

Stratum = tuple[str, ...]  # modality, question type; of all prompts: ()


def split_by_image(
    prompts: Sequence[Prompt], fraction: float, seed: int, identity: Callable[[Prompt, str], str]
) -> tuple[list[Prompt], list[Prompt]]:
    """Return (train, test) in the order of `prompts`; `fraction` of each stratum is the aim.

    `identity` names an image of a prompt: equal names, equal images. Prompts that share an image,
    be it through others, form a *bundle*, which stays whole. Bundles of the same make-up are dealt
    by the same fraction, so that images of many questions are no likelier in either part; what
    rounding leaves over goes where its strata lack most. The same arguments give the same split.
    Raises `ValueError` where there is a single bundle.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"the test set's share is between 0 and 1, got {fraction}")
    bundles = _bundles(prompts, identity)
    if len(bundles) < 2:
        raise ValueError("all prompts hang together through their images: nothing to split")
    test = _choose(bundles, prompts, fraction, Random(seed))
    return (
        [prompt for number, prompt in enumerate(prompts) if number not in test],
        [prompt for number, prompt in enumerate(prompts) if number in test],
    )


def _bundles(
    prompts: Sequence[Prompt], identity: Callable[[Prompt, str], str]
) -> list[tuple[int, ...]]:
    """Indices of the prompts that hang together, in the order of their first ones."""
    parent = list(range(len(prompts)))

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    first: dict[str, int] = {}
    for number, prompt in enumerate(prompts):
        for path in prompt.images:
            other = first.setdefault(identity(prompt, path), number)
            low, high = sorted((root(other), root(number)))
            parent[high] = low
    members: dict[int, list[int]] = defaultdict(list)
    for number in range(len(prompts)):
        members[root(number)].append(number)
    return [tuple(bundle) for bundle in members.values()]


def _choose(
    bundles: Sequence[tuple[int, ...]], prompts: Sequence[Prompt], fraction: float, random: Random
) -> set[int]:
    """Indices of the test prompts."""
    strata = [_strata(prompts[number] for number in bundle) for bundle in bundles]
    alike: dict[frozenset[tuple[Stratum, int]], list[int]] = defaultdict(list)
    for number, counts in enumerate(strata):
        alike[frozenset(counts.items())].append(number)
    chosen: list[int] = []
    left: list[int] = []
    for numbers in alike.values():
        random.shuffle(numbers)
        whole = int(len(numbers) * fraction)
        chosen += numbers[:whole]
        # One more of each make-up at most: beyond that its share would be above the fraction.
        left += numbers[whole : whole + 1]
    need = {stratum: fraction * n for stratum, n in _strata(prompts).items()}
    for number in chosen:
        _take(need, strata[number])
    random.shuffle(left)
    for number in sorted(left, key=lambda number: -len(bundles[number])):
        if _gain(need, strata[number]) > 0 and len(chosen) < len(bundles) - 1:
            _take(need, strata[number])
            chosen.append(number)
    if not chosen:  # a small data set: the test set is to hold something
        chosen = [min(left, key=lambda number: len(bundles[number]))]
    return {index for number in chosen for index in bundles[number]}


def _strata(prompts: Iterable[Prompt]) -> Counter[Stratum]:
    """Prompts of each stratum, and of all: many small strata are not all to be rounded down."""
    return Counter(
        stratum for prompt in prompts for stratum in ((prompt.modality, prompt.question_type), ())
    )


def _take(need: dict[Stratum, float], counts: Counter[Stratum]) -> None:
    for stratum, n in counts.items():
        need[stratum] -= n


def _gain(need: dict[Stratum, float], counts: Counter[Stratum]) -> float:
    """By how much a bundle in the test set brings the strata nearer to their aims (squares)."""
    return sum(need[stratum] ** 2 - (need[stratum] - n) ** 2 for stratum, n in counts.items())
