"""The policy that plans again at every finish, from the remaining-length model and the costs.

With n samples left, m engines that decode and N devices, two things bound what is still to come:

    path(m) = the last sample's steps, each as slow as its engine's batch makes it, and then its inference
    work(m) = (inference of everything + decoding by m engines) / N

More engines shorten the path, since batches shrink; fewer leave more devices to inference. Engines are given up where
that lowers max(path, work), what moving costs included; else free devices may decode as far as work stays below it.
Samples then move one by one, as long as the expected end of the rollout gains by it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fuse.interstage.costs import CostModel
from fuse.interstage.lengths import RemainingLengths
from fuse.interstage.migration import Action, Migrate, RolloutState, Room, consolidate, feed, free_devices

Floats = NDArray[np.float64]

_LEAST_GAIN = 0.01
"""Part of the time to come that a change of the number of engines must save: estimates are no better than that."""
_LEAST_MOVE_GAIN = 1e-4
"""Likewise for the move of one sample."""
_CAUTION = 2
"""Times that a move must save the delay of the sample that moves: more moves of it may follow."""
_SHARPNESS = 16
"""Power of a sample's predicted end, relative to the last, that says how likely it is to be the last itself."""
_MAX_MOVES = 64
"""Moves in one plan that only even out engines; the next finish plans again."""


@dataclass(frozen=True, slots=True, eq=False)
class Adaptive:
    """`adaptive`: as many engines decode as finish everything soonest, and their loads are kept even."""

    costs: CostModel
    lengths: RemainingLengths
    can_transfer: bool = True

    def __call__(self, state: RolloutState) -> list[Action]:
        if not len(state.live):
            return feed(state)
        forecast = _forecast(self.costs, self.lengths, state)
        free = free_devices(state)
        num_engines = int(np.count_nonzero(state.num_live()))
        num_wanted = self._num_engines(state, forecast, num_engines, len(free))
        if num_wanted < num_engines:
            moves = consolidate(state, num_wanted)
        else:
            moves = self._even_out(state, forecast, free[: num_wanted - num_engines])
        return [*moves, *feed(state, moves)]

    def _num_engines(self, state: RolloutState, forecast: _Forecast, num_engines: int, num_free: int) -> int:
        """How many engines may decode: fewer than now if that ends the rollout sooner, else as many as do no harm."""
        live, costs = state.live, self.costs
        num_samples, num_devices = len(live), state.num_devices
        engines = np.arange(1, min(num_samples, num_engines + num_free) + 1, dtype=np.float64)
        mean_context = live.context_tokens.mean(keepdims=True)
        moved_s = self._move_s(mean_context) * num_samples * np.abs(1 - engines / num_engines)

        others_s = forecast.sample_s.sum() * (1 / engines - 1 / num_samples)
        path_s = forecast.alone_s.max() + others_s + moved_s / engines

        # The longest of k samples grows like log k where tails are exponential: from the mean to the longest of all.
        mean = forecast.remaining.mean()
        spread = np.log(num_samples / engines) / np.log(num_samples) if num_samples > 1 else np.ones(1)
        steps = engines * (mean + max(0.0, forecast.far.max() - mean) * spread)
        tokens = state.finished_tokens.sum() + state.inferring_tokens.sum() / 2
        tokens += (live.context_tokens + forecast.remaining).sum()
        inference_s = costs.inference_token_s * tokens
        work_s = (inference_s + costs.step_s * steps + forecast.sample_s.sum() + moved_s) / num_devices

        total_s = np.maximum(path_s, work_s)
        best = int(np.argmin(total_s))
        now = min(num_engines, len(engines)) - 1
        if best < now and total_s[best] < (1 - _LEAST_GAIN) * total_s[now]:
            return best + 1
        return max(num_engines, 1 + int(np.flatnonzero(work_s <= total_s[now])[-1]))

    def _move_s(self, context_tokens: NDArray[Any]) -> Floats:
        """Seconds of `cheaper_migration` for many samples, [n]."""
        costs = self.costs
        recompute_s = costs.prefill_s + costs.prefill_token_s * context_tokens
        transfer_s = costs.transfer_s + costs.transfer_byte_s * costs.kv_bytes_per_token * context_tokens
        return np.minimum(recompute_s, transfer_s) if self.can_transfer else recompute_s

    def _even_out(self, state: RolloutState, forecast: _Forecast, fresh: list[int]) -> list[Migrate]:
        """Move samples from engines whose samples are likely to end last to those, or `fresh` devices, that are not.

        A sample that moves relieves those that it leaves of its share of their steps, and burdens those that it joins
        and, by the move, itself. Each counts by how near its predicted end is to the last one.
        """
        live, costs, counts = state.live, self.costs, state.num_live()
        devices = np.array(sorted({*np.flatnonzero(counts).tolist(), *fresh}))
        if len(devices) < 2:
            return []
        sample_s = forecast.shared_s
        load_s = np.bincount(live.devices, weights=sample_s, minlength=state.num_devices)
        end_s = forecast.alone_s + load_s[live.devices] - sample_s
        weight = (end_s / end_s.max()) ** _SHARPNESS
        weight /= weight.sum()
        at_stake = np.bincount(live.devices, weights=weight, minlength=state.num_devices)
        recompute_s = costs.prefill_s + costs.prefill_token_s * live.context_tokens
        move_s = np.where(live.started, self._move_s(live.context_tokens), 0.0)
        stall_s = np.where(live.started & (move_s < recompute_s), 0.0, move_s)
        least_s = _LEAST_MOVE_GAIN * float(end_s.max())
        typical_s, typical_weight = float(sample_s.mean()), 1 / len(live)

        room, can_move = Room(state), live.movable.copy()
        moves: list[Migrate] = []
        for _ in range(_MAX_MOVES):
            burden = at_stake[devices] * typical_s + load_s[devices] * typical_weight
            source, target = int(devices[np.argmax(burden)]), int(devices[np.argmin(burden)])
            here = np.flatnonzero((live.devices == source) & can_move)
            if not len(here) or source == target:
                break
            mates_s = (at_stake[source] - weight[here]) * sample_s[here]
            others_s = at_stake[target] * (sample_s[here] + stall_s[here])
            own_s = weight[here] * (load_s[source] - sample_s[here] - load_s[target] - _CAUTION * move_s[here])
            gain_s = mates_s - others_s + own_s - move_s[here] / state.num_devices
            best = int(np.argmax(gain_s))
            index = int(here[best])
            if gain_s[best] <= least_s or not room.fits(target, int(live.prompt_tokens[index])):
                break
            room.move(source, target, int(live.prompt_tokens[index]))
            for device, sign in ((source, -1), (target, 1)):
                load_s[device] += sign * sample_s[index]
                at_stake[device] += sign * weight[index]
            can_move[index] = False
            moves.append(Migrate(int(live.ids[index]), source, target))
        return moves


