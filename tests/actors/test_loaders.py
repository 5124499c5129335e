"""Weights get where vLLM's own loaders would put them, by plan where that is possible."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Event
from typing import Any

import pytest
import torch
from conftest import Live
from reference import request
from torch import Tensor, nn
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.model_loader.reload import record_metadata_for_reloading

from medrl.actors.copy_plan import Copy, Part, Place, record
from medrl.actors.loaders import PlannedLoader, _dealt
from medrl.actors.types import WeightMeta

pytestmark = pytest.mark.engines
with_engines = pytest.mark.asyncio(loop_scope="session")


async def loader_of(live: Live, forget: bool = False, layerwise: bool = False) -> str:
    """The name of its class, in vLLM's worker; before that, perhaps, take it away."""

    def ask(worker: object) -> str:
        from medrl.actors.loaders import LayerwiseLoader

        receiver = worker.weight_transfer_engine  # type: ignore[attr-defined]
        if forget:
            receiver._loader = None
        if layerwise:
            receiver._loader = LayerwiseLoader(
                receiver.model, receiver.model_config, receiver.device
            )
        return type(receiver._loader).__name__

    (name,) = await live.engine._llm.collective_rpc(ask)
    return str(name)


@with_engines
async def test_every_family_is_loaded_by_plan(live: Live) -> None:
    await live.push()
    assert await loader_of(live) == PlannedLoader.__name__


@with_engines
async def test_vllms_own_reload_and_the_plan_give_the_same_model(live: Live) -> None:
    """To the last bit; and a plan can be made after vLLM's reload, which leaves its marks."""
    model, asked = live.reference.model, request(n=1, temperature=0.0)
    live.reference.change("", 0.05)
    wanted = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        await loader_of(live, layerwise=True)
        await live.push()
        layerwise = await live.generate(asked)
        await loader_of(live, forget=True)
        live.reference.change("", 0.05)
        await live.push()
        other = await live.generate(asked)
        model.load_state_dict(wanted)
        await live.push()
        planned = await live.generate(asked)
    finally:
        await loader_of(live, forget=True)
    assert live.gap(planned) < 1e-4
    assert [one.logprobs for one in planned.completions] == [
        one.logprobs for one in layerwise.completions
    ]
    assert [one.logprobs for one in other.completions] != [
        one.logprobs for one in layerwise.completions
    ]


class Model(nn.Module):
    """Loads its one weight as it is told."""

    def __init__(self, loader: Callable[[Tensor, Tensor], None]) -> None:
        super().__init__()
        self.kept = nn.Parameter(torch.zeros(4, 2), requires_grad=False)
        self.kept.weight_loader = loader  # type: ignore[attr-defined]
        record_metadata_for_reloading(self)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        for _, weight in weights:
            self.kept.weight_loader(self.kept, weight)  # type: ignore[operator]


def ignore(name: str, weight: Tensor) -> None:
    """For tests in which nobody takes a digest."""


SHAPE = WeightMeta(name="w", dtype="float32", shape=(2, 2))


def lower_half(parameter: Tensor, weight: Tensor) -> None:
    parameter.data.narrow(0, 2, 2).copy_(weight.t())


def test_a_weight_goes_where_the_loader_put_it_and_nowhere_else() -> None:
    model = Model(lower_half)
    plan = record(model, [SHAPE])
    assert plan is not None
    assert not model.kept.any()  # recording changes nothing
    bucket = torch.arange(6.0)  # the weight is a view that begins later
    loader = PlannedLoader(model, plan)
    for _ in range(2):
        loader.begin()
        loader.load([("w", bucket[2:].view(2, 2))], ignore)
        loader.end()
    assert model.kept.tolist() == [[0, 0], [0, 0], [2, 4], [3, 5]]


class Halves(nn.Module):
    """Loads each of its weights into a half of one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = nn.Parameter(torch.zeros(2, 4), requires_grad=False)
        record_metadata_for_reloading(self)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        for name, weight in weights:
            self.kept.data[int(name)].copy_(weight)


def loader_of_halves() -> tuple[Halves, PlannedLoader]:
    model = Halves()
    plan = record(model, [WeightMeta(name=name, dtype="float32", shape=(4,)) for name in "01"])
    assert plan is not None
    return model, PlannedLoader(model, plan)


def test_a_weight_may_change_once_the_next_was_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not before, for loading goes on meanwhile."""
    (model, loader), fill = loader_of_halves(), PlannedLoader._fill

    def late(*arguments: Any) -> None:
        time.sleep(0.1)
        fill(*arguments)

    monkeypatch.setattr(PlannedLoader, "_fill", late)
    first, second = torch.full((4,), 1.0), torch.full((4,), 2.0)
    loader.begin()
    loader.load([("0", first)], ignore)
    loader.load([("1", second)], ignore)
    first.fill_(9.0)
    loader.end()
    assert model.kept.tolist() == [[1.0] * 4, [2.0] * 4]


