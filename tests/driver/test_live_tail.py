"""Whatever the policy, the order of events and who dies: samples are trained once, early or not, on devices at rest."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuse.algorithms.algorithm import Early
from fuse.algorithms.batch import Experience
from fuse.driver import live, live_tail
from fuse.driver.live_tail import TailRollout
from fuse.driver.tail import Tail, TailPlan
from fuse.engines.engine import SamplingParams
from fuse.interstage.costs import SMALL_CPU
from fuse.interstage.few_pipelines import on_few_pipelines
from fuse.interstage.tail import Sharing
from fuse.intrastage.placement import Replica
from fuse.sample import Sample, SampleState
from fuse.training.rounds import RankRound, Round, StepPart
from fuse.training.tail import FirstStep
from fuse.workers.errors import WorkerError

from .emulated_workers import unestimated
from .fake_workers import Chance, FakeEngine, FakeFuture, FakeScorer, use_chance
from .test_live import FIRST_ID, LIMITS, MAX_NEW_TOKENS, policies

GROUP = 2


class Trainer(FakeScorer):
    """Trains, too: keeps which replica has trained which prompts."""

    trained: list[tuple[int, tuple[int, ...]]]
    dies = False
    most_decoded = 0

    def accumulate(self, model: str, replica: int, experience: Experience, part: StepPart) -> RankRound:
        assert self.engine.is_dead or len(self.engine.samples) <= self.most_decoded, (
            "the device decodes while it trains"
        )
        if self.dies:
            raise WorkerError(self.device, self.role, "its process died", is_death=True)
        for own, shares in zip(part.micro_batches, part.shares, strict=True):
            assert len(own) == len(shares)
            self.trained += [(replica, experience.prompts[index]) for index in own]
        return RankRound(metrics={}, gradient_norms={}, said={model: ()})

    def run(self, future: FakeFuture, random: Any) -> None:
        try:
            super().run(future, random)
        except WorkerError as error:
            future.error = error


def experience_of(samples: Sequence[Sample], width: int, size: int) -> Experience:
    """With nothing but their lengths. The batch is known to be wider than each is, or as wide as it can be."""
    assert all(sample.length < width or width == MAX_NEW_TOKENS for sample in samples)
    assert all(sample.state is SampleState.SCORED for sample in samples)
    assert len(samples) % size == 0, "groups are whole"
    assert sum(sample.length for sample in samples) > 1, "of one token nothing can be estimated"
    return unestimated(samples)


def roll_out(
    lengths: Sequence[int],
    num_stages: int,
    which: int,
    seed: int,
    num_deaths: int = 0,
    dying: int | None = None,
    by_group: bool = True,
    most_decoded: int = 0,
) -> tuple[list[Sample], FirstStep, list[Trainer]]:
    num_devices = 4
    by_id = {FIRST_ID + index: length for index, length in enumerate(lengths)}
    engines = [FakeEngine(device, by_id, LIMITS.max_batch) for device in range(num_devices)]
    workers = [Trainer(device, engine) for device, engine in enumerate(engines)]
    for worker in workers:
        worker.trained, worker.dies, worker.most_decoded = [], worker.device == dying, most_decoded
    samples = [Sample(FIRST_ID + index, (1, 2, 3 + index)) for index in range(len(lengths))]
    micro_batches = tuple((index, index + 1) for index in range(0, len(lengths), 2))
    part = StepPart(micro_batches=micro_batches, weights=(1.0,) * len(micro_batches), is_last=True)
    estimate = partial(experience_of, size=GROUP if by_group else 1)
    early = Early(role="actor", estimate=estimate, mean_over="samples", by_group=by_group, needs_longer=True)
    members = [range(index // GROUP * GROUP, index // GROUP * GROUP + GROUP) for index in range(len(lengths))]
    step = FirstStep.of(early, [Round({"actor": part})], members)
    assert step is not None
    ranks = [tuple(range(first, first + num_stages)) for first in range(0, num_devices, num_stages)]
    tail = Tail(
        TailPlan(step=step, known=lambda scored: scored),
        [worker.handle for worker in workers],
        [Replica("actor", index, own) for index, own in enumerate(ranks)],
        sharing=Sharing(decoding=1.0, training=1.0, num_samples=most_decoded) if most_decoded else None,
    )
    rollout = TailRollout(
        [engine.handle for engine in engines],
        lambda: [worker.handle for worker in workers],
        samples,
        SamplingParams(seed=0, temperature=1.0, max_new_tokens=MAX_NEW_TOKENS),
        policy=on_few_pipelines(policies(seed)[which], ranks, SMALL_CPU),
        limits=LIMITS,
        pad_token_id=0,
        costs=SMALL_CPU,
        tail=tail,
    )
    clock = SimpleNamespace(perf_counter=time.perf_counter, monotonic=count().__next__, thread_time=time.thread_time)
    with pytest.MonkeyPatch.context() as patch:
        for module in (live, live_tail):
            patch.setattr(module, "time", clock)
        use_chance(rollout, Chance(seed, engines, num_deaths, 0.05))
        rollout.run()
    return samples, step, workers


@given(
    lengths=st.lists(st.integers(1, MAX_NEW_TOKENS), min_size=4, max_size=8).map(lambda own: own * 2),
    num_stages=st.sampled_from([1, 2, 4]),
    which=st.integers(0, 3),
    seed=st.integers(0, 1 << 20),
    num_deaths=st.integers(0, 2),
    by_group=st.booleans(),
    most_decoded=st.sampled_from([0, 2]),
)
def test_every_sample_is_trained_once(
    lengths: list[int], num_stages: int, which: int, seed: int, num_deaths: int, by_group: bool, most_decoded: int
) -> None:
    samples, step, workers = roll_out(
        lengths, num_stages, which, seed, num_deaths, by_group=by_group, most_decoded=most_decoded
    )
    assert all(sample.state is SampleState.SCORED for sample in samples)
    taken = [sample for piece in step.pieces for own in piece.micro_batches for sample in own]
    assert len(taken) == len(set(taken)) == step.num_samples - step.num_left
    assert step.num_left >= len(workers) // num_stages, "every replica finds something to train later"
    trained = Counter(own for worker in workers for own in worker.trained)
    assert trained == {
        (piece.replica, samples[sample].prompt_ids): num_stages
        for piece in step.pieces
        for own in piece.micro_batches
        for sample in own
    }


def test_devices_that_are_done_train() -> None:
    """One sample is far longer than the others, which do not move: what is theirs is trained by then."""
    lengths = [MAX_NEW_TOKENS, 1] + [2] * 14
    _, step, _ = roll_out(lengths, 1, 1, seed=0)
    assert step.num_left <= GROUP + 4


def test_a_pipeline_over_all_devices_trains_beside_the_last_sample() -> None:
    lengths = [MAX_NEW_TOKENS, 1] + [2] * 14
    _, step, workers = roll_out(lengths, 4, 1, seed=0, most_decoded=1)
    assert step.num_left < len(lengths) / 2
    assert all(worker.trained for worker in workers)
    _, step, _ = roll_out(lengths, 4, 1, seed=0)
    assert not step.pieces


def test_a_model_worker_that_dies_ends_the_run() -> None:
    with pytest.raises(WorkerError, match="model worker on device 2 failed: its process died"):
        roll_out([MAX_NEW_TOKENS, 1] + [2] * 14, 1, 1, seed=0, dying=2)
