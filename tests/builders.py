"""Small valid values for tests; every argument that matters to a test is one it names."""

from collections.abc import Iterable

from medrl.actors.engine import Engine
from medrl.actors.fake_engine import FakeEngine, FakeWire
from medrl.actors.pool import EnginePool
from medrl.actors.types import (
    Completion,
    Group,
    Prompt,
    Receipt,
    RolloutRequest,
    Sampling,
    Score,
    ScoredGroup,
    SyncPlan,
    UpdateMetrics,
    WeightMeta,
)


def make_prompt(name: str = "p", **changes: object) -> Prompt:
    fields: dict[str, object] = {
        "id": name,
        "question": "Which modality is this?",
        "options": ("CT", "MRI"),
        "answer": "A",
        "images": ("a.png",),
        "modality": "CT",
        "question_type": "Modality Recognition",
        "source": "test",
    }
    return Prompt(**{**fields, **changes})  # type: ignore[arg-type]


def make_request(
    draw: int = 0, *, prompt: Prompt | None = None, completions: int = 2, temperature: float = 1.0
) -> RolloutRequest:
    prompt = prompt or make_prompt(f"p{draw}")
    sampling = Sampling(num_completions=completions, max_tokens=16, temperature=temperature)
    return RolloutRequest(
        draw=draw, prompt=prompt, text=prompt.question, sampling=sampling, seed=draw * 8
    )


def make_group(
    draw: int = 0,
    *,
    version: int = 0,
    texts: tuple[str, ...] = ("<answer>A</answer>", "no"),
    prompt: Prompt | None = None,
) -> Group:
    request = make_request(draw, prompt=prompt, completions=len(texts))
    completions = tuple(
        Completion(
            token_ids=(5, 6, 7),
            logprobs=(-0.5, -0.25, -0.125),
            text=text,
            finish_reason="stop",
            version=version,
        )
        for text in texts
    )
    return Group(
        request=request,
        prompt_token_ids=(1, 2, 3, 4),
        image_hashes=tuple("h" for _ in request.prompt.images),
        completions=completions,
        engine=0,
        seconds=0.25,
    )


def make_score(total: float = 1.0, outcome: str = "ok", reason: str = "") -> Score:
    components = {} if outcome in ("error", "timeout") else {"format": 1.0, "accuracy": total}
    return Score(components=components, total=total, outcome=outcome, reason=reason)  # type: ignore[arg-type]


def make_scored(
    draw: int = 0, *, version: int = 0, scores: tuple[Score, ...] | None = None, **changes: object
) -> ScoredGroup:
    scores = scores or (make_score(1.0), make_score(0.0, "wrong"))
    texts = tuple(f"<answer>{i}</answer>" for i in range(len(scores)))
    group = make_group(draw, version=version, texts=texts, **changes)  # type: ignore[arg-type]
    return ScoredGroup(group=group, scores=scores, seconds=0.125)


def make_update(batch: list[ScoredGroup]) -> UpdateMetrics:
    return UpdateMetrics(
        loss=0.5,
        kl=0.0,
        entropy=1.0,
        clip_fraction=0.0,
        gradient_norm=2.0,
        learning_rate=1e-3,
        logprob_gap_mean=1e-7,
        logprob_gap_max=1e-6,
        zero_variance_groups=0,
        trained_completions=2 * len(batch),
        prompt_tokens=4 * len(batch),
        completion_tokens=6 * len(batch),
        visual_tokens=2 * len(batch),
        sharing=1.5,
        advantages=tuple((1.0, -1.0) for _ in batch),
        seconds=0.5,
    )


def make_receipt(step: int) -> Receipt:
    return Receipt(
        version=step,
        step=step,
        transport="gloo",
        engines=1,
        tensors=2,
        bytes=100,
        seconds=0.1,
        seconds_transfer=0.05,
        digests_equal=True,
        canary_gap=1e-6,
    )


async def make_engine(index: int = 0, *, seconds: float = 0.0, skill: float = 0.5) -> FakeEngine:
    """One that serves version 0."""
    wire = FakeWire()
    made = FakeEngine(wire, index=index, seconds=seconds)
    plan = SyncPlan(transport="gloo", address="127.0.0.1", port=1, world_size=2, bucket_bytes=1024)
    await made.open_transfer(plan, 1)
    wire.mailboxes[1].put_nowait(("skill", (skill,)))
    await made.receive([WeightMeta(name="skill", dtype="float32", shape=(1,))])
    await made.resume(0)
    return made


def pool_of(engines: Iterable[Engine], *, serving: bool = True) -> EnginePool:
    pool = EnginePool()
    for index, engine in enumerate(engines):
        pool.add(index, engine)
    if serving:
        pool.serve(pool.up)
    return pool
