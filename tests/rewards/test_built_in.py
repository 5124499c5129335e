"""The built-in rewards besides format and accuracy: one table of cases each."""

from __future__ import annotations

import re

import pytest

from medrl.actors.types import Score
from medrl.configs.errors import UserError
from medrl.configs.schema import RewardTerm
from medrl.rewards.boxes import boxes
from medrl.rewards.built_in import ANSWERS, BUILT_IN, make_judge
from medrl.rewards.check import check_rewards
from medrl.rewards.compose import PlainTerm, build_rewards
from medrl.rewards.modes import NO_THINK, THINK_BEFORE
from medrl.rewards.pool import RewardPool


@pytest.fixture
def value(make_prompt):
    """What a reward gives an answer, by its gold answer."""

    def score(name, answer, gold, **options):
        completion = f"<answer>{answer}</answer>"
        result = make_judge(name, options)(NO_THINK, make_prompt(gold, options=()), completion)
        return result.total if isinstance(result, Score) else result

    return score


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("yes", "Yes", 1),
        ("Yes.", "yes", 1),
        ("YES, there is a mass", "yes", 1),
        ("The answer is no", "No", 1),
        ("**No**", "no", 1),
        ("no", "yes", 0),
        ("yes or no", "yes", 0),
        ("yes, no doubt", "yes", 0),
        ("there is no mass", "no", 0),
        ("yesterday", "yes", 0),
        ("not", "no", 0),
        ("", "yes", 0),
        ("yes", "left lung", 0),
    ],
)
def test_yes_no(value, answer, gold, right):
    assert value("yes_no", answer, gold) == right


@pytest.mark.parametrize(
    ("answer", "gold", "options", "right"),
    [
        ("2", "2", {}, 1),
        ("2.0", "2", {}, 1),
        ("about 5 mm", "5", {}, 1),
        ("5mm", "5 cm", {}, 1),  # units are not compared
        ("1,250", "1250", {}, 1),
        ("-.5", "-0.5", {}, 1),
        ("−3", "-3", {}, 1),
        ("1.5e3", "1500", {}, 1),
        ("1.1", "1.0", {"tolerance": 0.1}, 1),  # not so in binary fractions
        ("1.11", "1.0", {"tolerance": 0.1}, 0),
        ("105", "100", {"relative": 0.05}, 1),
        ("-105", "-100", {"relative": 0.05}, 1),
        ("106", "100", {"relative": 0.05}, 0),
        ("106", "100", {"relative": 0.05, "tolerance": 6}, 1),
        ("0", "0", {"relative": 0.5}, 1),
        ("3", "2", {}, 0),
        ("-2", "2", {}, 0),
        ("2 or 3", "2", {}, 0),
        ("2-3", "2", {}, 0),
        ("0,5", "0.5", {}, 0),  # ambiguous
        ("1.2.3", "1.2", {}, 0),
        ("T2", "2", {}, 0),
        ("two", "2", {}, 0),
        ("9" * 400, "9", {"tolerance": 1e9}, 0),
        ("1e999", "1e999", {}, 0),
        ("2", "left lung", {}, 0),
    ],
)
def test_numeric(value, answer, gold, options, right):
    assert value("numeric", answer, gold, **options) == right


@pytest.mark.parametrize(
    ("answer", "gold", "match", "f1"),
    [
        ("left lung", "left lung", 1, 1),
        ("Left  Lung.", "left lung", 1, 1),
        ("lung left", "left lung", 0, 1),
        ("the left lung", "left lung", 0, 1),
        ("lung", "left lung", 0, 2 / 3),
        ("left left lung", "left lung", 0, 4 / 5),
        ("left right upper lower lung", "left lung", 0, 4 / 7),
        ("heart", "left lung", 0, 0),
        ("a", "A", 1, 1),
        ("cafe\u0301", "café", 1, 1),
        ("左肺", "左肺", 1, 1),
        ("右肺", "左肺", 0, 1 / 2),
        ("...", "left lung", 0, 0),
        ("...", "...", 1, 0),
    ],
)
def test_text_match_and_token_f1(value, answer, gold, match, f1):
    assert value("text_match", answer, gold) == match
    assert value("token_f1", answer, gold) == pytest.approx(f1)


