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
    # One row of all tokens, but where all of them are as long.
    packed = [Shape(1, 11), Shape(1, 9), Shape(1, 14), Shape(2, 6)]
    assert [load.shape(samples) for samples in load.tasks[3].micro_batches] == packed
    assert {load.shape(samples) for samples in load.buckets()} == {Shape(2, 8), *packed[1:]}
    assert load.experience.lengths[8:] == (6, 1, 2, 3, 9, 1, 4, 4)

    dealt = replace(load, regroups=True)
    assert dealt.micro_batches(dealt.tasks[3]) == ((15, 10, 13), (12,), (8, 9), (14, 11))
    assert {load.shape(samples) for samples in dealt.buckets()} >= {Shape(1, 13), Shape(1, 11), Shape(2, 8)}
    assert dealt.padding(dealt.tasks[3]) == load.padding(load.tasks[3]) == 1


def test_padding_is_counted_where_it_is_computed() -> None:
    """Micro-batches that are nearly full are not packed."""
    load = workload({"mixed": [97, 98, 99, 100]}, [2], num_sequences=2, prompt_tokens=1, vocab_size=8, regroups=False)
    assert load.padding(load.tasks[0]) == pytest.approx((2 * 99 + 2 * 101) / (98 + 99 + 100 + 101))
