"""Images: decoded and processed once a run, or every time they are met; and what keeping costs."""

from __future__ import annotations

import json
import multiprocessing
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image

from medrl.actors.types import RolloutRequest, Sampling
from medrl.bench.facts import Count
from medrl.bench.frame import Benchmark, Case, Options, paired
from medrl.bench.shapes import SIDE, make_model, question
from medrl.configs.schema import DataConfig
from medrl.data.image_files import decode
from medrl.data.images import ImageStore
from medrl.data.load import load_prompts
from medrl.learner.model import PromptReader

EPOCHS, PROMPTS = 3, 16
MAX_PIXELS = 401_408
MANY = 10_000
AGAIN = "decoded again in epoch 2, %"
_GRAIN = 14  # pixels of a drawn square: files as large as those of real pictures


def measure(options: Options) -> list[Case]:
    number = 64 if options.short else 256
    names = make_images(options.folder / "images", number)
    model = make_model(options.folder)
    cases = [
        _case("learner", _learner_passes(model, options.folder / "images", names), number, options),
        _case("engine", _engine_passes(options.folder / "images", names), number, options),
    ]
    if options.short:
        return cases
    folder, many = options.folder / "images", make_images(options.folder / "images", MANY)
    numbers = (
        _alone(learner_memory, model, folder, many),
        _alone(engine_memory, folder, many),
    )
    driver = _alone(driver_memory, folder, many)
    return [
        replace(case, numbers=own | shared)
        for case, own, shared in zip(cases, numbers, ({}, driver), strict=True)
    ]


Passes = Callable[[bool], tuple[float, int]]
"""Go over all epochs, keeping images or not: seconds a step, and the images decoded."""


def _case(name: str, passes: Passes, images: int, options: Options) -> Case:
    decoded: dict[bool, list[int]] = {True: [], False: []}

    def once(keeps: bool) -> float:
        seconds, number = passes(keeps)
        decoded[keeps].append(number)
        return seconds

    ours, other = paired(lambda: once(True), lambda: once(False), options.pairs)
    return Case(
        name=name,
        ours=ours,
        other=other,
        unit="s a step",
        facts=(
            *(Count(what="images decoded", asked=images, done=n) for n in decoded[True]),
            *(Count(what="images decoded", asked=EPOCHS * images, done=n) for n in decoded[False]),
        ),
        settings={
            "images": images,
            "pixels": f"{SIDE} x {SIDE}",
            "prompts a step": PROMPTS,
            "epochs": EPOCHS,
        },
    )


def _learner_passes(model: Path, folder: Path, names: Sequence[str]) -> Passes:
    def passes(keeps: bool) -> tuple[float, int]:
        reader, store = _reader(model, folder, keeps)
        return _seconds_a_step(names, lambda name: _prepare(reader, name)), store.decoded

    return passes


def _engine_passes(folder: Path, names: Sequence[str]) -> Passes:
    def passes(keeps: bool) -> tuple[float, int]:
        store = _store(folder, 2**30 if keeps else 0)
        return _seconds_a_step(names, store.load), store.decoded

    return passes


def _seconds_a_step(names: Sequence[str], prepare: Callable[[str], object]) -> float:
    began = time.perf_counter()
    for epoch in range(EPOCHS):
        for name in _shuffled(names, epoch):
            prepare(name)
    return (time.perf_counter() - began) / (EPOCHS * len(names) / PROMPTS)


def _shuffled(names: Sequence[str], epoch: int) -> list[str]:
    return random.Random(epoch).sample(names, len(names))


def _reader(model: Path, folder: Path, keeps: bool) -> tuple[PromptReader, ImageStore]:
    """As a learner rank has it: what it keeps is what the processor cut, in bytes."""
    store = _store(folder, 0)
    if keeps:
        return PromptReader(str(model), store), store
    return PromptReader(str(model), store, cache_bytes=0), store


def _store(folder: Path, cache_bytes: int) -> ImageStore:
    return ImageStore(folder, MAX_PIXELS, 28, cache_bytes)


def _prepare(reader: PromptReader, name: str) -> None:
    """A prompt's model inputs, its image's numbers included."""
    for hash in reader.inputs(_request(name)).images:
        reader.image(hash).pixels.to(torch.device("cpu"))


def _request(name: str) -> RolloutRequest:
    sampling = Sampling(num_completions=8, max_tokens=8, temperature=1.0)
    return RolloutRequest(
        draw=0, prompt=question(name), text="Which is it?", sampling=sampling, seed=0
    )


# What keeping costs, each in a process of its own.


def driver_memory(folder: Path, names: Sequence[str]) -> dict[str, float]:
    """Of a driver that has read, and checked, a data set of these images."""
    rows = folder.parent / "images.jsonl"
    lines = ({"question": "q?", "answer": "x", "image": name} for name in names)
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    config = DataConfig(format="jsonl", train=str(rows), images=str(folder))
    before = _resident()
    loaded = load_prompts(config, "train")
    Count(what="prompts", asked=len(names), done=len(loaded.prompts)).check()
    return {f"driver MiB, {len(names)} images": _resident() - before}


def engine_memory(folder: Path, names: Sequence[str]) -> dict[str, float]:
    """Of the store in an engine's process, and what it could not keep."""
    store = _store(folder, 2**30)
    return _epoch_and_some(names, store.load, store)


def learner_memory(model: Path, folder: Path, names: Sequence[str]) -> dict[str, float]:
    """Of a rank's reader, and what it could not keep."""
    reader, store = _reader(model, folder, keeps=True)
    return _epoch_and_some(names, lambda name: _prepare(reader, name), store)


def _epoch_and_some(
    names: Sequence[str], prepare: Callable[[str], object], store: ImageStore
) -> dict[str, float]:
    before = _resident()
    for name in _shuffled(names, 0):
        prepare(name)
    after, decoded = _resident(), store.decoded
    some = _shuffled(names, 1)[: len(names) // 20]
    for name in some:
        prepare(name)
    again = 100 * (store.decoded - decoded) / len(some)
    return {f"MiB, {len(names)} images": after - before, AGAIN: again}


def _resident() -> float:
    """MiB of this process."""
    return float(psutil.Process().memory_info().rss / 2**20)


def _alone(function: Callable[..., dict[str, float]], *arguments: object) -> dict[str, float]:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as process:
        return process.submit(function, *arguments).result()


def make_images(folder: Path, number: int) -> list[str]:
    """Names of `number` different images of SIDE pixels, drawn once."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{SIDE}_{index}.jpg" for index in range(number)]
    for index, name in enumerate(names):
        if not (folder / name).exists():
            small = np.random.default_rng(index).integers(
                0, 256, (SIDE // _GRAIN, SIDE // _GRAIN, 3), dtype=np.uint8
            )
            Image.fromarray(small).resize((SIDE, SIDE)).save(folder / name, quality=90)
    decode(folder / names[-1])  # the last one may be half a file of a run that was killed
    return names


BENCHMARK = Benchmark(
    name="images",
    title="Images once a run",
    ours="kept",
    other="not kept",
    text=(
        "Seconds that decoding and preparing a step's images take, one after another, over three "
        "epochs. Learner: the reader of a rank, which keeps the patches that the model's processor "
        "cuts, a byte a pixel and channel, in at most 4 GiB, and looks up their numbers each time; "
        "engine: the store in an engine's process, which keeps pixels, in at most 1 GiB, "
        "and leaves the processor to vLLM. Beside it what a process has grown by after "
        f"{MANY:,} images, and how many of these it has to decode again in the next epoch."
    ),
    measure=measure,
)