ONE = (10.0, 20.0, 30.0, 40.0)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("[10, 20, 30, 40]", [ONE]),
        ("(10,20,30,40)", [ONE]),
        ("[10 20 30 40]", [ONE]),
        ("10, 20, 30, 40", [ONE]),
        ("(10,20),(30,40)", [ONE]),
        ("[[10, 20], [30, 40]]", [ONE]),
        ("<|box_start|>(10,20),(30,40)<|box_end|>", [ONE]),
        ("<box>[[10, 20, 30, 40]]</box>", [ONE]),
        ('```json\n[{"bbox_2d": [10, 20, 30, 40], "label": "mass 2"}]\n```', [ONE]),
        ("x1=10, y1=20, x2=30, y2=40", [ONE]),
        ("[10.0, 20.00, +30, 40.0]", [ONE]),
        ("[10,20,30,40] and [1,2,3,4]", [ONE, (1.0, 2.0, 3.0, 4.0)]),
        ("(10,20),(30,40),(1,2),(3,4)", [ONE, (1.0, 2.0, 3.0, 4.0)]),
        ("[-1,0,1,2]", [(-1.0, 0.0, 1.0, 2.0)]),
        ("10 20 30", []),
        ("10 20 30 40 50", []),
        ("[10,20,30]", []),
        ("no box", []),
    ],
)
def test_boxes_are_read_as_models_write_them(text, found):
    assert boxes(text) == found


@pytest.mark.parametrize(
    ("answer", "gold", "options", "score"),
    [
        ("[10,20,30,40]", "[10,20,30,40]", {}, 1),
        ("(10,20),(30,40)", "[10,20,30,40]", {}, 1),
        ("[0,0,2,1]", "[1,0,3,1]", {}, 1 / 3),
        ("[0,0,2,1]", "[1,0,3,1]", {"threshold": 0.5}, 0),
        ("[0,0,1,1]", "[5,5,6,6]", {}, 0),
        ("[0,0,1,1]", "[1,0,2,1]", {}, 0),  # they touch
        ("[3,0,1,1]", "[1,0,3,1]", {}, 0),  # corners swapped: no box
        ("[1,1,1,1]", "[1,0,3,1]", {}, 0),
        ("[0,0,2,1] [5,5,6,6]", "[0,0,2,1]", {}, 1 / 2),  # one box too many
        ("[0,0,2,1]", "[0,0,2,1] [5,5,6,6]", {}, 1 / 2),  # one too few
        ("[0,0,2,1] [0,0,2,1]", "[0,0,2,1] [5,5,6,6]", {}, 1 / 2),  # each gold box counts once
        ("[5,5,6,6] [0,0,2,1]", "[0,0,2,1] [5,5,6,6]", {}, 1),
        ("[0,0,2,1] " * 33, "[0,0,2,1]", {}, 0),
        ("[0,0,1" + "0" * 400 + ",1]", "[0,0,2,1]", {}, 0),
        ("here", "[0,0,2,1]", {}, 0),
        ("[0,0,2,1]", "left lung", {}, 0),
        ("[0,0,2,1]", "[2,0,0,1]", {}, 0),
    ],
)
def test_box_iou(value, answer, gold, options, score):
    assert value("box_iou", answer, gold, **options) == pytest.approx(score)


@pytest.mark.parametrize(
    ("characters", "score"),
    [(0, 0), (768, 0), (769, -1 / 256), (896, -0.5), (1024, -1), (9999, -1)],
)
def test_length_falls_from_0_to_minus_1_within_the_margin(make_prompt, characters, score):
    judge = make_judge("length", {})
    assert judge(NO_THINK, make_prompt(), "x" * characters) == score


@pytest.mark.parametrize(
    ("completion", "n", "score"),
    [
        ("", 3, 0),
        ("a b", 3, 0),
        ("a b c", 3, 0),
        ("a b c d e f", 3, 0),
        ("a a a a a", 3, -2 / 3),  # 3 runs, all the same
        ("a b a b a b", 2, -3 / 5),
        ("A, a! a?", 1, -2 / 3),
        ("肺肺肺", 1, -2 / 3),
    ],
)
def test_repetition_is_minus_the_share_of_repeated_runs(make_prompt, completion, n, score):
    judge = make_judge("repetition", {"n": n})
    assert judge(NO_THINK, make_prompt(), completion) == pytest.approx(score)


