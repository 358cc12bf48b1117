"""Plans each rollout: makes its policy from the lengths and costs that past iterations have shown."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from fuse.interstage.adaptive import Adaptive
from fuse.interstage.calibration import Calibration
from fuse.interstage.costs import CostModel, shared_engine_costs
from fuse.interstage.dealing import Dealing
from fuse.interstage.evidence import Evidence
from fuse.interstage.lengths import LengthModel, Observation, drift, learn
from fuse.interstage.migration import EngineLimits, Policy, StageByStage, Threshold
from fuse.interstage.rollout import Rollout
from fuse.interstage.simulate import simulate
from fuse.interstage.tuning import LengthHistory, expected_gain, pays, tune_threshold
from fuse.sample import Sample
from fuse.trace import Span

_logger = logging.getLogger(__name__)

PolicyName = Literal["adaptive", "threshold", "none"]
_REMEMBERED_UPDATES = 16
"""Iterations whose lengths count: policies change slowly, and lengths with them."""
_SURE_GAIN = 0.1
"""Part of a rollout that fusion is expected to save, from which on no clock is asked: see `evidence.py`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutSettings:
    """How samples are generated and scored.

    policy: which one moves samples. limits: of each engine.
    num_devices: engines, each with whatever devices it has, of which there are `engine_devices`.
    kv_bytes_per_token: of the actor. inference_batch_tokens: of one micro-batch of scoring.
    """

    policy: PolicyName
    num_devices: int
    limits: EngineLimits
    kv_bytes_per_token: int
    inference_batch_tokens: int
    engine_devices: int = 1

    def within(self, kv_capacities: Iterable[int]) -> RolloutSettings:
        """With the least KV capacity, tokens, of the engines that tell one, where that is less."""
        kv_tokens = min((self.limits.kv_capacity_tokens, *kv_capacities))
        return replace(self, limits=replace(self.limits, kv_capacity_tokens=kv_tokens))


