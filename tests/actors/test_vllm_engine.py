"""The engine's promises: explicit sampling, forbidden tokens, pausing, and weights that arrive.

The three traps of a sync are each shown with their mend taken out: the canary or the digests must
then refuse the push.
"""

from __future__ import annotations

import asyncio
import copy
from dataclasses import replace

import pytest
import torch
from conftest import MAX_MODEL_LEN, Live
from reference import LONG, Reference, request

from medrl.actors.lane import Lane
from medrl.actors.types import Sent, SyncPlan, WeightMeta
from medrl.configs.errors import UserError, WeightSyncError
from medrl.configs.schema import ModelConfig
from medrl.learner import lora
from medrl.learner.transports import GlooSender, open_sender
from medrl.learner.weight_source import ModuleSource

pytestmark = [pytest.mark.engines, pytest.mark.asyncio(loop_scope="session")]
one_family = pytest.mark.parametrize("started", ["qwen2_vl"], indirect=True)
part_changed = pytest.mark.parametrize("part", ["", "visual"], ids=["all", "only the tower"])


@one_family
async def test_each_completion_has_its_own_stream_and_a_seed_repeats_it(live: Live) -> None:
    first, again, next_draw, shifted = [
        tuple(completion.token_ids for completion in group.completions)
        for group in await asyncio.gather(
            *(live.generate(request(seed=seed)) for seed in (0, 0, 4, 1))
        )
    ]
    # The folder's own defaults (top_k = 1, temperature = 0.01) would make all of them equal.
    assert len({*first, *next_draw}) == 8
    assert first == again
    # Why draws are spaced by G: completion i draws from seed + i.
    assert shifted[:3] == first[1:]


@one_family
async def test_no_completion_holds_a_vision_token_even_if_the_model_wants_one(live: Live) -> None:
    reference = live.reference
    image_pad = reference.model.config.image_token_id
    group = await live.generate(request(n=1, max_tokens=1, temperature=0.0))
    inputs = reference.inputs(group)
    with torch.no_grad():
        hidden = reference.model(**inputs, output_hidden_states=True).hidden_states[-1][0, -1]
        # Its own embedding is never read: pixels take its place.
        reference.model.lm_head.weight[image_pad] = 30 * hidden / hidden.square().sum()
        wanted = reference.model(**inputs).logits[0, -1].softmax(-1)[image_pad]
    assert wanted > 0.9
    await live.push()
    group = await live.generate(request(n=16))
    tokens = {token for completion in group.completions for token in completion.token_ids}
    assert not tokens & set(reference.forbidden)
    assert live.gap(group) < 1e-4


@one_family
async def test_a_blind_request_shows_grey_of_the_same_size_and_leaves_the_others_seeing(
    live: Live,
) -> None:
    """The engine's caches must tell the two apart, whichever comes first."""
    asked = request(("0.png", "1.png"), n=2)
    blind = replace(asked, blind=True)
    groups = [await live.generate(one) for one in (blind, asked, blind, asked)]
    for group in groups:
        assert live.gap(group) < 1e-4  # to transformers, shown the same pixels
        assert group.prompt_token_ids == groups[0].prompt_token_ids
    grey = live.reference.images.blank("0.png").sha256
    assert groups[0].image_hashes == groups[2].image_hashes == (grey, grey)
    assert groups[1].image_hashes == groups[3].image_hashes
    assert grey not in groups[1].image_hashes
    assert [c.logprobs for c in groups[0].completions] != [
        c.logprobs for c in groups[1].completions
    ]


@one_family
async def test_a_prompt_too_long_is_refused_and_never_cut(live: Live) -> None:
    asked = request(text=LONG * 20, max_tokens=8)
    with pytest.raises(UserError, match=rf"0\.png/0 .*{MAX_MODEL_LEN} leaves {MAX_MODEL_LEN - 8}"):
        await live.generate(asked)
    # The longest that fits is not cut either: all its tokens are there.
    group = await live.generate(request(n=2, max_tokens=MAX_MODEL_LEN - 200, text="Yes? "))
    assert all(
        len(completion.token_ids) == MAX_MODEL_LEN - 200 or completion.finish_reason == "stop"
        for completion in group.completions
    )


@one_family
async def test_the_end_token_is_kept_and_only_where_it_stopped(live: Live) -> None:
    end = live.reference.processor.tokenizer.eos_token_id
    group = await live.generate(request(n=64, max_tokens=100))
    assert {completion.finish_reason for completion in group.completions} == {"stop", "length"}
    for completion in group.completions:
        stopped = completion.finish_reason == "stop"
        assert (completion.token_ids[-1] == end) == stopped
        assert completion.token_ids.count(end) == stopped
        assert len(completion.token_ids) == 100 or stopped


@one_family
async def test_a_pause_lets_running_groups_end_and_keeps_new_ones_waiting(live: Live) -> None:
    running = asyncio.create_task(live.generate(request(n=2, max_tokens=200)))
    await asyncio.sleep(0.05)
    await live.engine.pause()
    assert running.done()
    waiting = asyncio.create_task(live.generate(request()))
    await live.engine.canary(request(n=1))
    await asyncio.sleep(0.2)
    assert not waiting.done()
    await live.engine.resume(7)
    assert (await waiting).version == 7
    assert (await running).version == live.version


