"""placement.engines is a number or a range, and means the same wherever it is written."""

from pathlib import Path

import pytest

from medrl.configs.errors import UserError
from medrl.configs.loader import dump_config, load_config

GOOD = '[run]\nname = "x"\n[model]\npath = "m"\n[data]\ntrain = "t"\n'


def write(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("written", "bounds"), [("3", (3, 3)), ('"2..8"', (2, 8)), ('"4..4"', (4, 4))]
)
def test_a_file_an_override_and_config_toml_say_the_same(
    tmp_path: Path, written: str, bounds: tuple[int, int]
) -> None:
    in_file = load_config(write(tmp_path, f"{GOOD}[placement]\nengines = {written}\n"))
    bare = written.strip('"')
    overridden = load_config(write(tmp_path, GOOD), [f"placement.engines={bare}"])
    assert in_file == overridden
    assert (in_file.placement.min_engines, in_file.placement.max_engines) == bounds
    assert load_config(write(tmp_path, dump_config(in_file))) == in_file


@pytest.mark.parametrize(
    "written", ["0", "0..2", "3..2", "1...3", "..3", "1..", "true", "2.0", "a"]
)
def test_what_is_no_count_is_refused_with_an_example(tmp_path: Path, written: str) -> None:
    with pytest.raises(UserError, match=r'^placement\.engines: got .*, needs .* such as "2\.\.8"'):
        load_config(write(tmp_path, GOOD), [f"placement.engines={written}"])


def test_colocated_engines_are_as_many_as_ranks_always(tmp_path: Path) -> None:
    pairs = ["placement.colocate=true", "placement.learners=2"]
    load_config(write(tmp_path, GOOD), [*pairs, "placement.engines=2"])
    with pytest.raises(UserError, match=r"needs one engine a rank, .* got 2\.\.4 engines"):
        load_config(write(tmp_path, GOOD), [*pairs, "placement.engines=2..4"])
