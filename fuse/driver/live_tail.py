"""A live rollout whose free devices train what depends on nothing that is still being generated.

To the policy that moves and scores samples, a device that trains early is one that scores: it is left alone until it
is done. One that decodes beside it goes on with the samples that it has. An engine that dies takes nothing along of
what was trained, which is with the model workers; a model worker that dies ends the run, as at any time, and the update
is done again from the last checkpoint.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from fuse.activity import silent
from fuse.driver.live import LiveRollout
from fuse.driver.rollout_state import RolloutDevice
from fuse.driver.tail import Job, Tail
from fuse.engines.engine import SamplingParams
from fuse.interstage.costs import CostModel
from fuse.interstage.few_pipelines import on_few_pipelines
from fuse.interstage.migration import Policy
from fuse.interstage.tail import spare_s
from fuse.sample import Sample
from fuse.training.rounds import RankRound
from fuse.workers.calls import Future
from fuse.workers.errors import WorkerError
from fuse.workers.generation_handle import GenerationHandle
from fuse.workers.model_handle import ModelHandle

_AS_SCORED = 3
"""Training on a token takes about as long as scoring so many, backward and forward."""


class TailRollout(LiveRollout):
    """As `LiveRollout`; devices with nothing to score, and next to nothing to generate, train what `tail` has for them.

    Pipelines come free as wholes where that pays: see `few_pipelines`.

    Raises: WorkerError as well where one that trains does not answer within `timeout_s`.
    """

    def __init__(
        self,
        engines: Sequence[GenerationHandle | None],
        scorers: Callable[[], Sequence[ModelHandle]] | None,
        samples: Sequence[Sample],
        params: SamplingParams,
        *,
        tail: Tail,
        policy: Policy,
        costs: CostModel | None = None,
        tell: Callable[[str], None] = silent,
        **options: Any,
    ) -> None:
        def tell_both(text: str) -> None:
            tell(f"{text}, {tail.num_trained} trained" if tail.num_trained else text)

        policy = on_few_pipelines(policy, tail.pipelines, costs)
        super().__init__(engines, scorers, samples, params, policy=policy, costs=costs, tell=tell_both, **options)
        self._tail = tail
        self._jobs: list[Job] = []

    def _take_answers(self) -> None:
        if self._num_scored < len(self._table.samples):
            self._train()
        super()._take_answers()

    def _train(self) -> None:
        num_live = Counter(self._table.home.values())
        decoding = {
            device.index: len(device.held)
            for device in self._devices
            if num_live[device.index] == len(device.held) and _only_decodes(device)
        }
        for job in self._tail.start(decoding, self._table.samples, self._params.max_new_tokens, self._spare_s):
            self._jobs.append(job)
            for index in job.devices:
                device = self._devices[index]
                device.is_scoring, device.scoring_s = True, time.monotonic()
                device.training_tokens = max(1, _AS_SCORED * job.stage_tokens // self._tail.num_stages)
            for call in job.calls:
                self._pending.expect(call, partial(self._trained, job, call))

    def _spare_s(self) -> float:
        return spare_s(self._policy, self._table.seen(self._devices, self._limits, self._costs, time.monotonic()))

    def _trained(self, job: Job, call: Future[RankRound]) -> None:
        told = call.result()
        rank, _ = job.calls.pop(call)
        job.told.setdefault(rank, told)  # that of its first lane
        if job.calls:
            return
        self._jobs.remove(job)
        self._tail.took(job, time.monotonic() - self._devices[job.devices[0]].scoring_s)
        self._has_news = True
        for index in job.devices:
            device = self._devices[index]
            device.is_scoring, device.training_tokens = False, 0
            self._admit(device)
            self._start_job(device)

    def _end_silent_ones(self) -> None:
        latest_s = time.monotonic() - self._timeout_s
        for job in self._jobs:
            if self._devices[job.devices[0]].scoring_s < latest_s:
                _, late = next(iter(job.calls.values()))
                raise WorkerError(late.worker.device, late.worker.role, f"not trained within {self._timeout_s:g} s")
        super()._end_silent_ones()


def _only_decodes(device: RolloutDevice) -> bool:
    """Whether a device has nothing else to do, or nothing at all, and nothing is on the way to it or from it."""
    return not (device.arrivals or device.num_evictions or device.job or device.is_scoring)
