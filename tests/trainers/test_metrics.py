"""Figures of micro-batches become one of an update."""

from __future__ import annotations

import pytest

from fuse.algorithms.policy_loss import (
    LARGEST_SAMPLER_DIFFERENCE,
    POLICY_LOSS,
    RATIO,
    SAMPLER_DIFFERENCE,
    SAMPLER_TOKENS,
)
from fuse.trainers.metrics import reduce_metrics


def test_means_are_of_all_micro_batches() -> None:
    rows = [[{POLICY_LOSS: 1.0}, {POLICY_LOSS: 3.0}], [{POLICY_LOSS: 5.0}]]
    assert reduce_metrics(rows) == {"loss/policy_avg": 3.0}


def test_places_without_a_micro_batch_count_as_zero() -> None:
    rows = [[{RATIO: 1.0}, {RATIO: 3.0}]]
    assert reduce_metrics(rows) == {"val/ratio": 2.0, "val/ratio_var": 2.0}
    assert reduce_metrics(rows, num_places=4) == {"val/ratio": 1.0, "val/ratio_var": 2.0}
    assert reduce_metrics([[{RATIO: 1.0}]])["val/ratio_var"] == 0.0


def test_the_sampler_is_compared_on_the_tokens_of_the_first_step_alone() -> None:
    first = [
        {SAMPLER_DIFFERENCE: 0.3, LARGEST_SAMPLER_DIFFERENCE: 0.2, SAMPLER_TOKENS: 2.0},
        {SAMPLER_DIFFERENCE: 0.1, LARGEST_SAMPLER_DIFFERENCE: 0.1, SAMPLER_TOKENS: 6.0},
    ]
    later = [{SAMPLER_DIFFERENCE: 9.0, LARGEST_SAMPLER_DIFFERENCE: 9.0, SAMPLER_TOKENS: 9.0}]
    reduced = reduce_metrics([first, later], num_places=8)
    assert reduced == {"val/sampler_logprob_diff": pytest.approx(0.05), "val/sampler_logprob_diff_max": 0.2}
    empty = {SAMPLER_DIFFERENCE: 0.0, LARGEST_SAMPLER_DIFFERENCE: 0.0, SAMPLER_TOKENS: 0.0}
    assert reduce_metrics([[empty]])["val/sampler_logprob_diff"] == 0.0
