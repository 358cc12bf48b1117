"""What a rank trains, put away in host memory while nothing trains."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor

from fuse.intrastage.optimizer import ModelOptimizer
from fuse.storages import Storages
from fuse.trace import SpanRecorder


class Offload:
    """Weights and moments of a device's models: on the device, or away. Nobody may use those that are away.

    What several models have in common is away while nobody needs it for any of them.
    """

    def __init__(self, optimizers: Mapping[str, ModelOptimizer], device: torch.device, recorder: SpanRecorder) -> None:
        self._optimizers, self._device, self._recorder = optimizers, device, recorder
        self._moments = Storages()
        self._weights = defaultdict[frozenset[str], Storages](Storages)  # by the models that have them

    def put_away(self, kept: Collection[str], staying: Iterable[Tensor] = ()) -> None:
        """Move everything to host memory, but for the weights of the models `kept`, and memory of tensors `staying`."""
        going = self._going(kept, staying)
        if self._moments.are_released and not going:
            return
        with self._recorder.span("offload", "weights"):
            for models, weights in going.items():
                self._weights[models].release(weights, keep_bits=True)
            for optimizer in self._optimizers.values():
                for _, parts in optimizer.state():
                    moments = [tensor for part, tensor in parts.items() if part != "parameter"]
                    self._moments.release(moments, keep_bits=True)
            if self._device.type == "cuda":
                torch.cuda.empty_cache()  # for the device's other process

    def _going(self, kept: Collection[str], staying: Iterable[Tensor]) -> dict[frozenset[str], list[Tensor]]:
        """Weights to be put away that are not yet, by the models that have them."""
        stay = {tensor.untyped_storage().data_ptr() for tensor in staying}
        users: defaultdict[int, set[str]] = defaultdict(set)
        weights: dict[int, Tensor] = {}
        for model, optimizer in self._optimizers.items():
            for tensor in optimizer.weights():
                storage = tensor.untyped_storage()
                if storage.nbytes() and storage.resizable():  # pages of the host's shared memory are not
                    users[storage.data_ptr()].add(model)
                    weights[storage.data_ptr()] = tensor
        going: defaultdict[frozenset[str], list[Tensor]] = defaultdict(list)
        for pointer, models in users.items():
            if pointer not in stay and not models & {*kept}:
                going[frozenset(models)].append(weights[pointer])
        return going

    def bring_weights(self, model: str) -> None:
        """Have a model's weights on the device again."""
        away = [storages for models, storages in self._weights.items() if model in models and storages.are_released]
        if away:
            with self._recorder.span(f"restore {model}", "weights"):
                for storages in away:
                    storages.restore()

    def bring_all(self) -> None:
        """Have everything on the device again."""
        for model in self._optimizers:
            self.bring_weights(model)
        if self._moments.are_released:
            with self._recorder.span("restore moments", "weights"):
                self._moments.restore()
