"""Processes that hold vLLM engines and outlive a test: importing vLLM takes longer than any of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from itertools import cycle
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from fuse.benchmarks.engine_process import EngineProcess
from fuse.engines.vllm import VllmEngine


class VllmProcess(EngineProcess):
    """Makes engines of one architecture after another, and knows which one it has."""

    def __init__(self, model: PreTrainedModel, **options: Any) -> None:
        self.holds: object = None
        super().__init__(partial(VllmEngine, model, **options))
        self.holds = model.config.to_json_string(), options

    def become(self, model: PreTrainedModel, **options: Any) -> None:
        """An empty engine of this model and these limits, as new."""
        wanted = model.config.to_json_string(), options
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
    """Two processes, handed out in turn: a test may use the last two engines it asked for."""

    def __init__(self, home: Path) -> None:
        self.home = home  # of the processes, and for their temporary files
        self._resources = ExitStack()
        self._processes: list[VllmProcess] = []
        self._turns: Iterator[int] = cycle(range(2))

    def __enter__(self) -> VllmPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self._resources.close()

    def engine(self, model: PreTrainedModel, **options: Any) -> VllmProcess:
        turn = next(self._turns)
        if turn < len(self._processes):
            self._processes[turn].become(model, **options)
        else:
            with pytest.MonkeyPatch.context() as patch:
                for name in ("HOME", "TMPDIR"):
                    patch.setenv(name, str(self.home))
                self._processes.append(self._resources.enter_context(VllmProcess(model, **options)))
        return self._processes[turn]
