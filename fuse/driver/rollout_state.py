"""Where a live rollout's samples are, and what a policy sees of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fuse.interstage.columns import Phase, SampleColumns
from fuse.interstage.costs import CostModel, MigrationKind, cheaper_migration, left_to_score
from fuse.interstage.dealing import prompt_numbers
from fuse.interstage.migration import EngineLimits, Infer, RolloutState
from fuse.sample import Sample, SampleState
from fuse.workers.generation_handle import GenerationHandle
from fuse.workers.generation_worker import Departure


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutReport:
    """What a rollout took. decision_s: from news to the last call it led to, per decision, in seconds.

    generation_s, makespan_s: from the start to the last token and to the last score.
    lost_engines: devices whose engine died; its samples went on elsewhere.
    scoring_calls: of each piece that a device scored by itself, its tokens, and seconds until its scores were there.
    """

    makespan_s: float
    generation_s: float
    num_migrations: int
    moved_bytes: int
    decision_s: tuple[float, ...]
    lost_engines: tuple[int, ...]
    scoring_calls: tuple[tuple[int, float], ...]


@dataclass(slots=True, eq=False)
class RolloutDevice:
    """What a device's workers are at.

    held: live samples that its engine has been given. heard_s: when it last told of tokens, or got its first samples.
    job, job_tokens: what it scores, or is to. scoring_s: when its model worker was given that. training_tokens: of what
        it trains in place of scoring, as many as it could score meanwhile.
    """

    index: int
    engine: GenerationHandle | None
    held: dict[int, None] = field(default_factory=dict)
    is_polled: bool = False
    num_evictions: int = 0
    released: bool = False
    job: Infer | None = None
    job_tokens: int = 0
    is_scoring: bool = False
    heard_s: float = 0.0
    scoring_s: float = 0.0
    training_tokens: int = 0
    arrivals: list[Departure] = field(default_factory=list)  # admitted when what the device scores is done
    scoring_calls: list[tuple[int, float]] = field(default_factory=list)

    @property
    def busy_tokens(self) -> int:
        """What it is at, or is to do, in tokens that it could score meanwhile; not what it trains while it decodes."""
        return self.job_tokens if self.held else self.training_tokens or self.job_tokens

    def end_scoring(self, now_s: float) -> None:
        """It has scored what it was given."""
        self.scoring_calls.append((self.job_tokens, now_s - self.scoring_s))
        self.job, self.job_tokens, self.is_scoring = None, 0, False


def moves_kv(costs: CostModel | None, sample: Sample) -> bool:
    """Whether a sample that moves takes its KV along; else it is computed again."""
    if costs is None or not sample.response_ids:
        return False
    context_tokens = len(sample.prompt_ids) + len(sample.response_ids)
    return cheaper_migration(costs, context_tokens).kind is MigrationKind.TRANSFER


class SampleTable:
    """A live rollout's samples, and beside them what policies see of them, in step.

    Policies know a sample by its index. What changes a sample changes its entries: a piece of news takes no look at all
    of them, one by one.
    """

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = tuple(samples)
        self.by_id: Mapping[int, Sample] = {sample.id: sample for sample in samples}
        self.home: dict[int, int] = {}
        """Live samples: where each is, or is going to, by its id."""
        self._index = {sample.id: index for index, sample in enumerate(samples)}
        num_samples = len(samples)
        self.columns = SampleColumns(
            prompts=prompt_numbers([sample.prompt_ids for sample in samples]),
            prompt_tokens=np.array([len(sample.prompt_ids) for sample in samples], dtype=np.int64),
            homes=np.zeros(num_samples, dtype=np.int64),
            phases=np.zeros(num_samples, dtype=np.int8),
            response_tokens=np.zeros(num_samples, dtype=np.int64),
            scored_tokens=np.zeros(num_samples, dtype=np.int64),
            started=np.zeros(num_samples, dtype=np.bool_),
        )
        self.update(*samples)

    def put(self, sample: Sample, device: int) -> None:
        """The sample is at home there from now on."""
        self.home[sample.id] = device
        self.columns.homes[self._index[sample.id]] = device

    def advance(self, sample: Sample, state: SampleState) -> None:
        """As `Sample.advance`."""
        sample.advance(state)
        self.columns.phases[self._index[sample.id]] = _PHASES[state]

    def update(self, *samples: Sample) -> None:
        """These have another state, or other tokens."""
        columns = self.columns
        for sample in samples:
            index = self._index[sample.id]
            columns.phases[index] = _PHASES[sample.state]
            columns.response_tokens[index] = len(sample.response_ids)
            columns.started[index] = bool(sample.response_ids)
            columns.scored_tokens[index] = sample.length

    def seen(
        self, devices: Sequence[RolloutDevice], limits: EngineLimits, costs: CostModel | None, now_s: float
    ) -> RolloutState:
        """What a policy sees. costs: None where they are not known. now_s: by the clock of the devices' times."""
        return self.columns.state(
            limits,
            released=[device.released for device in devices],
            inferring_tokens=[device.busy_tokens for device in devices],
            inferring_left=[
                left_to_score(costs, device.busy_tokens, now_s - device.scoring_s if device.is_scoring else 0.0)
                if device.busy_tokens
                else 0.0
                for device in devices
            ],
            lost=[device.engine is None for device in devices],
        )

    def progress_text(self) -> str:
        """How far the rollout is, for people."""
        columns, num_samples = self.columns, len(self.samples)
        num_live = columns.num_live
        if not num_live:
            return f"scoring: {columns.num_in(Phase.SCORED)} of {num_samples} samples"
        num_tokens = int(columns.response_tokens.sum())
        return f"generating: {num_samples - num_live} of {num_samples} samples, {num_tokens:,} tokens"


_PHASES = {
    SampleState.QUEUED: Phase.WAITING,
    SampleState.GENERATING: Phase.RUNNING,
    SampleState.MIGRATING: Phase.TRAVELLING,
    SampleState.GENERATED: Phase.FINISHED,
    SampleState.INFERRING: Phase.INFERRING,
    SampleState.SCORED: Phase.SCORED,
}
