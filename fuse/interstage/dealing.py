"""Which engine each sample starts on: siblings side by side, for an engine computes a prompt once, or apart.

Engines get even numbers of samples. Side by side, whole groups go to one engine each; what does not come out even is
split, unless computing the prompt once more costs more than the samples that one engine then has too many. Apart,
samples go round all engines: siblings tend to be alike in length, so that side by side some engines have more to do;
a policy that moves samples evens most of that out.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fuse.interstage.costs import CostModel
from fuse.sample import Sample

Ints = NDArray[np.int64]

_SPREAD = 0.6
"""Standard deviation of lengths, as a part of their mean, that is assumed."""
_CORRELATION = 0.4
"""Of siblings' lengths, that is assumed."""
_LEFT = 0.1
"""Part of what some engines have to do beyond others that moving samples leaves: by simulations of `adaptive`."""


def deal(
    prompts: Sequence[Hashable],
    prompt_tokens: Sequence[int] | Ints,
    num_engines: int,
    *,
    costs: CostModel | None = None,
    response_tokens: float = 1.0,
    is_evened_out: bool = False,
) -> Ints:
    """The engine of each sample, [samples]; samples without siblings go round the engines.

    prompts: of each sample, equal for siblings. response_tokens: that a response is expected to have.
    costs: None where they are not known yet; then siblings are side by side.
    is_evened_out: samples will be moved from engines that have much to do.
    """
    groups: dict[Hashable, list[int]] = {}
    for sample, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(sample)
    apart: Ints = np.arange(len(prompts), dtype=np.int64) % num_engines
    if len(groups) == len(prompts):
        return apart
    siblings = list(groups.values())
    if costs is not None:  # as of batches of the mean size, to which prompts and half of the responses are context
        context_tokens = float(np.sum(prompt_tokens)) + len(prompts) * response_tokens / 2
        costs = costs.at(len(prompts) / num_engines, context_tokens / num_engines)
    together = _together(siblings, prompt_tokens, num_engines, costs, response_tokens)
    if costs is None:
        return together
    spread = _SPREAD * (_LEFT if is_evened_out else 1.0)
    together_s, apart_s = (
        _expected_end_s(dealt, siblings, prompt_tokens, num_engines, costs, response_tokens, spread)
        for dealt in (together, apart)
    )
    return together if together_s <= apart_s else apart


def prompt_numbers(prompts: Sequence[Hashable]) -> Ints:
    """A number for each sample's prompt, equal for equal ones, [samples]; None is like no other."""
    known: dict[Hashable, int] = {}
    keys = (("unknown", index) if prompt is None else prompt for index, prompt in enumerate(prompts))
    return np.array([known.setdefault(key, len(known)) for key in keys], dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Dealing:
    """What samples are dealt by: costs, None where they are not known yet, and how many tokens responses have."""

    costs: CostModel | None = None
    response_tokens: float = 1.0

    def shares(self, samples: Sequence[Sample], num_engines: int, *, is_evened_out: bool = False) -> list[list[Sample]]:
        """What each engine starts with; see `deal`."""
        prompts = [sample.prompt_ids for sample in samples]
        lengths = [len(prompt) for prompt in prompts]
        dealt = deal(
            prompts,
            lengths,
            num_engines,
            costs=self.costs,
            response_tokens=self.response_tokens,
            is_evened_out=is_evened_out,
        )
        shares: list[list[Sample]] = [[] for _ in range(num_engines)]
        for sample, engine in zip(samples, dealt.tolist(), strict=True):
            shares[engine].append(sample)
        return shares


def _together(
    groups: Sequence[Sequence[int]],
    prompt_tokens: Sequence[int] | Ints,
    num_engines: int,
    costs: CostModel | None,
    response_tokens: float,
) -> Ints:
    num_samples = sum(map(len, groups))
    engines = np.zeros(num_samples, dtype=np.int64)
    counts = [0] * num_engines
    room = [(num_samples + num_engines - 1 - engine) // num_engines for engine in range(num_engines)]

    def give(engine: int, samples: Sequence[int]) -> None:
        engines[list(samples)] = engine
        counts[engine] += len(samples)
        room[engine] -= len(samples)

    uneven = []
    for group in sorted(groups, key=lambda one: -len(one)):
        fitting = [engine for engine in range(num_engines) if room[engine] >= len(group)]
        if fitting:
            give(min(fitting, key=lambda engine: counts[engine]), group)
        else:
            uneven.append(group)
    for group in uneven:
        widest = max(range(num_engines), key=lambda engine: room[engine])
        tokens = int(prompt_tokens[group[0]])
        over_s = (len(group) - room[widest]) * _decode_s(costs, tokens, response_tokens)
        if costs is not None and over_s <= costs.prefill(tokens):
            give(widest, group)
            continue
        rest = list(group)
        while rest:
            engine = max(range(num_engines), key=lambda engine: room[engine])
            most = max(1, room[engine])
            give(engine, rest[:most])
            rest = rest[most:]
    return engines


def _decode_s(costs: CostModel | None, prompt_tokens: float, response_tokens: float) -> float:
    """What a sample adds to the steps that it shares with others."""
    if costs is None:
        return math.inf
    return response_tokens * (costs.sample_s + costs.context_s * (prompt_tokens + response_tokens / 2))


def _expected_end_s(
    dealt: Ints,
    groups: Sequence[Sequence[int]],
    prompt_tokens: Sequence[int] | Ints,
    num_engines: int,
    costs: CostModel,
    response_tokens: float,
    spread: float,
) -> float:
    """Seconds of the engine that ends last, but for what all engines have alike. spread: of lengths, as _SPREAD."""
    mean_s, variance = np.zeros(num_engines), np.zeros(num_engines)
    for group in groups:
        tokens = int(prompt_tokens[group[0]])
        siblings = np.bincount(dealt[list(group)], minlength=num_engines)
        each_s = _decode_s(costs, tokens, response_tokens)
        mean_s += (siblings > 0) * costs.prefill_token_s * tokens + siblings * each_s
        variance += (each_s * spread) ** 2 * siblings * (1 + (siblings - 1) * _CORRELATION)
    # The mean of the largest of n alike is about so many deviations above their mean.
    return float((mean_s + np.sqrt(2 * math.log(num_engines) * variance)).max())
