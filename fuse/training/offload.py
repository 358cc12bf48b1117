"""What a rank trains, put away in host memory while nothing trains."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from fuse.intrastage.optimizer import ModelOptimizer
from fuse.storages import Storages
from fuse.trace import SpanRecorder


class Offload:
    """Weights and moments of a device's models: on the device, or away. Nobody may use those that are away."""

    def __init__(self, optimizers: Mapping[str, ModelOptimizer], device: torch.device, recorder: SpanRecorder) -> None:
        self._optimizers, self._device, self._recorder = optimizers, device, recorder
        self._moments = Storages()
        self._weights = {model: Storages() for model in optimizers}

    def put_away(self, kept: Collection[str]) -> None:
        """Move everything to host memory, but for the weights of the models `kept`."""
        going = [model for model, away in self._weights.items() if model not in kept and not away.are_released]
        if self._moments.are_released and not going:
            return
        with self._recorder.span("offload", "weights"):
            for model, optimizer in self._optimizers.items():
                if model in going:
                    self._weights[model].release(optimizer.weights(), keep_bits=True)
                for _, parts in optimizer.state():
                    moments = [tensor for part, tensor in parts.items() if part != "parameter"]
                    self._moments.release(moments, keep_bits=True)
            if self._device.type == "cuda":
                torch.cuda.empty_cache()  # for the device's other process

    def bring_weights(self, model: str) -> None:
        """Have a model's weights on the device again."""
        if self._weights[model].are_released:
            with self._recorder.span(f"restore {model}", "weights"):
                self._weights[model].restore()

    def bring_all(self) -> None:
        """Have everything on the device again."""
        for model in self._weights:
            self.bring_weights(model)
        if self._moments.are_released:
            with self._recorder.span("restore moments", "weights"):
                self._moments.restore()
