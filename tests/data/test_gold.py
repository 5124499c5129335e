"""A gold answer becomes one letter, or a reason why not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medrl.actors.types import LETTERS
from medrl.data.gold import GoldError, GoldKind, gold_letter


@pytest.mark.parametrize(
    ("gold", "options", "kind", "letter"),
    [
        ("Yes.", ("No", "Yes"), "text", "B"),
        ("yes", ("No.", "Yes."), "text", "B"),
        ("  COVID-19  pneumonia ", ("Normal", "covid-19 Pneumonia."), "text", "B"),
        ("MRI", ("CT", "CT", "MRI"), "text", "C"),  # a duplicate that is not the answer
        ("Yes.", ("yes", "Yes."), "text", "B"),  # exact before alike
        ("A", ("B", "A"), "text", "B"),
        ("A", ("B", "A"), "label", "A"),
        ("c", ("x", "y", "z"), "label", "C"),
        ("(B)", ("x", "y"), "either", "B"),
        ("B.", ("x", "y"), "either", "B"),
        ("MRI", ("CT", "MRI"), "either", "B"),
        (1, ("CT", "MRI"), "either", "B"),
        (7, ("5", "7", "9"), "either", "B"),
    ],
)
def test_gold_is_mapped(
    gold: str | int, options: tuple[str, ...], kind: GoldKind, letter: str
) -> None:
    assert gold_letter(gold, options, kind) == letter


@pytest.mark.parametrize(
    ("gold", "options", "kind", "reason"),
    [
        ("PET", ("CT", "MRI"), "text", r"'PET' is not among the options A\) CT, B\) MRI"),
        ("B", ("CT", "MRI"), "text", "not among"),
        ("CT", ("CT", "ct.", "CT"), "text", "options A and C"),
        ("ct", ("CT", "MRI", "CT."), "text", "options A and C"),
        ("E", ("a", "b", "c", "d"), "label", "not among"),
        ("MRI", ("CT", "MRI"), "label", "not among"),
        ("A", ("B", "A"), "either", "A or B"),
        (2, ("1", "2", "3"), "either", "B or C"),
        (-1, ("CT", "MRI"), "either", "not among"),
        ("", ("CT", "MRI"), "either", "not among"),
    ],
)
def test_gold_that_names_no_option_or_two_is_refused(
    gold: str | int, options: tuple[str, ...], kind: GoldKind, reason: str
) -> None:
    with pytest.raises(GoldError, match=reason):
        gold_letter(gold, options, kind)


words = st.text("abcdefgh", min_size=2, max_size=8)


@given(st.lists(words, min_size=2, max_size=10, unique=True), st.data())
def test_any_spelling_of_an_option_finds_its_letter(
    options: list[str], data: st.DataObject
) -> None:
    index = data.draw(st.integers(0, len(options) - 1))
    spelled = data.draw(
        st.sampled_from([str.upper, str.title, lambda t: f" {t} ", lambda t: f"{t}."])
    )(options[index])
    assert gold_letter(spelled, options, "text") == LETTERS[index]
