"""Tail training: who trains what, and that a rollout with it is one, simulated."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuse.interstage.adaptive import Adaptive
from fuse.interstage.costs import CostModel
from fuse.interstage.few_pipelines import on_few_pipelines
from fuse.interstage.lengths import Observation, learn
from fuse.interstage.migration import EngineLimits, Policy, StageByStage, Threshold
from fuse.interstage.rollout import Rollout, SpanKind
from fuse.interstage.simulate import simulate
from fuse.interstage.simulate_tail import TailWork, simulate_tail
from fuse.interstage.tail import ONE_CORE, Sharing, TailSettings, Train, spare_s, train_early

TOKENS = np.array([50, 10, 40, 30, 20, 60])
SETTINGS = TailSettings(micro_batch_size=2, num_kept=1)

COSTS = CostModel(
    step_s=1.0,
    sample_s=0.0,
    context_s=0.0,
    prefill_s=0.0,
    prefill_token_s=0.0,
    inference_s=0.0,
    inference_token_s=0.01,
    kv_bytes_per_token=1,
    transfer_s=0.0,
    transfer_byte_s=0.0,
)


def test_long_samples_go_first_and_short_ones_are_kept() -> None:
    chosen = train_early([0, 1, 2, 3], TOKENS, {4: 1.0}, SETTINGS, token_s=1.0)
    assert chosen == [Train(4, ((0, 2),))], "a micro-batch of two; 1 is the shortest of those that are ready"
    assert train_early([1], TOKENS, {4: 1.0}, SETTINGS, token_s=1.0) == []
    shared = train_early([0, 1, 2, 3], TOKENS, {4: 1.0, 7: 1.0}, SETTINGS, token_s=1.0)
    assert shared == [Train(4, ((0,),)), Train(7, ((2, 3),))], "even in tokens"


def test_a_piece_takes_half_of_the_time_to_spare() -> None:
    assert train_early([0, 1, 2, 3], TOKENS, {0: 1.0}, SETTINGS, token_s=1.0, within_s=160.0) == [Train(0, ((0, 3),))]
    assert train_early([0, 1, 2, 3], TOKENS, {0: 1.0}, SETTINGS, token_s=1.0, within_s=60.0) == [Train(0, ((3,),))]
    assert train_early([0, 1, 2, 3], TOKENS, {0: 1.0}, SETTINGS, token_s=1.0, within_s=0.0) == []


def test_a_replica_trains_beside_samples_only_where_that_pays() -> None:
    """A second of one of two replicas is worth half a second; beside decoding it delays samples by `lost` seconds."""
    for decoding, training, lost in ((1.25, 1.5, 0.3), (2.0, 1.2, 0.6), (2.0, 2.0, 1.0), (1.0, 9.0, 0.0)):
        sharing = Sharing(decoding=decoding, training=training, num_samples=3)
        settings = TailSettings(micro_batch_size=2, num_replicas=2, sharing=sharing)
        assert settings.takers({0: 3, 1: 4}) == ({0: training} if lost < 0.5 else {}), "of 4 samples nothing is known"
        assert settings.takers({0: 3, 1: 0}) == {1: 1.0}, "one that is free is slowed down by nothing"
    assert ONE_CORE.pays(1) is False, "a core does either in the time of the other"
    assert TailSettings(micro_batch_size=2).takers({0: 1}) == {}, "nothing is known"
    sharing = Sharing(decoding=1.25, training=2.0)
    beside = replace(SETTINGS, sharing=sharing)
    assert train_early([0, 1, 2, 3], TOKENS, {0: 2.0}, beside, token_s=1.0, within_s=160.0) == [
        Train(0, ((2,),), 2.0)
    ], "it takes twice as long"
    assert sharing.pays(1, fill=0.6)
    assert not sharing.pays(1, fill=0.5), "decoding loses 0.4 of what is as much as 0.5 of a full pipeline"
    alone, one_stage = TailSettings(micro_batch_size=2, num_stages=2, num_kept=0), TOKENS[:2]
    for tokens, number in ((TOKENS, 1), (one_stage, 0)):
        pieces = train_early(
            range(len(tokens)), tokens, {0: 2.0}, replace(alone, sharing=sharing), token_s=1.0, within_s=1e4
        )
        assert len(pieces) == number, "the shorter of two samples fills little of a pipeline that waits for the longer"
    with pytest.raises(ValueError, match=r"decoding beside the other takes 0\.5 times as long: it must be >= 1"):
        Sharing(decoding=0.5, training=1.0)


def test_a_pipeline_gets_even_micro_batches() -> None:
    stages = TailSettings(micro_batch_size=2, num_stages=2, num_kept=0)
    chosen = [Train(0, ((5,), (0,), (2,), (3,)))]
    assert train_early(range(6), TOKENS, {0: 1.0}, stages, token_s=1.0) == chosen, "two samples for each of two stages"
    short = np.array([50, 10, 10, 10, 10])
    assert train_early(range(5), short, {0: 1.0}, stages, token_s=1.0) == [Train(0, ((0,), (1, 2), (3,)))], (
        "as even as the longest sample allows, at most two at a time"
    )
    assert train_early(range(6), TOKENS, {0: 1.0}, stages) == [Train(0, ((5,), (0,)))], "to learn what it takes"


def rollout(lengths: list[int], num_devices: int) -> Rollout:
    return Rollout(
        prompt_tokens=np.full(len(lengths), 5),
        response_tokens=np.array(lengths),
        num_devices=num_devices,
        costs=COSTS,
        limits=EngineLimits(max_batch=64, kv_capacity_tokens=1 << 20, max_new_tokens=200),
    )


def work(
    num_samples: int, group: int, num_stages: int = 1, token_s: float = 0.5, sharing: Sharing | None = None
) -> TailWork:
    settings = TailSettings(micro_batch_size=2, num_stages=num_stages, num_kept=2, sharing=sharing)
    return TailWork(groups=np.arange(num_samples) // group, token_s=token_s, micro_batch_s=0.0, settings=settings)


def test_a_device_trains_what_is_scored_until_the_rollout_ends() -> None:
    """Device 1 has samples of 10, 9, 8 and 7 tokens, which it scores; then it trains two of 15 and 14 in 14.5 s."""
    lengths = [100, 10, 9, 8, 7]
    one = rollout(lengths, 2)
    policy = Threshold(remaining=len(lengths), num_kept=2)
    plain, result = simulate(one, policy), simulate_tail(one, policy, work(len(lengths), 1))
    assert result.rollout.makespan_s == pytest.approx(plain.makespan_s)
    assert result.num_trained >= 2
    trained = [span for spans in result.rollout.timeline for span in spans if span.kind is SpanKind.TRAIN]
    assert sum(span.end_s - span.start_s for span in trained) == pytest.approx(0.5 * result.trained_tokens)
    grouped = simulate_tail(one, policy, work(len(lengths), 5))
    assert grouped.num_trained == 0, "all of them are a group with the long one"


def test_a_pipeline_over_all_devices_trains_beside_the_last_samples() -> None:
    """Its two devices are never both free. What decoding loses beside it is what a second of training costs."""
    lengths = [150, 10, 9, 8, 7, 6]
    one, policy = rollout(lengths, 2), Threshold(remaining=len(lengths), num_kept=2)
    plain = simulate(one, policy)
    for sharing in (None, ONE_CORE):
        none = simulate_tail(one, policy, work(len(lengths), 1, 2, sharing=sharing))
        assert none.num_trained == 0
        assert none.rollout.makespan_s == plain.makespan_s
    sharing = Sharing(decoding=1.25, training=1.5)
    result = simulate_tail(one, policy, work(len(lengths), 1, 2, sharing=sharing))
    assert result.num_trained == 3, "two are kept"
    late_s = result.rollout.makespan_s - plain.makespan_s
    assert late_s == pytest.approx(result.training_s / 2 * (1 - 1 / 1.25), abs=1.5), (
        "slower steps begin and end between two"
    )
    free = simulate_tail(one, policy, work(len(lengths), 1, 2, sharing=Sharing(decoding=1, training=1)))
    assert free.num_trained == 3
    assert free.rollout.makespan_s == plain.makespan_s


def policies(lengths: list[int]) -> list[Policy]:
    model = learn([Observation(one, prompt=(index,)) for index, one in enumerate(lengths)], 200)
    adaptive = Adaptive(COSTS, model.for_samples())
    return [StageByStage(), Threshold(remaining=len(lengths), num_kept=1), adaptive]


@given(
    lengths=st.lists(st.integers(1, 200), min_size=4, max_size=24),
    which=st.integers(0, 2),
    num_stages=st.sampled_from([1, 2, 4]),
    group=st.integers(1, 3),
    sharing=st.sampled_from([None, Sharing(decoding=1.2, training=1.1, num_samples=2)]),
    on_few=st.booleans(),
)
def test_a_rollout_with_training_is_one(
    lengths: list[int], which: int, num_stages: int, group: int, sharing: Sharing | None, on_few: bool
) -> None:
    """The simulation asserts that no sample is lost, trained twice or trained before its group is scored."""
    one, policy = rollout(lengths, 4), policies(lengths)[which]
    if on_few:
        pipelines = [range(first, first + num_stages) for first in range(0, 4, num_stages)]
        policy = on_few_pipelines(policy, pipelines, COSTS)
    result = simulate_tail(one, policy, work(len(lengths), group, num_stages, sharing=sharing))
    assert result.num_trained <= max(0, len(lengths) - 2)
    busy_s = sum(
        span.end_s - span.start_s for spans in result.rollout.timeline for span in spans if span.kind is SpanKind.TRAIN
    )
    assert busy_s == pytest.approx(result.training_s) if sharing is None else busy_s <= result.training_s + 1e-6
    if num_stages == 1 and sharing is None:
        assert busy_s == pytest.approx(0.5 * result.trained_tokens)


def test_where_there_is_no_tail_nothing_is_trained() -> None:
    one = rollout([50] * 8, 4)
    assert simulate_tail(one, policies([50] * 8)[2], work(8, 1)).num_trained == 0
    with pytest.raises(ValueError, match="replicas of 3 devices do not divide 4: choose a divisor"):
        simulate_tail(one, StageByStage(), work(8, 1, num_stages=3))
    assert math.isinf(spare())


def spare() -> float:
    """Of a policy that knows no costs, while a sample is live."""
    seen: list[float] = []

    def look(state: object) -> list[object]:
        seen.append(spare_s(StageByStage(), state))  # type: ignore[arg-type]
        return StageByStage()(state)  # type: ignore[arg-type,return-value]

    simulate(rollout([3, 4], 1), look)  # type: ignore[arg-type]
    assert seen[-1] == 0.0, "all are scored"
    return seen[0]
