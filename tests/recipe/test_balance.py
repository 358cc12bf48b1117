"""Pairs balanced by length."""

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fuse.recipe.balance import balanced_by_length, length_buckets

differences_of = st.lists(st.integers(-50, 50), max_size=80)


@given(differences_of, st.integers(1, 8), st.integers(0, 3))
def test_in_every_bucket_as_many_longer_ones_win_as_shorter_ones(differences, num_buckets, seed):
    kept = balanced_by_length(differences, num_buckets, seed)
    assert kept == sorted(set(kept)) == balanced_by_length(differences, num_buckets, seed)
    buckets = length_buckets(differences, num_buckets)
    count = Counter((buckets[index], np.sign(differences[index])) for index in range(len(differences)))
    count_kept = Counter((buckets[index], np.sign(differences[index])) for index in kept)
    for bucket in set(buckets):
        assert count_kept[bucket, 0] == count[bucket, 0]
        assert count_kept[bucket, 1] == count_kept[bucket, -1] == min(count[bucket, 1], count[bucket, -1])


@given(differences_of, st.integers(1, 8))
def test_buckets_are_ranges_of_differences(differences, num_buckets):
    buckets = length_buckets(differences, num_buckets)
    assert len(set(buckets)) <= num_buckets
    ordered = sorted(zip(map(abs, differences), buckets, strict=True))
    assert [bucket for _, bucket in ordered] == sorted(buckets)
    assert len(set(ordered)) == len({size for size, _ in ordered})


def test_which_pairs_stay_is_drawn_from_the_seed():
    differences = [5] * 20 + [-5] * 5
    kept = {tuple(balanced_by_length(differences, 1, seed)) for seed in range(5)}
    assert len(kept) > 1
    assert all(len(indices) == 10 for indices in kept)
