"""All workers of a run: started together, told what to do together, stopped together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import ray
from transformers import PreTrainedModel

from fuse import roles
from fuse.activity import silent
from fuse.algorithms.batch import Experience
from fuse.driver import stage_by_stage
from fuse.driver.fleet_settings import FleetSettings
from fuse.driver.live import LiveRollout
from fuse.driver.memory import free_for_micro_batches
from fuse.driver.model_start import ModelStart
from fuse.driver.rollout_state import RolloutReport
from fuse.engines.engine import SamplingParams
from fuse.interstage.costs import CostModel
from fuse.interstage.migration import Policy
from fuse.interstage.rollout_planner import RolloutPlanner
from fuse.intrastage.training_planner import TrainingPlanner
from fuse.roles import GENERATING
from fuse.sample import Sample
from fuse.state_dict import load_state_dict
from fuse.trace import Span
from fuse.training.model_spec import ModelSpec
from fuse.training.rounds import Round, step_reports, unfused_counts
from fuse.training.state import check_saved
from fuse.training.steps import StepReport
from fuse.workers.calls import Future, gather
from fuse.workers.cluster import Cluster
from fuse.workers.errors import WorkerError
from fuse.workers.generation_handle import GenerationHandle
from fuse.workers.model_handle import ModelHandle
from fuse.workers.weights import WeightsRef, get_state_dict, put_state_dict

_T = TypeVar("_T")

_MOST_REPLACEMENTS = 3
"""Of an engine in a row, before it is given up."""

_logger = logging.getLogger(__name__)


class Fleet:
    """The workers of a run. A context manager: they start on entry and are gone on exit, whatever happened.

    models: by role; see `fuse.roles`.
    cluster: where they run, and end when it does; by default one of their own.
    tell: hears what is being done.

    Raises:
        WorkerError: from every method, when a worker died or raised.
    """

    def __init__(
        self,
        settings: FleetSettings,
        models: Mapping[str, PreTrainedModel],
        *,
        cluster: Cluster | None = None,
        tell: Callable[[str], None] = silent,
    ) -> None:
        self.settings = settings
        self._early = cluster
        self._trained = {role: models[role] for role in roles.training(models)}
        self._scoring = {role: models[role] for role in roles.scoring(models)}
        self._tell = tell
        self._tensor_parallel_size = settings.training.tensor_parallel_size
        self._resources = ExitStack()

    def __enter__(self) -> Fleet:
        with ExitStack() as resources:
            self._start(resources)
            self._resources = resources.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._resources.close()

    def _start(self, resources: ExitStack) -> None:
        """Start the engines, and the model workers behind them: samples are generated while models load."""
        settings = self.settings
        self._tell("starting: engines" if self._early else "starting: Ray")
        self._cluster = self._early or resources.enter_context(
            Cluster(settings.num_devices, ray_address=settings.ray_address, accelerator=settings.accelerator)
        )
        actor = put_state_dict(self._trained[GENERATING].state_dict())
        devices = range(settings.num_devices)
        self._generation_workers = [self._spawn_engine(device, [actor]) for device in devices]
        self._models = ModelStart(
            self._cluster, settings, self._trained, self._scoring, actor, after=self._generation_workers
        )
        resources.callback(self._models.abandon)
        for device, engine in enumerate(self._generation_workers):
            self._tell(f"starting: the engine of device {device}")
            engine.worker.wait_started()
        capacities = gather([engine.kv_capacity_tokens() for engine in self._generation_workers])
        self._rollouts = RolloutPlanner(
            settings.rollout.within(one for one in capacities if one is not None), num_scoring=len(self._scoring)
        )

    @property
    def _model_workers(self) -> list[ModelHandle]:
        """Once they are ready."""
        return self._models.wait(self._tell).workers

    @property
    def _planner(self) -> TrainingPlanner:
        return self._models.wait(self._tell).planner

    def _spawn_engine(self, device: int, weights: Sequence[WeightsRef]) -> GenerationHandle:
        settings = self.settings
        spec = ModelSpec.of(self._trained[GENERATING])
        make_engine = partial(settings.engine, spec, weights, settings.accelerator)
        return GenerationHandle.spawn(self._cluster, device, make_engine, settings.kv_transfer)

    def _replace_engine(self, device: int) -> GenerationHandle:
        """Another generation worker in place of one that died, with the actor's weights as they are now."""
        self._cluster.kill(self._generation_workers[device].worker)
        engine = self._generation_workers[device] = self._spawn_engine(device, self._exported(GENERATING))
        return engine

    # One iteration

    def roll_out(
        self,
        samples: Sequence[Sample],
        params: SamplingParams,
        on_generated: Callable[[Sequence[Sample]], None] = lambda samples: None,
        *,
        policy: Policy | None = None,
        max_new_tokens: Mapping[int, int] | None = None,
        teaches: bool = True,
    ) -> RolloutReport:
        """Fill in responses and what models say of them, sample by sample; `on_generated` gets samples as they finish.

        policy: in place of the one that past rollouts suggest. max_new_tokens: see `LiveRollout`.
        teaches: whether later rollouts may be planned by this one. One that must not teach runs under a fixed policy;
            `forget_spans` drops what it cost.

        An engine that dies loses no sample, and another takes its place.
        """
        settings, rollouts = self.settings, self._rollouts
        if policy is None:
            policy = rollouts.policy(samples) if teaches else rollouts.fixed_policy(len(samples))
        report = LiveRollout(
            self._generation_workers,
            (lambda: self._model_workers) if self._scoring else None,
            samples,
            params,
            policy=policy,
            limits=rollouts.limits,
            pad_token_id=settings.pad_token_id,
            costs=rollouts.costs(),
            on_generated=on_generated,
            max_new_tokens=max_new_tokens,
            timeout_s=settings.training.timeout_s,
            tell=self._tell,
        ).run()
        if teaches:
            rollouts.observe(samples)
        for device in report.lost_engines:
            self._replace_engine(device)
        return report

    @property
    def rollout_costs(self) -> CostModel | None:
        """What operations of rollouts cost here, as measured so far; None before there is enough."""
        return self._rollouts.costs()

    def generate(
        self, samples: Sequence[Sample], params: SamplingParams, *, max_new_tokens: Mapping[int, int] | None = None
    ) -> None:
        """Fill in the samples' responses. max_new_tokens: as of `roll_out`."""
        stage_by_stage.generate(
            self._generation_workers,
            samples,
            params,
            self.settings.pad_token_id,
            self._tell,
            max_new_tokens=max_new_tokens,
            timeout_s=self.settings.training.timeout_s,
        )

    def infer(self, samples: Sequence[Sample]) -> None:
        """Fill in what models say of the samples."""
        if not self._scoring:
            stage_by_stage.skip_inference(samples)
            return
        workers = self._model_workers
        self._tell("scoring")
        stage_by_stage.infer(workers, samples, timeout_s=self.settings.training.timeout_s)

    def train(
        self, experience: Experience, rounds: Sequence[Round], learning_rates: Sequence[Mapping[str, float]]
    ) -> dict[str, list[StepReport]]:
        """Take the rounds' optimizer steps. learning_rates: by round, of the roles in it. Returns each role's steps."""
        counts = [one.counts for one in rounds]
        shape_of = self.settings.training.layout.shape
        trained = dict.fromkeys(mb for one in rounds for part in one.parts.values() for mb in part.micro_batches)
        shapes = [shape_of(experience, samples) for samples in trained]
        if self._planner.will_solve(counts):
            self._tell("solving: the fused schedule")
        plans = self._planner.plans(counts, shapes, self._free_bytes, unfused_counts(rounds))
        self._tell("training")
        shared = ray.put(experience), ray.put(rounds), learning_rates, ray.put(plans)
        results = gather([worker.train(*shared) for worker in self._model_workers])
        return step_reports(rounds, results[:: self._tensor_parallel_size], self._planner.placement)

    def _free_bytes(self) -> int | None:
        """That micro-batches under way may take on the fullest device, if devices tell."""
        on_devices = gather([worker.free_bytes() for worker in self._model_workers])
        memory = self.settings.memory
        if memory is not None:
            on_devices = free_for_micro_batches(replace(memory, placement=self._planner.placement), on_devices)
        return min((free for free in on_devices if free is not None), default=None)

    def synchronise(self) -> None:
        """Give the trained weights to the engines, and to what scores with a copy of a model that trains."""
        self._tell("weights: to engines and inference")
        weights = self._exported(GENERATING)
        self._on_engines(lambda engine: engine.load_weights(weights))
        for role in self._trained.keys() & self._scoring.keys():
            exported = self._exported(role)
            gather([worker.load_scoring_weights(role, exported) for worker in self._model_workers])

    # Weights, checkpoints, traces

    def fetch_weights(self) -> None:
        """Copy the trained weights into the models that the run was started with."""
        self._tell("weights: to the driver")
        for role, model in self._trained.items():
            load_state_dict(model, get_state_dict(self._exported(role)))

    def save(self, directory: Path) -> None:
        """Write the training state of all models that train.

        Raises: OSError when a worker could not write it, or wrote it where it is not seen from here.
        """
        self._tell("saving: the training state")
        try:
            seen = gather([worker.save(directory) for worker in self._model_workers])
        except WorkerError as error:
            if isinstance(error.raised, OSError):
                raise OSError(str(error)) from error
            raise
        check_saved(directory, seen)

    def load(self, directory: Path) -> None:
        """Read a training state, and give its weights to whoever holds copies."""
        self._tell("loading: the checkpoint")
        gather([worker.load(directory) for worker in self._model_workers])
        self.synchronise()

    def drain_spans(self) -> dict[str, dict[str, list[Span]]]:
        """Spans since the last call, by device and worker."""
        models = gather([worker.drain_spans() for worker in self._model_workers])
        self._planner.observe(span for spans in models for span in spans)
        engines = self._on_engines(GenerationHandle.drain_spans)
        for spans in (*models, *engines):
            self._rollouts.observe_spans(spans)
        return {
            f"device{index}": {"generation": generation, "model": model}
            for index, (generation, model) in enumerate(zip(engines, models, strict=True))
        }

    def forget_spans(self) -> None:
        """Drop all spans since they were drained last: nothing is learnt from them, and no trace has them."""
        gather([worker.drain_spans() for worker in self._model_workers])
        self._on_engines(GenerationHandle.drain_spans)

    @property
    def serial_bubble_ratio(self) -> float | None:
        """Idle share that the last update's training would have had without fusion; None where it is not known."""
        return self._planner.serial_bubble_ratio

    @property
    def process_ids(self) -> dict[str, list[int]]:
        """Of the workers, by their kind."""
        return {
            "generation": [engine.worker.process_id for engine in self._generation_workers],
            "model": [handle.worker.process_id for handle in self._model_workers],
        }

    def _exported(self, role: str) -> list[WeightsRef]:
        parts = gather([worker.export_weights(role) for worker in self._model_workers])
        return [part for part in parts if part is not None]

    def _on_engines(self, call: Callable[[GenerationHandle], Future[_T]]) -> list[_T]:
        """Call all engines; one that has died is replaced, and the new one called."""
        futures = [call(engine) for engine in self._generation_workers]
        return [self._answer(device, future, call) for device, future in enumerate(futures)]

    def _answer(self, device: int, future: Future[_T], call: Callable[[GenerationHandle], Future[_T]]) -> _T:
        for _ in range(_MOST_REPLACEMENTS):
            try:
                return future.result()
            except WorkerError as error:
                if not error.is_death:
                    raise
                _logger.warning("%s; another takes its place", error)
                future = call(self._replace_engine(device))
        return future.result()
