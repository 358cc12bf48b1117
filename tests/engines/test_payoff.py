"""Whether drafts pay, on machines whose steps take what is written here: little is lost by finding out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fuse.engines.draft_lengths import PayingLengths
from fuse.engines.engine import GeneratedToken

PROMPT = 100


@dataclass(frozen=True)
class Machine:
    """Seconds of steps, for tokens that pass at once and the keys that they read; acceptance: of a draft's tokens.

    wide_s: what more than sixteen tokens take beside. noise: of a step's time, as the deviation of its logarithm; one
    in held_up steps takes half a minute more.
    """

    fixed_s: float = 0.04
    token_s: float = 0.003
    key_s: float = 6e-6
    wide_s: float = 0.0
    draft_share: float = 0.4
    acceptance: float = 0.95
    prepare_s: float = 0.35
    noise: float = 0.0
    held_up: int = 0

    def target_s(self, tokens: int, keys: float) -> float:
        return self.fixed_s + self.token_s * tokens + self.wide_s * (tokens > 16) + self.key_s * keys

    def draft_s(self, rows: int, keys: float) -> float:
        return self.draft_share * (self.fixed_s + self.token_s * rows) + self.key_s * keys

    def plain_token_s(self, batch: int, context: float) -> float:
        return self.target_s(batch, batch * context) / batch

    def best_token_s(self, batch: int, context: float) -> float:
        """Seconds of a token with as many drafts for all as are best in expectation, or with none."""
        found = []
        for count in range(9):
            tokens = sum(self.acceptance**place for place in range(count + 1))
            drafting_s = count * self.draft_s(batch, batch * context)
            found.append((drafting_s + self.target_s(batch * (1 + count), batch * context)) / (batch * tokens))
        return min(found)


@dataclass
class Decoded:
    """Seconds that were taken, that plain decoding takes for these tokens, and that the best number of drafts does."""

    seconds: float = 0.0
    plain_s: float = 0.0
    best_s: float = 0.0
    tokens: int = 0
    drafted_for: int = 0  # tokens


def decode(
    lengths: PayingLengths, machine: Machine, batch: int, num_tokens: int, context: float = PROMPT, seed: int = 0
) -> Decoded:
    """So many tokens of each sample, by the lengths that were chosen; new weights have come before."""
    random = np.random.default_rng(seed)
    decoded, is_prepared = Decoded(), False
    rows: Any = [SimpleNamespace(request=SimpleNamespace(sample_id=id), num_left=num_tokens) for id in range(batch)]
    while decoded.tokens < batch * num_tokens:
        counts = lengths.choose(rows)
        right = [int(np.cumprod(random.random(count) < machine.acceptance).sum()) for count in counts]
        noise = float(np.exp(machine.noise * random.standard_normal()))
        if machine.held_up and random.integers(machine.held_up) == 0:
            noise += 30.0
        keys = batch * context
        prepare_s = machine.prepare_s if any(counts) and not is_prepared else 0.0
        draft_s = noise * sum(machine.draft_s(sum(n > level for n in counts), keys) for level in range(max(counts)))
        target_s = noise * machine.target_s(batch + sum(counts), keys)
        is_prepared |= any(counts)
        generated = [
            GeneratedToken(id, 0, -1.0, False, drafted_tokens=counts[id] if place == 0 else 0)
            for id in range(batch)
            for place in range(1 + right[id])
        ]
        lengths.learn(generated, [[0] * count for count in counts], prepare_s, draft_s, target_s)
        tokens = len(generated)
        decoded.seconds += prepare_s + (draft_s + target_s) / noise
        decoded.plain_s += tokens * machine.plain_token_s(batch, context)
        decoded.best_s += tokens * machine.best_token_s(batch, context)
        decoded.tokens += tokens
        decoded.drafted_for += tokens * any(counts)
        context += tokens / batch
    return decoded


STEADY, NOISY = (0.0, 0), (0.15, 100)
CHEAP = Machine()
COSTLY = Machine(token_s=0.006, draft_share=0.6, wide_s=0.1)
"""For a batch: few samples gain a little."""


def on(machine: Machine, noise: tuple[float, int]) -> Machine:
    return replace(machine, noise=noise[0], held_up=noise[1])


@pytest.mark.parametrize("noise", [STEADY, NOISY])
@pytest.mark.parametrize(
    ("machine", "batch", "context"),
    [(COSTLY, 8, PROMPT), (COSTLY, 8, 3000), (COSTLY, 16, PROMPT), (replace(CHEAP, acceptance=0.0), 1, PROMPT)],
)
def test_next_to_nothing_is_lost_where_drafts_do_not_pay(
    machine: Machine, batch: int, context: float, noise: tuple[float, int]
) -> None:
    """What it takes to quantize new weights included."""
    lengths = PayingLengths(draft_share=0.3)
    for seed in range(2):
        decoded = decode(lengths, on(machine, noise), batch, 1200, context, seed)
        assert decoded.plain_s > 0.98 * decoded.seconds


@pytest.mark.parametrize(("noise", "had"), [(STEADY, 0.94), (NOISY, 0.9)])
@pytest.mark.parametrize(("batch", "machine"), [(1, CHEAP), (1, COSTLY), (8, replace(CHEAP, key_s=0.0))])
def test_what_drafts_gain_is_had(batch: int, machine: Machine, noise: tuple[float, int], had: float) -> None:
    lengths = PayingLengths(draft_share=0.3)
    first, later = (decode(lengths, on(machine, noise), batch, 1000, seed=seed) for seed in range(2))
    assert later.best_s > had * later.seconds
    assert first.plain_s > 1.02 * first.seconds


@pytest.mark.parametrize("noise", [STEADY, NOISY])
def test_batches_for_which_drafts_pay_or_do_not_in_turn(noise: tuple[float, int]) -> None:
    lengths, machine = PayingLengths(draft_share=0.3), on(COSTLY, noise)
    turns = [[decode(lengths, machine, batch, 500, seed=seed) for batch in (8, 1)] for seed in range(4)]
    many, few = ([turn[place] for turn in turns] for place in (0, 1))
    assert sum(one.plain_s for one in many) > 0.98 * sum(one.seconds for one in many)
    assert sum(one.plain_s for one in few) > 1.06 * sum(one.seconds for one in few)


def test_the_way_follows_the_context() -> None:
    """Of drafts that read all keys, which pay while these are few."""
    lengths, machine = PayingLengths(draft_share=0.3), replace(CHEAP, key_s=3e-5, prepare_s=0.0)
    short, _, long = (decode(lengths, machine, 2, 1000, context) for context in (100, 2000, 6000))
    assert short.plain_s > 1.1 * short.seconds
    assert long.plain_s > 0.985 * long.seconds
    assert short.drafted_for > 0.8 * short.tokens
    assert long.drafted_for < 0.2 * long.tokens
