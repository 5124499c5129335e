"""The gloo transport without vLLM's engine: real sender, real receivers, real sockets."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from medrl.actors.gloo_receiver import GlooReceiver
from medrl.actors.lane import SLOTS, Lane
from medrl.actors.loaders import Note
from medrl.actors.types import Sent, SyncPlan, WeightMeta
from medrl.actors.wire import (
    ALIGNMENT,
    buffer_bytes,
    decode_ipc_handle,
    digest,
    encode_ipc_handle,
    split_buckets,
    views,
)
from medrl.configs.errors import WeightSyncError
from medrl.learner.transports import GlooSender, open_sender
from medrl.learner.weight_source import ModuleSource

pytestmark = pytest.mark.engines  # imports vLLM


def module(seed: int = 0) -> nn.Module:
    """Odd shapes and two types, so that nothing is aligned by luck."""
    generator = torch.Generator().manual_seed(seed)
    holder = nn.Module()
    for number, (shape, dtype) in enumerate(
        [((3,), torch.bfloat16), ((7, 5), torch.float32), ((1,), torch.bfloat16), ((40, 33), None)]
    ):
        value = torch.randn(shape, generator=generator).to(dtype or torch.float32)
        holder.register_parameter(f"w{number}", nn.Parameter(value))
    return holder


class Loaded:
    """A loader of no model: keeps what it is given."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}

    def begin(self) -> None:
        self.tensors = {}

    def load(self, weights: Sequence[tuple[str, torch.Tensor]], note: Note) -> None:
        for name, tensor in weights:
            note(name, tensor)
            self.tensors[name] = tensor.clone()

    def end(self) -> None: ...


class LoadedLate(Loaded):
    """Takes as long as a loader may: until the next bucket is handed over, and all of that time."""

    def begin(self) -> None:
        super().begin()
        self._last: Sequence[tuple[str, torch.Tensor]] = ()

    def load(self, weights: Sequence[tuple[str, torch.Tensor]], note: Note) -> None:
        time.sleep(0.005)
        super().load(self._last, note)
        self._last, self._note = weights, note

    def end(self) -> None:
        super().load(self._last, self._note)


def receiver(kind: type[Loaded] = Loaded) -> tuple[GlooReceiver, Loaded]:
    loaded = kind()
    config = SimpleNamespace(parallel_config=SimpleNamespace(rank=0), model_config=None)
    one = GlooReceiver(None, config, torch.device("cpu"), None)
    one._loader = loaded
    return one, loaded


def plan(
    engines: int, *, bucket_bytes: int = 256, timeout_s: float = 10.0, share_memory: bool = True
) -> SyncPlan:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return SyncPlan(
        transport="gloo",
        address="127.0.0.1",
        port=port,
        world_size=1 + engines,
        bucket_bytes=bucket_bytes,
        timeout_s=timeout_s,
        share_memory=share_memory,
    )


def join(one: GlooReceiver, agreed: SyncPlan, rank: int) -> None:
    info = asdict(agreed) | {"rank": rank}
    del info["transport"], info["share_memory"]
    one.init_transfer_engine(one.parse_init_info(info))


def update_info(weights: Sequence[WeightMeta], path: Path) -> dict[str, Any]:
    return {
        "names": [meta.name for meta in weights],
        "dtype_names": [meta.dtype for meta in weights],
        "shapes": [list(meta.shape) for meta in weights],
        "digests_path": str(path),
    }


def transfer(
    sent_from: nn.Module,
    folder: Path,
    *,
    bucket_bytes: int,
    share_memory: bool = True,
    laid_out: bool = False,
    kind: type[GlooSender] = GlooSender,
    loader: type[Loaded] = Loaded,
) -> tuple[Sent, list[Loaded], list[dict[str, str]]]:
    """From one sender to two receivers, twice: a group serves many pushes."""
    agreed = plan(2, bucket_bytes=bucket_bytes, share_memory=share_memory)
    source = ModuleSource(sent_from)
    if laid_out:
        source.lay_out()
    pairs = [receiver(loader), receiver(loader)]
    paths = [folder / "a.json", folder / "b.json"]
    with ThreadPoolExecutor(3) as threads:
        joins = [
            threads.submit(join, one, agreed, rank) for rank, (one, _) in enumerate(pairs, start=1)
        ]
        sender = kind(agreed, 0, source)
        for joined in joins:
            joined.result()
        assert {one._lane.shares_memory for one, _ in pairs if one._lane} == {share_memory}
        for _ in range(2):
            sending = threads.submit(sender.send)
            receiving = [
                threads.submit(one.update_weights, update_info(source.metadata(), path))
                for (one, _), path in zip(pairs, paths, strict=True)
            ]
            for future in receiving:
                future.result()
            sent = sending.result()
        sender.close()
    return (
        sent,
        [loaded for _, loaded in pairs],
        [json.loads(Path(f"{path}.0").read_text()) for path in paths],
    )


