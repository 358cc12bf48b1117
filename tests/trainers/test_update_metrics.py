"""Figures that no loss gives, of samples and spans made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from fuse.sample import Sample
from fuse.trace import PhaseClock, Span
from fuse.trainers.update_metrics import device_bytes, drafts, kl_by_position, migrations, token_rates
from fuse.training.rounds import Round, StepPart


def sample(prompt: int, length: int, ratios: list[float] | None = None) -> Sample:
    made = Sample(0, (1,) * prompt, response_ids=[2] * (length + 1), logprobs=[-1.0] * (length + 1), length=length)
    if ratios is not None:
        made.reference_logprobs = np.array([-1.0 - ratio for ratio in ratios], dtype=np.float32)
    return made


def test_kl_is_told_by_quarters_of_each_response() -> None:
    samples = [sample(1, 8, [1, 1, 2, 2, 3, 3, 4, 4]), sample(1, 2, [5, 7]), sample(1, 0, [])]
    assert kl_by_position(samples) == pytest.approx(
        {
            "objective/kl_quartile_1": (1 + 1 + 5) / 3,
            "objective/kl_quartile_2": 2,
            "objective/kl_quartile_3": (3 + 3 + 7) / 3,
            "objective/kl_quartile_4": 4,
        }
    )
    assert kl_by_position([sample(1, 3)]) == {}, "no reference"


def test_tokens_a_second_are_of_what_was_done_in_that_time() -> None:
    samples = [sample(2, 3), sample(2, 5)]
    clock = PhaseClock()
    clock.start_s, clock.end_s, clock.seconds = 0.0, 12.0, {"training": 3.0}
    decode = [Span("decode", "generate", 0, 2), Span("decode", "generate", 4, 6)]
    tracks = {"device0": {"generation": decode, "model": [Span("actor", "infer", 6, 7)]}}
    epoch = Round({"actor": StepPart(micro_batches=((0, 1),), weights=(1.0,), is_last=True)})
    rates = token_rates(samples, [epoch, epoch], tracks, clock)
    assert rates == {
        "tokens_per_s/generation": (4 + 6) / 4,
        "tokens_per_s/training": 2 * (5 + 7) / 3,
        "tokens_per_s/total": (5 + 7) / 12,
    }
    first = Round({"critic": StepPart(micro_batches=((0,),), weights=(1.0,), is_last=True)})
    assert token_rates(samples, [first, first], tracks, clock)["tokens_per_s/training"] == 2 * 6 / 3, "of the mean"


def test_drafts_are_told_by_what_they_proposed_and_brought() -> None:
    def decode(batch: int, tokens: int, drafted: int) -> Span:
        return Span("decode", "generate", 0, 1, {"batch": batch, "tokens": tokens, "drafted_tokens": drafted})

    tracks = {
        "device0": {"generation": [decode(4, 4, 0), decode(2, 7, 6)]},
        "device1": {"generation": [decode(2, 3, 4)]},
    }
    assert drafts(tracks) == {"speculation/accepted": (5 + 1) / 10, "speculation/tokens_per_step": 14 / 8}
    assert drafts({"device0": {"generation": [decode(4, 4, 0), Span("evict", "transfer", 0, 1)]}}) == {}


def test_moves_and_bytes() -> None:
    def told(num_bytes: int) -> Span:
        return Span("memory", "usage", 0, 0, {"bytes": num_bytes})

    evict = Span("evict", "transfer", 0, 1, {"samples": 2, "bytes": 10})
    admit = Span("admit", "transfer", 0, 1, {"samples": 2, "bytes": 10})
    tracks = {"device0": {"generation": [evict, evict, told(4), told(5)], "model": [told(2)]}}
    tracks["device1"] = {"generation": [admit], "model": []}
    assert migrations(tracks) == {"migration/samples": 4, "migration/bytes": 20}
    assert device_bytes(tracks) == {"memory/device0": 7}
    many = {f"device{index}": {"model": [told(index + 1)]} for index in range(9)}
    assert device_bytes(many) == {"memory/min": 1, "memory/mean": 5, "memory/max": 9}
