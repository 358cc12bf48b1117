"""What a run's operations cost: per stage and shape of micro-batch, merged over ranks, in an exact JSON form.

`measure` fills it, each rank for its own stages, or `observed` does, from the spans of all; `training_schedule` builds
problems from it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from fuse.micro_batch import MicroBatch

VERSION = 1
_MOST_FILLED = 0.97
"""Of a micro-batch's places by tokens, beyond which it passes padded though it could pass packed."""


@dataclass(frozen=True, slots=True, order=True)
class Shape:
    """A length bucket: micro-batches of `num_sequences` rows of `num_tokens` each, as they pass through a model.

    A row is a sequence, padded; or, packed, the only one, of all sequences' tokens one after the other.
    """

    num_sequences: int
    num_tokens: int

    @classmethod
    def of(cls, lengths: Sequence[int], *, packs: bool) -> Shape:
        """Of sequences of these lengths. packs: they pass packed, where that leaves out any padding to speak of."""
        padded = cls(len(lengths), max(lengths))
        return cls(1, sum(lengths)) if packs and sum(lengths) <= _MOST_FILLED * padded.size else padded

    @property
    def size(self) -> int:
        """Tokens that are computed, padding included."""
        return self.num_sequences * self.num_tokens


def shape_of(micro_batch: MicroBatch) -> Shape:
    """The length bucket that a micro-batch defines."""
    if micro_batch.lengths is not None:
        return Shape.of(micro_batch.lengths, packs=True)
    return Shape(*micro_batch.input_ids.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCosts:
    """One stage of a pipeline on micro-batches of one shape: median times, and memory of one micro-batch.

    input_grad_ticks, weight_grad_ticks: None where the stage cannot split its backward.
    activation_bytes: held from F to B or I; weight_grad_bytes: held from I to W, 0 where there is none.
    """

    pipeline: str
    stage: int
    shape: Shape
    forward_ticks: int
    backward_ticks: int
    input_grad_ticks: int | None
    weight_grad_ticks: int | None
    activation_bytes: int
    weight_grad_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferCosts:
    """Median time of a message, one way, between `stage` and the next one of its pipeline."""

    pipeline: str
    stage: int
    shape: Shape
    ticks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Costs of all stages and transfers; a tick lasts `tick_s` seconds. A rank's part of it has the same form.

    Raises:
        ValueError: something was measured twice.
    """

    tick_s: float
    stages: tuple[StageCosts, ...]
    transfers: tuple[TransferCosts, ...]

    def __post_init__(self) -> None:
        for costs in (self.stages, self.transfers):
            for (pipeline, stage, shape), count in Counter(map(_key, costs)).items():
                if count > 1:
                    raise ValueError(
                        f"profile: stage {stage} of {pipeline} was measured twice on {shape}: give each to one rank"
                    )

    def stage_costs(self, pipeline: str, stage: int, shape: Shape) -> StageCosts:
        """Costs on the bucket for micro-batches of this shape: the smallest with no fewer tokens, else the largest.

        Raises:
            ValueError: the stage was not measured.
        """
        measured = [cost for cost in self.stages if (cost.pipeline, cost.stage) == (pipeline, stage)]
        if not measured:
            raise ValueError(f"profile has no stage {stage} of pipeline {pipeline}: measure it on this placement")
        return _nearest(measured, shape)

    def transfer_ticks(self, pipeline: str, shape: Shape) -> int:
        """The slowest of the pipeline's transfers at that shape; 0 when all its stages are on one rank."""
        measured = [cost for cost in self.transfers if cost.pipeline == pipeline]
        stages = sorted({cost.stage for cost in measured})
        return max(
            (_nearest([cost for cost in measured if cost.stage == stage], shape).ticks for stage in stages), default=0
        )


_Costs = TypeVar("_Costs", StageCosts, TransferCosts)


def _nearest(measured: Sequence[_Costs], shape: Shape) -> _Costs:
    fitting = [cost for cost in measured if cost.shape.size >= shape.size]
    if fitting:
        return min(fitting, key=lambda cost: (cost.shape.size, cost.shape))
    return max(measured, key=lambda cost: (cost.shape.size, cost.shape))


def _key(costs: StageCosts | TransferCosts) -> tuple[str, int, Shape]:
    return costs.pipeline, costs.stage, costs.shape


def merge(parts: Iterable[Profile]) -> Profile:
    """The profile of a run from those of its ranks, in the order of pipelines, stages and shapes.

    Raises:
        ValueError: there are no parts, their ticks differ, or two have measured the same.
    """
    parts = list(parts)
    ticks = {part.tick_s for part in parts}
    if len(ticks) != 1:
        raise ValueError(f"profiles to merge count in ticks of {sorted(ticks)} s: measure all ranks with one tick_s")
    return Profile(
        tick_s=ticks.pop(),
        stages=tuple(sorted((cost for part in parts for cost in part.stages), key=_key)),
        transfers=tuple(sorted((cost for part in parts for cost in part.transfers), key=_key)),
    )


def profile_to_json(profile: Profile) -> dict[str, object]:
    """A JSON object; `profile_from_json` reads it back."""
    return {"profile": VERSION, **asdict(profile)}


def profile_from_json(value: object) -> Profile:
    """Read a profile.

    Raises:
        ValueError: the object is not a profile of this version.
    """
    if not isinstance(value, Mapping) or value.get("profile") != VERSION:
        raise ValueError(f"not a profile of version {VERSION}: measure again")
    members = _members(Profile, {name: member for name, member in value.items() if name != "profile"})
    return Profile(
        tick_s=members["tick_s"],
        stages=tuple(_read(StageCosts, entry) for entry in members["stages"]),
        transfers=tuple(_read(TransferCosts, entry) for entry in members["transfers"]),
    )


def _read(kind: Callable[..., _Costs], value: object) -> _Costs:
    members = _members(kind, value)
    return kind(**{**members, "shape": Shape(**_members(Shape, members["shape"]))})


def _members(kind: Any, value: object) -> dict[str, Any]:
    expected = {field.name for field in fields(kind)}
    if not isinstance(value, Mapping) or set(value) != expected:
        raise ValueError(f"profile: {kind.__name__} must have exactly {sorted(expected)}, not {value!r}")
    return dict(value)