@pytest.mark.parametrize("laid_out", [True, False], ids=["laid out", "anywhere"])
@pytest.mark.parametrize("share_memory", [True, False])
@pytest.mark.parametrize("bucket_bytes", [1, 256, 10**6], ids=["a tensor each", "some", "one"])
def test_every_engine_gets_every_tensor_bit_for_bit(
    bucket_bytes: int, share_memory: bool, laid_out: bool, tmp_path: Path
) -> None:
    original = module()
    sent, models, digests = transfer(
        original,
        tmp_path,
        bucket_bytes=bucket_bytes,
        share_memory=share_memory,
        laid_out=laid_out,
    )
    assert sent.tensors == 4
    assert sent.bytes == 3 * 2 + 35 * 4 + 1 * 2 + 40 * 33 * 4
    for loaded, received in zip(models, digests, strict=True):
        assert received == sent.digests
        for name, parameter in original.named_parameters():
            assert loaded.tensors[name].dtype == parameter.dtype
            assert torch.equal(loaded.tensors[name], parameter)


@pytest.mark.parametrize("share_memory", [True, False])
def test_a_slow_engine_gets_what_a_quick_one_gets(share_memory: bool, tmp_path: Path) -> None:
    """Of more buckets than there is memory for."""
    original = nn.Module()
    for number in range(4 * SLOTS):
        value = torch.full((3,), float(number))
        original.register_parameter(f"w{number}", nn.Parameter(value))
    _, models, _ = transfer(
        original, tmp_path, bucket_bytes=1, share_memory=share_memory, loader=LoadedLate
    )
    for loaded in models:
        for name, parameter in original.named_parameters():
            assert torch.equal(loaded.tensors[name], parameter), name


def test_laying_weights_out_changes_none_of_them() -> None:
    """They train on there, ties and types as they were."""
    model, untouched = module(), module()
    model.register_parameter("tied", model.w1)
    source = ModuleSource(model)
    source.lay_out()
    assert model.tied is model.w1
    assert all(map(torch.equal, model.parameters(), untouched.parameters()))
    memory = source.memory()
    assert memory is not None
    assert memory.size == buffer_bytes(source.metadata())
    sum(one.float().sum() for one in model.parameters()).backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    lying = views(source.metadata(), memory.part(0, memory.size))
    assert all(map(torch.equal, lying, model.parameters()))
    assert not torch.equal(model.w1, untouched.w1)


def flattened(*sizes: int, beyond: int = 0) -> tuple[nn.Module, torch.Tensor]:
    """As DeepSpeed has parameters from ZeRO 1 on: parts of one tensor, which goes on `beyond`; its
    order is not the module's."""
    flat = torch.arange(float(sum(sizes) + beyond))
    model = nn.Module()
    model.register_parameter("lone", nn.Parameter(torch.randn(5)))
    for number, part in reversed([*enumerate(torch.split(flat[: sum(sizes)], sizes))]):
        model.register_parameter(f"w{number}", nn.Parameter(part))
    return model, flat


def test_weights_in_one_storage_move_together_and_are_sent_as_they_lie() -> None:
    model, flat = flattened(16, 32, 7)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    source = ModuleSource(model)
    source.lay_out()
    memory = source.memory()
    assert memory is not None
    names = [meta.name for meta in source.metadata()]
    assert names == ["lone", "w0", "w1", "w2"]
    flat += 1  # what DeepSpeed writes there reaches the parameters, and whoever maps the memory
    lying = views(source.metadata(), memory.part(0, memory.size))
    for name, value in zip(names, lying, strict=True):
        assert torch.equal(value, model.get_parameter(name))
        assert torch.equal(value, before[name] + (name != "lone"))


