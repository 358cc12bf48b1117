"""Devices that are emulated, in place of a run's cluster: trainer, fleet and controller are the real ones.

The seam is `Cluster.spawn`. Of a generation worker the engine alone is emulated. A model worker is told sizes in place
of what would need torch: its calls are translated here, and what it would have computed is made up here.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import ray

from fuse.algorithms.batch import Experience
from fuse.benchmarks.emulated.costs import EmulatedCosts
from fuse.benchmarks.emulated.engine import EmulatedGenerationWorker
from fuse.benchmarks.emulated.model_worker import EmulatedModelWorker
from fuse.benchmarks.emulated.training import EmulatedRound
from fuse.benchmarks.emulated.update import EmulatedUpdate
from fuse.intrastage.placement import Replica
from fuse.roles import role_of
from fuse.training.rank import TAIL, TrainingSettings
from fuse.training.reading import TokenSequence
from fuse.training.rounds import RankRound, StepPart
from fuse.training.scoring import Inference, inferences
from fuse.workers.calls import Future, Worker
from fuse.workers.generation_worker import GenerationWorker
from fuse.workers.model_worker import ModelWorker
from fuse.workers.process import actor_class, concurrent_methods

_T = TypeVar("_T")

_HOST = "127.0.0.1"
_ANSWERS: Mapping[str, Any] = {
    "serve_store": 0, "connect": None, "place": None, "load_training_weights": None, "load_scoring_weights": None,
    "free_bytes": None, "has_copy": False, "begin_export": {}, "end_export": None, "scale_gradients": None,
}  # fmt: skip
"""What calls of a model worker give that take no time in emulation."""


class EmulatedCluster:
    """Devices of this host, for the length of a `with` block, within a Ray cluster; see `Cluster`. Call `use` first.

    Processes neither import torch nor need a core of their own, and serve one run after the other.
    """

    def __init__(self) -> None:
        self._processes: dict[tuple[str, int], tuple[Any, ray.ObjectRef[int]]] = {}
        self._resources = ExitStack()
        self.models: EmulatedModels | None = None
        """Of the last run."""

    def use(self, num_devices: int, costs: EmulatedCosts, max_batch: int) -> None:
        """Have the next runs' devices be like this. costs: in seconds of this machine. max_batch: of an engine."""
        self.num_devices, self._costs, self._max_batch = num_devices, costs, max_batch

    def __enter__(self) -> EmulatedCluster:
        with ExitStack() as resources:
            self._directory = Path(resources.enter_context(tempfile.TemporaryDirectory(prefix="fuse-emulated-")))
            resources.callback(self._end)
            self._resources = resources.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._resources.close()

    def _end(self) -> None:
        for actor, _ in self._processes.values():
            ray.kill(actor)
        self._processes.clear()

    def host(self, device: int) -> str:
        """Where a device's processes reach one another."""
        return _HOST

    def elsewhere(self) -> dict[str, Worker[Any]]:
        """There is no other host."""
        return {}

    def kill(self, worker: Worker[Any]) -> None:
        """End one worker."""
        del self._processes[worker.role, worker.device]
        worker.kill()

    def spawn(self, role: str, device: int, worker_class: type, *args: Any) -> Worker[Any]:
        """An emulated worker in place of one of this class, which would be made of `args`."""
        if worker_class is GenerationWorker:
            actor, started = self._start(role, device, EmulatedGenerationWorker, self._costs, self._max_batch)
            return Worker(role, device, actor, started, concurrent_methods(EmulatedGenerationWorker), None)
        assert worker_class is ModelWorker, f"there are no emulated workers of {worker_class}"
        rank, _, _, scoring, settings, _ = args
        if rank == 0:
            self.models = EmulatedModels(settings, tuple(scoring))
        assert self.models is not None
        actor, started = self._start(
            role, device, EmulatedModelWorker, rank, self._costs, self._directory, settings.timeout_s
        )
        return _ModelProcess(role, device, actor, started, self.models, rank)

    def _start(self, role: str, device: int, worker_class: type, *args: Any) -> tuple[Any, ray.ObjectRef[int]]:
        """The process of a device's worker of this role, new or with another worker in it, and when it is made."""
        if (role, device) in self._processes:
            actor, _ = self._processes[role, device]
            actor.call.remote("close")
        else:
            actor = actor_class(worker_class).options(num_cpus=0, max_restarts=0).remote()
        process = self._processes[role, device] = actor, actor.start.remote(None, worker_class, args, {})
        return process


