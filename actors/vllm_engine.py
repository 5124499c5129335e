"""The real engine: vLLM's AsyncLLM behind the `Engine` protocol. The only file that starts vLLM.

Three invariants live here:
- *Engines cannot emit image, video or vision tokens, and every sampling field is set*: a model
  folder's own defaults (top_k=1, say) never apply. The ban is a logit of -inf, so the log-probs
  returned are of the distribution without those tokens, after temperature, top_p and top_k.
- *An engine serves only after `resume`*: it starts paused, and between `pause` and `resume` nothing
  but `canary` runs.
- *`deterministic`: a group follows from the weights and the request alone*, to the last bit. What
  shares a step or a cache with a completion changes the shapes of its sums, hence their rounding,
  and that now and then the token: so a group is alone in the engine, starts from empty caches, and
  its first step has all its completions.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections.abc import Awaitable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from medrl.actors.chat import forbidden_token_ids, render_chat
from medrl.actors.leftovers import clear
from medrl.actors.types import Group, RolloutRequest, SyncPlan, WeightMeta
from medrl.actors.vllm_calls import read_completion, sampling_params
from medrl.actors.vllm_start import engine_options, output_to, start
from medrl.configs.errors import EngineError, MedrlError, UserError, WeightSyncError, as_death
from medrl.configs.schema import ModelConfig, RolloutConfig
from medrl.data.images import ImageStore, LoadedImage

_SHUTDOWN_S = 1.0  # for vLLM's processes to end; then they are killed
_ALIVE_POLL_S = 0.5  # how often a call looks whether vLLM's process still lives
_LOG_TAIL_CHARS = 2000  # of vLLM's log, quoted where an engine dies


class VllmEngine:
    """One vLLM instance. Start takes 15-30 s on two cores and blocks; use within one event loop."""

    def __init__(
        self,
        *,
        model: ModelConfig,
        rollout: RolloutConfig,
        max_pixels: int,
        image_root: Path,
        index: int,
        device: Literal["cpu", "gpu"],
        seed: int,
        transport: Literal["gloo", "nccl", "ipc"],
        max_images: int = 1,  # most images in one prompt
        workers: int = 1,  # tensor-parallel size; CPU: 1
        colocated: bool = False,  # shares its GPU with a learner: sleeps while paused
        deterministic: bool = False,  # a group follows from weights and request alone
        log_path: Path | None = None,  # vLLM's output; None: in `scratch`
        scratch: Path | None = None,  # folder for sockets and digests; None: a temporary one
        stat_logger: Any = None,  # vLLM's StatLoggerFactory; None: it keeps no statistics
    ) -> None:
        self._index = index
        self._rollout = rollout
        self._workers = workers
        self._sleeps = colocated and device == "gpu"
        self._asleep = False
        self._scratch = scratch or Path(tempfile.mkdtemp(prefix=f"medrl-engine-{index}-"))
        self._scratch.mkdir(parents=True, exist_ok=True)
        self._log = log_path or self._scratch / "vllm.log"
        self._log.parent.mkdir(parents=True, exist_ok=True)
        self._log.touch()
        self._log_start = self._log.stat().st_size  # an earlier run may have written there
        self._llm: Any = None
        self._open = asyncio.Event()  # set: serving
        self._idle = asyncio.Event()  # set: no request runs
        self._idle.set()
        self._running = 0
        self._alone = asyncio.Lock() if deterministic else None
        self._requests = 0
        self._version = -1
        options = engine_options(model, rollout, device, seed, max_images, workers, deterministic)
        options |= {
            "weight_transfer_config": {"backend": f"medrl_{transport}"},
            "enable_sleep_mode": self._sleeps,
        }
        try:
            with output_to(self._log):
                self._llm = start(options, device, self._scratch, stat_logger)
        except Exception as error:
            raise EngineError(f"engine {index} did not start: {error}{self._log_tail()}") from error
        self._tokenizer = self._llm.get_tokenizer()
        self._ban = dict.fromkeys(forbidden_token_ids(self._tokenizer), float("-inf"))
        self._processor = self._llm.renderer.get_mm_processor().info
        self._images = ImageStore.for_model(
            image_root, self._processor.get_image_processor(), max_pixels
        )

    async def generate(self, request: RolloutRequest) -> Group:
        while not self._open.is_set():
            await self._open.wait()
        self._running += 1
        self._idle.clear()
        try:
            return await self._sample(request)
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()

    async def ping(self) -> None:
        """Asks vLLM's own process, not only ours: it answers between two steps of the model."""
        if self._llm.errored:
            raise self._death()
        await self._while_alive(self._llm.is_sleeping())

    async def pause(self) -> None:
        # Submitting ends first: a request that enters between the clearing of the front end's
        # image cache and the engine's would name an image that the engine no longer has.
        self._open.clear()
        await self._idle.wait()
        if self._asleep:
            return
        await self._stop_and_clear()
        if self._sleeps:
            await self._while_alive(self._llm.sleep(level=1))
            self._asleep = True

    async def open_transfer(self, plan: SyncPlan, rank: int) -> None:
        info = {
            "address": plan.address,
            "port": plan.port,
            "rank": 1 + (rank - 1) * self._workers,
            "world_size": plan.world_size,
            "bucket_bytes": plan.bucket_bytes,
            "timeout_s": plan.timeout_s,
        }
        await self._transfer_call(
            "joining the transfer group", "init_weight_transfer_engine", init_info=info
        )

    async def receive(self, weights: Sequence[WeightMeta]) -> Mapping[str, str]:
        if self._asleep:
            await self._while_alive(self._llm.wake_up(tags=["weights"]))
        path = self._scratch / "digests.json"
        for old in path.parent.glob(f"{path.name}.*"):
            old.unlink()
        info = {
            "names": [meta.name for meta in weights],
            "dtype_names": [meta.dtype for meta in weights],
            "shapes": [list(meta.shape) for meta in weights],
            "digests_path": str(path),
        }
        # vLLM takes them one after the other; the learner sends already.
        await asyncio.gather(
            self._transfer_call("starting the update", "start_weight_update"),
            self._transfer_call("receiving weights", "update_weights", update_info=info),
            self._transfer_call("finishing the update", "finish_weight_update"),
        )
        first, *others = [
            json.loads(Path(f"{path}.{worker}").read_text()) for worker in range(self._workers)
        ]
        if any(other != first for other in others):
            raise WeightSyncError(f"sync: workers of engine {self._index} received other bytes")
        digests: dict[str, str] = first
        return digests

    async def canary(self, request: RolloutRequest) -> Group:
        await self._wake()
        # vLLM's scheduler only: `generate` still waits.
        await self._while_alive(self._llm.resume_generation())
        return await self._sample(request)

    async def resume(self, version: int) -> None:
        await self._wake()
        await self._while_alive(self._llm.update_weight_version(str(version)))
        await self._while_alive(self._llm.resume_generation())
        self._version = version
        self._open.set()

    async def close(self) -> None:
        if self._llm is not None:
            llm, self._llm = self._llm, None
            if llm.output_handler is not None:
                llm.output_handler.cancel()  # else it reports the end of its process as a failure
            await asyncio.to_thread(llm.shutdown, _SHUTDOWN_S)
            clear(self._scratch)

    async def _wake(self) -> None:
        if self._asleep:
            await self._while_alive(self._llm.wake_up())
            self._asleep = False

    async def _stop_and_clear(self) -> None:
        """Clears the prefix, image and encoder caches: an update makes all of them stale. What
        vLLM's own `pause_generation` does, but for its sleep of 20 ms: all answers are here."""
        await self._while_alive(self._llm.renderer.clear_mm_cache_async())
        stopping = self._llm.engine_core.pause_scheduler_async(mode="wait", clear_cache=True)
        await self._while_alive(stopping)

    async def _while_alive(self, call: Awaitable[Any]) -> Any:
        """The answer to a call; vLLM waits for ever for the one in which its process died."""
        answer = asyncio.ensure_future(call)
        try:
            while not (await asyncio.wait({answer}, timeout=_ALIVE_POLL_S))[0]:
                if self._llm.errored:
                    raise self._death()
            return answer.result()
        except Exception as error:
            if isinstance(error, MedrlError) or not self._llm.errored:
                raise
            raise self._death(f": {error}") from error
        finally:
            answer.cancel()

    async def _transfer_call(self, phase: str, method: str, **arguments: Any) -> None:
        try:
            await self._while_alive(self._llm.collective_rpc(method, kwargs=arguments))
        except EngineError:
            raise  # its process died
        except Exception as error:
            text = f"sync: engine {self._index} failed while {phase}: {error}"
            raise WeightSyncError(text) from error

    async def _sample(self, request: RolloutRequest) -> Group:
        started = time.perf_counter()
        paths = request.prompt.images
        load = self._images.blank if request.blind else self._images.load
        if request.small:
            load = self._images.small
        try:
            images = [await asyncio.to_thread(load, path) for path in paths]
            text = render_chat(self._tokenizer, request.text, len(images))
            length = self._prompt_length(request, text, images)
            output = await self._run(request, text, images)
            completions = tuple(read_completion(one, self._version) for one in output.outputs)
        except MedrlError:
            raise
        except Exception as error:
            told = f"prompt {request.prompt.id}: {type(error).__name__}: {error}"
            if self._llm is None or self._llm.errored:
                raise self._death(f", with {told}") from error
            raise EngineError(f"engine {self._index}: {told}") from error
        if len(output.prompt_token_ids) != length:
            raise EngineError(
                f"engine {self._index}: prompt {request.prompt.id} has "
                f"{len(output.prompt_token_ids)} tokens, expected {length}"
            )
        return Group(
            request=request,
            prompt_token_ids=tuple(output.prompt_token_ids),
            image_hashes=tuple(image.sha256 for image in images),
            completions=completions,
            engine=self._index,
            seconds=time.perf_counter() - started,
        )

    def _prompt_length(
        self, request: RolloutRequest, text: str, images: Sequence[LoadedImage]
    ) -> int:
        """[T] counted before vLLM sees the prompt, which would cut the completion short instead."""
        length = len(self._tokenizer(text)["input_ids"]) - len(images)
        for image in images:
            length += self._processor.get_num_image_tokens(
                image_width=image.width,
                image_height=image.height,
                image_processor=self._processor.get_image_processor(),
                mm_kwargs={},
            )
        limit = self._rollout.max_model_len - request.sampling.max_tokens
        if length > limit:
            raise UserError(
                f"prompt {request.prompt.id} is {length} tokens long with its images, but "
                f"rollout.max_model_len = {self._rollout.max_model_len} leaves {limit} beside "
                f"max_tokens = {request.sampling.max_tokens}; raise rollout.max_model_len or "
                "lower data.max_pixels"
            )
        return length

    async def _run(self, request: RolloutRequest, text: str, images: Sequence[LoadedImage]) -> Any:
        prompt: dict[str, Any] = {"prompt": text}
        if images:
            prompt["multi_modal_data"] = {"image": [image.image for image in images]}
            prompt["multi_modal_uuids"] = {"image": [image.sha256 for image in images]}
        self._requests += 1
        number, params = str(self._requests), sampling_params(request, self._ban)
        if self._alone:
            async with self._alone:
                return await self._run_alone(prompt, params, number)
        outputs = self._llm.generate(prompt, params, request_id=number)
        return [output async for output in outputs][-1]  # one, for only the final is asked for

    async def _run_alone(self, prompt: Mapping[str, Any], params: Any, number: str) -> Any:
        """vLLM steps as soon as it has the first completion of a group: it is held until it has all
        of them."""
        await self._stop_and_clear()
        asked = await self._llm.add_request(number, prompt, params)
        try:
            await self._while_alive(self._llm.resume_generation())
            return await asked.get()  # the only one, for only the final is asked for
        except asyncio.CancelledError:
            await self._llm.abort(asked.request_id, internal=True)
            raise

    def _death(self, told: str = "") -> EngineError:
        text = f"engine {self._index}: vLLM's process died{told}{self._log_tail()}"
        return as_death(EngineError(text))

    def _log_tail(self) -> str:
        tail = self._log.read_bytes()[self._log_start :][-_LOG_TAIL_CHARS:].decode(errors="replace")
        return f"\nvLLM's log ends with:\n{tail.strip()}" if "Error" in tail else ""
