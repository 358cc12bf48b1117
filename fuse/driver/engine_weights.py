"""What engines are started with, at first and in place of one that died: the policy, with adapters or merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedModel

from fuse.driver.fetch import exported
from fuse.intrastage.adapters import NO_ADAPTERS
from fuse.intrastage.stage import Exported
from fuse.roles import GENERATING
from fuse.training.model_spec import ModelSpec
from fuse.workers.model_handle import ModelHandle
from fuse.workers.weights import WeightsRef, put_state_dict


class EngineWeights:
    """Of a policy, of which `part` travels to engines after every update.

    model: the driver's, whose frozen weights are those of every update.
    """

    def __init__(self, model: PreTrainedModel, part: Exported) -> None:
        self._model, self._whole = model, ModelSpec.of(model)
        self._part, self.spec = part, self._whole
        if part == "merged":
            self.spec = replace(self._whole, adapters=NO_ADAPTERS, frozen=frozenset())

    def initial(self, whole: WeightsRef) -> list[WeightsRef]:
        """Those of the first update. whole: the model's, in the object store."""
        if not (self._part == "merged" and self._whole.adapters):
            return [whole]
        return [put_state_dict({name: weight() for name, _, weight in self._whole.adapters.merged(self._model)})]

    def current(self, workers: Sequence[ModelHandle]) -> list[WeightsRef]:
        """Those of now. workers: of all stages."""
        frozen = {name: one for name, one in self._model.state_dict().items() if name in self.spec.frozen}
        return [*([put_state_dict(frozen)] if frozen else ()), *exported(workers, GENERATING, self._part)]
