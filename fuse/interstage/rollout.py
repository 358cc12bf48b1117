"""What is simulated, and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from fuse.interstage.costs import CostModel
from fuse.interstage.migration import EngineLimits

Ints = NDArray[np.int64]


class SpanKind(StrEnum):
    """What a device is busy with; decoding includes prefill."""

    GENERATE = "generate"
    INFER = "infer"
    TRAIN = "train"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rollout:
    """What to simulate: `prompt_tokens`, `response_tokens` [samples]; where samples start is for `deal` to say.

    prompts: a number of each sample's, [samples], equal for siblings, of which an engine computes the prompt once; None
        where no two are siblings.

    Raises:
        ValueError: no samples or devices, a response over the limit, or a sample that no engine can hold.
    """

    prompt_tokens: Ints
    response_tokens: Ints
    num_devices: int
    costs: CostModel
    limits: EngineLimits
    can_transfer: bool = True
    prompts: Ints | None = None

    def __post_init__(self) -> None:
        if self.num_devices < 1:
            raise ValueError(f"num_devices is {self.num_devices}: it must be at least 1")
        if not len(self.response_tokens) or len(self.prompt_tokens) != len(self.response_tokens):
            raise ValueError(
                f"{len(self.prompt_tokens)} prompts and {len(self.response_tokens)} responses: give as many of each, "
                "at least one"
            )
        if self.prompts is not None and len(self.prompts) != self.num_samples:
            raise ValueError(f"prompts has {len(self.prompts)} numbers for {self.num_samples} samples: give one each")
        if self.response_tokens.min() < 1 or self.prompt_tokens.min() < 1:
            raise ValueError("a prompt or a response has less than one token: leave it out")
        if (longest := int(self.response_tokens.max())) > self.limits.max_new_tokens:
            raise ValueError(f"a response has {longest} tokens, over max_new_tokens={self.limits.max_new_tokens}")
        needed = int(self.prompt_tokens.max()) + self.limits.max_new_tokens
        if needed > self.limits.kv_capacity_tokens:
            raise ValueError(
                f"a sample may need {needed} tokens of KV, but an engine holds {self.limits.kv_capacity_tokens}: "
                "raise the capacity or lower the maximum of new tokens"
            )

    @property
    def num_samples(self) -> int:
        return len(self.response_tokens)

    @property
    def prompt_numbers(self) -> Ints:
        """Of each sample, equal for siblings alone, [samples]."""
        return np.arange(self.num_samples, dtype=np.int64) if self.prompts is None else self.prompts

    @property
    def distinct_prompt_tokens(self) -> int:
        """Tokens of all prompts, each computed once."""
        _, first = np.unique(self.prompt_numbers, return_index=True)
        return int(self.prompt_tokens[first].sum())


@dataclass(frozen=True, slots=True)
class BusySpan:
    """What a device did from `start_s` to `end_s`."""

    kind: SpanKind
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class SampleSpan:
    """A sample was in the batch of `device` from `start_s` to `end_s`; then it was finished, or left for another."""

    sample: int
    device: int
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationResult:
    """How a rollout went: seconds to the last score and the last token, and what it took."""

    makespan_s: float
    generation_s: float
    idle_share: float
    num_migrations: int
    moved_bytes: int
    num_inferences: int
    prefill_tokens: int
    peak_batch: int
    peak_kv_tokens: int
    timeline: tuple[tuple[BusySpan, ...], ...]
    """Per device, in order."""
    samples: tuple[SampleSpan, ...]
    """In the order of their ends; a migrated sample has several."""

    def idle_s(self, num_together: int = 1) -> float:
        """Device-seconds of which so many devices could be idle together, were the busy ones always the first ones."""
        num_groups, num_busy, since_s, idle_s = len(self.timeline) // num_together, 0, 0.0, 0.0
        spans = [span for own in self.timeline for span in own]
        changes = sorted(
            [*((one.start_s, 1) for one in spans), *((one.end_s, -1) for one in spans), (self.makespan_s, 0)]
        )
        for time_s, change in changes:
            idle_s += (num_groups - -(-num_busy // num_together)) * num_together * (time_s - since_s)
            num_busy, since_s = num_busy + change, time_s
        return idle_s
