"""A run that nobody ran, to see what pages of runs show: simulated rollouts, a planned schedule, made-up learning.

It goes through the same spans, traces and log as a real one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fuse.idle_causes import Tracks, idle_causes, shares
from fuse.interstage.costs import PROFILES
from fuse.interstage.migration import EngineLimits, Threshold
from fuse.interstage.policies import ADAPTIVE
from fuse.interstage.rollout import Rollout, SampleSpan, SimulationResult, SpanKind
from fuse.interstage.simulate import simulate
from fuse.trace import PhaseClock, Span
from fuse.trace_file import DRIVER, write_chrome_trace
from fuse.update_log import NAME, append, record_of
from schedules.fused.greedy import greedy
from schedules.instances import actor_and_critic
from schedules.ir import Schedule
from schedules.timing import Timing, evaluate

TITLE = "Demonstration: a simulated run, with made-up rewards"
_COSTS = PROFILES["llama-33b-8xh800"]
_PROMPT_TOKENS, _MOST_TOKENS = 128, 1024
_TICK_S = 0.04
_WEIGHTS_S, _OPTIMIZER_S = 0.4, 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Demo:
    """What to make up. num_traces: of the latest updates."""

    num_updates: int = 30
    num_devices: int = 4
    num_samples: int = 96
    num_traces: int = 6
    seed: int = 0


def write_demo(directory: Path, demo: Demo | None = None) -> None:
    """Write the log and the traces of a run into a directory, as a run would."""
    demo = demo or Demo()
    draw = np.random.default_rng(demo.seed)
    schedule = _schedule(demo.num_devices)
    timing = evaluate(schedule)
    begin_s = 1.0e9
    for update in range(1, demo.num_updates + 1):
        is_traced = update > demo.num_updates - demo.num_traces
        lengths = _lengths(draw, demo.num_samples, update)
        result = _simulated(lengths, demo.num_devices)
        clock = PhaseClock()
        tracks = _tracks(result, lengths, begin_s, steps=is_traced)
        rolled_s = begin_s + result.makespan_s
        slower = float(draw.uniform(1.02, 1.12))
        trained_s = _train(tracks, schedule, timing, rolled_s + 0.2, slower)
        end_s = _send_weights(tracks, trained_s)
        clock.start_s, clock.end_s = begin_s, end_s
        clock.spans = [
            Span("rollout", "phase", begin_s, rolled_s),
            Span("training", "phase", rolled_s, trained_s),
            Span("weights", "phase", trained_s, end_s),
        ]
        clock.seconds = {span.name: span.duration_s for span in clock.spans}
        metrics = _metrics(draw, update, demo.num_updates, lengths, result, tracks, clock)
        metrics |= {"bubble/planned": timing.bubble_ratio, "bubble/executed": 1 - (1 - timing.bubble_ratio) / slower}
        append(directory / NAME, record_of(update, metrics, tracks, clock))
        if is_traced:
            about = {"update": update, "policy": ADAPTIVE, "max_new_tokens": _MOST_TOKENS, "max_batch": 64}
            path = directory / "traces" / f"iteration-{update:05d}.json"
            write_chrome_trace(path, {**tracks, DRIVER: {"phases": clock.spans}}, about)
        begin_s = end_s + 0.05


def _lengths(draw: np.random.Generator, count: int, update: int) -> np.ndarray:
    """Log-normal, longer as the run goes on."""
    drawn = draw.lognormal(math.log(180 + 2 * update), 0.7, count)
    return np.clip(drawn, 4, _MOST_TOKENS).astype(np.int64)


def _simulated(lengths: np.ndarray, num_devices: int) -> SimulationResult:
    rollout = Rollout(
        prompt_tokens=np.full(len(lengths), _PROMPT_TOKENS, dtype=np.int64),
        response_tokens=lengths,
        num_devices=num_devices,
        costs=_COSTS,
        limits=EngineLimits(max_batch=64, kv_capacity_tokens=1 << 20, max_new_tokens=_MOST_TOKENS),
    )
    return simulate(rollout, Threshold(remaining=len(lengths) // 5, num_kept=max(1, num_devices // 4)))


def _schedule(num_devices: int) -> Schedule:
    return greedy(
        actor_and_critic(
            actor_stages=num_devices,
            critic_stages=num_devices,
            actor_microbatches=2 * num_devices,
            critic_microbatches=2 * num_devices,
            actor_forward=2,
            critic_forward=1,
        ).problem
    )


def _tracks(
    result: SimulationResult, lengths: np.ndarray, begin_s: float, *, steps: bool
) -> dict[str, dict[str, list[Span]]]:
    """The rollout as spans. steps: every decode step one of its own, and every sample."""
    tracks: dict[str, dict[str, list[Span]]] = {}
    last = {span.sample: span.end_s for span in result.samples}
    for device, timeline in enumerate(result.timeline):
        own = [span for span in result.samples if span.device == device]
        generation: list[Span] = []
        model: list[Span] = []
        for busy in timeline:
            start_s, end_s = begin_s + busy.start_s, begin_s + busy.end_s
            if busy.kind is SpanKind.INFER:
                tokens = max(1, round((end_s - start_s - _COSTS.inference_s) / _COSTS.inference_token_s))
                sizes = {"call": len(model), "tokens": tokens, "samples": 1, "sample_ids": []}
                model.append(Span("reference", "infer", start_s, end_s, sizes))
            elif steps:
                generation += _decode_steps(own, busy.start_s, busy.end_s, begin_s)
            else:
                generation.append(Span("decode", "generate", start_s, end_s))
        if steps:
            generation += [_stay(span, lengths, last, begin_s) for span in own]
        tracks[f"device{device}"] = {"generation": generation, "model": model}
    return tracks


def _decode_steps(samples: Sequence[SampleSpan], start_s: float, end_s: float, begin_s: float) -> Iterator[Span]:
    now_s = start_s
    while now_s < end_s:
        live = [span for span in samples if span.start_s <= now_s < span.end_s]
        context = sum(_PROMPT_TOKENS + round((now_s - span.start_s) / _COSTS.step_s) for span in live)
        step_s = _COSTS.step_s + _COSTS.sample_s * len(live) + _COSTS.context_s * context
        sizes = {"batch": len(live), "context_tokens": context, "prefill_tokens": 0, "shared_tokens": 0}
        yield Span("decode", "generate", begin_s + now_s, begin_s + min(end_s, now_s + step_s), sizes)
        now_s += step_s


def _stay(span: SampleSpan, lengths: np.ndarray, last: Mapping[int, float], begin_s: float) -> Span:
    tokens = int(lengths[span.sample])
    sizes = {
        "sample": span.sample,
        "prompt_tokens": _PROMPT_TOKENS,
        "first": 0,
        "tokens": tokens,
        "wait_s": 0.0,
        "finished": span.end_s == last[span.sample],
    }
    return Span(f"sample {span.sample}", "sample", begin_s + span.start_s, begin_s + span.end_s, sizes)


def _train(
    tracks: Mapping[str, Mapping[str, list[Span]]], schedule: Schedule, timing: Timing, begin_s: float, slower: float
) -> float:
    """Two optimizer steps that take longer than planned; returns when they end."""
    for _ in range(2):
        for rank, order in enumerate(schedule.ranks):
            model = tracks[f"device{rank}"]["model"]
            for op, start, end in zip(order, timing.start[rank], timing.end[rank], strict=True):
                name = f"{op.kind} {schedule.problem.pipelines[op.pipeline].name}.{op.stage}.{op.micro_batch}"
                planned = {"planned_start_s": start * _TICK_S, "planned_end_s": end * _TICK_S}
                times = begin_s + start * _TICK_S * slower, begin_s + end * _TICK_S * slower
                model.append(Span(name, "train", *times, planned))
        begin_s += timing.makespan * _TICK_S * slower
        for workers in tracks.values():
            workers["model"].append(Span("step", "optimizer", begin_s, begin_s + _OPTIMIZER_S))
        begin_s += _OPTIMIZER_S
    return begin_s


def _send_weights(tracks: Mapping[str, Mapping[str, list[Span]]], begin_s: float) -> float:
    for device, workers in enumerate(tracks.values()):
        sent_s = _WEIGHTS_S * (0.7 + 0.3 * device / len(tracks))
        workers["generation"].append(Span("load weights", "weights", begin_s, begin_s + sent_s))
        told = Span("memory", "usage", begin_s, begin_s, {"bytes": 40_000_000_000 + 1_000_000_000 * device})
        workers["model"].append(told)
    return begin_s + _WEIGHTS_S


def _metrics(
    draw: np.random.Generator,
    update: int,
    num_updates: int,
    lengths: np.ndarray,
    result: SimulationResult,
    tracks: Tracks,
    clock: PhaseClock,
) -> dict[str, float]:
    """What simulation and lengths say; of learning, curves as they often look."""
    done, total_s = update / num_updates, clock.end_s - clock.start_s
    noise = draw.normal(0, 0.02, 8)
    tokens = float(lengths.sum()) + _PROMPT_TOKENS * len(lengths)
    causes = shares(idle_causes(tracks, clock.start_s, clock.end_s, clock.spans), total_s)
    return {
        "objective/scores": 0.9 - 0.7 * math.exp(-3 * done) + noise[0],
        "objective/scores_std": 0.3 - 0.15 * done + 0.3 * noise[1],
        "objective/kl": 8 * done**1.5 + 2 * noise[2],
        **{f"objective/kl_quartile_{q}": 0.01 * done * (1 + 0.1 * q) + 0.02 * abs(noise[2]) for q in range(1, 5)},
        "policy/entropy_avg": 1.2 - 0.5 * done + noise[3],
        "critic/explained_variance": 0.8 - 0.9 * math.exp(-4 * done) + noise[4],
        "grad_norm/actor": 0.8 + 4 * abs(noise[5]),
        "grad_norm/critic": 1.5 - done + 4 * abs(noise[6]),
        "val/sampler_logprob_diff": 2e-4 * (1 + abs(noise[7])),
        "completions/mean_length": float(lengths.mean()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": float((lengths >= _MOST_TOKENS).mean()),
        "tokens_per_s/generation": float(lengths.sum()) / result.generation_s,
        "tokens_per_s/training": 2 * tokens / clock.seconds["training"],
        "tokens_per_s/total": tokens / total_s,
        "migration/samples": float(result.num_migrations),
        "time/total": total_s,
        **{f"time/{name}": seconds for name, seconds in clock.seconds.items()},
        **{f"idle_cause/{cause}": share for cause, share in causes.items()},
    }
