"""An emulated engine takes what the simulator says, on a clock that nobody waits for."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fuse.benchmarks.emulated.costs import SCORING_BATCH_TOKENS
from fuse.benchmarks.emulated.device import EmulatedDevice
from fuse.benchmarks.emulated.engine import EmulatedEngine, EmulatedGenerationWorker
from fuse.benchmarks.emulated.h100 import costs_named
from fuse.engines.engine import GeneratedToken, GenerationRequest, SamplingParams
from fuse.interstage.calibration import Calibration
from fuse.interstage.migration import EngineLimits, StageByStage
from fuse.interstage.rollout import Rollout
from fuse.interstage.simulate import simulate
from fuse.interstage.speculation import DRAFTS
from fuse.trace import Span
from fuse.workers.step_sizes import step_sizes
from fuse.workers.unreported import Unreported

COSTS = costs_named("h100-33b")
PROMPT_TOKENS = 5


def request(sample_id: int, num_tokens: int) -> GenerationRequest:
    params = SamplingParams(seed=0, temperature=1.0, max_new_tokens=num_tokens)
    return GenerationRequest(sample_id=sample_id, prompt_ids=(1,) * PROMPT_TOKENS, params=params)


def still() -> EmulatedDevice:
    """A device for whose time nobody waits."""
    return EmulatedDevice(now=lambda: 0.0, sleep=lambda seconds: None)


def drain(*engines: EmulatedEngine) -> list[GeneratedToken]:
    tokens: list[GeneratedToken] = []
    while stepped := [token for engine in engines for token in engine.step()]:
        tokens += stepped
    return tokens


@pytest.mark.parametrize("max_batch", [3, 64])
def test_a_batch_takes_what_the_simulator_says(max_batch: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 60, 10)
    device = still()
    engine = EmulatedEngine(COSTS, max_batch, device)
    for index, length in enumerate(lengths.tolist()):
        engine.submit(request(index, length))
    assert len(drain(engine)) == lengths.sum()
    rollout = Rollout(
        prompt_tokens=np.full(10, PROMPT_TOKENS),
        response_tokens=lengths,
        num_devices=1,
        costs=COSTS.rollout,
        limits=EngineLimits(max_batch=max_batch, kv_capacity_tokens=10**6, max_new_tokens=60),
    )
    assert device.free_s == pytest.approx(simulate(rollout, StageByStage()).generation_s, rel=1e-9)


DRAFTING = replace(COSTS, speculation=DRAFTS["int8"])


def test_a_batch_that_drafts_takes_about_what_the_simulator_says_and_gets_the_same_tokens() -> None:
    """Samples are lucky or not, and the last drafts of a response are for nothing."""
    lengths = np.random.default_rng(0).integers(1, 800, 12)
    seconds, tokens = [], []
    for costs in (COSTS, DRAFTING):
        device = still()
        engine = EmulatedEngine(costs, 8, device)
        for index, length in enumerate(lengths.tolist()):
            engine.submit(request(index, length))
        tokens.append(sorted((token.sample_id, token.token_id) for token in drain(engine)))
        seconds.append(device.free_s)
    rollout = Rollout(
        prompt_tokens=np.full(12, PROMPT_TOKENS),
        response_tokens=lengths,
        num_devices=1,
        costs=DRAFTING.rollout,
        limits=EngineLimits(max_batch=8, kv_capacity_tokens=10**6, max_new_tokens=800),
    )
    assert tokens[0] == tokens[1]
    assert seconds[1] == pytest.approx(simulate(rollout, StageByStage()).generation_s, rel=0.04)
    assert seconds[1] < 0.8 * seconds[0]


def test_what_steps_with_drafts_tell_is_what_they_cost() -> None:
    """Learnt from their sizes, as the generation worker tells them, costs are those of the engine."""
    device = still()
    engine = EmulatedEngine(DRAFTING, 64, device)
    samples = {index: Unreported(0, PROMPT_TOKENS, PROMPT_TOKENS) for index in range(40)}
    for index in samples:
        engine.submit(request(index, 20 * (1 + index)))
    calibration = Calibration(1, SCORING_BATCH_TOKENS, 3)
    costs = DRAFTING.rollout
    spans = [
        Span("actor", "infer", 0.0, costs.inference(tokens), {"call": 0, "tokens": tokens}) for tokens in (50, 9000)
    ]
    start_s = device.free_s
    while tokens := engine.step():
        spans.append(Span("decode", "generate", start_s, device.free_s, step_sizes(tokens, samples)))
        start_s = device.free_s
        for token in tokens:
            samples[token.sample_id].add(token, None)
    calibration.add(spans)
    learnt = calibration.costs()
    assert learnt is not None
    assert learnt.speculation is not None
    assert learnt.speculation.acceptance == pytest.approx(0.97, abs=0.01)
    for batch in (1, 6, 40):
        assert learnt.decode_step(batch, 300 * batch) == pytest.approx(costs.decode_step(batch, 300 * batch), rel=0.02)


def test_a_sample_that_moves_goes_on_with_its_tokens_and_is_computed_again() -> None:
    device = still()
    stays, first, second = (EmulatedEngine(COSTS, 8, own) for own in (still(), still(), device))
    stays.submit(request(3, 6))
    expected = [token.token_id for token in drain(stays)]
    first.submit(request(3, 6))
    begun = [token.token_id for _ in range(2) for token in first.step()]
    evicted = first.evict(3, with_kv=True)
    assert evicted.kv is None
    second.admit(evicted)
    assert begun + [token.token_id for token in second.step()] == expected[:3]
    context = PROMPT_TOKENS + 2
    assert device.free_s == pytest.approx(COSTS.rollout.prefill(context) + COSTS.rollout.decode_step(1, context))
    assert [token.token_id for token in drain(second)] == expected[3:]
    assert len(set(expected)) == 6


def test_what_was_idle_starts_now_and_what_is_late_catches_up() -> None:
    now, slept = [10.0], list[float]()
    device = EmulatedDevice(now=lambda: now[0], sleep=slept.append)
    now[0] = 12.0
    device.resume()
    device.work(1.0)
    now[0] = 13.5  # half a second overslept
    device.work(1.0)
    now[0] = 15.0  # the host is behind for good
    device.work(0.5)
    assert slept == [1.0, 0.5]
    assert device.free_s == 14.5


def test_steps_are_told_as_long_as_they_should_take_however_late_the_host_is() -> None:
    worker = EmulatedGenerationWorker(COSTS.scaled(1e-3), max_batch=4)
    worker.submit([request(index, length) for index, length in enumerate((2, 5, 5))])
    while sum(one.finished for one in worker.poll(60.0)) == 0:
        pass
    worker.close()
    spans = [span for span in worker.drain_spans() if span.name == "decode"]
    assert spans
    for span in spans:
        sizes: Mapping[str, Any] = span.arguments
        expected = COSTS.rollout.decode_step(sizes["batch"], sizes["context_tokens"])
        expected += COSTS.rollout.prefill(sizes["prefill_tokens"]) if sizes["prefill_tokens"] else 0.0
        assert span.duration_s == pytest.approx(1e-3 * expected, abs=1e-6)


@pytest.mark.processes
def test_emulated_processes_do_without_torch() -> None:
    program = (
        "import sys, fuse.workers.process, fuse.benchmarks.emulated.engine, fuse.benchmarks.emulated.model_worker;"
        "print(*{'torch', 'transformers', 'ortools'} & sys.modules.keys())"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == ""
