"""All workers of a run: started together, told what to do together, stopped together."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import ray
import torch
from transformers import PreTrainedModel

from fuse.config import PPOConfig
from fuse.engines.engine import GenerationEngine, SamplingParams
from fuse.engines.transformers import TransformersEngine
from fuse.experience import Experience
from fuse.interstage import controller
from fuse.intrastage.optimizer import AdamWConfig
from fuse.intrastage.plan import ModelName, place, replica_micro_batches
from fuse.sample import Sample
from fuse.state_dict import load_state_dict
from fuse.steps import OptimizerStep
from fuse.trace import Span
from fuse.workers.cluster import Cluster, gather
from fuse.workers.generation_worker import GenerationWorker
from fuse.workers.inference import MicroBatchLimit
from fuse.workers.model_worker import ModelSpec, ModelWorker, Role, TrainingSettings
from fuse.workers.weights import WeightsRef, get_state_dict, put_state_dict

EngineFactory = Callable[[ModelSpec, WeightsRef, str], GenerationEngine]
"""(model, its weights, torch device) -> an engine; runs inside the generation worker."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetSettings:
    """Which workers a run has, and how they work."""

    num_devices: int
    accelerator: Literal["cpu", "cuda"]
    ray_address: str | None
    pad_token_id: int
    engine: EngineFactory
    inference: MicroBatchLimit
    training: TrainingSettings

    @classmethod
    def from_config(cls, config: PPOConfig, pad_token_id: int) -> FleetSettings:
        """What `config` asks for.

        Raises:
            ValueError: stages that do not divide the devices, or more devices than there are.
        """
        num_devices = config.num_devices or _default_num_devices(config.accelerator)
        placement = (
            *place("actor", num_devices, config.actor_stages or num_devices),
            *place("critic", num_devices, config.critic_stages or num_devices, reverse=True),
        )
        training = TrainingSettings(
            placement=placement,
            temperature=config.temperature + 1e-7,
            cliprange=config.cliprange,
            vf_coef=config.vf_coef,
            cliprange_value=config.cliprange_value,
            adamw=AdamWConfig(
                betas=(config.adam_beta1, config.adam_beta2),
                eps=config.adam_epsilon,
                weight_decay=config.weight_decay,
                max_grad_norm=0.0 if config.trl_quirks else config.max_grad_norm,
            ),
            autocast=torch.bfloat16 if config.bf16 and not config.trl_quirks else None,
            gradient_checkpointing=config.gradient_checkpointing,
            pad_token_id=pad_token_id if config.trl_quirks else None,
            timeout_s=config.worker_timeout_s,
        )
        return cls(
            num_devices=num_devices,
            accelerator=config.accelerator,
            ray_address=config.ray_address,
            pad_token_id=pad_token_id,
            engine=partial(transformers_engine, max_batch=config.generation_batch_size, autocast=training.autocast),
            inference=MicroBatchLimit(
                max_samples=config.local_rollout_forward_batch_size, max_tokens=config.inference_batch_tokens
            ),
            training=training,
        )


def transformers_engine(
    spec: ModelSpec, weights: WeightsRef, device: str, *, max_batch: int, autocast: torch.dtype | None
) -> GenerationEngine:
    """The embedded engine; it computes in `autocast`'s type where there is one."""
    model = spec.build(torch.device(device), autocast)
    load_state_dict(model, get_state_dict([weights]))
    return TransformersEngine(model, max_batch=max_batch)


