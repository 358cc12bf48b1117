"""The fluid model: makespans worked out by hand, and against the simulator where both are exact."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations_with_replacement

import numpy as np
import pytest
from numpy.typing import NDArray

from fuse.interstage.costs import CostModel
from fuse.interstage.fluid import Outlook, best_num_engines, best_plans, makespans
from fuse.interstage.speculation import Speculation

COSTS = CostModel(
    step_s=1.0, sample_s=1.0, context_s=0.0, prefill_s=0.0, prefill_token_s=0.0, inference_s=0.0,
    inference_token_s=1e-3, kv_bytes_per_token=1, transfer_s=0.0, transfer_byte_s=0.0,
)  # fmt: skip
# Four samples, one on each engine, with five tokens left each.
OUTLOOK = Outlook(
    costs=COSTS,
    remaining=np.full((1, 4), 5.0),
    live=np.ones(4, dtype=np.int64),
    context_tokens=np.zeros(4, dtype=np.int64),
    widest=(0, 0),
    backlog_tokens=60_000,
    num_devices=4,
    max_batch=8,
    can_transfer=True,
)


def fixed(outlook: Outlook, *engines: int) -> NDArray[np.float64]:
    """Makespans of plans with so many engines to the end."""
    num_points = best_plans(outlook, most=1).shape[1]
    return makespans(outlook, np.tile(np.array(engines)[:, None], num_points))


def test_makespans_by_hand() -> None:
    now = fixed(OUTLOOK, 1, 2, 4)[:, 0]
    # On m engines decoding takes 5 * (1 + 4 / m) s; 60 s of scoring fill what is left of 4 devices, and 0.02 s come in.
    assert now == pytest.approx([25 + 0.005, (60.02 + 2 * 15) / 4, (60.02 + 4 * 10) / 4])
    assert best_num_engines(OUTLOOK, most=4) == 2


def test_nothing_is_given_up_without_work_for_it() -> None:
    assert best_num_engines(replace(OUTLOOK, backlog_tokens=0), most=4) == 4


def test_free_devices_decode_when_engines_are_crowded() -> None:
    crowded = replace(
        OUTLOOK, live=np.array([4]), context_tokens=np.zeros(1, dtype=np.int64), backlog_tokens=0, num_devices=8
    )
    assert best_num_engines(crowded, most=4) == 4


def test_a_change_waits_for_the_time_when_it_is_worth_most() -> None:
    """Nine samples end soon, and one late: engines are worth more then than they are now."""
    outlook = replace(
        OUTLOOK,
        costs=replace(COSTS, sample_s=0.1),
        remaining=np.array([[*[100.0] * 12, 400.0, 410.0, 420.0, 430.0]]),
        live=np.full(4, 4),
        backlog_tokens=0,
    )
    seconds = fixed(outlook, 1, 2, 3, 4)
    assert seconds[:3, 1:].min() < seconds[:3, 0].min()
    assert best_num_engines(outlook, most=4) == 4


def test_moves_cost_what_is_computed_again() -> None:
    costly = replace(OUTLOOK, costs=replace(COSTS, prefill_s=100.0), can_transfer=False)
    assert best_num_engines(costly, most=4) == 4


def test_a_small_batch_that_decodes_fast_is_worth_more() -> None:
    """Two engines with two samples each: two more spare each token 0.05 s, and with drafts, of which each is computed,
    1.5 / 3.3616 - 1.25 / 3.3616 = 0.074 s: of 100 tokens that is less and more than the 6 s that moving takes.
    """
    plain = replace(
        OUTLOOK,
        costs=replace(COSTS, sample_s=0.05, prefill_s=6.0),
        remaining=np.full((1, 4), 100.0),
        live=np.full(2, 2),
        context_tokens=np.zeros(2, dtype=np.int64),
        backlog_tokens=0,
        can_transfer=False,
    )
    draft = Speculation(acceptance=0.8, draft_share=0.0, reads_context=False, max_drafts=4)
    drafting = replace(plain, costs=replace(plain.costs, speculation=draft))
    assert fixed(plain, 2, 4)[:, 0] == pytest.approx([110 + 0.1, 105 + 6 + 0.1])
    assert fixed(drafting, 2, 4)[:, 0] == pytest.approx([150 / 3.3616 + 0.1, 125 / 3.3616 + 6 + 0.1])
    assert (best_num_engines(plain, most=4), best_num_engines(drafting, most=4)) == (2, 4)


def test_plans_are_for_the_mean_of_the_draws() -> None:
    """Short responses leave time for two engines to score, long ones do not: whichever loses more decides."""

    def drawn(*tokens: float) -> Outlook:
        return replace(OUTLOOK, remaining=np.repeat([tokens], 4, axis=0).T)

    assert [best_num_engines(drawn(tokens), most=4) for tokens in (5.0, 80.0)] == [2, 4]
    assert best_num_engines(drawn(5.0, 80.0), most=4) == 4
    assert best_num_engines(drawn(*[5.0] * 99, 80.0), most=4) < 4
    apart = [fixed(drawn(tokens), 1, 2, 4) for tokens in (5.0, 80.0)]
    assert fixed(drawn(5.0, 80.0), 1, 2, 4) == pytest.approx(np.mean(apart, axis=0))


def test_a_sample_that_takes_long_to_score_must_end_early() -> None:
    """The second sample has two tokens left, and 20 s to be scored: on 4 engines it is done after 2 * 2 + 20.002 s."""
    narrow = replace(OUTLOOK, remaining=np.array([[5.0, 2.0, 5.0, 5.0]]), backlog_tokens=30_000, widest=(1, 0))
    wide = replace(narrow, widest=(1, 20_000))
    assert fixed(wide, 1, 4)[:, 0] == pytest.approx([2 * 5 + 20.002, 2 * 2 + 20.002])
    assert np.all(fixed(narrow, 1, 4)[:, 0] < fixed(wide, 1, 4)[:, 0])


def test_a_price_of_the_devices_time_finds_plans_that_are_near_the_best_of_all() -> None:
    """All that never grow, of up to four engines and six samples; scoring takes none, some or most of the time."""
    random, lost, wide = np.random.default_rng(0), [], 0
    for backlog_tokens in (0, 100_000, 400_000):
        for _ in range(4):
            outlook = replace(
                OUTLOOK,
                costs=replace(COSTS, sample_s=0.2, inference_token_s=1e-3),
                remaining=random.exponential(50, (2, 6)).round() + 1,
                live=np.array([2, 2, 1, 1]),
                backlog_tokens=backlog_tokens,
            )
            found = makespans(outlook, best_plans(outlook, most=4))[:, 0]
            plans = combinations_with_replacement((4, 3, 2, 1), best_plans(outlook, most=4).shape[1])
            best_s = float(makespans(outlook, np.array(list(plans)))[:, 0].min())
            lost.append(float(found.min()) / best_s - 1)
            wide += float(fixed(outlook, 1, 2, 3, 4)[:, 0].min()) > 1.005 * best_s
    assert max(lost) < 0.03
    assert np.mean(lost) < 0.005
    assert wide >= 2, "now and then no number of engines is the best to the end"
