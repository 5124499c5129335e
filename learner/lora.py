"""Low-rank adapters (LoRA) of a vision-language model. The only file that imports peft.

An adapted layer's weight W [out, in] stays as it is; A [rank, in] and B [out, rank] are trained,
and the layer computes with W + alpha / rank * B A (Hu et al. 2021). Nobody outside the learner
knows: what is sent, saved and exported is that sum, under the names and in the order of the model
without adapters. With the adapters off the model is the starting model, so it is its own reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medrl.actors.types import WeightMeta
from medrl.actors.wire import split_buckets
from medrl.configs.schema import ModelConfig
from medrl.learner.weight_source import Gather, ModuleSource, side_by_side

_NAME = "default"  # PEFT's name for the one adapter of a layer
_BASE, _ADAPTER = ".base_layer.", ".lora_"  # what PEFT puts into the names of parameters


class Adapters:
    """The adapters in one model. Build it with `attach`."""

    def __init__(self, vlm: nn.Module, config: Any) -> None:
        from peft.tuners.lora import LoraLayer

        self._vlm, self._config = vlm, config
        self._layers: dict[str, Any] = {
            name: module for name, module in vlm.named_modules() if isinstance(module, LoraLayer)
        }

    def without(self, module: Callable[..., Any]) -> Callable[..., Any]:
        """`module`, which runs the model, as if there were no adapters: the starting model.

        They count 0 times rather than being left out: ZeRO-3 prefetches weights by the order of
        modules it saw before, and PEFT's own switch would also touch `requires_grad`.
        """

        def run(*arguments: Any) -> Any:
            self._count(0.0)
            try:
                return module(*arguments)
            finally:
                self._count(1.0)

        return run

    def source(self, gather: Gather | None) -> MergedSource:
        return MergedSource(self._vlm, self._layers, gather)

    def save(self, folder: Path, gather: Gather, *, write: bool) -> None:
        """A folder `PeftModel.from_pretrained` loads over the starting model. A collective; only
        ranks that `write` do."""
        from safetensors.torch import save_file

        named = {n: p for n, p in self._vlm.named_parameters() if _ADAPTER in n}
        with gather(list(named.values())):
            if not write:
                return
            state = {
                f"base_model.model.{name.replace(f'.{_NAME}.', '.')}": p.detach().cpu().contiguous()
                for name, p in named.items()
            }
            self._config.save_pretrained(folder)
            save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    def _count(self, times: float) -> None:
        for layer in self._layers.values():
            layer.set_scale(_NAME, times)


class MergedSource(ModuleSource):
    """A `WeightSource` of the model that the adapters make. Each tensor is merged when it is taken:
    ranks that only gather merge nothing."""

    def __init__(self, vlm: nn.Module, layers: dict[str, Any], gather: Gather | None) -> None:
        super().__init__(vlm, gather)
        self._layers = {f"{name}.weight": layer for name, layer in layers.items()}
        self._parameters = side_by_side(
            (name.replace(_BASE, "."), parameter)
            for name, parameter in vlm.named_parameters()
            if _ADAPTER not in name
        )

    def buckets(self, bucket_bytes: int) -> Iterator[tuple[Sequence[WeightMeta], Iterable[Tensor]]]:
        for bucket in split_buckets(self.metadata(), bucket_bytes):
            names = [meta.name for meta in bucket]
            with self.gather([p for name in names for p in self._pieces(name)]):
                yield bucket, map(self._merged, names)

    def _pieces(self, name: str) -> list[nn.Parameter]:
        """The weight, and its A and B where it has any."""
        if name not in self._layers:
            return [self._parameters[name]]
        layer = self._layers[name]
        return [self._parameters[name], layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight]

    def _merged(self, name: str) -> Tensor:
        """In float32, then in the weight's type."""
        weight, *adapter = (piece.data for piece in self._pieces(name))
        if not adapter:
            return weight
        a, b = (piece.float() for piece in adapter)
        scale = self._layers[name].scaling[_NAME]
        return torch.addmm(weight.float(), b, a, alpha=scale).to(weight.dtype)


def attach(vlm: Any, config: ModelConfig, seed: int) -> Adapters | None:
    """Put adapters into every linear layer of the language model but the head, with
    `lora_vision` into the vision tower's too, and freeze the rest. None where `lora_rank` is 0.

    Same seed, same adapters on every rank and for every ZeRO stage. B is 0 at first: the model is
    still the starting model.
    """
    if not config.lora_rank:
        return None
    from peft import LoraConfig, inject_adapter_in_model

    parts = ("model.language_model.", "model.visual.")[: 1 + config.lora_vision]
    chosen = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules=[
            name
            for name, module in vlm.named_modules()
            if isinstance(module, nn.Linear) and name.startswith(parts)
        ],
        task_type="CAUSAL_LM",
        base_model_name_or_path=config.path,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(chosen, vlm)
    return Adapters(vlm, chosen)
