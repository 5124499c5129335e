"""What every rank runs: nothing lost, nothing split, everybody in step."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from medrl.learner.rows import GroupSize, MicroBatch, plan_rows


def group(prompt: int, lengths: list[int], images: int = 0) -> GroupSize:
    return GroupSize(prompt=prompt, completions=tuple(enumerate(lengths)), images=images)


def tokens_of(micro_batch: MicroBatch, sizes: list[GroupSize]) -> int:
    """As the tensors will be: rows times (longest prompt + slots times longest completion)."""
    rows = micro_batch.rows
    if not rows:
        return 0
    lengths = [dict(sizes[row.group].completions)[i] for row in rows for i in row.completions]
    slots = max(len(row.completions) for row in rows)
    return len(rows) * (max(sizes[row.group].prompt for row in rows) + slots * max(lengths))


groups = st.builds(
    group,
    st.integers(1, 300),
    st.lists(st.integers(1, 60), min_size=0, max_size=8),
    st.integers(0, 2),
)


@given(st.lists(groups, max_size=12), st.integers(1, 4), st.integers(1, 3000))
@settings(deadline=None, max_examples=200)
def test_plan(sizes: list[GroupSize], world: int, budget: int) -> None:
    plan = plan_rows(sizes, world=world, budget=budget)
    assert plan == plan_rows(sizes, world=world, budget=budget)

    # Every rank runs the same number of micro-batches, and the tower in the same ones.
    assert len(plan.ranks) == world
    assert len({len(mine) for mine in plan.ranks}) == 1
    assert plan.ranks[0], "a step needs a backward pass"
    for column in zip(*plan.ranks, strict=True):
        seen = [any(sizes[row.group].images for row in one.rows) for one in column]
        assert {one.vision for one in column} == {any(seen)}

    # Every trained completion once, and a group in one micro-batch only.
    placed: dict[int, list[int]] = {}
    where: dict[int, set[tuple[int, int]]] = {}
    for rank, mine in enumerate(plan.ranks):
        for number, one in enumerate(mine):
            for row in one.rows:
                placed.setdefault(row.group, []).extend(row.completions)
                where.setdefault(row.group, set()).add((rank, number))
    want = {i: [at for at, _ in size.completions] for i, size in enumerate(sizes)}
    assert placed == {i: all_of for i, all_of in want.items() if all_of}
    assert all(len(places) == 1 for places in where.values())

    # The budget counts padding; only a group that is too large by itself goes beyond it.
    total = 0
    for mine in plan.ranks:
        for one in mine:
            total += tokens_of(one, sizes)
            if tokens_of(one, sizes) > budget:
                assert len({row.group for row in one.rows}) == 1
    assert plan.tokens == total


def test_a_group_is_one_row_where_sharing_pays_and_padded_rows_where_not() -> None:
    # 8 * (100 + 20) / (100 + 8 * 20) = 3.7; 4 * 10 + 200 over 10 + 4 * 194: far below 1.3
    pays, does_not = group(100, [20] * 8), group(10, [194, 2, 2, 2])
    plan = plan_rows([pays, does_not], world=1, budget=10_000)
    rows = [row for one in plan.ranks[0] for row in one.rows]
    assert [row.completions for row in rows if row.group == 0] == [tuple(range(8))]
    assert [row.completions for row in rows if row.group == 1] == [(0,), (1,), (2,), (3,)]


def test_ranks_get_about_the_same_number_of_tokens() -> None:
    sizes = [group(50 + 10 * i, [10 + i] * 4) for i in range(16)]
    plan = plan_rows(sizes, world=2, budget=400)
    loads = [sum(tokens_of(one, sizes) for one in mine) for mine in plan.ranks]
    assert max(loads) / min(loads) < 1.15


def test_sharing_is_the_ratio_of_tokens() -> None:
    plan = plan_rows([group(100, [20] * 8)], world=1, budget=10_000)
    assert plan.sharing == 8 * 120 / (100 + 8 * 20)
