"""Processes that hold vLLM engines and outlive a test: importing vLLM takes longer than any of them."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from fuse.engines.vllm import VllmEngine

from .engine_process import DistantEngine

Kind = tuple[str, tuple[tuple[str, Any], ...]]
"""Of engines that differ in their weights alone: the model's configuration and the engine's options."""


def kind_of(model: PreTrainedModel, options: dict[str, Any]) -> Kind:
    return model.config.to_json_string(), tuple(sorted(options.items()))


class VllmProcess(DistantEngine):
    """Makes engines of one architecture after another, and knows which one it has."""

    def __init__(self, model: PreTrainedModel, **options: Any) -> None:
        self.holds: Kind | None = None
        super().__init__(partial(VllmEngine, model, **options))
        self.holds = kind_of(model, options)

    def become(self, model: PreTrainedModel, **options: Any) -> None:
        """An empty engine of this model and these limits, as new."""
        wanted = kind_of(model, options)
        if self.holds == wanted:
            for sample_id in self.run(attrgetter("_live")):
                self.evict(sample_id)
            self.load_weights(model.state_dict())
        else:
            self.holds = None
            self.restart(partial(VllmEngine, model, **options))
            self.holds = wanted

    def close(self) -> None:
        super().close()
        self.holds = None


class VllmPool:
    """Two processes: a test may use the last two engines it asked for."""

    def __init__(self, home: Path) -> None:
        self.home = home  # of the processes, and for their temporary files
        self._resources = ExitStack()
        self._processes: list[VllmProcess] = []
        self._last: VllmProcess | None = None
        self._num_asked: Counter[Kind | None] = Counter()

    def __enter__(self) -> VllmPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self._resources.close()

    def begin_test(self) -> None:
        """No engine is in use."""
        self._last = None

    def engine(self, model: PreTrainedModel, **options: Any) -> VllmProcess:
        """Of a process that has such an engine already; else of one whose engine is asked for least."""
        wanted = kind_of(model, options)
        self._num_asked[wanted] += 1
        free = [process for process in self._processes if process is not self._last]
        if not free:
            free = [self._start(model, **options)]
        self._last = min(free, key=lambda process: (process.holds != wanted, self._num_asked[process.holds]))
        self._last.become(model, **options)
        return self._last

    def _start(self, model: PreTrainedModel, **options: Any) -> VllmProcess:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("HOME", "TMPDIR"):
                patch.setenv(name, str(self.home))
            self._processes.append(self._resources.enter_context(VllmProcess(model, **options)))
        return self._processes[-1]
