"""The vocabulary of schedules: operations, pipelines, the problem of placing them, and a schedule as each rank's order.

A schedule holds an order and no times. Times, memory and bubbles come from `schedules.timing`, legality from
`schedules.validate`, text and JSON forms from `schedules.formats`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

MOST_RANKS = 1 << 14
MOST_FORWARDS = 200_000
"""Of a problem: micro-batches times stages, over all pipelines."""
MOST_TICKS, MOST_BYTES = 1 << 45, 1 << 60
"""Of all operations together: evaluator, bounds and solver count in 64 bits."""

_OP_FORM = re.compile(r"([FBIW])([0-9]{1,9})\.([0-9]{1,9})\.([0-9]{1,9})")
_NAME_FORM = re.compile(r"[A-Za-z0-9_.-]+")


class Kind(StrEnum):
    """What an operation computes: forward, full backward, or one half of a split backward (B = I + W)."""

    F = "F"
    B = "B"
    I = "I"  # noqa: E741  (the field's name for the input gradient)
    W = "W"

    __hash__ = str.__hash__  # that of enumerations is a call of Python, in every hash of an operation


class Op(NamedTuple):
    """One operation: `kind` of one micro-batch at one stage of `problem.pipelines[pipeline]`."""

    pipeline: int
    stage: int
    micro_batch: int
    kind: Kind

    def __str__(self) -> str:
        return f"{self.kind}{self.pipeline}.{self.stage}.{self.micro_batch}"

    @staticmethod
    def parse(text: str) -> Op:
        """Read the form that `str(op)` writes, such as `F0.3.12`: kind, pipeline, stage, micro-batch.

        Raises:
            ValueError: the text has another form.
        """
        match = _OP_FORM.fullmatch(text)
        if match is None:
            raise ValueError(f"operation {text!r} is not of the form F0.3.12 (kind, pipeline.stage.micro_batch)")
        kind, *numbers = match.groups()
        pipeline, stage, micro_batch = map(int, numbers)
        return Op(pipeline, stage, micro_batch, Kind(kind))


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """One model, or one replica of it, cut into stages: stage s runs on `ranks[s]`; a rank may repeat (virtual stages).

    Per-stage tuples have one entry per stage. Ticks are durations in the problem's unit of time; bytes are counted in
    any unit, as long as it is one unit for the whole problem. `input_grad_ticks` and `weight_grad_ticks` come together;
    without them backwards of this pipeline cannot be split. `transfer_ticks` separates the end of a stage's operation
    from the start of the operation that needs its result on another rank.

    A *forward-only* pipeline has no `backward_ticks` (an empty tuple) and holds nothing: its operations are forwards.
    `before` is the number of a pipeline that uses what its last stage makes: the last forward of micro-batch m there
    comes after the last one of micro-batch m here. Both are on one rank, so that no message is needed.

    Memory changes at the start of an operation: F takes `activation_bytes`, B and I give them back, I takes
    `weight_grad_bytes` (what the weight gradient still needs), W gives those back. Since a rank runs one operation
    at a time, giving back at the end instead would leave the peak where it is as long as
    `weight_grad_bytes <= activation_bytes`.
    """

    name: str
    ranks: tuple[int, ...]
    num_micro_batches: int
    forward_ticks: tuple[int, ...]
    backward_ticks: tuple[int, ...]
    input_grad_ticks: tuple[int, ...] | None = None
    weight_grad_ticks: tuple[int, ...] | None = None
    activation_bytes: tuple[int, ...] = ()
    weight_grad_bytes: tuple[int, ...] = ()
    transfer_ticks: int = 0
    before: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME_FORM.fullmatch(self.name):
            raise ValueError(f"pipeline name {self.name!r} must be letters, digits, '_', '-' or '.'")
        owner = f"pipeline {self.name}"
        _check_tuple(owner, "ranks", self.ranks)
        zeros = (0,) * len(self.ranks)
        object.__setattr__(self, "activation_bytes", self.activation_bytes or zeros)
        object.__setattr__(self, "weight_grad_bytes", self.weight_grad_bytes or zeros)
        if not self.ranks:
            raise ValueError(f"{owner}: ranks is empty; a pipeline needs at least one stage")
        _check_integers(owner, "ranks", self.ranks, len(self.ranks), minimum=0)
        _check_integers(owner, "num_micro_batches", (self.num_micro_batches,), 1, minimum=1)
        _check_integers(owner, "transfer_ticks", (self.transfer_ticks,), 1, minimum=0)
        if (self.input_grad_ticks is None) != (self.weight_grad_ticks is None):
            raise ValueError(f"{owner}: input_grad_ticks and weight_grad_ticks must be given together or not at all")
        per_stage = {
            "forward_ticks": (self.forward_ticks, 1),
            "backward_ticks": (self.backward_ticks or None, 1),
            "input_grad_ticks": (self.input_grad_ticks, 1),
            "weight_grad_ticks": (self.weight_grad_ticks, 1),
            "activation_bytes": (self.activation_bytes, 0),
            "weight_grad_bytes": (self.weight_grad_bytes, 0),
        }
        for name, (values, minimum) in per_stage.items():
            if values is not None or name == "forward_ticks":
                _check_integers(owner, name, values, self.num_stages, minimum)
        if self.is_forward_only:
            held = (*self.activation_bytes, *self.weight_grad_bytes)
            if self.can_split or any(held):
                raise ValueError(
                    f"{owner}: without backward_ticks it is forward-only, and has neither halves of backwards nor "
                    f"memory; give backward_ticks, or leave those out"
                )
        elif self.before is not None:
            raise ValueError(f"{owner}: before is for forward-only pipelines; give no backward_ticks, or no before")

    @property
    def num_stages(self) -> int:
        return len(self.ranks)

    @property
    def is_forward_only(self) -> bool:
        return not self.backward_ticks

    @property
    def can_split(self) -> bool:
        """Whether a backward may be run as I and W."""
        return self.input_grad_ticks is not None

    def ticks(self, kind: Kind, stage: int) -> int:
        """Duration of an operation; asking for the half of a backward that cannot be split is a bug."""
        if kind is Kind.F:
            return self.forward_ticks[stage]
        if kind is Kind.B:
            return self.backward_ticks[stage]
        halves = self.input_grad_ticks if kind is Kind.I else self.weight_grad_ticks
        assert halves is not None, f"pipeline {self.name} has no split backward"
        return halves[stage]

    def bytes_taken(self, kind: Kind, stage: int) -> int:
        """Change of the rank's memory when the operation starts; negative when it gives memory back."""
        if kind is Kind.F:
            return self.activation_bytes[stage]
        if kind is Kind.B:
            return -self.activation_bytes[stage]
        if kind is Kind.I:
            return self.weight_grad_bytes[stage] - self.activation_bytes[stage]
        return -self.weight_grad_bytes[stage]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Pipelines that share ranks. Limits and initial bytes have one entry per rank; no limits means memory is free."""

    num_ranks: int
    pipelines: tuple[Pipeline, ...]
    memory_limit_bytes: tuple[int, ...] | None = None
    initial_bytes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check_integers("problem", "num_ranks", (self.num_ranks,), 1, minimum=1)
        if self.num_ranks > MOST_RANKS:
            raise ValueError(f"problem: num_ranks is {self.num_ranks}; the most is {MOST_RANKS}")
        object.__setattr__(self, "initial_bytes", self.initial_bytes or (0,) * self.num_ranks)
        _check_integers("problem", "initial_bytes", self.initial_bytes, self.num_ranks, minimum=0)
        if self.memory_limit_bytes is not None:
            _check_integers("problem", "memory_limit_bytes", self.memory_limit_bytes, self.num_ranks, minimum=0)
            for rank, (initial, limit) in enumerate(zip(self.initial_bytes, self.memory_limit_bytes, strict=True)):
                if initial > limit:
                    raise ValueError(f"rank {rank}: initial_bytes {initial} exceed memory_limit_bytes {limit}")
        if not self.pipelines:
            raise ValueError("problem: pipelines is empty; give at least one")
        names = Counter(pipeline.name for pipeline in self.pipelines)
        for name, count in names.items():
            if count > 1:
                raise ValueError(f"problem: two pipelines are named {name!r}; names must differ")
        for pipeline in self.pipelines:
            if max(pipeline.ranks) >= self.num_ranks:
                raise ValueError(
                    f"pipeline {pipeline.name}: rank {max(pipeline.ranks)} is outside 0..{self.num_ranks - 1}; "
                    "raise num_ranks or move the stage"
                )
            if pipeline.before is not None:
                self._check_before(pipeline, pipeline.before)
        self._check_size()

    def _check_before(self, pipeline: Pipeline, number: int) -> None:
        owner = f"pipeline {pipeline.name}: before"
        _check_integers(owner, "the number", (number,), 1, minimum=0)
        if number >= len(self.pipelines):
            raise ValueError(f"{owner} is {number}; the pipelines are 0..{len(self.pipelines) - 1}")
        user = self.pipelines[number]
        if user.is_forward_only:
            raise ValueError(f"{owner} is {user.name}, which is forward-only; name one that has backwards")
        if user.ranks[-1] != pipeline.ranks[-1]:
            raise ValueError(
                f"{owner} is {user.name}, whose last stage is on rank {user.ranks[-1]} and not on rank "
                f"{pipeline.ranks[-1]}; have both end on one rank"
            )
        if user.num_micro_batches > pipeline.num_micro_batches:
            raise ValueError(
                f"{owner} is {user.name}, which has {user.num_micro_batches} micro-batches and not at most "
                f"{pipeline.num_micro_batches}; give one for each"
            )

    def _check_size(self) -> None:
        totals = {
            "micro-batches times stages": (sum(map(_num_forwards, self.pipelines)), MOST_FORWARDS, "give fewer"),
            "ticks of all operations": (sum(map(_all_ticks, self.pipelines)), MOST_TICKS, "give a coarser unit"),
            "bytes of all operations": (sum(map(_all_bytes, self.pipelines)), MOST_BYTES, "give a coarser unit"),
        }
        for what, (total, most, remedy) in totals.items():
            if total > most:
                raise ValueError(f"problem: {what} add up to {total}; the most is {most}: {remedy}")

    def contains(self, op: Op) -> bool:
        """Whether the operation exists in this problem."""
        if not 0 <= op.pipeline < len(self.pipelines):
            return False
        pipeline = self.pipelines[op.pipeline]
        return (
            0 <= op.stage < pipeline.num_stages
            and 0 <= op.micro_batch < pipeline.num_micro_batches
            and op.kind in self.kinds(op.pipeline, split=op.kind in (Kind.I, Kind.W))
        )

    def kinds(self, number: int, *, split: bool) -> tuple[Kind, ...]:
        """Of a pipeline's operations, with backwards as I and W if `split` and it can."""
        pipeline = self.pipelines[number]
        if pipeline.is_forward_only:
            return (Kind.F,)
        return (Kind.F, Kind.I, Kind.W) if split and pipeline.can_split else (Kind.F, Kind.B)

    def first(self, op: Op) -> tuple[Op, ...]:
        """The forwards of forward-only pipelines that must come before `op` on its rank."""
        if op.kind is not Kind.F or op.stage != self.pipelines[op.pipeline].num_stages - 1:
            return ()
        return tuple(
            Op(number, pipeline.num_stages - 1, op.micro_batch, Kind.F)
            for number, pipeline in enumerate(self.pipelines)
            if pipeline.before == op.pipeline
        )

    def rank_of(self, op: Op) -> int:
        """The rank an operation must run on."""
        return self.pipelines[op.pipeline].ranks[op.stage]

    def ticks(self, op: Op) -> int:
        """The operation's duration."""
        return self.pipelines[op.pipeline].ticks(op.kind, op.stage)

    def bytes_taken(self, op: Op) -> int:
        """Change of its rank's memory when the operation starts."""
        return self.pipelines[op.pipeline].bytes_taken(op.kind, op.stage)

    def transfer_ticks(self, source: Op, target: Op) -> int:
        """Ticks between the end of `source` and the earliest start of `target`, which needs its result."""
        if self.rank_of(source) == self.rank_of(target):
            return 0
        return self.pipelines[source.pipeline].transfer_ticks


