"""One batch of a length trace to simulate, and the policies that what is left of the trace teaches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from fuse.interstage.costs import CostModel
from fuse.interstage.dealing import prompt_numbers
from fuse.interstage.length_trace import LengthTrace
from fuse.interstage.migration import EngineLimits, Policy
from fuse.interstage.policies import THRESHOLD, policy_of
from fuse.interstage.rollout import Rollout


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """`batch` rows of a trace from `start` on, on so many devices."""

    trace: LengthTrace
    costs: CostModel
    limits: EngineLimits
    num_devices: int
    start: int
    batch: int
    can_transfer: bool = True

    @cached_property
    def rollout(self) -> Rollout:
        return Rollout(
            prompt_tokens=self.trace.prompt_tokens[self._rows],
            response_tokens=self.trace.response_tokens[self._rows],
            num_devices=self.num_devices,
            costs=self.costs,
            limits=self.limits,
            can_transfer=self.can_transfer,
            prompts=prompt_numbers(self.trace.prompts[self._rows]),
        )

    def policy(self, name: str) -> Policy:
        """A threshold is tuned to all rows where there are no others."""
        past = self._others if len(self._others) or name != THRESHOLD else self.trace
        return policy_of(name, self.rollout, past, self.trace.prompts[self._rows])

    def without_drafts(self) -> Case:
        """The same of engines that do not draft."""
        return replace(self, costs=replace(self.costs, speculation=None))

    @property
    def _rows(self) -> slice:
        return slice(self.start, self.start + self.batch)

    @cached_property
    def _others(self) -> LengthTrace:
        return self.trace.rows(np.delete(np.arange(len(self.trace)), self._rows))


def enough_room(trace: LengthTrace, max_batch: int, batch: int, kv_tokens: int | None = None) -> EngineLimits:
    """Of an engine that holds any batch, by default; responses may reach the trace's longest."""
    max_new_tokens = int(trace.response_tokens.max())
    enough = (int(trace.prompt_tokens.max()) + max_new_tokens) * max(max_batch, batch)
    return EngineLimits(
        max_batch=max_batch,
        kv_capacity_tokens=enough if kv_tokens is None else kv_tokens,
        max_new_tokens=max_new_tokens,
    )