class EmulatedModels:
    """What model workers of a run would know beyond sizes, the same for all ranks. trained: rounds of the last update.

    scoring: roles that do. apart_s: seconds in which ranks waited for their sizes of it, as real ones would not.
    """

    def __init__(self, settings: TrainingSettings, scoring: Sequence[str]) -> None:
        self._settings, self._scoring = settings, scoring
        self.placement: tuple[Replica, ...] = ()
        self.trained: list[EmulatedRound] = []
        self._told: Any = None
        self._update: EmulatedUpdate | None = None
        self._sizes: Any = None
        self.apart_s = 0.0
        self._answers: dict[str, ray.ObjectRef[Any]] = {}

    def sizes(self, piece: Any) -> Any:
        """A call's argument, a reference, as emulated ranks take it: one reference for all ranks' calls."""
        if self._told != piece:
            start_s = time.perf_counter()
            self._told, told = piece, ray.get(piece)
            args = told.experience, told.rounds, told.plans
            self._update = EmulatedUpdate(self.placement, self._settings, *args)
            self._sizes = ray.put(self._update.sizes)
            self.trained = self._update.sizes
            self.apart_s = time.perf_counter() - start_s
        return self._sizes

    def early(self, model: str, replica: int, experience: Experience, part: StepPart) -> EmulatedUpdate:
        """What a replica is called to train before the update."""
        (own,) = [one for one in self.placement if (one.model, one.index) == (model, replica)]
        return EmulatedUpdate.early(own, self._settings, experience, part)

    def answer(self, name: str) -> ray.ObjectRef[Any]:
        """What a call of this name gives every rank, put into the object store once."""
        if name not in self._answers:
            self._answers[name] = ray.put(_ANSWERS[name])
        return self._answers[name]

    def results(self, rank: int) -> list[RankRound]:
        """What a rank tells of the rounds that were sized last."""
        assert self._update is not None
        return self._update.results(rank)

    def inferences(self, sequences: Sequence[TokenSequence]) -> list[Inference]:
        """Zeros from every model."""
        zeros: dict[str | None, Callable[[int], Any]] = {
            "reference_logprobs": lambda tokens: np.zeros(tokens, np.float32),
            "values": lambda tokens: np.zeros(tokens + 1, np.float32),
            "scores": lambda tokens: 0.0,
        }
        lengths = [len(one.response_ids) for one in sequences]
        return inferences({role: list(map(zeros[role_of(role).scores], lengths)) for role in self._scoring})


class _Translated(Future[_T]):
    """The answer to a call, made of what an emulated worker answers."""

    __slots__ = ("_translate",)

    def __init__(self, worker: Worker[Any], reference: ray.ObjectRef[Any], translate: Callable[[Any], _T]) -> None:
        super().__init__(worker, reference)
        self._translate = translate

    def result(self) -> _T:
        return self._translate(super().result())


class _ModelProcess(Worker[EmulatedModelWorker]):
    """Takes the calls of a `ModelWorker`."""

    def __init__(
        self, role: str, device: int, actor: Any, started: ray.ObjectRef[int], models: EmulatedModels, rank: int
    ) -> None:
        super().__init__(role, device, actor, started, frozenset(), None)
        self._models, self._rank = models, rank

    def call(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
        name = method.__name__
        if name == "train":
            told = self._actor.call.remote(name, self._models.sizes(*args))
            return _Translated(self, told, lambda _: self._models.results(self._rank))
        if name == "accumulate":
            piece = self._models.early(*args)
            told = self._actor.call.remote(name, *piece.sizes, TAIL)
            return _Translated(self, told, lambda _: piece.results(self._rank)[0])
        if name == "infer":
            (sequences,) = args
            told = self._actor.call.remote(name, len(sequences), sum(map(len, sequences)))
            return _Translated(self, told, lambda _: self._models.inferences(sequences))
        if name == "drain_spans":
            return super().call(method)
        if name == "place":
            (self._models.placement,) = args
        if name not in _ANSWERS:
            raise NotImplementedError(f"emulated devices do not {name}")
        return Future(self, self._models.answer(name))