class RolloutPlanner:
    """Remembers iterations, and makes each rollout's policy.

    Before lengths and costs are known, samples stay where they are, and are scored as devices come free. Once they are
    known, simulations tune `threshold` and tell whether fusion is expected to pay, and again when lengths have drifted:
    where it is not, rollouts go stage by stage. Where little is expected of it, both ways are timed, and the better one
    taken.

    num_scoring: models that score.
    """

    def __init__(self, settings: RolloutSettings, *, num_scoring: int) -> None:
        self._settings = settings
        self._calibration = Calibration(settings.kv_bytes_per_token, settings.inference_batch_tokens, num_scoring)
        self._updates: deque[list[Observation]] = deque(maxlen=_REMEMBERED_UPDATES)
        self._prompt_tokens: deque[list[int]] = deque(maxlen=_REMEMBERED_UPDATES)
        self._threshold: Threshold | None = None
        self._tuned_to: LengthModel | None = None
        self._num_since_tuned = 0
        self._tuning: Future[None] | None = None  # for the next policy, in a thread of its own
        self._gain = 1 + _SURE_GAIN  # that fusion is expected to bring
        self._evidence = Evidence()
        self._is_fused: bool | None = None  # the rollout that was planned last, if it is timed
        self._timed: tuple[bool, float] | None = None  # whether the last rollout was fused, and its seconds
        self._fitted: tuple[CostModel | None] | None = None  # since the last measurement: that takes a while

    @property
    def limits(self) -> EngineLimits:
        """Of each engine."""
        return self._settings.limits

    def costs(self) -> CostModel | None:
        """The costs measured so far; None before there are enough measurements."""
        if self._fitted is None:
            costs, size = self._calibration.costs(), self._settings.engine_devices
            self._fitted = (costs if costs is None or size == 1 else shared_engine_costs(costs, size),)
        return self._fitted[0]

    def dealing(self) -> Dealing:
        """How samples are dealt to engines."""
        lengths = [one.tokens for update in self._updates for one in update]
        mean = sum(lengths) / len(lengths) if lengths else float(self.limits.max_new_tokens)
        return Dealing(self.costs(), mean)

    def policy(self, samples: Sequence[Sample]) -> Policy:
        """The policy for a rollout of these samples."""
        settings = self._settings
        self._is_fused = None
        if settings.policy == "none":
            return StageByStage()
        costs = self.costs()
        if costs is None or not self._updates:
            return self.fixed_policy(len(samples))
        if self._tuning is None:
            self._keep_tuned(costs, len(samples))
        else:
            self._tuning.result()
        if not pays(self._gain):
            return StageByStage()
        if self._gain < 1 + _SURE_GAIN:
            self._is_fused = self._evidence.is_for_fusion
            if not self._is_fused:
                return StageByStage()
        if self._threshold is not None:
            return self._threshold
        prompts = {index: sample.prompt_ids for index, sample in enumerate(samples)}
        model = learn(self._observations(), settings.limits.max_new_tokens)
        return Adaptive(costs, model.for_samples(prompts))

    def fixed_policy(self, num_samples: int) -> Policy:
        """A policy that depends on nothing learnt: samples stay where they are, and are scored as devices come free."""
        if self._settings.policy == "none":
            return StageByStage()
        return Threshold(remaining=num_samples, num_kept=self._settings.num_devices)

    def observe(
        self,
        samples: Sequence[Sample],
        scoring_calls: Iterable[tuple[int, float]] = (),
        seconds: float | None = None,
    ) -> None:
        """Learn how long a rollout's responses were, and what its calls to score took: tokens and seconds of each.

        seconds: of all of it, where nothing else went on and it went by the policy that was made last.
        """
        if self._tuning is not None:
            self._tuning.result()  # it reads what changes here
            self._tuning = None
        self._timed = None if seconds is None or self._is_fused is None else (self._is_fused, seconds)
        size = self._settings.engine_devices
        self._calibration.begin_iteration()
        self._fitted = None
        self._calibration.add_calls((tokens / size, seconds) for tokens, seconds in scoring_calls)
        limit = self._settings.limits.max_new_tokens
        self._num_since_tuned += 1
        self._updates.append([Observation(min(limit, len(one.response_ids)), prompt=one.prompt_ids) for one in samples])
        self._prompt_tokens.append([len(sample.prompt_ids) for sample in samples])

    def observe_spans(self, spans: Iterable[Span]) -> None:
        """Learn what one worker's operations took."""
        self._calibration.add(spans)
        self._fitted = None

    def weigh(self) -> None:
        """All that an update's operations took has been observed: note how its rollout went, if that is timed."""
        if self._timed is not None and (costs := self.costs()) is not None:
            self._note(costs, *self._timed)
            self._timed = None

    def look_ahead(self) -> None:
        """Have another thread simulate what the policy of a next rollout of as many samples has to be tuned by.

        By costs known so far, which may lack what the rollout observed last took. Returns at once; the next policy
        waits for it.
        """
        costs = self.costs()
        if self._tuning is None and costs is not None and self._updates and self._settings.policy != "none":
            thread = ThreadPoolExecutor(1, thread_name_prefix="tuning")
            self._tuning = thread.submit(self._keep_tuned, costs, len(self._updates[-1]))
            thread.shutdown(wait=False)  # it ends with this

    def _note(self, costs: CostModel, is_fused: bool, seconds: float) -> None:
        rollout = Rollout(
            prompt_tokens=np.array(self._prompt_tokens[-1]),
            response_tokens=np.array([max(1, one.tokens) for one in self._updates[-1]]),
            num_devices=self._settings.num_devices,
            costs=costs,
            limits=self.limits,
        )
        self._evidence.add(seconds / simulate(rollout, StageByStage()).makespan_s, is_fused=is_fused)

    def _observations(self) -> list[Observation]:
        return [one for update in self._updates for one in update]

    def _keep_tuned(self, costs: CostModel, num_samples: int) -> None:
        """At first, when lengths have drifted, and now and then, for costs become known better."""
        tuned_to, age = self._tuned_to, self._num_since_tuned
        if tuned_to is None or age >= _REMEMBERED_UPDATES or (age and drift(tuned_to, self._observations()) > 1):
            self._tune(costs, num_samples)

    def _tune(self, costs: CostModel, num_samples: int) -> None:
        settings = self._settings
        history = LengthHistory(
            prompt_tokens=np.array([tokens for update in self._prompt_tokens for tokens in update]),
            response_tokens=np.array([one.tokens for update in self._updates for one in update]),
        )
        self._num_since_tuned = 0
        self._tuned_to = learn(self._observations(), settings.limits.max_new_tokens)
        policy: Policy
        if settings.policy == "threshold":
            policy = self._threshold = tune_threshold(
                history,
                num_samples=num_samples,
                num_devices=settings.num_devices,
                costs=costs,
                limits=settings.limits,
            )
            _logger.info("migration threshold: %s", policy)
        else:
            policy = Adaptive(costs, self._tuned_to.for_samples())
        self._gain = expected_gain(
            policy,
            history,
            num_samples=num_samples,
            num_devices=settings.num_devices,
            costs=costs,
            limits=settings.limits,
        )
