"""The modes: how a model is asked to answer. A mode's words, its form and the way its answer is
read lie together here, so that they cannot drift apart.

The three are Med-R1's: think-before, no-think, think-after. The words are kept short, since every
prompt pays for them. A fourth is one file of your own, named by its import path as `data.mode`:

    from medrl.rewards.modes import Mode
    DESCRIBE = Mode("describe", ("describe", "answer"), "Describe the image inside "
        "<describe></describe>, then give the {answer} inside <answer></answer>.")

A subclass may also render, write, judge the form or read the answer in another way.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass, replace

from medrl.actors.types import LETTERS, Prompt
from medrl.configs.errors import UserError
from medrl.rewards.tags import MOST_TAGS, Tag, find_tags

# Something is said where there is a letter or a digit: white space, dots and zero-width characters
# are cheap ways to say nothing.
_SAID = re.compile(r"[^\W_]")
_PLACEHOLDER = re.compile(r"\{\w*\}")


@dataclass(frozen=True, slots=True)
class Answer:
    """What was read from a completion."""

    text: str | None  # the answer as written, stripped; None: none could be read
    reason: str = ""  # why none could be read


@dataclass(frozen=True, slots=True)
class Mode:
    """One way to answer. Well-formed completions hold each block once, in order, nothing else."""

    name: str
    blocks: tuple[str, ...]  # tag names in their order, lower case; "answer" is one of them
    instruction: str  # "{answer}" stands for "letter" or, for an open question, "answer"

    def __post_init__(self) -> None:
        plain = all(re.fullmatch("[a-z]+", block) for block in self.blocks)
        if not plain or self.blocks.count("answer") != 1:
            raise ValueError(f"blocks are names in a-z, one of them answer; got {self.blocks}")

    def render(self, prompt: Prompt) -> str:
        """Return the user turn: the question, an option a line ("A) CT"), the instruction."""
        options = [
            f"{letter}) {text}" for letter, text in zip(LETTERS, prompt.options, strict=False)
        ]
        noun = "letter" if prompt.options else "answer"
        return "\n".join([prompt.question, *options, self.instruction.replace("{answer}", noun)])

    def write(self, answer: str, thought: str = "The image shows it.") -> str:
        """Return a well-formed completion."""
        return "".join(
            f"<{block}>{answer if block == 'answer' else thought}</{block}>"
            for block in self.blocks
        )

    def is_well_formed(self, completion: str) -> tuple[bool, str]:
        """Say whether a completion has the mode's form, and why where it has not."""
        reason = self._flaw(completion, find_tags(completion, self.blocks))
        return not reason, reason

    def _flaw(self, completion: str, tags: list[Tag]) -> str:
        want = [tag for block in self.blocks for tag in (f"<{block}>", f"</{block}>")]
        found = [completion[tag.start : tag.end] for tag in tags[: len(want) + 1]]
        if found != want:
            return f"needs the tags {' '.join(want)}, got {_listed(found)}"
        edges = [0, *(edge for tag in tags for edge in (tag.start, tag.end)), len(completion)]
        gaps = [completion[i:j] for i, j in zip(edges[::2], edges[1::2], strict=True)]
        for number, gap in enumerate(gaps):
            inside = number % 2 == 1  # a block's content; the others lie before, between and after
            if inside and not _SAID.search(gap):
                return f"nothing inside <{self.blocks[number // 2]}>"
            if not inside and gap.strip():
                return f"text outside the tags: {gap.strip()[:40]!r}"
        return ""

    def read(self, completion: str) -> Answer:
        """Read the answer strictly: the only answer tag there is, and not from the reasoning.

        The form may be broken elsewhere: that is the format reward's business.
        """
        tags = find_tags(completion, self.blocks)
        if len(tags) == MOST_TAGS:
            return Answer(None, "too many tags")
        places = [number for number, tag in enumerate(tags) if tag.name == "answer"]
        if not places:
            return Answer(None, "no answer tag")
        if len(places) > 2:
            return Answer(None, "more than one answer tag")
        first, last = tags[places[0]], tags[places[-1]]
        if not (first.exact and last.exact):
            return Answer(None, "misspelled answer tag")
        if len(places) < 2 or first.closing or not last.closing:
            return Answer(None, "answer tag not opened or not closed")
        if places[1] != places[0] + 1:
            return Answer(None, "a tag inside the answer")
        before = [tag for tag in tags[: places[0]] if tag.name != "answer"]
        if before and not before[-1].closing:
            return Answer(None, "answer tag inside the reasoning")
        text = completion[first.end : last.start].strip()
        return Answer(text) if text else Answer(None, "empty answer tag")


def _listed(tags: list[str]) -> str:
    return " ".join(tag[:20] for tag in tags) if tags else "none"


THINK_BEFORE = Mode(
    "think-before",
    ("think", "answer"),
    "Think inside <think></think>, then give the {answer} inside <answer></answer>.",
)
NO_THINK = Mode("no-think", ("answer",), "Answer with the {answer} inside <answer></answer>.")
THINK_AFTER = Mode(
    "think-after",
    ("answer", "think"),
    "Give the {answer} inside <answer></answer>, then explain inside <think></think>.",
)

MODES = {mode.name: mode for mode in (THINK_BEFORE, NO_THINK, THINK_AFTER)}


def get_mode(name: str, instruction: str = "") -> Mode:
    """Return a mode by its name or import path, with other last words where `instruction` is given.
    Raises UserError."""
    mode = MODES.get(name) or _import(name)
    return replace(mode, instruction=instruction) if instruction else mode


def odd_words(mode: Mode) -> list[str]:
    """A sentence for each thing in a mode's instruction that may not do what its author thinks."""
    words = mode.instruction
    others = sorted({found for found in _PLACEHOLDER.findall(words) if found != "{answer}"})
    missing = [f"<{block}>" for block in mode.blocks if f"<{block}>" not in words]
    return [
        *(
            f"the instruction's {one} is sent as it stands: only {{answer}} is filled in"
            for one in others
        ),
        *(
            f"the instruction does not name {one}, a tag that {mode.name} needs for its reward"
            for one in missing
        ),
    ]


def _import(path: str) -> Mode:
    """Resolve "pkg.module:MODE". Raises UserError."""
    module, colon, name = path.partition(":")
    if not (module and colon and name):
        raise UserError(
            f"unknown mode {path!r}: choose one of {', '.join(MODES)}, or name an import path "
            "like my_lab.modes:DESCRIBE"
        )
    try:
        mode = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever the user's module does while it loads
        raise UserError(f"mode {path}: does not import: {error}") from None
    if not isinstance(mode, Mode):
        raise UserError(f"mode {path}: is a {type(mode).__name__}, not a medrl.rewards.modes.Mode")
    return replace(mode, name=path)  # by which every process finds it again