@dataclass(frozen=True, slots=True, eq=False)
class _Forecast:
    """Per live sample [live]: mean tokens left; tokens left if it were the longest; seconds from now to its score, were
    it that and alone; seconds that it adds to steps, to all of its own and to those of one like it beside it.
    """

    remaining: Floats
    far: Floats
    alone_s: Floats
    sample_s: Floats
    shared_s: Floats


def _forecast(costs: CostModel, lengths: RemainingLengths, state: RolloutState) -> _Forecast:
    live = state.live
    remaining = lengths.expected(live.ids, live.response_tokens)
    # The median of the longest of n alike is where each of them is with probability 0.5 ** (1 / n).
    far = lengths.quantile(live.ids, live.response_tokens, 0.5 ** (1 / len(live)))
    context = live.context_tokens
    prefill_s = np.where(live.started, 0.0, costs.prefill_token_s * context)
    # The median of the shorter of two alike.
    shared = lengths.quantile(live.ids, live.response_tokens, 1 - 0.5**0.5)
    far_s, sample_s, shared_s = (
        tokens * (costs.sample_s + costs.context_s * (context + tokens / 2)) + prefill_s
        for tokens in (far, remaining, shared)
    )
    inference_s = costs.inference_s + costs.inference_token_s * (context + far)
    return _Forecast(
        remaining=remaining,
        far=far,
        alone_s=far * costs.step_s + far_s + inference_s,
        sample_s=sample_s,
        shared_s=shared_s,
    )
