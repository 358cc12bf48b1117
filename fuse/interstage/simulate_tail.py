"""A simulated rollout whose free devices train, by the policy of the live driver."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fuse.interstage.columns import Phase
from fuse.interstage.migration import Action, Policy
from fuse.interstage.rollout import Rollout, SimulationResult, SpanKind
from fuse.interstage.simulate import Simulation
from fuse.interstage.tail import TailSettings, Train, micro_batch_tokens, spare_s, time_tokens, train_early

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TailWork:
    """The first optimizer step of an update, which is on all samples of a rollout.

    groups: a number of each sample's, [samples]: it is trained once all with that number are scored. token_s: seconds
    of a replica's devices to train on a token, as long as each of its stages takes. micro_batch_s: in addition, of each
    micro-batch. settings: as of the policy; replicas have `num_stages` devices each, side by side.

    Raises:
        ValueError: a device is left over, or a cost is negative.
    """

    groups: Ints
    token_s: float
    micro_batch_s: float
    settings: TailSettings

    def __post_init__(self) -> None:
        if self.token_s < 0 or self.micro_batch_s < 0:
            raise ValueError(f"token_s={self.token_s}, micro_batch_s={self.micro_batch_s}: a cost is not negative")

    def seconds(self, sizes: Sequence[int]) -> float:
        """That a replica takes for micro-batches of so many tokens: through its stages, one behind the other."""
        stages = self.settings.num_stages
        waits = len(sizes) + stages - 1
        return (self.micro_batch_s * waits + self.token_s * time_tokens(sizes, stages)) / stages


@dataclass(frozen=True, slots=True, kw_only=True)
class TailResult:
    """A rollout, and what was trained in it: samples, their tokens, and device-seconds."""

    rollout: SimulationResult
    num_trained: int
    trained_tokens: int
    training_s: float


def simulate_tail(rollout: Rollout, policy: Policy, work: TailWork) -> TailResult:
    """Play the rollout under the policy, to the last score, with what is trained by then.

    A sample that is trained twice fails an assertion.

    Raises:
        ValueError: the replicas' devices do not divide the rollout's.
    """
    if rollout.num_devices % work.settings.num_stages:
        raise ValueError(
            f"replicas of {work.settings.num_stages} devices do not divide {rollout.num_devices}: choose a divisor"
        )
    return _TailSimulation(rollout, policy, work).run_with_training()


class _TailSimulation(Simulation):
    """To policies, a device that trains is one that scores, unless it decodes beside it."""

    def __init__(self, rollout: Rollout, policy: Policy, work: TailWork) -> None:
        super().__init__(rollout, policy)
        self._work = work
        stages = work.settings.num_stages
        self._replicas = [range(first, first + stages) for first in range(0, rollout.num_devices, stages)]
        self._left = np.ones(rollout.num_samples, dtype=np.bool_)
        self._context = rollout.prompt_tokens + rollout.response_tokens
        _, self._groups, sizes = np.unique(work.groups, return_inverse=True, return_counts=True)
        self._num_unscored = sizes.copy()
        self._counted = np.zeros(rollout.num_samples, dtype=np.bool_)
        self._training_ends_s: dict[int, float] = {}  # by device that trains
        self._training_s = 0.0

    def run_with_training(self) -> TailResult:
        result = self.run()
        trained = ~self._left
        return TailResult(
            rollout=result,
            num_trained=int(trained.sum()),
            trained_tokens=int(self._context[trained].sum()),
            training_s=self._training_s,
        )

    def _act(self, actions: Sequence[Action]) -> None:
        super()._act(actions)
        self._train()

    def _start_inference(self, device: int) -> None:
        if device in self._training_ends_s:  # it has decoded beside it so far
            self._only_trains(device)
        else:
            super()._start_inference(device)
        self._train()

    def _finish_inference(self, device: int) -> None:
        if device not in self._training_ends_s:
            super()._finish_inference(device)
            return
        del self._training_ends_s[device]
        self._has_news = True
        self._engines[device].slow_down(1.0)
        if self._scoring[device]:
            self._scoring[device] = False
            self._end_span(device, SpanKind.TRAIN)
            if self._jobs[device] is None:
                self._inferring_tokens[device] = 0
        self._interrupt(device)

    def _only_trains(self, device: int) -> None:
        """Whatever comes up waits until it is done."""
        left_s = self._training_ends_s[device] - self._now_s
        self._scoring[device], self._busy_since_s[device] = True, self._now_s
        if self._jobs[device] is None:
            self._inferring_tokens[device] = max(1, int(left_s / max(self._costs.inference_token_s, 1e-12)))

    def _train(self) -> None:
        decoding = {
            number: int(self._num_live[list(devices)].max())
            for number, devices in enumerate(self._replicas)
            if all(map(self._only_decodes, devices))
        }
        takers = self._work.settings.takers(decoding)
        if not takers or self._now_s == 0 or not (self._phase != Phase.SCORED).any():
            return
        ready = np.flatnonzero(self._left & (self._scored_groups()[self._groups]))
        if not len(ready):
            return
        work = self._work
        actions = train_early(
            *(ready.tolist(), self._context, takers, work.settings),
            token_s=(work.token_s + work.micro_batch_s / max(1, int(self._context.mean()))) / work.settings.num_stages,
            within_s=spare_s(self._policy, self._state()),
        )
        for action in actions:
            self._start_training(action)

    def _start_training(self, action: Train) -> None:
        for own in action.micro_batches:
            assert self._left[list(own)].all(), "a sample was trained twice"
            self._left[list(own)] = False
        alone_s = self._work.seconds(micro_batch_tokens(action.micro_batches, self._context))
        seconds = alone_s * action.factor
        for device in self._replicas[action.replica]:
            self._training_ends_s[device] = self._now_s + seconds
            self._schedule_end(self._now_s + seconds, device)
            self._training_s += seconds
            engine, sharing = self._engines[device], self._work.settings.sharing
            if engine.is_empty:
                engine.version += 1  # it has no batch, and no boundary to come to
                self._only_trains(device)
            else:
                assert sharing is not None
                engine.slow_down(sharing.decoding)
                self._interrupt(device)

    def _scored_groups(self) -> NDArray[np.bool_]:
        """Whether all samples of each group are scored, [groups]."""
        new = np.flatnonzero((self._phase == Phase.SCORED) & ~self._counted)
        self._counted[new] = True
        np.subtract.at(self._num_unscored, self._groups[new], 1)
        whole: NDArray[np.bool_] = self._num_unscored == 0
        return whole

    def _only_decodes(self, device: int) -> bool:
        """Whether it does nothing else, or nothing at all, and nothing is on the way to it or from it."""
        num_held = self._engines[device].num_held
        return bool(
            self._num_live[device] == num_held
            and not self._leaving[device]
            and self._jobs[device] is None
            and not self._scoring[device]
            and device not in self._training_ends_s
        )