@part_changed
async def test_an_update_reaches_prompts_seen_before(live: Live, part: str) -> None:
    before = await live.generate(request())
    live.reference.change(part, 0.05)
    assert live.gap(before) > 1e-3  # so a stale answer would show
    receipt = await live.push()
    assert receipt.digests_equal
    assert receipt.canary_gap < 1e-4
    after = await live.generate(request())
    assert after.version == live.version
    assert live.gap(after) < 1e-4


@part_changed
async def test_trap_1_without_clearing_caches_the_push_fails(live: Live, part: str) -> None:
    live.engine.clears_caches = False
    live.reference.change(part, 0.05)
    with pytest.raises(WeightSyncError, match="other weights than it was given"):
        await live.push()


async def test_trap_2_without_packing_the_head_anew_the_push_fails(live: Live) -> None:
    await live.engine.set_head_repacking(False)
    live.reference.change("", 0.05)
    with pytest.raises(WeightSyncError, match="other weights than it was given"):
        await live.push()


class FlipsOneBit(GlooSender):
    """One bit changes between the sender's digest and the wire: too little for the canary."""

    def _pass_on(self, lane: Lane, number: int, slot: torch.Tensor) -> None:
        if number == 0:
            slot[0] ^= 1
        super()._pass_on(lane, number, slot)


class Flipping(Reference):
    """Sends through `FlipsOneBit`."""

    async def open_transfer(self, plan: SyncPlan) -> None:
        source = ModuleSource(self.model)
        self._sender = await asyncio.to_thread(FlipsOneBit, plan, 0, source)


@one_family
async def test_trap_3_what_arrived_is_compared_with_what_left(live: Live) -> None:
    live.reference.__class__ = Flipping
    first = (await live.reference.weights())[0].name
    try:
        live.sync = live.new_sync()
        with pytest.raises(WeightSyncError, match=f"engine 0 received other weights.*{first}"):
            await live.push()
        # Without the comparison nothing would show: the canary's gap stays below its limit.
        group = await live.engine.canary(request(n=1, temperature=0.0))
        assert live.gap(group) < 1e-4
    finally:
        live.reference.__class__ = Reference
        live.sync = live.new_sync()


class Adapted(Reference):
    """Learns by adapters, of which engines know nothing."""

    adapters: lora.Adapters

    async def weights(self) -> tuple[WeightMeta, ...]:
        return self.adapters.source(None).metadata()

    async def open_transfer(self, plan: SyncPlan) -> None:
        source = self.adapters.source(None)
        self._sender = await asyncio.to_thread(open_sender, plan, 0, source)


async def test_an_engine_serves_the_sum_of_weights_and_adapters(live: Live) -> None:
    reference, whole = live.reference, live.reference.model
    reference.model = copy.deepcopy(whole)
    config = ModelConfig(path=str(live.folder), lora_rank=4, lora_vision=True)
    attached = lora.attach(reference.model, config, seed=0)
    assert attached is not None
    reference.__class__ = Adapted
    reference.adapters = attached  # type: ignore[attr-defined]
    try:
        live.sync = live.new_sync()
        before = await live.generate(request())
        assert live.gap(before) < 1e-4  # untrained, they change nothing
        reference.change(".lora_B.", 0.02)
        assert live.gap(before) > 1e-3
        receipt = await live.push()
        assert receipt.digests_equal
        assert receipt.canary_gap < 1e-4
        assert live.gap(await live.generate(request())) < 1e-4
    finally:
        reference.__class__, reference.model = Reference, whole
        live.sync = live.new_sync()


class BreaksOff(GlooSender):
    """The learner fails after the first bucket."""

    def _pass_on(self, lane: Lane, number: int, slot: torch.Tensor) -> None:
        if number == 1:
            lane.close()
            raise WeightSyncError("sync: the learner's host went away")
        super()._pass_on(lane, number, slot)


class Breaking(Reference):
    """Sends through `BreaksOff`."""

    async def open_transfer(self, plan: SyncPlan) -> None:
        source = ModuleSource(self.model)
        self._sender = await asyncio.to_thread(BreaksOff, plan, 0, source)

    async def send(self) -> Sent:
        try:
            return await super().send()
        finally:
            self._sender = None


@one_family
async def test_a_push_that_broke_off_leaves_no_engine_serving_and_can_be_repeated(
    live: Live,
) -> None:
    live.reference.change("", 0.05)
    live.reference.__class__ = Breaking
    try:
        live.sync = live.new_sync(timeout_s=5, bucket_bytes=64 * 1024)
        with pytest.raises(WeightSyncError, match=r"learner: .*went away.*engine 0: .*bucket"):
            await live.push()
    finally:
        live.reference.__class__ = Reference
    waiting = asyncio.create_task(live.generate(request()))
    await asyncio.sleep(0.2)
    assert not waiting.done()
    live.sync = live.new_sync()
    assert (await live.push()).canary_gap < 1e-4
    assert live.gap(await waiting) < 1e-4