GOLD = {"yes_no": "yes", "numeric": "5", "box_iou": "[1,2,3,4]"}


@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.parametrize(
    "completion",
    ["{}", "<answer>{}", "<answer>{}</answer><answer>x</answer>", "<think><answer>{}</answer>"],
)
def test_answers_come_from_the_only_answer_tag(make_prompt, name, completion):
    gold = GOLD.get(name, "left lung")
    prompt = make_prompt(gold, options=())
    judge = make_judge(name, {})
    assert judge(THINK_BEFORE, prompt, f"<answer>{gold}</answer>") == 1.0
    refused = judge(THINK_BEFORE, prompt, completion.format(gold))
    assert isinstance(refused, Score)
    assert (refused.total, refused.failed) == (0.0, False)
    assert refused.reason


@pytest.mark.parametrize(
    ("use", "options", "problem"),
    [
        ("numeric", {"tolerence": 1}, "reward numeric: unknown option 'tolerence'; known: toler"),
        ("numeric", {"tolerance": "x"}, "reward numeric: option tolerance: got 'x', needs a num"),
        ("numeric", {"tolerance": True}, "option tolerance: got True, needs a number"),
        ("numeric", {"tolerance": float("nan")}, "option tolerance: got nan, needs a number"),
        ("numeric", {"tolerance": 10**400}, "needs a number"),
        ("numeric", {"tolerance": -1}, "need to be 0 or more, got {'tolerance': -1}"),
        ("box_iou", {"threshold": 2}, "threshold needs to be between 0 and 1"),
        ("length", {"longest": 1.5}, "option longest: got 1.5, needs an integer"),
        ("length", {"longest": 10}, "margin needs to be between 1 and longest (10)"),
        ("repetition", {"n": 0}, "n needs to be between 1 and 100"),
        ("repetition", {"n": 10**9}, "n needs to be between 1 and 100"),
        ("yes_no", {"x": 1}, "unknown option 'x'; known: it has none"),
        ("accuracy", {"policy": "lenient"}, "reward accuracy: takes no options"),
        ("hostile_rewards:length", {"x": 1}, "and takes the options x"),
    ],
)
def test_wrong_options_are_the_users_mistake(use, options, problem):
    for resolve in (build_rewards, lambda terms, mode: check_rewards(terms, mode, [])):
        with pytest.raises(UserError, match=re.escape(problem)):
            resolve([PlainTerm(use, options=options)], "no-think")


def test_options_reach_the_rewards_process(make_prompt):
    terms = (
        RewardTerm(use="numeric", options={"tolerance": 1}),
        RewardTerm(use="hostile_rewards:scaled", options={"by": 3}),
        RewardTerm(use="length", weight=2.0, options={"longest": 10, "margin": 10}),
    )
    with RewardPool(terms, "no-think", 1, 5.0) as pool:
        (score,) = pool.score_pairs([(make_prompt("5", options=()), "<answer>6</answer>")])
    assert score.components == {"numeric": 1.0, "scaled": 54.0, "length": -1.0}
    assert score.total == 53.0


@pytest.mark.parametrize("name", ANSWERS)
def test_the_check_refuses_a_reward_for_another_kind_of_answer(make_prompt, name):
    """It would be 0 for ever, and the run would look like a model that learns nothing."""
    gold, other = GOLD.get(name, "left lung"), {"yes_no": "5"}.get(name, "yes")
    prompts = [make_prompt(gold, options=()), make_prompt(other, options=(), id="row-2")]
    check_rewards([PlainTerm(name)], "no-think", prompts)  # one of its kind is enough
    if name not in ("text_match", "token_f1"):  # these two take any text
        with pytest.raises(UserError, match=f"reward {name}: gives 1 to none of the first 1 gold"):
            check_rewards([PlainTerm(name)], "no-think", prompts[1:])


def test_every_built_in_reward_is_named_in_the_schema():
    said = RewardTerm.model_fields["use"].description
    assert all(f"`{name}`" in said for name in BUILT_IN)
