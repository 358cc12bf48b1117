"""Real training steps of actor and critic, serial and fused in turn, and what explains the difference."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Concatenate, ParamSpec, TypedDict, TypeVar

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from fuse.algorithms.policy_loss import clipped_policy_loss
from fuse.algorithms.value_loss import clipped_value_loss
from fuse.benchmarks.comparison import compare
from fuse.benchmarks.training_batches import Task, Workload
from fuse.benchmarks.training_worker import TimedStep, TrainingWorker
from fuse.intrastage.cost_profile import Profile, merge
from fuse.intrastage.optimizer import AdamWConfig
from fuse.intrastage.placement import place
from fuse.intrastage.planned_times import PlannedTimes, planned_times
from fuse.intrastage.training_schedule import Plan, fused_schedule, serial_schedule
from fuse.training.layout import RaggedLayout
from fuse.training.model_spec import ModelSpec
from fuse.training.rank import TrainingSettings
from fuse.training.steps import OptimizerStep
from fuse.workers.calls import Worker, gather
from fuse.workers.cluster import Cluster
from schedules import Schedule

_P = ParamSpec("_P")
_T = TypeVar("_T")

_WARMUP = 1
_GAIN_WANTED = 0.9
_CAUSES = ("contention", "imbalance", "overhead", "transfer")

SETTINGS = TrainingSettings(
    backend="transformers",
    split_backward=True,
    losses={
        "actor": partial(clipped_policy_loss, temperature=1.0, cliprange=0.2),
        "critic": partial(clipped_value_loss, vf_coef=0.1, cliprange=0.2),
    },
    layout=RaggedLayout(),
    adamw=AdamWConfig(max_grad_norm=1.0),
    autocast=None,
    gradient_checkpointing=False,
    timeout_s=120.0,
)


class Side(TypedDict):
    """Steps by one schedule: medians over the repeats.

    step_ms: all of it. executed_ms: from the first operation's start to the last one's end; setup_ms: before that;
    optimizer_ms: after it. planned_ms: of the operations. bubble_*: idle shares while operations are executed.
    slowdown: seconds of all operations over those planned. overhead_share: of the step, on neither operations, waiting
    nor the optimizer. transfer_share: waiting for messages already made. The rest: where `executed_ms - planned_ms`
    went, see `fuse.benchmarks.comparison.Comparison`.
    """

    step_ms: float
    setup_ms: float
    executed_ms: float
    optimizer_ms: float
    planned_ms: float
    bubble_planned: float
    bubble_executed: float
    slowdown: float
    overhead_share: float
    transfer_share: float
    contention_ms: float
    imbalance_ms: float
    overhead_ms: float
    transfer_ms: float


class Row(TypedDict):
    """One setting. A gain is a ratio less one; gain_share is the measured one over the predicted one.

    predicted_ratio: of the planned operations, with the optimizer's measured time added to both sides.
    why: empty where fused was faster and had 90 % of the predicted gain; else what kept it from its plan most.
    """

    setting: str
    actor_layers: int
    critic_layers: int
    lengths: str
    num_micro_batches: int
    micro_batch_tokens: list[int]
    serial_ms: float
    fused_ms: float
    ratio: float
    predicted_ratio: float
    gain_share: float
    bubble_serial: float
    bubble_fused: float
    bubble_planned: float
    overhead_share: float
    why: str
    serial: Side
    fused: Side


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """Random Llamas whose layers are spread evenly over the devices."""

    layers: Mapping[str, int]
    hidden_size: int
    vocab_size: int

    def specs(self) -> dict[str, ModelSpec]:
        classes = {"actor": LlamaForCausalLM, "critic": LlamaForSequenceClassification}
        return {
            model: ModelSpec(model_class=classes[model], config=self._config(num_layers), dtype=torch.float32)
            for model, num_layers in self.layers.items()
        }

    def _config(self, num_layers: int) -> LlamaConfig:
        config = LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.hidden_size * 43 // 16,
            num_hidden_layers=num_layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=8192,
        )
        config.num_labels = 1
        return config


class Trainers:
    """Training workers on all devices, which build one pair of models after the other."""

    def __init__(self, workers: Sequence[Worker[TrainingWorker]]) -> None:
        count = len(workers)
        self._workers = workers
        self._placement = (*place("actor", count, count), *place("critic", count, count, reverse=True))

    @classmethod
    @contextmanager
    def start(cls, num_devices: int) -> Iterator[Trainers]:
        """One worker per device, in a cluster of their own.

        Raises:
            ValueError: there are fewer devices.
        """
        with Cluster(num_devices) as cluster:
            devices = range(num_devices)
            workers = [cluster.spawn("training worker", one, TrainingWorker, one, SETTINGS) for one in devices]
            trainers = cls(workers)
            port = workers[0].call(TrainingWorker.serve_store, cluster.host(0)).result()
            trainers._on_all(TrainingWorker.connect, cluster.host(0), port, num_devices)
            yield trainers

    def build(self, models: Models) -> None:
        """Models of these sizes in place of those before."""
        self._on_all(TrainingWorker.place, models.specs(), self._placement)

    def profile(self, load: Workload) -> Profile:
        """What every stage costs on micro-batches of all kinds."""
        return merge(self._on_all(TrainingWorker.profile, load.experience, load.buckets()))

    def compare(
        self, load: Workload, task: Task, profile: Profile, *, repeats: int, solve_s: float
    ) -> tuple[Side, Side]:
        """Take the task's step by the serial and by the fused schedule, in turn."""
        count = len(task.micro_batches)
        shapes = [load.shape(samples) for samples in task.micro_batches]
        middle = sorted(shapes, key=lambda shape: shape.size)[count // 2]
        schedules = {
            "serial": serial_schedule(self._placement, count),
            "fused": fused_schedule(profile, self._placement, count, middle, time_limit_s=solve_s),
        }
        plans = {side: Plan(schedule, profile) for side, schedule in schedules.items()}
        step = OptimizerStep(micro_batches=task.micro_batches, weight=1 / count)
        by_rank = self._on_all(TrainingWorker.alternate, load.experience, step, plans, repeats, _WARMUP)
        names = [replica.name for replica in self._placement]
        sides = {}
        for side, schedule in schedules.items():
            planned = planned_times(schedule, profile, names, [shapes] * len(names))
            by_repeat = list(zip(*(steps[side] for steps in by_rank), strict=True))
            sides[side] = _medians([side_of(schedule, planned, step) for step in by_repeat])
        return sides["serial"], sides["fused"]

    def _on_all(
        self, method: Callable[Concatenate[TrainingWorker, _P], _T], *args: _P.args, **kwargs: _P.kwargs
    ) -> list[_T]:
        return gather([worker.call(method, *args, **kwargs) for worker in self._workers])


def side_of(schedule: Schedule, planned: PlannedTimes, ranks: Sequence[TimedStep]) -> Side:
    """One step, from what each rank recorded."""
    found = compare(schedule, planned, [rank.spans for rank in ranks])
    start_s, end_s = min(rank.start_s for rank in ranks), max(rank.end_s for rank in ranks)
    operations = [[span for span in rank.spans if span.category == "train"] for rank in ranks]
    setup_s = min(of_rank[0].start_s for of_rank in operations if of_rank) - start_s
    step_s = end_s - start_s
    return {
        "step_ms": 1e3 * step_s,
        "setup_ms": 1e3 * setup_s,
        "executed_ms": 1e3 * found.makespan_executed_s,
        "optimizer_ms": 1e3 * (step_s - setup_s - found.makespan_executed_s),
        "planned_ms": 1e3 * found.makespan_planned_s,
        "bubble_planned": found.bubble_planned,
        "bubble_executed": found.bubble_executed,
        "slowdown": found.slowdown,
        "overhead_share": (setup_s + found.overhead_share * found.makespan_executed_s) / step_s,
        "transfer_share": found.transfer_share,
        "contention_ms": 1e3 * found.contention_s,
        "imbalance_ms": 1e3 * found.imbalance_s,
        "overhead_ms": 1e3 * found.overhead_s,
        "transfer_ms": 1e3 * found.transfer_s,
    }


def _medians(sides: Sequence[Side]) -> Side:
    values: Any = {name: statistics.median(_number(side, name) for side in sides) for name in sides[0]}
    medians: Side = values
    return medians


def _number(side: Side, name: str) -> float:
    value: float = side[name]  # type: ignore[literal-required]
    return value


def row_of(sizes: str, models: Models, task: Task, tokens: list[int], serial: Side, fused: Side) -> Row:
    """What a setting came to. tokens: of each micro-batch, padding included."""
    optimizer_ms = statistics.mean((serial["optimizer_ms"], fused["optimizer_ms"]))
    ratio = serial["step_ms"] / fused["step_ms"]
    predicted = (serial["planned_ms"] + optimizer_ms) / (fused["planned_ms"] + optimizer_ms)
    gain_share = (ratio - 1) / (predicted - 1) if predicted != 1 else 1.0
    return {
        "setting": f"{sizes} {task.lengths} {len(task.micro_batches)}",
        "actor_layers": models.layers["actor"],
        "critic_layers": models.layers["critic"],
        "lengths": task.lengths,
        "num_micro_batches": len(task.micro_batches),
        "micro_batch_tokens": tokens,
        "serial_ms": serial["step_ms"],
        "fused_ms": fused["step_ms"],
        "ratio": ratio,
        "predicted_ratio": predicted,
        "gain_share": gain_share,
        "bubble_serial": serial["bubble_executed"],
        "bubble_fused": fused["bubble_executed"],
        "bubble_planned": fused["bubble_planned"],
        "overhead_share": fused["overhead_share"],
        "why": "" if ratio > 1 and gain_share >= _GAIN_WANTED else _why(serial, fused),
        "serial": serial,
        "fused": fused,
    }


def _why(serial: Side, fused: Side) -> str:
    """What fused steps lost most on, beyond what serial steps would lose in as much time."""
    scale = fused["planned_ms"] / serial["planned_ms"]
    lost_ms = {cause: _number(fused, f"{cause}_ms") - scale * _number(serial, f"{cause}_ms") for cause in _CAUSES}
    lost_ms["setup"] = fused["setup_ms"] - scale * serial["setup_ms"]
    cause = max(lost_ms, key=lambda one: lost_ms[one])
    return f"{cause}: {lost_ms[cause]:.1f} ms more than serial steps lose in as much time"
