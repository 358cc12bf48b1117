"""Figures of an update that no loss gives: KL by position, tokens a second, drafts, samples that moved, memory."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from fuse.idle_causes import Tracks
from fuse.memory_use import USAGE
from fuse.roles import GENERATING
from fuse.sample import Sample
from fuse.trace import PhaseClock, Span, busy_s
from fuse.training.rounds import Round

_QUARTERS = 4
MOST_DEVICES = 8
"""Of more, only what is true of all is told."""


def kl_by_position(samples: Sequence[Sample]) -> dict[str, float]:
    """`objective/kl_quartile_1` to 4: the mean log-ratio of policy and reference in each quarter of the responses.

    Nats per token. Token t of n counts to quarter 4 t / n, rounded down. Nothing without a reference; a quarter in
    which no response has a token is left out.
    """
    known = [sample for sample in samples if sample.reference_logprobs is not None and sample.length]
    if not known:
        return {}
    ratios = np.concatenate([one.old_logprobs - np.asarray(one.reference_logprobs)[: one.length] for one in known])
    quarters = np.concatenate([np.arange(one.length) * _QUARTERS // one.length for one in known])
    return {
        f"objective/kl_quartile_{quarter + 1}": float(ratios[quarters == quarter].mean())
        for quarter in range(_QUARTERS)
        if (quarters == quarter).any()
    }


def token_rates(
    samples: Sequence[Sample], rounds: Sequence[Round], tracks: Tracks, clock: PhaseClock
) -> dict[str, float]:
    """Tokens a second of all devices together: `tokens_per_s/generation`, `/training` and `/total`.

    Generation: tokens of responses, by the time in which some engine decoded. Training: tokens of prompts, responses
    and text that pass through the policy's stages, or those of the one model that trains, by the time of that phase.
    Total: tokens of prompts and responses, once, by the whole update's time. Padding never counts.
    """
    sizes = [len(sample.prompt_ids) + sample.length for sample in samples]
    total_s = clock.end_s - clock.start_s
    decoding = [span for workers in tracks.values() for spans in workers.values() for span in spans]
    decoding = [span for span in decoding if span.category == "generate"]
    counts = {
        "generation": (sum(len(one.response_ids) for one in samples), busy_s(decoding, clock.start_s, clock.end_s)),
        "training": (_trained_tokens(sizes, rounds), clock.seconds.get("training", 0.0)),
        "total": (sum(sizes), total_s),
    }
    return {f"tokens_per_s/{name}": tokens / seconds for name, (tokens, seconds) in counts.items() if seconds > 0}


def _trained_tokens(sizes: Sequence[int], rounds: Sequence[Round]) -> int:
    """Samples by their numbers in the update; where an algorithm trains on pairs of them, all count as the mean."""
    roles = {role for one in rounds for role in one.parts}
    role = GENERATING if GENERATING in roles else next(iter(roles), "")
    parts = [one.parts[role] for one in rounds if role in one.parts]
    places = [sample for part in parts for micro_batch in part.micro_batches for sample in micro_batch]
    texts = sum(text.num_tokens for part in parts for text in part.auxiliary)
    if len({*places}) != len(sizes):
        return texts + (round(len(places) * statistics.fmean(sizes)) if sizes else 0)
    return texts + sum(sizes[place] for place in places)


def migrations(tracks: Tracks) -> dict[str, float]:
    """`migration/samples` that left an engine for another, and `migration/bytes` of KV that they took along."""
    transfers = [
        span.arguments
        for workers in tracks.values()
        for span in workers.get("generation", ())
        if span.category == "transfer" and span.name == "evict"
    ]
    return {
        f"migration/{name}": float(sum(int(str(one.get(name, 0))) for one in transfers))
        for name in ("samples", "bytes")
    }


def drafts(tracks: Tracks) -> dict[str, float]:
    """`speculation/accepted`, of the tokens that drafts proposed, and `speculation/tokens_per_step`, of a sample.

    Steps without drafts count in the second. Nothing where nothing was drafted.
    """
    steps = decode_steps(tracks)
    batch, tokens, drafted = (
        sum(int(str(one[name])) for one in steps) for name in ("batch", "tokens", "drafted_tokens")
    )
    if not drafted:
        return {}
    return {"speculation/accepted": (tokens - batch) / drafted, "speculation/tokens_per_step": tokens / batch}


def decode_steps(tracks: Tracks) -> list[Mapping[str, object]]:
    """What spans tell of engines' steps, of those that tell of drafts."""
    return [
        span.arguments
        for workers in tracks.values()
        for span in workers.get("generation", ())
        if span.name == "decode" and "drafted_tokens" in span.arguments
    ]


def device_bytes(tracks: Tracks) -> dict[str, float]:
    """`memory/{device}`: bytes that its workers hold; of more than 8 devices `memory/min`, `/mean` and `/max`."""
    held = {device: _held(workers) for device, workers in tracks.items()}
    known = {device: num_bytes for device, num_bytes in held.items() if num_bytes}
    if len(known) > MOST_DEVICES:
        sizes = list(known.values())
        known = {"min": min(sizes), "mean": statistics.fmean(sizes), "max": max(sizes)}
    return {f"memory/{name}": num_bytes for name, num_bytes in known.items()}


def _held(workers: Mapping[str, Sequence[Span]]) -> float:
    """What the workers told last, together."""
    last = [[span.arguments["bytes"] for span in spans if span.category == USAGE][-1:] for spans in workers.values()]
    return float(sum(int(str(num_bytes)) for of_one in last for num_bytes in of_one))