def test_an_update_that_broke_off_is_over_before_the_next_begins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (_, loader), fill, gate = loader_of_halves(), PlannedLoader._fill, Event()

    def held(*arguments: Any) -> None:
        assert gate.wait(30)
        fill(*arguments)

    monkeypatch.setattr(PlannedLoader, "_fill", held)
    loader.begin()
    loader.load([("0", torch.ones(4))], ignore)
    with ThreadPoolExecutor(1) as threads:
        beginning = threads.submit(loader.begin)
        with pytest.raises(TimeoutError):
            beginning.result(timeout=0.2)
        gate.set()
        beginning.result()


@pytest.mark.parametrize("told_by", ["the next load", "the end"])
def test_a_weight_that_cannot_be_loaded_ends_the_update(told_by: str) -> None:
    _, loader = loader_of_halves()
    loader.begin()
    loader.load([("0", torch.ones(2))], ignore)
    with pytest.raises(RuntimeError):
        loader.load([("1", torch.ones(4))], ignore) if told_by == "the next load" else loader.end()


def rows_apart(parameter: Tensor, weight: Tensor) -> None:
    for row, part in zip((0, 2), weight, strict=True):
        parameter.data[row].copy_(part)


def test_each_weight_is_told_of_once_before_it_is_loaded() -> None:
    """Wherever its parts go: what is told takes its digest."""
    model, told = Model(rows_apart), []
    plan = record(model, [SHAPE])
    assert plan is not None
    assert len(plan["w"]) == 2

    def note(name: str, weight: Tensor) -> None:
        told.append((name, weight.tolist(), model.kept.tolist()))

    loader = PlannedLoader(model, plan)
    loader.begin()
    loader.load([("w", torch.ones(2, 2))], note)
    loader.end()
    assert told == [("w", [[1, 1], [1, 1]], [[0, 0]] * 4)]
    assert model.kept.tolist() == [[1, 1], [0, 0], [1, 1], [0, 0]]


def doubled(parameter: Tensor, weight: Tensor) -> None:
    parameter.data[:2].copy_(2 * weight)


def looked_at(parameter: Tensor, weight: Tensor) -> None:
    if weight.max().item() > 0:
        parameter.data[:2].copy_(weight)


def replaced(parameter: Tensor, weight: Tensor) -> None:
    parameter.data = weight


def added_to(parameter: Tensor, weight: Tensor) -> None:
    parameter.data[:2].copy_(weight)
    parameter.data.add_(1)


def as_numpy(parameter: Tensor, weight: Tensor) -> None:
    parameter.data[:2].copy_(torch.from_numpy(weight.numpy()))


def as_another_type(parameter: Tensor, weight: Tensor) -> None:
    parameter.data[:2].copy_(weight.view(torch.int32))


def twice(parameter: Tensor, weight: Tensor) -> None:
    for _ in range(2):
        parameter.data[:2].copy_(weight)


@pytest.mark.parametrize(
    "loader", [doubled, looked_at, replaced, added_to, as_numpy, as_another_type, twice]
)
def test_what_is_more_than_a_copy_is_left_to_vllm(loader: Callable[..., None]) -> None:
    model = Model(loader)
    assert record(model, [SHAPE]) is None
    assert model.kept.tolist() == [[0, 0]] * 4


