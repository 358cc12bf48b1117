"""A run in words: what is wrong with it, and what its idle time could be spent on."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean, median

from fuse.idle_causes import CAUSES
from fuse.update_log import IDLE_LETTERS, NUM_CELLS, UpdateRecord

LATEST = 50
"""Updates that advice is computed from."""
_WORTH_SAYING = 0.05
"""Of all devices' time."""
_FEW = 5
_REMEDIES: Mapping[str, str] = {
    "start": "some engines begin late; with few samples to each, use fewer devices",
    "host": "the host keeps devices waiting between steps: let each engine decode more at once (engine_batch_size), "
    "or give processes more cores",
    "tail": "the last samples keep the others' devices waiting",
    "scoring": "a few devices score while others wait: more, smaller micro-batches (inference_batch_tokens)",
    "reward": "devices wait for reward functions: make them async, or set reward_workers='process'",
    "warm_up": "pipelines fill and drain: more micro-batches to a step (num_micro_batches), or fewer stages",
    "cool_down": "pipelines fill and drain: more micro-batches to a step (num_micro_batches), or fewer stages",
    "dependency": "the schedule waits for what is not made yet: more micro-batches (num_micro_batches), or a longer "
    "search (schedule_time_limit_s)",
    "drift": "operations take longer than planned: plan again sooner (replan_drift)",
    "message": "messages between stages are slow: fewer stages (actor_stages), or stages of one host",
    "imbalance": "stages have unequal work: balance_stages, or another number of stages",
    "optimizer": "optimizer steps are a large part: fewer, larger ones",
    "weights": "weights take long to reach engines: more samples to an update",
    "driver": "the driver prepares and plans while devices wait",
}
_NAMES = {
    **dict(zip(CAUSES, CAUSES, strict=True)),
    "start": "a late start",
    "host": "the host",
    "tail": "the tail of generation",
    "reward": "rewards",
    "warm_up": "warm-up of pipelines",
    "cool_down": "cool-down of pipelines",
    "dependency": "dependencies",
    "message": "messages",
    "optimizer": "the optimizer",
    "driver": "the driver",
}


def idle_shares(records: Sequence[UpdateRecord]) -> dict[str, dict[str, float]]:
    """By cause and device, the part of its time, by strips: their letters have no imbalance."""
    causes = {letter: cause for cause, letter in IDLE_LETTERS.items()}
    total_s = sum(record.end_s - record.start_s for record in records)
    shares: dict[str, dict[str, float]] = {cause: {} for cause in CAUSES}
    for record in records:
        part = (record.end_s - record.start_s) / total_s / NUM_CELLS if total_s else 0.0
        for device, cells in record.strips.items():
            for letter, count in Counter(cells).items():
                if letter in causes:
                    of_cause = shares[causes[letter]]
                    of_cause[device] = of_cause.get(device, 0.0) + count * part
    return {cause: of_cause for cause, of_cause in shares.items() if of_cause}


def advice(records: Sequence[UpdateRecord]) -> list[str]:
    """Sentences on the latest updates, what costs most first; not on the first, in which models start."""
    latest = records[-LATEST:] if len(records) == 1 else records[1:][-LATEST:]
    if not latest:
        return []
    logged = {cause: fmean(record.metrics.get(f"idle_cause/{cause}", 0.0) for record in latest) for cause in CAUSES}
    by_device = idle_shares(latest)
    said: set[str] = set()
    lines = []
    for cause, share in sorted(logged.items(), key=lambda item: -item[1]):
        if share < _WORTH_SAYING or _REMEDIES[cause] in said:
            continue
        said.add(_REMEDIES[cause])
        most = max(by_device.get(cause, {"": 0.0}).items(), key=lambda item: item[1])
        where = f" ({most[1]:.0%} of {most[0]})" if most[0] and most[1] > 1.2 * share else ""
        lines.append(f"{share:.0%} of all devices' time{where} is idle for {_NAMES[cause]}: {_remedy(cause, latest)}.")
    lines += _of_plans(latest)
    if not lines:
        idle = fmean(
            sum(value for name, value in one.metrics.items() if name.startswith("idle_cause/")) for one in latest
        )
        lines.append(f"Devices are idle {idle:.0%} of the time, and no single cause takes {_WORTH_SAYING:.0%}.")
    return lines


