"""One engine of the simulator: continuous batching in closed form, from one change of its batch to the next."""

from __future__ import annotations

import heapq
import math
from collections import Counter, deque
from dataclasses import dataclass

from fuse.interstage.costs import CostModel, slowed
from fuse.interstage.migration import EngineLimits

_STEP_TOLERANCE = 1e-9
"""Steps by which a time may be off a boundary and still be on it."""


class SimulatedEngine:
    """Samples run in a batch within the limits, and wait in order of arrival; both change between two steps only."""

    def __init__(self, costs: CostModel, limits: EngineLimits) -> None:
        self._costs, self._limits = costs, limits
        self._alone = self._next_costs = costs
        self._finish_steps: dict[int, int] = {}
        self._finish_order: list[tuple[int, int]] = []  # heap of (step, sample); what was evicted is skipped
        self._waiting: deque[_Entry] = deque()
        self._reserved: dict[int, int] = {}
        self._prompts: dict[int, int] = {}  # of those that run
        self._num_siblings: Counter[int] = Counter()  # that run, by prompt
        self._context_tokens = 0
        self.num_steps = 0
        self.resumed_s = 0.0
        """When the step after `num_steps` starts, if there is one."""
        self.version = 0
        """Counts changes of plan: what was scheduled under an older version is void."""
        self.peak_batch = self.peak_kv_tokens = self._kv_tokens = self.prefill_tokens = 0

    @property
    def batch(self) -> int:
        """Running samples."""
        return len(self._finish_steps)

    @property
    def num_held(self) -> int:
        """Samples that run or wait."""
        return len(self._finish_steps) + len(self._waiting)

    @property
    def is_empty(self) -> bool:
        """Whether no sample runs or waits."""
        return not self.num_held

    def first_step_s(self) -> float:
        """Seconds of the next step."""
        return self._costs.decode_step(self.batch, self._context_tokens)

    def growth_s(self) -> float:
        """Seconds by which each step is slower than the one before."""
        return self._costs.at(self.batch, self._context_tokens).context_s * self.batch

    def slow_down(self, factor: float) -> None:
        """Have decode steps take so many times as long as alone, from the next boundary on."""
        self._next_costs = self._alone if factor == 1 else slowed(self._alone, factor)

    def enqueue(
        self,
        sample: int,
        context_tokens: int,
        remaining: int,
        reserved: int,
        *,
        has_kv: bool,
        prompt: int,
        is_new: bool,
    ) -> None:
        """Let a sample wait; it runs from the next boundary on, if it fits.

        A new one takes its prompt from a sibling that runs: one with the same `prompt`.
        """
        self._waiting.append(_Entry(sample, context_tokens, remaining, reserved, has_kv, prompt, is_new))

    def next_boundary(self, now_s: float) -> tuple[int, float]:
        """Steps from `num_steps` to the first boundary not before `now_s`, and its time; no later than a change."""
        if not self.batch:
            return 0, max(now_s, self.resumed_s)
        elapsed_s = max(0.0, now_s - self.resumed_s)
        steps = min(math.ceil(self._steps_in(elapsed_s) - _STEP_TOLERANCE), self._steps_to_change())
        return steps, max(now_s, self.resumed_s + self._costs.decode(self.batch, self._context_tokens, steps))

    def next_change(self) -> tuple[int, float]:
        """Steps from `num_steps` to the next finish or other number of drafts, and its time. Pre: a sample runs."""
        steps = self._steps_to_change()
        return steps, self.resumed_s + self._costs.decode(self.batch, self._context_tokens, steps)

    def _steps_to_change(self) -> int:
        return int(min(self._steps_to_finish(), self._costs.num_alike_steps(self.batch, self._context_tokens)))

    def _steps_to_finish(self) -> int:
        """Steps from `num_steps` until the first running sample is done."""
        while self._finish_steps.get(self._finish_order[0][1]) != self._finish_order[0][0]:
            heapq.heappop(self._finish_order)
        return self._finish_order[0][0] - self.num_steps

    def advance(self, steps: int, end_s: float) -> list[int]:
        """Take `steps` steps until `end_s`; return the samples that finish with the last."""
        self.num_steps += steps
        self._context_tokens += steps * self.batch
        self.resumed_s, self._costs = end_s, self._next_costs
        finished: dict[int, None] = {}  # one that left and came back within a step is in the heap twice
        while self._finish_order and self._finish_order[0][0] <= self.num_steps:
            step, sample = heapq.heappop(self._finish_order)
            if self._finish_steps.get(sample) == step:
                assert step == self.num_steps, "a sample ran past its end"
                finished[sample] = None
        return list(finished)

    def remove(self, sample: int, context_tokens: int) -> None:
        """Take a sample out, running (with this much context) or waiting."""
        if sample in self._finish_steps:
            del self._finish_steps[sample]
            self._context_tokens -= context_tokens
            self._kv_tokens -= self._reserved.pop(sample)
            self._num_siblings[self._prompts.pop(sample)] -= 1
        else:
            self._waiting = deque(entry for entry in self._waiting if entry.sample != sample)

    def admit(self) -> list[int]:
        """Start what waits and fits, first come first served; prefill delays the next step. Return who started."""
        started = []
        prefill_tokens = 0
        while self._waiting:
            entry = self._waiting[0]
            kv_tokens = self._kv_tokens + entry.reserved
            if self.batch >= self._limits.max_batch or kv_tokens > self._limits.kv_capacity_tokens:
                break
            self._waiting.popleft()
            self._finish_steps[entry.sample] = finish = self.num_steps + entry.remaining
            heapq.heappush(self._finish_order, (finish, entry.sample))
            self._reserved[entry.sample] = entry.reserved
            self._kv_tokens = kv_tokens
            self._context_tokens += entry.context_tokens
            is_there = entry.is_new and self._num_siblings[entry.prompt] > 0
            prefill_tokens += 0 if entry.has_kv or is_there else entry.context_tokens
            self._prompts[entry.sample] = entry.prompt
            self._num_siblings[entry.prompt] += 1
            started.append(entry.sample)
        self.prefill_tokens += prefill_tokens
        if prefill_tokens:
            self.resumed_s += self._costs.prefill(prefill_tokens)
        self.peak_batch = max(self.peak_batch, self.batch)
        self.peak_kv_tokens = max(self.peak_kv_tokens, self._kv_tokens)
        return started

    def _steps_in(self, elapsed_s: float) -> float:
        """The real k with decode(batch, context, k) = elapsed_s: the root of a quadratic, in its stable form."""
        half_growth = self.growth_s() / 2
        linear = self.first_step_s() - half_growth
        return 2 * elapsed_s / (linear + math.sqrt(linear**2 + 4 * half_growth * elapsed_s))


@dataclass(slots=True)
class _Entry:
    """A waiting sample."""

    sample: int
    context_tokens: int
    remaining: int
    reserved: int
    has_kv: bool
    prompt: int
    is_new: bool