class Packed(nn.Module):
    """A linear layer as vLLM leaves it: a packed copy, and a weight without elements."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(0), requires_grad=False)

    def matrix(self) -> list[list[float]]:
        """What it computes with, [4, 2]."""
        rows: Tensor = self.cpu_linear(torch.eye(2), None, None).t()
        return rows.tolist()


def loader_of_rows(layer: Packed) -> PlannedLoader:
    """Weights `a` and `b`, [2, 2], are its upper and its lower rows."""
    place = Place(layer=layer, name="weight", shape=torch.Size([4, 2]))
    whole, half = (torch.empty(rows, 2, device="meta") for rows in (4, 2))
    return PlannedLoader(
        layer,
        {
            name: [Copy(source=Part.of(half), place=place, target=Part.of(rows))]
            for name, rows in zip("ab", whole.split(2), strict=True)
        },
    )


JOINED = [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_weights_that_are_joined_are_packed_from_where_they_lie_side_by_side(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer, told = Packed(), []
    loader = loader_of_rows(layer)
    monkeypatch.setattr(loader, "_gather", None)  # which would copy them first
    bucket = torch.arange(-3.0, 8.0)
    weights = {"b": bucket[7:].view(2, 2), "a": bucket[3:7].view(2, 2)}
    loader.begin()
    loader.load(list(weights.items()), lambda name, weight: told.append(name))
    loader.end()
    assert layer.matrix() == JOINED
    assert sorted(told) == ["a", "b"]


@pytest.mark.parametrize("how", ["apart", "in other order", "in another memory", "one by one"])
def test_weights_that_are_joined_are_copied_where_they_lie_otherwise(how: str) -> None:
    a, b = torch.arange(4.0), torch.arange(4.0, 8.0)
    if how == "apart":
        a, _, b = torch.cat([a, torch.zeros(1), b]).split([4, 1, 4])
    if how == "in other order":
        b, a = torch.cat([b, a]).split(4)
    if how == "in another memory":  # as far into it as it would be into the first one's
        b = torch.cat([torch.zeros(4), b])[4:]
    layer = Packed()
    loader = loader_of_rows(layer)
    loader.begin()
    weights = [("a", a.view(2, 2)), ("b", b.view(2, 2))]
    for some in [[one] for one in weights] if how == "one by one" else [weights]:
        loader.load(some, ignore)
    loader.end()
    assert layer.matrix() == JOINED


def test_a_weight_that_is_turned_or_cut_does_not_lie_as_it_will() -> None:
    """A square one, whose shape does not tell."""
    weight = torch.empty(2, 2, device="meta")
    place = Place(layer=nn.Module(), name="w", shape=weight.shape)
    straight = Copy(source=Part.of(weight), place=place, target=Part.of(weight))
    assert straight.shift == 0
    assert replace(straight, source=Part.of(weight.t())).shift is None
    assert replace(straight, target=Part.of(weight.t())).shift is None
    row, column = Part.of(weight[1]), Part.of(weight[:, 1])
    assert replace(straight, source=row, target=Part.of(weight[0])).shift == 2
    assert replace(straight, source=column, target=row).shift is None


def test_threads_have_as_much_to_do() -> None:
    """However unlike places are: choosing a layout takes as long for small ones as for large."""
    shapes = [(1000, 1000), *[(10, 10)] * 4, (1200, 1000)]
    places = [Place(layer=Packed(), name="weight", shape=torch.Size(shape)) for shape in shapes]
    threads = _dealt(places, 2)
    assert Counter(threads.values()) == {0: 3, 1: 3}
    assert threads[places[0]] != threads[places[-1]]


def test_a_layer_of_another_kind_is_left_to_vllm() -> None:
    model = Model(lower_half)
    model.quant_method = object()  # packs, scales or what not
    assert record(model, [SHAPE]) is None


def test_a_parameter_that_lies_otherwise_since_is_left_to_vllm() -> None:
    model = Model(lower_half)
    model.kept.data = torch.zeros(2, 4).t()
    assert record(model, [SHAPE]) is None


def test_parameters_that_are_one_since_are_left_to_vllm() -> None:
    """What is loaded last would win, whichever that is."""
    model = nn.Module()
    for name in "ab":
        layer = Model(lower_half)
        layer.load_weights = None  # type: ignore[assignment]
        model.add_module(name, layer)

    def load_weights(weights: Iterable[tuple[str, Tensor]]) -> None:
        for name, weight in weights:
            lower_half(model.get_parameter(f"{name}.kept"), weight)

    model.load_weights = load_weights  # type: ignore[assignment]
    shapes = [replace(SHAPE, name=name) for name in "ab"]
    assert record(model, shapes) is not None
    model.b.kept.data = model.a.kept.data  # type: ignore[union-attr]
    assert record(model, shapes) is None


def test_a_layer_packed_by_a_kind_of_what_is_known_is_left_to_vllm() -> None:
    """A class made of a known one may do more than it."""
    model = Model(lower_half)
    model.quant_method = UnquantizedLinearMethod()
    assert record(model, [SHAPE]) is not None
    model.quant_method = type("Other", (UnquantizedLinearMethod,), {})()
    assert record(model, [SHAPE]) is None
