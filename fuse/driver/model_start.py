"""The model workers' start, beside the first rollout: processes, weights, and where models are cut."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from transformers import PreTrainedModel

from fuse.driver.fleet_settings import FleetSettings
from fuse.driver.identity import identity
from fuse.driver.memory import fits
from fuse.driver.one_base import own_weights
from fuse.driver.stage_choice import StageChoice
from fuse.intrastage.forward_only import with_scorers
from fuse.intrastage.measurement_store import Measured, MeasurementStore
from fuse.intrastage.opposite import UpdateCosts, has_opposites
from fuse.intrastage.search_time import SearchTime
from fuse.intrastage.stage_balance import LayerCosts
from fuse.intrastage.training_planner import TrainingPlanner
from fuse.roles import GENERATING
from fuse.workers.calls import gather
from fuse.workers.cluster import Cluster
from fuse.workers.generation_handle import GenerationHandle
from fuse.workers.model_handle import ModelHandle
from fuse.workers.weights import WeightsRef, put_state_dict

_logger = logging.getLogger(__name__)

_TICK_S = 1e-5


@dataclass(frozen=True, slots=True)
class Models:
    """The model workers, one per device, ready for every call; and who plans their training."""

    workers: list[ModelHandle]
    planner: TrainingPlanner


class ModelStart:
    """Starts a model worker per device in a thread, once the engines `after` are there: samples come first.

    actor: its weights, which are in the object store already.
    """

    def __init__(
        self,
        cluster: Cluster,
        settings: FleetSettings,
        trained: Mapping[str, PreTrainedModel],
        scoring: Mapping[str, PreTrainedModel],
        actor: WeightsRef,
        *,
        after: Sequence[GenerationHandle],
    ) -> None:
        self._cluster, self._settings = cluster, settings
        self._trained, self._scoring = trained, scoring
        self._specs = {role: settings.spec(role, model) for role, model in trained.items()}
        self._workers: list[ModelHandle] = []
        self._doing = "model workers"
        self._is_abandoned = False
        self._ready: Future[Models] = Future()
        self._thread = threading.Thread(target=self._run, args=(actor, after), name="model workers", daemon=True)
        self._thread.start()

    def wait(self, tell: Callable[[str], None]) -> Models:
        """The workers, once they are ready; `tell` hears what is waited for.

        Raises:
            WorkerError: one died or raised.
        """
        while not self._ready.done():
            tell(f"loading: {self._doing}")
            self._thread.join(timeout=0.5)
        return self._ready.result()

    @property
    def is_ready(self) -> bool:
        """Whether `wait` returns, or raises, at once."""
        return self._ready.done()

    def abandon(self) -> None:
        """End a start that goes on, with its workers."""
        self._is_abandoned = True
        while not self._ready.done():
            for model in self._workers:
                model.worker.kill()
            self._thread.join(timeout=0.1)

    def _run(self, actor: WeightsRef, after: Sequence[GenerationHandle]) -> None:
        try:
            for engine in after:
                engine.worker.wait_started()
            if self._is_abandoned:
                raise RuntimeError("the run has ended")
            self._ready.set_result(self._start(actor))
        except BaseException as error:  # noqa: BLE001  (the end of a thread: whoever waits raises it)
            self._ready.set_exception(error)

    def _start(self, actor: WeightsRef) -> Models:
        settings = self._settings
        scoring = {role: settings.spec(role, model) for role, model in self._scoring.items()}
        self._workers += [
            ModelHandle.spawn(
                self._cluster,
                device,
                settings.accelerator,
                self._specs,
                scoring,
                settings.training,
                settings.scoring,
            )
            for device in range(settings.num_devices)
        ]
        host = self._cluster.host(0)
        (port,) = gather([self._workers[0].serve_store(host)])
        gather([worker.connect(host, port, settings.num_devices) for worker in self._workers])
        store = MeasurementStore(settings.plan.directory, identity(settings, self._specs))
        stages = self._stages(store)
        placement = stages.placement
        self._doing = "stages"
        gather([worker.place(placement) for worker in self._workers])
        self._doing = "weights"
        models = {**self._trained, **self._scoring}
        specs = {**scoring, **self._specs}
        lenders = {role: {origin.role for origin in spec.origins.values()} - {role} for role, spec in specs.items()}
        stored = {GENERATING: actor}
        for role, model in models.items():
            if role not in stored:
                stored[role] = put_state_dict(own_weights(role, model, specs[role]))
            weights = {one: stored[one] for one in (role, *lenders[role])}
            if role in self._trained:
                gather([worker.load_training_weights(role, weights) for worker in self._workers])
            if role in self._scoring:
                gather([worker.load_scoring_weights(role, weights) for worker in self._workers])
            if not any(role in others for others in lenders.values()):
                del stored[role], weights  # or they would lie on the host beside the next model's
        planned = with_scorers(placement, settings.scorers)
        return Models(self._workers, TrainingPlanner(planned, settings.plan, store, stages.unfused, stages.update_s))

    def _stages(self, store: MeasurementStore) -> Measured:
        """The placement asked for or its alternative, cut where measured times favour it, now or in an earlier run."""
        settings = self._settings
        if settings.balance is None:
            return Measured(settings.placement, None)
        known = store.load()
        if known is not None:
            _logger.info("stages are cut as measured in an earlier run")
            return self._with_room(known)
        self._doing = "measuring a layer and a head of each model"
        profiles = gather([worker.measure_layer_costs(settings.balance, _TICK_S) for worker in self._workers])
        choice = StageChoice(
            specs=self._specs,
            costs={model: LayerCosts.of(profiles, model) for model in self._specs},
            num_micro_batches=settings.micro_batches_per_step,
            is_fused=settings.plan.fused,
            tensor_parallel_size=settings.training.tensor_parallel_size,
            tick_s=_TICK_S,
            within=SearchTime(settings.plan.time_limit_s),
        )
        stages = self._chosen(choice)
        store.save(stages)
        return self._with_room(stages)

    def _with_room(self, stages: Measured) -> Measured:
        """Those, or what is known to fit where they do not."""
        if self._settings.memory is None or fits(self._settings.memory, stages.placement):
            return stages
        _logger.info("stages are cut as planned: memory has no room for the cut that measured times favour")
        return Measured(self._settings.placement, None)

    def _chosen(self, choice: StageChoice) -> Measured:
        asked, alternative = self._settings.placement, self._settings.alternative
        if alternative is None and not has_opposites(asked):
            return choice.cut(asked)
        costs = UpdateCosts.slowest(gather([worker.measure_update_costs() for worker in self._workers]))
        if alternative is None:
            return choice.cut_with_update(asked, costs)
        return choice.soonest(asked, alternative, costs)
