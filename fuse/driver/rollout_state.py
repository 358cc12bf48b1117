"""Where a live rollout's samples are, and what a policy sees of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fuse.interstage.costs import CostModel, MigrationKind, cheaper_migration
from fuse.interstage.migration import EndedSamples, EngineLimits, Infer, LiveSamples, RolloutState
from fuse.sample import Sample, SampleState
from fuse.workers.generation_handle import GenerationHandle
from fuse.workers.generation_worker import Departure

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutReport:
    """What a rollout took. decision_s: from news to the last call it led to, per decision, in seconds.

    generation_s, makespan_s: from the start to the last token and to the last score.
    lost_engines: devices whose engine died; its samples went on elsewhere.
    """

    makespan_s: float
    generation_s: float
    num_migrations: int
    moved_bytes: int
    decision_s: tuple[float, ...]
    lost_engines: tuple[int, ...]


@dataclass(slots=True, eq=False)
class RolloutDevice:
    """What a device's workers are at.

    held: live samples that its engine has been given. heard_s: when it last told of tokens, or got its first samples.
    scoring_s: when its model worker was given what it scores.
    """

    index: int
    engine: GenerationHandle | None
    held: dict[int, None] = field(default_factory=dict)
    is_polled: bool = False
    num_evictions: int = 0
    released: bool = False
    job: Infer | None = None
    is_scoring: bool = False
    heard_s: float = 0.0
    scoring_s: float = 0.0
    arrivals: list[Departure] = field(default_factory=list)  # admitted when what the device scores is done


def moves_kv(costs: CostModel | None, sample: Sample) -> bool:
    """Whether a sample that moves takes its KV along; else it is computed again."""
    if costs is None or not sample.response_ids:
        return False
    context_tokens = len(sample.prompt_ids) + len(sample.response_ids)
    return cheaper_migration(costs, context_tokens).kind is MigrationKind.TRANSFER


def visible_state(
    samples: Sequence[Sample],
    prompts: Ints,
    home: Mapping[int, int],
    devices: Sequence[RolloutDevice],
    limits: EngineLimits,
) -> RolloutState:
    """What a policy sees. It knows a sample by its index in `samples`; `home` has each live one's device, by its id.

    prompts: of `prompt_numbers`.
    """
    ids: list[int] = []
    ended: list[int] = []
    for index, sample in enumerate(samples):
        (ids if sample.id in home else ended).append(index)
    live = [samples[index] for index in ids]
    backlog = [index for index, sample in enumerate(samples) if sample.state is SampleState.GENERATED]
    response_tokens = np.array([len(sample.response_ids) for sample in live], dtype=np.int64)
    return RolloutState(
        limits=limits,
        live=LiveSamples(
            ids=np.array(ids, dtype=np.int64),
            devices=np.array([home[sample.id] for sample in live], dtype=np.int64),
            prompt_tokens=np.array([len(sample.prompt_ids) for sample in live], dtype=np.int64),
            response_tokens=response_tokens,
            started=response_tokens > 0,
            movable=np.array([sample.state is SampleState.GENERATING for sample in live], dtype=np.bool_),
            prompts=prompts[ids],
        ),
        ended=EndedSamples(
            prompts=prompts[ended],
            response_tokens=np.array([len(samples[index].response_ids) for index in ended], dtype=np.int64),
        ),
        finished_ids=np.array(backlog, dtype=np.int64),
        finished_tokens=np.array([_num_tokens(samples[index]) for index in backlog], dtype=np.int64),
        released=np.array([device.released for device in devices], dtype=np.bool_),
        inferring_tokens=np.array([_job_tokens(samples, device) for device in devices], dtype=np.int64),
        lost=np.array([device.engine is None for device in devices], dtype=np.bool_),
    )


def _job_tokens(samples: Sequence[Sample], device: RolloutDevice) -> int:
    return 0 if device.job is None else sum(_num_tokens(samples[index]) for index in device.job.samples)


def _num_tokens(sample: Sample) -> int:
    """Of a finished sample, as far as it counts: the length of its `sequence_of`, without the copy."""
    return len(sample.prompt_ids) + sample.length