@dataclass(frozen=True, slots=True)
class Schedule:
    """A problem and, for each rank, the operations it runs in order."""

    problem: Problem
    ranks: tuple[tuple[Op, ...], ...]
    _hash: int | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if len(self.ranks) != self.problem.num_ranks:
            raise ValueError(
                f"schedule: {len(self.ranks)} rank orders for {self.problem.num_ranks} ranks; give one each"
            )

    def __hash__(self) -> int:
        """Of all operations, taken once: what is computed of a schedule is often kept by it."""
        if self._hash is None:
            object.__setattr__(self, "_hash", hash((self.problem, self.ranks)))
        assert self._hash is not None
        return self._hash

    def __reduce__(self) -> tuple[type[Schedule], tuple[object, ...]]:
        """Another process has other hashes."""
        return Schedule, (self.problem, self.ranks)

    def ops(self) -> Iterator[tuple[int, Op]]:
        """Every (rank, operation), rank by rank in order."""
        for rank, order in enumerate(self.ranks):
            for op in order:
                yield rank, op


def _num_forwards(pipeline: Pipeline) -> int:
    return pipeline.num_micro_batches * pipeline.num_stages


def _all_ticks(pipeline: Pipeline) -> int:
    of_stages = (pipeline.forward_ticks, pipeline.backward_ticks)
    halves = (pipeline.input_grad_ticks or (), pipeline.weight_grad_ticks or ())
    transfers = 2 * pipeline.num_stages * pipeline.transfer_ticks
    return pipeline.num_micro_batches * (sum(map(sum, (*of_stages, *halves))) + transfers)


def _all_bytes(pipeline: Pipeline) -> int:
    return pipeline.num_micro_batches * sum(map(sum, (pipeline.activation_bytes, pipeline.weight_grad_bytes)))


def _check_tuple(owner: str, field: str, values: object) -> None:
    if not isinstance(values, tuple):
        raise ValueError(f"{owner}: {field} is {values!r}; it must be a tuple of integers")


def _check_integers(owner: str, field: str, values: tuple[int, ...] | None, length: int, minimum: int) -> None:
    _check_tuple(owner, field, values)
    assert values is not None
    if len(values) != length:
        raise ValueError(f"{owner}: {field} has {len(values)} entries for {length}; give one per stage or rank")
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{owner}: {field} holds {value!r}; scale it to an integer")
        if value < minimum:
            raise ValueError(f"{owner}: {field} holds {value}; the least is {minimum}")
        if value > MOST_BYTES:
            raise ValueError(f"{owner}: {field} holds a number of {value.bit_length()} bits; give a coarser unit")