@pytest.mark.parametrize(
    ("sizes", "beyond"), [((15, 16), 0), ((16, 16), 3)], ids=["not aligned", "with more behind"]
)
def test_weights_that_lie_otherwise_than_in_a_bucket_stay_and_are_copied(
    sizes: tuple[int, ...], beyond: int
) -> None:
    model, flat = flattened(*sizes, beyond=beyond)
    source = ModuleSource(model)
    weights = source.metadata()
    source.lay_out()
    assert source.memory() is None
    assert source.metadata() == weights
    assert model.w0.data_ptr() == flat.data_ptr()


def test_weights_that_were_moved_on_are_copied() -> None:
    model = module()
    source = ModuleSource(model)
    source.lay_out()
    assert source.memory() is not None
    model.w3.data = model.w3.data.clone()
    assert source.memory() is None


def test_weights_moved_on_under_an_open_group_still_arrive(tmp_path: Path) -> None:
    class MovedOn(GlooSender):
        def send(self) -> Sent:
            original.w1.data = original.w1.data + 1
            return super().send()

    original = module()
    sent, models, digests = transfer(
        original, tmp_path, bucket_bytes=1, laid_out=True, kind=MovedOn
    )
    for loaded, received in zip(models, digests, strict=True):
        assert received == sent.digests
        assert torch.equal(loaded.tensors["w1"], original.w1)


def test_what_an_engine_joins_is_sent_side_by_side() -> None:
    """Queries, keys and values have biases, which come after all three."""
    block = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("q_proj", "k_proj", "v_proj")})
    model = nn.ModuleDict({"norm": nn.LayerNorm(2), "attention": block})
    names = [meta.name for meta in ModuleSource(model).metadata()]
    assert names == [
        *("norm.weight", "norm.bias"),
        *(f"attention.{one}_proj.{kind}" for kind in ("weight", "bias") for one in "qkv"),
    ]


class FlipsOneBit(GlooSender):
    """Breaks the first byte of every bucket on its way."""

    def _pass_on(self, lane: Lane, number: int, slot: torch.Tensor) -> None:
        slot[0] ^= 1
        super()._pass_on(lane, number, slot)


def test_one_flipped_bit_shows_in_that_tensors_digest_alone(tmp_path: Path) -> None:
    sent, _, digests = transfer(module(), tmp_path, bucket_bytes=10**6, kind=FlipsOneBit)
    for received in digests:
        assert [name for name in sent.digests if received[name] != sent.digests[name]] == ["w0"]


def test_a_digest_is_of_bytes_and_sees_order() -> None:
    one = torch.tensor([1.0, 2.0, 3.0])
    assert digest(one) == digest(one.clone()) == digest(one.view(3, 1))
    assert digest(one) != digest(one.flip(0))
    assert digest(torch.tensor([0.0])) != digest(torch.tensor([-0.0]))


def test_buckets_hold_whole_tensors_in_order_and_respect_their_size() -> None:
    weights = ModuleSource(module()).metadata()
    buckets = list(split_buckets(weights, 256))
    assert [meta for bucket in buckets for meta in bucket] == list(weights)
    assert all(len(bucket) == 1 or buffer_bytes(bucket) <= 256 for bucket in buckets)
    bucket = list(weights)
    buffer = torch.zeros(buffer_bytes(bucket), dtype=torch.uint8)
    starts = [view.data_ptr() - buffer.data_ptr() for view in views(bucket, buffer)]
    assert starts == sorted(starts)
    assert all(start % ALIGNMENT == 0 for start in starts)


def test_an_engine_that_never_joins_is_named_before_long() -> None:
    began = time.monotonic()
    with pytest.raises(WeightSyncError, match=r"not all of 1 engine\(s\) joined .* within 1 s"):
        open_sender(plan(1, timeout_s=1.0), 0, ModuleSource(module()))
    assert time.monotonic() - began < 10


def test_an_engine_that_stops_receiving_ends_the_send_within_its_deadline(tmp_path: Path) -> None:
    big = nn.Module()
    big.register_parameter("w", nn.Parameter(torch.zeros(16 * 2**20)))  # more than sockets buffer
    agreed = plan(1, timeout_s=2.0)
    one, _ = receiver()
    with ThreadPoolExecutor(1) as threads:
        joining = threads.submit(join, one, agreed, 1)
        sender = open_sender(agreed, 0, ModuleSource(big))
        joining.result()
    began = time.monotonic()
    with pytest.raises(WeightSyncError, match=r"sending bucket 0 to 1 engine\(s\) failed"):
        sender.send()
    assert time.monotonic() - began < 10


