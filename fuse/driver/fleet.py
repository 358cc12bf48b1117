"""All workers of a run: started together, told what to do together, stopped together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import ray
from transformers import PreTrainedModel

from fuse.activity import silent
from fuse.algorithms.experience import Experience
from fuse.driver import stage_by_stage as controller
from fuse.driver.fleet_settings import FleetSettings
from fuse.driver.live import LiveRollout, RolloutReport
from fuse.driver.model_start import ModelStart
from fuse.engines.engine import SamplingParams
from fuse.interstage.costs import CostModel
from fuse.interstage.migration import Policy
from fuse.interstage.planner import RolloutPlanner
from fuse.intrastage.placement import ModelName, replica_micro_batches
from fuse.intrastage.planner import Planner
from fuse.intrastage.profile import Shape
from fuse.sample import Sample
from fuse.state_dict import load_state_dict
from fuse.trace import Span
from fuse.training.model_spec import ModelSpec
from fuse.training.steps import OptimizerStep
from fuse.workers.cluster import Cluster, Worker, gather
from fuse.workers.errors import WorkerError
from fuse.workers.generation_worker import GenerationWorker
from fuse.workers.model_worker import Role
from fuse.workers.weights import WeightsRef, get_state_dict, put_state_dict

_logger = logging.getLogger(__name__)


class Fleet:
    """The workers of a run. A context manager: they start on entry and are gone on exit, whatever happened.

    cluster: where they run, and end when it does; by default one of their own.
    tell: hears what is being done.

    Raises:
        WorkerError: from every method, when a worker died or raised.
    """

    def __init__(
        self,
        settings: FleetSettings,
        *,
        actor: PreTrainedModel,
        critic: PreTrainedModel,
        reference: PreTrainedModel,
        reward: PreTrainedModel | None,
        cluster: Cluster | None = None,
        tell: Callable[[str], None] = silent,
    ) -> None:
        self.settings = settings
        self._early = cluster
        self._trained: dict[ModelName, PreTrainedModel] = {"actor": actor, "critic": critic}
        self._scoring: dict[Role, PreTrainedModel] = {"reference": reference, "critic": critic}
        if reward is not None:
            self._scoring["reward"] = reward
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
        actor = put_state_dict(self._trained["actor"].state_dict())
        devices = range(settings.num_devices)
        self._generation_workers = [self._spawn_engine(device, [actor]) for device in devices]
        self._rollouts = RolloutPlanner(settings.rollout)
        self._models = ModelStart(
            self._cluster, settings, self._trained, self._scoring, actor, after=self._generation_workers
        )
        resources.callback(self._models.abandon)
        for worker in self._generation_workers:
            self._tell(f"starting: the engine of device {worker.device}")
            worker.wait_started()

    @property
    def _model_workers(self) -> list[Worker]:
        """Once they are ready."""
        return self._models.wait(self._tell).workers

    @property
    def _planner(self) -> Planner:
        return self._models.wait(self._tell).planner

    def _spawn_engine(self, device: int, weights: Sequence[WeightsRef]) -> Worker:
        settings = self.settings
        spec = ModelSpec.of(self._trained["actor"])
        make_engine = partial(settings.engine, spec, weights, settings.accelerator)
        return self._cluster.spawn("generation worker", device, GenerationWorker, make_engine, settings.kv_transfer)

    def _replace_engine(self, device: int) -> Worker:
        """Another generation worker in place of one that died, with the actor's weights as they are now."""
        self._cluster.kill(self._generation_workers[device])
        worker = self._generation_workers[device] = self._spawn_engine(device, self._exported("actor"))
        return worker

    # One iteration

    def roll_out(
        self,
        samples: Sequence[Sample],
        params: SamplingParams,
        on_generated: Callable[[Sequence[Sample]], None] = lambda samples: None,
        *,
        policy: Policy | None = None,
        max_new_tokens: Mapping[int, int] | None = None,
    ) -> RolloutReport:
        """Fill in responses and what models say of them, sample by sample; `on_generated` gets samples as they finish.

        policy: in place of the one that past rollouts suggest. max_new_tokens: see `LiveRollout`.

        An engine that dies loses no sample, and another takes its place.
        """
        settings = self.settings
        report = LiveRollout(
            self._generation_workers,
            lambda: self._model_workers,
            samples,
            params,
            policy=policy or self._rollouts.policy(samples),
            limits=settings.rollout.limits,
            pad_token_id=settings.pad_token_id,
            costs=self._rollouts.costs(),
            on_generated=on_generated,
            max_new_tokens=max_new_tokens,
            tell=self._tell,
        ).run()
        self._rollouts.observe(samples)
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
        controller.generate(
            self._generation_workers,
            samples,
            params,
            self.settings.pad_token_id,
            self._tell,
            max_new_tokens=max_new_tokens,
        )

    def infer(self, samples: Sequence[Sample]) -> None:
        """Fill in the samples' reference log-probabilities, values and, from a reward model, scores."""
        workers = self._model_workers
        self._tell("scoring")
        controller.infer(workers, samples)

    def train(
        self, experience: Experience, steps: Sequence[OptimizerStep], learning_rate: float
    ) -> list[list[dict[str, float]]]:
        """Take the steps; returns the statistics of every micro-batch, [steps][micro-batches]."""
        counts = {len(step.micro_batches) for step in steps}
        shapes = [self._shape(experience, samples) for step in steps for samples in step.micro_batches]
        if self._planner.will_solve(counts):
            self._tell("solving: the fused schedule")
        plans = self._planner.plans(counts, shapes, self._free_bytes)
        self._tell("training")
        kept = ray.put(experience)
        results = self._on_models("train", kept, ray.put(steps), learning_rate, ray.put(plans))
        return [
            self._merge(len(step.micro_batches), [result[index] for result in results[:: self._tensor_parallel_size]])
            for index, step in enumerate(steps)
        ]

    def _merge(
        self, num_micro_batches: int, by_rank: Sequence[Mapping[ModelName, Sequence[dict[str, float]]]]
    ) -> list[dict[str, float]]:
        """One row per micro-batch: a replica's last rank has those of the replica's micro-batches."""
        merged: list[dict[str, float]] = [{} for _ in range(num_micro_batches)]
        placement = self._planner.placement
        for replica in placement:
            num_replicas = sum(other.model == replica.model for other in placement)
            indices = replica_micro_batches(num_micro_batches, num_replicas, replica.index)
            for index, row in zip(indices, by_rank[replica.ranks[-1]][replica.model], strict=True):
                merged[index] |= row
        return merged

    def _shape(self, experience: Experience, samples: Sequence[int]) -> Shape:
        """Of the micro-batch that these samples make."""
        if self.settings.training.pad_token_id is not None:
            return Shape(len(samples), max(map(len, experience.prompts)) + experience.width)
        return Shape(len(samples), max(len(experience.prompts[i]) + experience.lengths[i] for i in samples))

    def _free_bytes(self) -> int | None:
        """On the fullest device, if it tells."""
        return min((free for free in self._on_models("free_bytes") if free is not None), default=None)

    def synchronise(self) -> None:
        """Give the trained weights to the engines and to the critic's inference copies."""
        self._tell("weights: to engines and inference")
        self._on_engines("load_weights", self._exported("actor"))
        self._on_models("load_scoring_weights", "critic", self._exported("critic"))

    # Weights, checkpoints, traces

    def fetch_weights(self, policy: PreTrainedModel, value_model: PreTrainedModel) -> None:
        """Copy the trained weights into the caller's models."""
        self._tell("weights: to the driver")
        load_state_dict(policy, get_state_dict(self._exported("actor")))
        load_state_dict(value_model, get_state_dict(self._exported("critic")))

    def save(self, directory: Path) -> None:
        """Write the training state of both models."""
        self._tell("saving: the training state")
        self._on_models("save", directory)

    def load(self, directory: Path) -> None:
        """Read a training state, and give its weights to whoever holds copies."""
        self._tell("loading: the checkpoint")
        self._on_models("load", directory)
        self.synchronise()

    def drain_spans(self) -> dict[str, dict[str, list[Span]]]:
        """Spans since the last call, by device and worker."""
        models = self._on_models("drain_spans")
        self._planner.observe(span for spans in models for span in spans)
        engines = self._on_engines("drain_spans")
        for spans in (*models, *engines):
            self._rollouts.observe_spans(spans)
        return {
            f"device{index}": {"generation": generation, "model": model}
            for index, (generation, model) in enumerate(zip(engines, models, strict=True))
        }

    @property
    def serial_bubble_ratio(self) -> float | None:
        """Idle share that the last update's training would have had without fusion; None where it is not known."""
        return self._planner.serial_bubble_ratio

    @property
    def process_ids(self) -> dict[str, list[int]]:
        """Of the workers, by their kind."""
        workers = {"generation": self._generation_workers, "model": self._model_workers}
        return {kind: [worker.process_id for worker in those] for kind, those in workers.items()}

    def _exported(self, model: ModelName) -> list[WeightsRef]:
        return [ref for ref in self._on_models("export_weights", model) if ref is not None]

    def _on_models(self, method: str, *arguments: object) -> list[Any]:
        return gather([worker.call(method, *arguments) for worker in self._model_workers])

    def _on_engines(self, method: str, *arguments: object) -> list[Any]:
        """Call all engines; one that has died is replaced, and the new one called."""
        calls = [worker.call(method, *arguments) for worker in self._generation_workers]
        results = []
        for device, call in enumerate(calls):
            try:
                results.append(call.result())
            except WorkerError as error:
                if not error.is_death:
                    raise
                _logger.warning("%s; another takes its place", error)
                results += gather([self._replace_engine(device).call(method, *arguments)])
        return results
