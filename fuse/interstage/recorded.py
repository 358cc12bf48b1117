"""What a run recorded of a rollout: which samples were where and when, and what a simulation of it says.

A trace is Chrome trace-event JSON, a process per device. A sample's stay in an engine is a complete event of category
`sample`, a decode step one of `generate`, scoring by a model one of `infer`; `otherData` tells the policy and limits.
Times are seconds since the trace's first event.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fuse.interstage.adaptive import Adaptive
from fuse.interstage.calibration import Calibration
from fuse.interstage.costs import CostModel
from fuse.interstage.length_trace import LengthTrace
from fuse.interstage.lengths import Observation, learn
from fuse.interstage.migration import EngineLimits, Policy
from fuse.interstage.policies import ADAPTIVE, POLICIES, policy_of
from fuse.interstage.rollout import BusySpan, Rollout, SampleSpan, SimulationResult, SpanKind
from fuse.interstage.simulate import simulate
from fuse.trace import Span
from fuse.trace_file import DRIVER, tracks_of
from schedules.reading import finite_number

_MOST = 1e15
_KINDS = {"generate": SpanKind.GENERATE, "transfer": SpanKind.GENERATE, "infer": SpanKind.INFER}
_JOINED_S = 1e-3
"""Decode steps with less between them are one busy span."""
_INFERENCE_TOKENS = 16384


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """A rollout of a trace.

    result: in the form of simulations. devices: names, as `result` numbers them. start_s: when it began, by the trace's
    clock, which `result` counts from. tokens, prompt_tokens: by sample. spans: by device, as recorded. policy: its
    name. limits: of each engine.
    """

    result: SimulationResult
    devices: tuple[str, ...]
    start_s: float
    tokens: Mapping[int, int]
    prompt_tokens: Mapping[int, int]
    spans: tuple[tuple[Span, ...], ...]
    policy: str
    limits: EngineLimits


def recorded_rollout(trace: Mapping[str, object]) -> Recorded | None:
    """The rollout that a trace holds; None where it has no samples, as traces of earlier versions.

    Raises:
        ValueError: an event is damaged.
    """
    devices = _devices(trace)
    stays = {name: [span for span in spans if span.category == "sample"] for name, spans in devices.items()}
    devices = {
        name: spans for name, spans in devices.items() if stays[name] or any(s.category in _KINDS for s in spans)
    }
    if not any(stays.values()):
        return None
    busy = [[span for span in spans if span.category in _KINDS] for spans in devices.values()]
    start_s = min(span.start_s for name in devices for span in [*stays[name], *devices[name]] if _counts(span))
    samples: list[SampleSpan] = []
    tokens: dict[int, int] = {}
    prompt_tokens: dict[int, int] = {}
    for device, name in enumerate(devices):
        for span in stays[name]:
            sample = _whole(span, "sample")
            samples.append(SampleSpan(sample, device, span.start_s - start_s, span.end_s - start_s))
            tokens[sample] = max(tokens.get(sample, 0), _whole(span, "tokens"))
            prompt_tokens[sample] = _whole(span, "prompt_tokens")
    timeline = tuple(_joined(spans, start_s) for spans in busy)
    ends = [span.end_s for spans in timeline for span in spans] or [0.0]
    makespan_s = max(*ends, *(span.end_s for span in samples), 1e-9)
    decodes = [span.arguments for spans in busy for span in spans if span.category == "generate"]
    evicted = [span.arguments for spans in busy for span in spans if span.name == "evict"]
    result = SimulationResult(
        makespan_s=makespan_s,
        generation_s=max(span.end_s for span in samples),
        idle_share=1 - sum(one.end_s - one.start_s for spans in timeline for one in spans) / makespan_s / len(devices),
        num_migrations=len(samples) - len(tokens),
        moved_bytes=sum(_count(one, "bytes") for one in evicted),
        num_inferences=sum(span.category == "infer" for spans in busy for span in spans),
        prefill_tokens=sum(_count(one, "prefill_tokens") for one in decodes),
        peak_batch=max((_count(one, "batch") for one in decodes), default=0),
        peak_kv_tokens=max((_count(one, "context_tokens") for one in decodes), default=0),
        timeline=timeline,
        samples=tuple(sorted(samples, key=lambda span: span.end_s)),
    )
    policy, limits = _about(trace, tokens, prompt_tokens)
    return Recorded(
        result=result,
        devices=tuple(devices),
        start_s=start_s,
        tokens=tokens,
        prompt_tokens=prompt_tokens,
        spans=tuple(tuple(spans) for spans in devices.values()),
        policy=policy,
        limits=limits,
    )


def measured_costs(recorded: Recorded) -> CostModel | None:
    """The cost model fitted to the rollout's own operations; None where they are too few."""
    roles = {span.name for spans in recorded.spans for span in spans if span.category == "infer"}
    moved = sum(_count(span.arguments, "bytes") for spans in recorded.spans for span in spans if span.name == "evict")
    context = sum(recorded.tokens.values()) + sum(recorded.prompt_tokens.values())
    calibration = Calibration(max(1, moved // max(1, context)), _INFERENCE_TOKENS, max(1, len(roles)))
    for spans in recorded.spans:
        calibration.add(span for span in spans if span.category != "sample")
    return calibration.costs()


def simulated(recorded: Recorded) -> SimulationResult | None:
    """The same samples under the run's policy, as the simulator has it by measured costs; samples keep their numbers.

    The policy learns from these lengths: as if all earlier rollouts had been like this one. None where costs are not
    known.
    """
    costs = measured_costs(recorded)
    if costs is None:
        return None
    samples = sorted(recorded.tokens)
    lengths = LengthTrace(
        prompt_tokens=np.array([recorded.prompt_tokens[sample] for sample in samples], dtype=np.int64),
        response_tokens=np.array([max(1, recorded.tokens[sample]) for sample in samples], dtype=np.int64),
        prompts=(None,) * len(samples),
    )
    rollout = Rollout(
        prompt_tokens=lengths.prompt_tokens,
        response_tokens=lengths.response_tokens,
        num_devices=len(recorded.devices),
        costs=costs,
        limits=recorded.limits,
    )
    result = simulate(rollout, _policy(recorded.policy, rollout, lengths))
    return replace(result, samples=tuple(replace(span, sample=samples[span.sample]) for span in result.samples))


def _policy(name: str, rollout: Rollout, past: LengthTrace) -> Policy:
    """Adaptive whether that pays or not: a run that found that it does not has gone stage by stage."""
    if name != ADAPTIVE:
        return policy_of(name, rollout, past)
    model = learn((Observation(tokens) for tokens in past.response_tokens.tolist()), rollout.limits.max_new_tokens)
    return Adaptive(rollout.costs, model.for_samples())


def _about(
    trace: Mapping[str, object], tokens: Mapping[int, int], prompt_tokens: Mapping[int, int]
) -> tuple[str, EngineLimits]:
    told = trace.get("otherData")
    other: Mapping[str, object] = told if isinstance(told, Mapping) else {}
    policy = other.get("policy")
    longest = max(tokens.values())
    most = max(longest, int(finite_number(other, "max_new_tokens", _MOST) or longest))
    batch = int(finite_number(other, "max_batch", _MOST) or len(tokens))
    enough = (max(prompt_tokens.values()) + most) * max(batch, len(tokens))
    limits = EngineLimits(max_batch=max(1, batch), kv_capacity_tokens=enough, max_new_tokens=most)
    return policy if isinstance(policy, str) and policy in POLICIES else ADAPTIVE, limits


def _devices(trace: Mapping[str, object]) -> dict[str, list[Span]]:
    """Spans by device, those of all its workers."""
    return {
        device: [span for spans in workers.values() for span in spans]
        for device, workers in tracks_of(trace).items()
        if device != DRIVER
    }


def _counts(span: Span) -> bool:
    return span.category == "sample" or span.category in _KINDS


def _joined(spans: Sequence[Span], start_s: float) -> tuple[BusySpan, ...]:
    """What a device did, without gaps too short to see."""
    return tuple(_join(sorted(spans, key=lambda span: span.start_s), start_s))


def _join(spans: Sequence[Span], start_s: float) -> Iterator[BusySpan]:
    current: BusySpan | None = None
    for span in spans:
        kind, begin, end = _KINDS[span.category], span.start_s - start_s, span.end_s - start_s
        if current is not None and kind is current.kind and begin - current.end_s < _JOINED_S:
            current = replace(current, end_s=max(current.end_s, end))
            continue
        if current is not None:
            yield current
            begin = max(begin, current.end_s)
            end = max(end, begin)
        current = BusySpan(kind, begin, end)
    if current is not None:
        yield current


def _whole(span: Span, name: str) -> int:
    value = finite_number(span.arguments, name, _MOST)
    if value is None or value < 0:
        raise ValueError(f"trace: {span.name} has {name}={span.arguments.get(name)!r}, not a number of at least 0")
    return int(value)


def _count(arguments: Mapping[str, object], name: str) -> int:
    return int(finite_number(arguments, name, _MOST) or 0)
