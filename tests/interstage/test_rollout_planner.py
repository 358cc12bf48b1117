"""What iterations teach: costs that equal those behind the spans, and the policy that follows from them."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from fuse.interstage.adaptive import Adaptive
from fuse.interstage.calibration import TRANSFER_S, Calibration
from fuse.interstage.costs import SMALL_CPU, CostModel
from fuse.interstage.migration import EngineLimits, StageByStage, Threshold
from fuse.interstage.rollout import Rollout
from fuse.interstage.rollout_planner import PolicyName, RolloutPlanner, RolloutSettings
from fuse.interstage.simulate import simulate
from fuse.interstage.speculation import DRAFTS, Speculation
from fuse.sample import Sample
from fuse.trace import Span

LIMIT = 64


def decode(costs: CostModel, batch: int, context: int, prefill: int = 0) -> Span:
    seconds = costs.decode_step(batch, context) + (costs.prefill(prefill) if prefill else 0.0)
    sizes = {"batch": batch, "tokens": batch, "context_tokens": context, "prefill_tokens": prefill}
    return Span("decode", "generate", 5.0, 5.0 + seconds, sizes)


def inference(costs: CostModel, call: int, tokens: int) -> list[Span]:
    """Three models share the time."""
    seconds = costs.inference(tokens) / 3
    sizes = {"samples": 1, "tokens": tokens, "call": call}
    return [Span(role, "infer", 7.0, 7.0 + seconds, sizes) for role in ("reference", "critic", "reward")]


def moved(name: str, num_bytes: int, seconds: float) -> Span:
    return Span(name, "transfer", 1.0, 1.0 + seconds, {"samples": 1, "bytes": num_bytes})


def spans_of(costs: CostModel) -> list[Span]:
    return [
        *(decode(costs, batch, 40 * batch) for batch in (1, 4, 9)),
        decode(costs, 4, 900),
        *(decode(costs, 4, 160, prefill) for prefill in (100, 300)),
        *itertools.chain.from_iterable(inference(costs, call, 200 * (1 + call)) for call in range(3)),
    ]


def test_costs_are_those_behind_the_spans() -> None:
    calibration = Calibration(SMALL_CPU.kv_bytes_per_token, SMALL_CPU.inference_batch_tokens, 3)
    calibration.add(spans_of(SMALL_CPU))
    costs = calibration.costs()
    assert costs is not None
    for name in ("step_s", "sample_s", "prefill_s", "prefill_token_s", "inference_s", "inference_token_s"):
        assert getattr(costs, name) == pytest.approx(getattr(SMALL_CPU, name), rel=1e-6), name
    assert costs.context_s == pytest.approx(SMALL_CPU.context_s, abs=1e-9)
    assert costs.transfer_s == TRANSFER_S

    calibration.add([moved("evict", 0, 9.0), moved("evict", 1000, 2e-3), moved("evict", 3000, 4e-3)])
    calibration.add([moved("admit", 1000, 1e-3), moved("admit", 2000, 1e-3)])
    measured = calibration.costs()
    assert measured is not None
    assert measured.transfer(2000) == pytest.approx(3e-3 + 1e-3)

    in_vain = moved("admit", 2000, 10.0)
    calibration.add([in_vain._replace(arguments={**in_vain.arguments, "lost": 1})])
    calibration.add([moved("admit", 1500, 1e-3)._replace(arguments={"samples": 1, "bytes": 1500, "lost": 0})])
    measured = calibration.costs()
    assert measured is not None
    assert measured.transfer(2000) == pytest.approx(3e-3 + 1e-3), "the other one waited for a process that had died"


def test_steps_of_all_batches_count_and_not_those_of_the_last_tail_alone() -> None:
    """Engines decode from a full batch down to one sample, the longest while; times scatter by a tenth."""
    costs = replace(SMALL_CPU, context_s=1e-7)
    random = np.random.default_rng(0)
    calibration = Calibration(costs.kv_bytes_per_token, costs.inference_batch_tokens, 3)
    calibration.add([span for call in range(3) for span in inference(costs, call, 200 * (1 + call))])
    for _ in range(4):
        spans = []
        for step in range(1200):
            batch = max(1, 64 - step // 8)
            exact = decode(costs, batch, batch * (100 + step))
            spans.append(exact._replace(end_s=exact.start_s + exact.duration_s * random.uniform(0.9, 1.1)))
        calibration.add(spans)
    learnt = calibration.costs()
    assert learnt is not None
    for batch in (1, 8, 64):
        for age in (100, 1000):
            expected = costs.decode_step(batch, batch * age)
            assert learnt.decode_step(batch, batch * age) == pytest.approx(expected, rel=0.05)


def test_calls_of_several_micro_batches_pay_for_each() -> None:
    costs = replace(SMALL_CPU, inference_batch_tokens=500)
    calibration = Calibration(costs.kv_bytes_per_token, costs.inference_batch_tokens, 3)
    calibration.add([decode(costs, batch, 40 * batch) for batch in (1, 4, 9)])
    calibration.add([span for call in range(6) for span in inference(costs, call, 300 * (1 + call))])
    learnt = calibration.costs()
    assert learnt is not None
    assert learnt.inference_s == pytest.approx(costs.inference_s)
    assert learnt.inference_token_s == pytest.approx(costs.inference_token_s)


def test_what_calls_take_beyond_inference_is_their_hand_out() -> None:
    calibration = Calibration(SMALL_CPU.kv_bytes_per_token, SMALL_CPU.inference_batch_tokens, 3)
    calibration.add(spans_of(SMALL_CPU))
    calibration.add_calls((tokens, SMALL_CPU.inference(tokens) + 4e-3 + 1e-6 * tokens) for tokens in (100, 500, 4000))
    costs = calibration.costs()
    assert costs is not None
    assert costs.hand_out_s == pytest.approx(4e-3)
    assert costs.inference_token_s == pytest.approx(SMALL_CPU.inference_token_s + 1e-6)
    assert costs.inference_s == pytest.approx(SMALL_CPU.inference_s)


def test_where_handing_out_costs_more_than_fusion_brings_rollouts_go_stage_by_stage() -> None:
    samples = of_tokens(LONG_TAILED)
    found = []
    for hand_out_s in (1e-4, 0.1):
        planner = RolloutPlanner(settings("adaptive"), num_scoring=3)
        planner.observe(samples, [(100 * call, SMALL_CPU.inference(100 * call) + hand_out_s) for call in range(1, 4)])
        planner.observe_spans(spans_of(SMALL_CPU))
        found.append(planner.policy(samples))
    assert isinstance(found[0], Adaptive)
    assert found[1] == StageByStage()


def drafting(costs: CostModel, batch: int, context: int, count: int, right: int, prepare_s: float = 0.0) -> Span:
    """A step of `count` drafts for each sample, of which so many of all were right."""
    draft = costs.speculation
    assert draft is not None
    draft_s = draft.draft_share * (costs.step_s + costs.sample_s * batch)
    draft_s += draft.reads_context * costs.context_s * context
    model_s = costs.step_s + costs.sample_s * batch * (1 + count) + costs.context_s * context
    sizes = {
        "batch": batch,
        "tokens": batch + right,
        "context_tokens": context,
        "prefill_tokens": 0,
        "drafted_tokens": batch * count,
        "draft_steps": count,
        "tried_tokens": min(right + batch, batch * count),
        "draft_s": count * draft_s + prepare_s,
    }
    return Span("decode", "generate", 5.0, 5.0 + model_s + count * draft_s + prepare_s, sizes)


@pytest.mark.parametrize("draft", [DRAFTS["int8"], replace(DRAFTS["int8"], reads_context=False), DRAFTS["ngram"]])
def test_what_drafts_take_and_bring_is_learnt_beside_plain_steps(draft: Speculation) -> None:
    """One step in two hundred also quantizes new weights."""
    costs = replace(SMALL_CPU, context_s=1e-6, speculation=draft)
    plain = replace(costs, speculation=None)
    random = np.random.default_rng(0)
    calibration = Calibration(costs.kv_bytes_per_token, costs.inference_batch_tokens, 3)
    calibration.add([span for call in range(3) for span in inference(costs, call, 200 * (1 + call))])
    calibration.add([decode(plain, batch, 40 * batch) for batch in (9, 20, 33)])
    before = calibration.costs()
    assert before is not None
    assert before.speculation is None, "nothing has been drafted"
    spans = []
    for step in range(200):
        batch, count = 1 + step // 50, 1 + step % 5
        drawn = np.cumprod(random.random((batch, count)) < draft.acceptance, axis=1).sum(axis=1)
        prepare_s = 0.7 if step == 0 else 0.0
        span = drafting(costs, batch, batch * (100 + step), count, int(drawn.sum()), prepare_s)
        tried = int(np.minimum(drawn + 1, count).sum())
        spans.append(span._replace(arguments={**span.arguments, "tried_tokens": tried}))
    calibration.add(spans)
    learnt = calibration.costs()
    assert learnt is not None
    assert learnt.speculation is not None
    for name in ("step_s", "sample_s", "context_s"):
        assert getattr(learnt, name) == pytest.approx(getattr(costs, name), rel=1e-6), name
    assert learnt.speculation.draft_share == pytest.approx(draft.draft_share, abs=1e-9)
    assert learnt.speculation.reads_context == draft.reads_context
    assert learnt.speculation.acceptance == pytest.approx(draft.acceptance, abs=0.04)
    assert learnt.decode_step(2, 500) == pytest.approx(costs.decode_step(2, 500), rel=0.05)


@pytest.mark.parametrize("in_windows", [(False, True), (True,), (False,)])
def test_drafts_with_a_window_and_without_are_counted_apart(in_windows: tuple[bool, ...]) -> None:
    """What was not seen follows from what was, by the share that is known of such drafts."""
    draft = replace(DRAFTS["int8"], acceptance=0.9, window_share=0.7 if len(in_windows) == 2 else 0.91)
    costs = replace(SMALL_CPU, context_s=1e-6, speculation=draft)
    random = np.random.default_rng(0)
    calibration = Calibration(costs.kv_bytes_per_token, costs.inference_batch_tokens, 3)
    calibration.add([span for call in range(3) for span in inference(costs, call, 200 * (1 + call))])
    spans = [decode(replace(costs, speculation=None), batch, 40 * batch) for batch in (9, 20, 33)]
    for step in range(300):
        for in_window in in_windows:
            chance = draft.acceptance * (draft.window_share if in_window else 1)
            right = int(np.cumprod(random.random(4) < chance).sum())
            own = replace(draft, reads_context=not in_window)
            read_s = 4 * costs.context_s * draft.window_tokens if in_window else 0.0
            span = drafting(replace(costs, speculation=own), 1, 1000 + step, 4, right)
            sizes = {**span.arguments, "drafted_in_window": in_window}
            sizes["draft_s"] += read_s
            spans.append(span._replace(end_s=span.end_s + read_s, arguments=sizes))
    calibration.add(spans)
    learnt = calibration.costs()
    assert learnt is not None
    assert learnt.speculation is not None
    assert learnt.speculation.acceptance == pytest.approx(draft.acceptance, abs=0.03)
    assert learnt.speculation.window_share == pytest.approx(draft.window_share, abs=0.04)
    assert learnt.speculation.draft_share == pytest.approx(draft.draft_share, abs=0.01)


def test_few_drafts_say_little_of_how_many_are_right() -> None:
    costs = replace(SMALL_CPU, speculation=DRAFTS["int8"])
    calibration = Calibration(costs.kv_bytes_per_token, costs.inference_batch_tokens, 3)
    calibration.add([*spans_of(SMALL_CPU), drafting(costs, 1, 50, 4, 0)])
    learnt = calibration.costs()
    assert learnt is not None
    assert learnt.speculation is not None
    assert 0.7 < learnt.speculation.acceptance < 0.8, "of 0.8 for sixteen, and one that was wrong"
    assert learnt.prefill_s == pytest.approx(SMALL_CPU.prefill_s), "steps that computed prompts are told apart as ever"


def test_the_time_of_one_stage_tells_that_of_all() -> None:
    """Of models that score through pipelines a device runs a part alone, and samples pass through all of them."""
    calibrations = [Calibration(SMALL_CPU.kv_bytes_per_token, SMALL_CPU.inference_batch_tokens, 3) for _ in range(2)]
    whole = spans_of(SMALL_CPU)
    staged = [
        one._replace(end_s=one.start_s + one.duration_s / 4, arguments={**one.arguments, "stage": 1, "stages": 4})
        if one.category == "infer"
        else one
        for one in whole
    ]
    found = []
    for calibration, spans in zip(calibrations, (whole, staged), strict=True):
        calibration.add(spans)
        found.append(calibration.costs())
    assert found[0] is not None
    assert found[1] is not None
    assert found[1].inference_s == pytest.approx(found[0].inference_s)
    assert found[1].inference_token_s == pytest.approx(found[0].inference_token_s)


def test_a_machine_that_has_become_faster_is_known_for_it_whatever_sizes_it_was_seen_with_before() -> None:
    """All sizes at the old speed for ten iterations, then five of one size, with half of the seconds."""
    calibration = Calibration(SMALL_CPU.kv_bytes_per_token, SMALL_CPU.inference_batch_tokens, 3)
    for _ in range(10):
        calibration.begin_iteration()
        calibration.add(spans_of(SMALL_CPU))
    names = ("step_s", "sample_s", "prefill_s", "prefill_token_s", "inference_s", "inference_token_s")
    fast = replace(SMALL_CPU, **{name: getattr(SMALL_CPU, name) / 2 for name in names})
    for _ in range(5):
        steps = [decode(fast, 9, 360), decode(fast, 9, 450), decode(fast, 9, 360, 300)]
        calibration.begin_iteration()
        calibration.add([*steps, *inference(fast, 0, 900)])
    learnt = calibration.costs()
    assert learnt is not None
    assert learnt.decode_step(9, 400) == pytest.approx(fast.decode_step(9, 400), rel=0.1)
    assert learnt.inference(900) == pytest.approx(fast.inference(900), rel=0.1)
    assert learnt.prefill(300) == pytest.approx(fast.prefill(300), rel=0.2)


def test_what_was_hardly_seen_is_assumed_or_missing() -> None:
    calibration = Calibration(2048, 16384, 3)
    calibration.add([decode(SMALL_CPU, 2, 10), decode(SMALL_CPU, 3, 10), *inference(SMALL_CPU, 0, 100)])
    assert calibration.costs() is None
    calibration.add([decode(SMALL_CPU, 4, 30), *inference(SMALL_CPU, 1, 500)])
    costs = calibration.costs()
    assert costs is not None
    assert costs.prefill_token_s == pytest.approx(SMALL_CPU.inference_token_s / 3)


def settings(policy: PolicyName) -> RolloutSettings:
    return RolloutSettings(
        policy=policy,
        num_devices=2,
        limits=EngineLimits(max_batch=8, kv_capacity_tokens=8 * 80, max_new_tokens=LIMIT),
        kv_bytes_per_token=2048,
        inference_batch_tokens=16384,
    )


def of_tokens(lengths: Sequence[int]) -> list[Sample]:
    return [Sample(index, (1, 2, index), response_ids=[0] * tokens) for index, tokens in enumerate(lengths)]


LONG_TAILED = [8, 8, 8, 8, 8, 8, 8, 60] * 4


@pytest.mark.parametrize("name", ["adaptive", "threshold"])
def test_policies_follow_what_is_known(name: PolicyName) -> None:
    samples = of_tokens(LONG_TAILED)
    planner = RolloutPlanner(settings(name), num_scoring=3)
    staying = Threshold(remaining=32, num_kept=2)
    assert planner.policy(samples) == staying, "nothing is known"
    planner.observe(samples)
    assert planner.policy(samples) == staying, "costs are not known"
    planner.observe_spans(spans_of(SMALL_CPU))
    learnt = planner.policy(samples)
    if name == "threshold":
        assert isinstance(learnt, Threshold)
        assert planner.policy(samples) is learnt, "tuned once"
        for _ in range(3):
            planner.observe(of_tokens([LIMIT - one for one in LONG_TAILED]))
        assert planner.policy(samples) is not learnt, "lengths have drifted"
    else:
        assert isinstance(learnt, Adaptive)
        (expected,) = learnt.lengths.expected(np.array([0]), np.array([5]))
        assert 1 <= expected < 20, "responses of 10 tokens are known, of at most 64"


def test_no_rollout_waits_for_what_an_earlier_one_lets_simulate(monkeypatch: pytest.MonkeyPatch) -> None:
    samples, tuned = of_tokens(LONG_TAILED), list[bool]()

    def gain(*_: object, **__: object) -> float:
        tuned.append(threading.current_thread() is threading.main_thread())
        return 1.3

    monkeypatch.setattr("fuse.interstage.rollout_planner.expected_gain", gain)
    planner = RolloutPlanner(settings("adaptive"), num_scoring=3)
    planner.look_ahead()
    planner.observe(samples)
    planner.look_ahead()
    assert not tuned, "costs are not known"
    planner.observe_spans(spans_of(SMALL_CPU))
    planner.look_ahead()
    assert isinstance(planner.policy(samples), Adaptive)
    assert tuned == [False], "in a thread of its own, for which the policy waited"
    planner.observe(of_tokens([LIMIT - one for one in LONG_TAILED]))
    planner.look_ahead()
    planner.policy(samples)
    assert tuned == [False, False], "lengths have drifted"


@pytest.mark.parametrize("name", ["none", "adaptive", "threshold"])
def test_where_fusion_gains_nothing_rollouts_go_stage_by_stage(
    name: PolicyName, caplog: pytest.LogCaptureFixture
) -> None:
    """Responses of one length end at once; later ones do not."""
    samples = of_tokens([10] * 32)
    planner = RolloutPlanner(settings(name), num_scoring=3)
    planner.observe(samples)
    planner.observe_spans(spans_of(SMALL_CPU))
    with caplog.at_level(logging.INFO):
        assert planner.policy(samples) == StageByStage()
    assert ("rollouts go stage by stage" in caplog.text) == (name != "none")
    if name != "none":
        for _ in range(16):
            planner.observe(of_tokens(LONG_TAILED))
        assert planner.policy(samples) != StageByStage()


def test_where_little_is_expected_of_fusion_the_clock_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused rollouts of these take longer than simulated; so they are not taken once that is known."""
    samples = of_tokens(LONG_TAILED)
    found = {}
    for gain, slowdown in ((1.05, 1.2), (1.05, 0.5), (1.3, 1.2)):
        monkeypatch.setattr("fuse.interstage.rollout_planner.expected_gain", lambda *args, gain=gain, **given: gain)
        planner = RolloutPlanner(settings("adaptive"), num_scoring=3)
        planner.observe(samples)
        planner.observe_spans(spans_of(SMALL_CPU))
        costs = planner.costs()
        assert costs is not None
        lengths = np.array(LONG_TAILED)
        rollout = Rollout(
            prompt_tokens=np.full(len(lengths), 3),
            response_tokens=lengths,
            num_devices=2,
            costs=costs,
            limits=planner.limits,
        )
        serial_s = simulate(rollout, StageByStage()).makespan_s
        taken = []
        for _ in range(7):
            taken.append(planner.policy(samples) != StageByStage())
            planner.observe(samples, seconds=serial_s * (slowdown if taken[-1] else 1.0))
            planner.weigh()
        found[gain, slowdown] = taken
    assert found[1.05, 1.2] == [True, True, False, False, False, False, False]
    assert all(found[1.05, 0.5])
    assert all(found[1.3, 1.2]), "what is sure is not timed"
