"""How the optimizer's state is dealt to replicas."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from fuse.intrastage.optimizer_shards import largest_share, shares_of


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=30), st.integers(1, 8))
def test_shares_are_about_equal_and_the_same_everywhere(sizes: list[int], num_shares: int) -> None:
    named = {f"p{index}": size for index, size in enumerate(sizes)}
    dealt = shares_of(named, num_shares)
    assert dealt.keys() == named.keys()
    assert dealt == shares_of(dict(reversed(named.items())), num_shares), "ranks name parameters in different orders"
    totals: Counter[int] = Counter()
    for name, share in dealt.items():
        totals[share] += named[name]
    assert set(dealt.values()) <= set(range(num_shares))
    assert max(totals.values()) == largest_share(tuple(sizes), num_shares)
    assert max(totals.values()) <= sum(sizes) / num_shares + max(sizes)
