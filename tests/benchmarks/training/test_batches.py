"""What the training benchmark trains on: lengths, micro-batches, and those of each shape to measure on."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fuse.benchmarks.training.batches import scaled_in_groups, workload
from fuse.intrastage.cost_profile import Shape


def test_mixed_lengths_are_scaled_by_the_longest_of_each_micro_batch() -> None:
    assert scaled_in_groups([10, 2, 4, 8, 1, 6], 2, 4) == [5, 1, 2, 4, 1, 3]


def test_tasks_share_samples_and_buckets_cover_each_mix() -> None:
    mixes = {"uniform": [6] * 8, "mixed": [6, 1, 2, 3, 9, 1, 4, 4]}
    load = workload(mixes, [2, 4], num_sequences=2, prompt_tokens=2, vocab_size=8, regroups=False)
    assert [(task.lengths, len(task.micro_batches)) for task in load.tasks] == [
        ("uniform", 2),
        ("uniform", 4),
        ("mixed", 2),
        ("mixed", 4),
    ]
    assert load.tasks[3].micro_batches == ((8, 9), (10, 11), (12, 13), (14, 15))
    assert [load.shape(samples).num_tokens for samples in load.tasks[3].micro_batches] == [8, 5, 11, 6]
    assert {load.shape(samples) for samples in load.buckets()} == {Shape(2, tokens) for tokens in (5, 8, 11)}
    assert load.experience.lengths[8:] == (6, 1, 2, 3, 9, 1, 4, 4)

    dealt = replace(load, regroups=True)
    assert dealt.micro_batches(dealt.tasks[3]) == ((9, 13, 10), (11, 14), (15, 8), (12,))
    assert {load.shape(samples) for samples in dealt.buckets()} >= {Shape(3, 4), Shape(2, 8)}
    real = sum(dealt.experience.lengths[8:]) + 8 * 2
    assert dealt.padding(dealt.tasks[3]) == pytest.approx((12 + 12 + 16 + 11) / real)
    assert load.padding(load.tasks[3]) == pytest.approx((16 + 10 + 22 + 12) / real)