class Fleet:
    """The workers of a run. A context manager: they start on entry and are gone on exit, whatever happened.

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
    ) -> None:
        self._settings = settings
        self._trained: dict[ModelName, PreTrainedModel] = {"actor": actor, "critic": critic}
        self._scoring: dict[Role, PreTrainedModel] = {"reference": reference, "critic": critic}
        if reward is not None:
            self._scoring["reward"] = reward
        self._resources = ExitStack()

    def __enter__(self) -> Fleet:
        with ExitStack() as resources:
            self._start(resources)
            self._resources = resources.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._resources.close()

    def _start(self, resources: ExitStack) -> None:
        settings = self._settings
        cluster = resources.enter_context(
            Cluster(settings.num_devices, ray_address=settings.ray_address, accelerator=settings.accelerator)
        )
        trained = {name: ModelSpec.of(model) for name, model in self._trained.items()}
        scoring = {role: ModelSpec.of(model) for role, model in self._scoring.items()}
        weights = {name: put_state_dict(model.state_dict()) for name, model in self._trained.items()}
        torch_device = settings.accelerator
        devices = range(settings.num_devices)
        self._model_workers = [
            cluster.spawn(
                "model worker",
                device,
                ModelWorker,
                device,
                torch_device,
                trained,
                scoring,
                settings.training,
                settings.inference,
            )
            for device in devices
        ]
        self._generation_workers = [
            cluster.spawn(
                "generation worker",
                device,
                GenerationWorker,
                partial(settings.engine, trained["actor"], weights["actor"], torch_device),
            )
            for device in devices
        ]
        host = cluster.host(0)
        (port,) = gather([self._model_workers[0].call("serve_store", host)])
        self._on_models("connect", host, port, settings.num_devices)
        for name in self._trained:
            self._on_models("load_training_weights", name, [weights[name]])
        for role, model in self._scoring.items():
            known = weights.get(role) if role == "critic" else None
            self._on_models("load_scoring_weights", role, [known or put_state_dict(model.state_dict())])

    # One iteration

    def generate(self, samples: Sequence[Sample], params: SamplingParams) -> None:
        """Fill in the samples' responses."""
        controller.generate(self._generation_workers, samples, params, self._settings.pad_token_id)

    def infer(self, samples: Sequence[Sample]) -> None:
        """Fill in the samples' reference log-probabilities, values and, from a reward model, scores."""
        controller.infer(self._model_workers, samples)

    def train(
        self, experience: Experience, steps: Sequence[OptimizerStep], learning_rate: float
    ) -> list[list[dict[str, float]]]:
        """Take the steps; returns the statistics of every micro-batch, [steps][micro-batches]."""
        results = self._on_models("train", ray.put(experience), ray.put(steps), learning_rate)
        return [
            self._merge(len(step.micro_batches), [result[index] for result in results])
            for index, step in enumerate(steps)
        ]

    def _merge(
        self, num_micro_batches: int, by_rank: Sequence[Mapping[ModelName, Sequence[dict[str, float]]]]
    ) -> list[dict[str, float]]:
        """One row per micro-batch: a replica's last rank has those of the replica's micro-batches."""
        merged: list[dict[str, float]] = [{} for _ in range(num_micro_batches)]
        training = self._settings.training
        for replica in training.placement:
            indices = replica_micro_batches(num_micro_batches, len(training.replicas(replica.model)), replica.index)
            for index, row in zip(indices, by_rank[replica.ranks[-1]][replica.model], strict=True):
                merged[index] |= row
        return merged

    def synchronise(self) -> None:
        """Give the trained weights to the engines and to the critic's inference copies."""
        self._on_engines("load_weights", self._exported("actor"))
        self._on_models("load_scoring_weights", "critic", self._exported("critic"))

    # Weights, checkpoints, traces

    def fetch_weights(self, policy: PreTrainedModel, value_model: PreTrainedModel) -> None:
        """Copy the trained weights into the caller's models."""
        load_state_dict(policy, get_state_dict(self._exported("actor")))
        load_state_dict(value_model, get_state_dict(self._exported("critic")))

    def save(self, directory: Path) -> None:
        """Write the training state of both models."""
        self._on_models("save", directory)

    def load(self, directory: Path) -> None:
        """Read a training state, and give its weights to whoever holds copies."""
        self._on_models("load", directory)
        self.synchronise()

    def drain_spans(self) -> dict[str, dict[str, list[Span]]]:
        """Spans since the last call, by device and worker."""
        models = self._on_models("drain_spans")
        engines = self._on_engines("drain_spans")
        return {
            f"device{index}": {"generation": generation, "model": model}
            for index, (generation, model) in enumerate(zip(engines, models, strict=True))
        }

    def _exported(self, model: ModelName) -> list[WeightsRef]:
        return [ref for ref in self._on_models("export_weights", model) if ref is not None]

    def _on_models(self, method: str, *arguments: object) -> list[Any]:
        return gather([worker.call(method, *arguments) for worker in self._model_workers])

    def _on_engines(self, method: str, *arguments: object) -> list[Any]:
        return gather([worker.call(method, *arguments) for worker in self._generation_workers])


def _default_num_devices(accelerator: Literal["cpu", "cuda"]) -> int:
    """Every GPU, or two cores."""
    return torch.cuda.device_count() if accelerator == "cuda" else min(2, len(os.sched_getaffinity(0)))