def _remedy(cause: str, records: Sequence[UpdateRecord]) -> str:
    if cause != "tail":
        return _REMEDIES[cause]
    if not any(record.metrics.get("migration/samples") for record in records):
        return (
            f"{_REMEDIES[cause]}, and none of them moves: inter_stage_fusion with migration_policy='adaptive' moves "
            "them together where that pays, and scores meanwhile"
        )
    longest = fmean(record.metrics.get("completions/max_length", 0.0) for record in records)
    mean = fmean(record.metrics.get("completions/mean_length", 0.0) for record in records)
    return f"{_REMEDIES[cause]} though samples move: the longest has {longest:.0f} tokens, on average {mean:.0f}"


def _of_plans(records: Sequence[UpdateRecord]) -> Iterator[str]:
    planned = [one for one in records if {"bubble/planned", "bubble/executed"} <= one.metrics.keys()]
    if not planned:
        return
    before, after = (fmean(one.metrics[f"bubble/{name}"] for one in planned) for name in ("planned", "executed"))
    if after - before > 2 * _WORTH_SAYING:
        yield (
            f"Training idles {after:.0%} where {before:.0%} was planned: stages take other times than measured; on "
            "CPUs, processes that share cores do that."
        )


def alarms(records: Sequence[UpdateRecord]) -> list[str]:
    """What is to be looked at before anything is tuned, of the latest update."""
    if not records:
        return []
    *_, last = records
    return [f"Update {last.update}: {text}." for text in (*_broken(last.metrics), *_out_of_line(records))]


def _broken(metrics: Mapping[str, float]) -> Iterator[str]:
    for name, value in metrics.items():
        if not math.isfinite(value):
            yield f"{name} is {value}, not a number"
    if (difference := metrics.get("val/sampler_logprob_diff", 0.0)) > 1e-2:
        yield (
            f"the sampler's log-probabilities are {difference:.2g} from the trainer's: other weights, or another "
            "computation"
        )
    if (share := metrics.get("completions/clipped_ratio", 0.0)) > 0.5:
        yield f"{share:.0%} of the responses are cut off: raise their greatest length, or penalise what has no end"
    for name in ("objective/scores_std", "reward_std"):
        if metrics.get(name) == 0.0:
            yield "all responses score the same, so nothing is learnt"
    if (share := metrics.get("frac_reward_zero_std", 0.0)) > 0.9:
        yield f"in {share:.0%} of the groups all rewards are equal, so these teach nothing"
    if errors := metrics.get("rewards/errors", 0.0):
        yield f"{errors:.0f} samples have the score of errors of a reward function"
    for name in ("policy/clipfrac_avg", "clip_ratio/region_mean"):
        if (share := metrics.get(name, 0.0)) > 0.5:
            yield f"{share:.0%} of the ratios are clipped: lower the learning rate, or take fewer steps of a rollout"


def _out_of_line(records: Sequence[UpdateRecord]) -> Iterator[str]:
    """The latest update against those before it."""
    *before, last = records
    if len(before) < _FEW:
        return
    for name in ("grad_norm", "grad_norm/actor", "grad_norm/critic", "time/total"):
        known = [one.metrics[name] for one in before[-LATEST:] if name in one.metrics]
        if len(known) >= _FEW and last.metrics.get(name, 0.0) > 10 * (usual := median(known)) > 0:
            yield f"{name} is {last.metrics[name]:.3g}, where {usual:.3g} was usual"
    variance = [
        one.metrics["critic/explained_variance"] for one in records if "critic/explained_variance" in one.metrics
    ]
    if len(variance) > _FEW and max(variance[-_FEW:]) < 0:
        yield f"the critic is worse than a constant (explained variance {variance[-1]:.2g}) for {_FEW} updates"
    for name in ("policy/entropy_avg", "entropy"):
        if name in last.metrics and last.metrics[name] < 0.05 * before[0].metrics.get(name, 0.0):
            first = before[0].metrics[name]
            yield f"entropy fell from {first:.3g} to {last.metrics[name]:.3g}: the policy has collapsed"
