"""`fuse bench speculation --devices N`: whole rollouts, generation and inference, by engines that draft and by others.

For each draft, workers that draft and workers that do not live beside each other and roll out the same samples in turn,
plain decoding first; that they draw the same tokens is checked. A response ends where the model ends it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from fuse.benchmarks.measure import alternate
from fuse.benchmarks.options import Row, tell, telling
from fuse.benchmarks.rollout.fleet import model_fleet
from fuse.driver.early_start import IMPORTED
from fuse.driver.fleet import Fleet
from fuse.engines.engine import SamplingParams
from fuse.sample import Sample, SpecialTokens
from fuse.trainers.update_metrics import decode_steps, drafts
from fuse.workers.ray_session import local_cluster

ROLLOUT_LINE = (
    "{draft}, {batch} samples on {devices} devices: {seconds:.1f} s, plain {plain_seconds:.1f} s: {ratio:.2f} times as "
    "fast, generation {generation_ratio:.2f} times; {tokens_per_step:.2f} tokens a step, {right:.0%} of drafted ones "
    "right, and {drafted_steps:.0%} of steps had any ({by_batch})"
)


@dataclass(frozen=True, slots=True)
class _RolledOut:
    token_ids: tuple[tuple[int, ...], ...]
    seconds: float
    generation_seconds: float
    right: float
    tokens_per_step: float
    steps: Counter[int]
    """Of engines, by the samples that they decoded."""
    drafted_steps: Counter[int]


def rollout_row(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], plain: str, draft: str, arguments: argparse.Namespace
) -> Row:
    """Of all prompts at once. plain: what the draft is compared with.

    Raises: AssertionError where a token differs from plain decoding's.
    """
    stop = model.config.eos_token_id
    stops = () if arguments.model is None or stop is None else (stop,) if isinstance(stop, int) else tuple(stop)
    params = SamplingParams(seed=0, temperature=1.0, max_new_tokens=arguments.new_tokens, stop_token_ids=stops)
    options: dict[str, Any] = {
        "special": SpecialTokens(pad=-1, eos=stops, stop=stops),
        "prompt_tokens": max(map(len, prompts)),
        "engine_batch_size": len(prompts),
        "num_devices": arguments.devices,
        "response_length": arguments.new_tokens,
    }
    kinds = (plain, draft)
    with tempfile.TemporaryDirectory(prefix="fuse-bench-") as directory, ExitStack() as living:
        living.enter_context(local_cluster(arguments.devices * len(kinds), IMPORTED))
        fleets = {
            kind: living.enter_context(
                model_fleet(model, output_dir=str(Path(directory) / kind), speculation=kind, **options)
            )
            for kind in kinds
        }
        sides = {kind: partial(_roll_out, kind, fleet, prompts, params) for kind, fleet in fleets.items()}
        rolled_out = alternate(sides, arguments.repeats, arguments.warmup)
    return _row(draft, rolled_out[draft], rolled_out[plain], arguments.devices)


def _roll_out(kind: str, fleet: Fleet, prompts: Sequence[Sequence[int]], params: SamplingParams) -> _RolledOut:
    samples = [Sample(index, tuple(prompt)) for index, prompt in enumerate(prompts)]
    ended: list[Sample] = []
    with telling(lambda: f"{kind}: {len(ended)} of {len(samples)} samples have ended"):
        report = fleet.roll_out(samples, params, ended.extend)
    tell(f"{kind}: {report.makespan_s:.1f} s")
    tracks = fleet.drain_spans()
    figures = drafts(tracks)
    steps = decode_steps(tracks)
    return _RolledOut(
        token_ids=tuple(tuple(sample.response_ids) for sample in samples),
        seconds=report.makespan_s,
        generation_seconds=report.generation_s,
        right=figures.get("speculation/accepted", 0.0),
        tokens_per_step=figures.get("speculation/tokens_per_step", 1.0),
        steps=Counter(int(str(one["batch"])) for one in steps),
        drafted_steps=Counter(int(str(one["batch"])) for one in steps if one["drafted_tokens"]),
    )


def _row(draft: str, rolled_out: Sequence[_RolledOut], plain: Sequence[_RolledOut], devices: int) -> Row:
    """Medians over rounds; steps are those of all rounds."""
    for one, other in zip(rolled_out, plain, strict=True):
        assert one.token_ids == other.token_ids, f"{draft} on {devices} devices has changed tokens"

    def middle(runs: Sequence[_RolledOut], name: str) -> float:
        return float(statistics.median(getattr(run, name) for run in runs))

    steps, drafted = Counter[int](), Counter[int]()
    for one in rolled_out:
        steps += one.steps
        drafted += one.drafted_steps
    seconds, generation_seconds = (middle(rolled_out, name) for name in ("seconds", "generation_seconds"))
    plain_seconds, plain_generation_seconds = (middle(plain, name) for name in ("seconds", "generation_seconds"))
    return {
        "draft": draft,
        "devices": devices,
        "batch": len(plain[0].token_ids),
        "num_tokens": sum(map(len, plain[0].token_ids)),
        "seconds": seconds,
        "plain_seconds": plain_seconds,
        "ratio": plain_seconds / seconds,
        "generation_seconds": generation_seconds,
        "plain_generation_seconds": plain_generation_seconds,
        "generation_ratio": plain_generation_seconds / generation_seconds,
        "tokens_per_step": middle(rolled_out, "tokens_per_step"),
        "right": middle(rolled_out, "right"),
        "drafted_steps": drafted.total() / steps.total(),
        "steps_by_batch": {str(batch): [steps[batch], drafted[batch]] for batch in sorted(steps)},
        "by_batch": _by_batch(steps, drafted),
    }


def _by_batch(steps: Counter[int], drafted: Counter[int]) -> str:
    """The share of steps that had drafts, for batches up to each power of two."""
    parts = []
    for bits in sorted({(batch - 1).bit_length() for batch in steps}):
        own = [batch for batch in steps if (batch - 1).bit_length() == bits]
        share = sum(drafted[batch] for batch in own) / sum(steps[batch] for batch in own)
        parts.append(f"{share:.0%} of {min(own)}" + (f" to {max(own)}" if len(own) > 1 else ""))
    return ", ".join(parts) + " samples"
