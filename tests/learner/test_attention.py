"""Attention of shared rows is plain softmax over what each token may see, gradients included."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from medrl.learner import attention, attention_cpu
from medrl.learner.attention import Layout

HEADS, SIZE, SCALE = 4, 8, 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """What attention is given: states [B, N, heads, D] of 8 byte floats, and how they lie."""

    prompts: tuple[int, ...]  # lengths, B
    slots: int = 3
    length: int = 7
    key_heads: int = 2

    @property
    def layout(self) -> Layout:
        return Layout(
            prompt_lengths=torch.tensor(self.prompts),
            prompt=max(self.prompts),
            slots=self.slots,
            length=self.length,
        )

    @property
    def states(self) -> list[Tensor]:
        """Query, key and value, as projections of a layer leave them."""
        torch.manual_seed(0)
        tokens = max(self.prompts) + self.slots * self.length
        return [
            torch.randn(len(self.prompts), tokens, heads, SIZE, dtype=torch.float64)
            for heads in (HEADS, self.key_heads, self.key_heads)
        ]

    @property
    def seen(self) -> Tensor:
        """[B, N, N] bool: token by token, what a row's definition says that it sees."""
        prompt, tokens = max(self.prompts), max(self.prompts) + self.slots * self.length

        def sees(length: int, this: int, other: int) -> bool:
            if other < prompt:  # a completion does not see the padding of its prompt
                return other <= this and (this < prompt or other < length)
            same = (this - prompt) // self.length == (other - prompt) // self.length
            return same and other <= this

        return torch.tensor(
            [
                [[sees(length, i, j) for j in range(tokens)] for i in range(tokens)]
                for length in self.prompts
            ]
        )


ROWS = {
    "grouped heads": Rows(prompts=(13,)),
    "a key head a query head": Rows(prompts=(13,), key_heads=HEADS),
    "one key head": Rows(prompts=(13,), key_heads=1),
    "two rows": Rows(prompts=(13, 13)),
    "prompts of two lengths": Rows(prompts=(13, 5)),
    "one completion": Rows(prompts=(13, 1, 6), slots=1),
    "eight completions": Rows(prompts=(5, 9), slots=8),
    "one token": Rows(prompts=(9, 4), length=1),
    "least": Rows(prompts=(1,), slots=1, length=1),
    "several blocks of the kernel": Rows(prompts=(70, 67), slots=2, length=67),
    "long": Rows(prompts=(530, 3), slots=2, length=270),
}
Attention = Callable[..., Tensor]


def dense(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
    """[B, N, H, D] each: every score, a mask, a softmax."""
    repeats = query.shape[2] // key.shape[2]
    key, value = (x.repeat_interleave(repeats, dim=2) for x in (key, value))
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * SCALE
    weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, value)


def ours(query: Tensor, key: Tensor, value: Tensor, layout: Layout, dropout: float = 0.0) -> Tensor:
    states = (x.transpose(1, 2) for x in (query, key, value))
    return attention.shared_prompt_attention(
        torch.nn.Identity(), *states, None, dropout, SCALE, **{attention.LAYOUT: layout}
    )[0]


def with_gradients(attend: Attention, states: list[Tensor], *rest: object) -> list[Tensor]:
    """The output, and the gradients of query, key and value for a random one of the output."""
    leaves = [x.detach().clone().requires_grad_() for x in states]
    out = attend(*leaves, *rest)
    torch.manual_seed(1)
    out.backward(torch.randn(out.shape, dtype=torch.float64).to(out.dtype))
    return [out.detach(), *(x.grad for x in leaves if x.grad is not None)]


@pytest.fixture(params=["kernel", "masks"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """That of the CPU, and that of all other devices."""
    if request.param == "masks":
        monkeypatch.setattr(attention_cpu, "takes", lambda *states: False)
    return str(request.param)


def same(got: list[Tensor], want: list[Tensor], within: float) -> None:
    assert len(got) == len(want) == 4
    for one, other in zip(got, want, strict=True):
        assert (one.double() - other).norm() <= within * other.norm()


@pytest.mark.parametrize("name", ROWS)
def test_it_is_softmax_over_what_is_seen(name: str, way: str) -> None:
    rows = ROWS[name]
    want = with_gradients(dense, rows.states, rows.seen)
    same(with_gradients(ours, rows.states, rows.layout), want, 1e-13)


@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("name", ["prompts of two lengths", "long"])
def test_fewer_bits_are_as_near_as_they_can_be(
    name: str, dtype: torch.dtype, within: float, way: str
) -> None:
    rows = ROWS[name]
    states = [x.to(dtype) for x in rows.states]
    want = with_gradients(dense, [x.double() for x in states], rows.seen)
    got = with_gradients(ours, states, rows.layout)
    assert {x.dtype for x in got} == {dtype}
    same(got, want, within)


def test_large_scores_of_either_part_neither_overflow_nor_vanish() -> None:
    """A token that sees almost only its prompt, or almost only its own completion."""
    rows = ROWS["grouped heads"]
    for of_prompt in (40.0, 0.025):
        states = rows.states
        states[0] *= 10
        states[1][:, :13] *= of_prompt
        want = with_gradients(dense, states, rows.seen)
        same(with_gradients(ours, states, rows.layout), want, 1e-12)


@pytest.mark.parametrize("name", ["prompts of two lengths", "grouped heads"])
def test_activations_computed_again_and_no_gradients_give_the_same(name: str) -> None:
    """Bit by bit: gradient checkpointing, and scoring beside training."""
    rows = ROWS[name]

    def again(*states: object) -> Tensor:
        out: Tensor = checkpoint(ours, *states, use_reentrant=False)
        return out

    want = with_gradients(ours, rows.states, rows.layout)
    for got in (again, ours):
        pairs = zip(with_gradients(got, rows.states, rows.layout), want, strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
    with torch.no_grad():
        assert torch.equal(ours(*rows.states, rows.layout), want[0])


def test_a_tensor_that_needs_no_gradient_gets_none() -> None:
    query, key, value = ROWS["grouped heads"].states
    ours(query, key, value.requires_grad_(), ROWS["grouped heads"].layout).sum().backward()
    assert query.grad is None
    assert value.grad is not None


def test_states_that_the_kernel_would_misread_are_attended_to_all_the_same() -> None:
    """In memory [B, N, D, heads], say: no entry of a head beside the next."""
    rows = ROWS["prompts of two lengths"]
    strided = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in rows.states]
    want = dense(*rows.states, rows.seen)
    torch.testing.assert_close(ours(*strided, rows.layout), want)


def test_dropout_drops() -> None:
    rows = ROWS["grouped heads"]
    torch.manual_seed(0)
    with_dropout = ours(*rows.states, rows.layout, 0.5)
    assert not torch.allclose(with_dropout, ours(*rows.states, rows.layout))


def test_a_row_without_its_layout_is_refused() -> None:
    state = torch.zeros(1, 1, 2, SIZE)
    with pytest.raises(ValueError, match="shared_prompt_layout"):
        attention.shared_prompt_attention(torch.nn.Identity(), state, state, state, None)