def test_a_learner_that_stops_sending_ends_the_receiving_within_its_deadline(
    tmp_path: Path,
) -> None:
    agreed, source = plan(1, timeout_s=2.0), ModuleSource(module())
    one, _ = receiver()
    with ThreadPoolExecutor(1) as threads:
        joining = threads.submit(join, one, agreed, 1)
        sender = open_sender(agreed, 0, source)
        joining.result()
        sender.close()
        with pytest.raises(RuntimeError, match="bucket 0 from the learner"):
            one.update_weights(update_info(source.metadata(), tmp_path / "x.json"))
    assert not list(tmp_path.iterdir())  # nothing half-received is vouched for


def test_a_send_that_fails_ends_the_receiving_at_once(tmp_path: Path) -> None:
    """Not at the deadline: a peer of the sender died in gathering, say, and engines wait on."""

    class Broken(ModuleSource):
        def buckets(self, bucket_bytes: int) -> Iterator[Any]:
            yield next(super().buckets(bucket_bytes))
            raise RuntimeError("rank 1 hung up")

    agreed, source = plan(2, bucket_bytes=1, timeout_s=60.0), Broken(module())
    pairs = [receiver(), receiver()]
    began = time.monotonic()
    with ThreadPoolExecutor(3) as threads:
        joins = [threads.submit(join, one, agreed, n) for n, (one, _) in enumerate(pairs, start=1)]
        sender = open_sender(agreed, 0, source)
        for joined in joins:
            joined.result()
        receiving = [
            threads.submit(one.update_weights, update_info(source.metadata(), tmp_path / "x.json"))
            for one, _ in pairs
        ]
        with pytest.raises(RuntimeError, match="rank 1 hung up"):
            sender.send()
        for future in receiving:
            with pytest.raises(RuntimeError, match=r"bucket 1 from the learner: .*(closed|reset)"):
                future.result()
    assert time.monotonic() - began < 20


def test_a_rank_that_does_not_send_still_gathers_every_bucket() -> None:
    gathered: list[list[nn.Parameter]] = []

    class Gather:
        def __init__(self, parameters: list[nn.Parameter]) -> None:
            gathered.append(parameters)

        def __enter__(self) -> None: ...

        def __exit__(self, *error: object) -> None: ...

    model = module()
    source = ModuleSource(model, Gather)
    sender = open_sender(plan(1, bucket_bytes=256), 3, source)
    assert sender.send().digests == {}
    assert [len(bucket) for bucket in gathered] == [
        len(bucket) for bucket in split_buckets(source.metadata(), 256)
    ]
    assert [*chain.from_iterable(gathered)] == list(model.parameters())


def test_a_gpu_buffers_handle_survives_being_json() -> None:
    arguments = (
        *(torch.Tensor, torch.Size([64]), (1,), 0, torch.UntypedStorage, torch.uint8),
        *(3, b"\x00\xff", 64, 0, False, b"counter", 8, b"event", True),
    )
    assert decode_ipc_handle(json.loads(json.dumps(encode_ipc_handle(arguments)))) == arguments
    hash(decode_ipc_handle(encode_ipc_handle(arguments)))  # vLLM keys its cache by it


class FullAtOnce(Loaded):
    def begin(self) -> None:
        raise MemoryError("no room")


class FullLater(Loaded):
    def load(self, weights: Sequence[tuple[str, torch.Tensor]], note: Note) -> None:
        raise MemoryError("no room")


@pytest.mark.parametrize("loader", [FullAtOnce, FullLater])
def test_an_engine_that_cannot_load_ends_the_send_at_once(
    loader: type[Loaded], tmp_path: Path
) -> None:
    """Not at the deadline: its process lives on, but it will ask for no more buckets."""
    agreed, source = plan(1, bucket_bytes=1, timeout_s=60.0), ModuleSource(module())
    one, _ = receiver(loader)
    began = time.monotonic()
    with ThreadPoolExecutor(2) as threads:
        joining = threads.submit(join, one, agreed, 1)
        sender = open_sender(agreed, 0, source)
        joining.result()
        receiving = threads.submit(
            one.update_weights, update_info(source.metadata(), tmp_path / "x.json")
        )
        with pytest.raises(WeightSyncError, match="sending bucket"):
            sender.send()
        with pytest.raises(MemoryError, match="no room"):
            receiving.result()
    assert time.monotonic() - began < 30
