"""Figures of micro-batches become one of an update."""

from __future__ import annotations

from typing import Any

import pytest

from fuse.algorithms.policy_loss import (
    LARGEST_SAMPLER_DIFFERENCE,
    POLICY_LOSS,
    RATIO,
    SAMPLER_DIFFERENCE,
    SAMPLER_TOKENS,
)
from fuse.micro_batch import Metric
from fuse.trainers.metrics import reduce_metrics
from fuse.training.steps import StepReport


def reduced(rows: list[list[dict[Metric, float]]], **options: Any) -> dict[str, float]:
    """Of steps of one role without gradients."""
    steps = {"critic": [StepReport(metrics=row, gradient_norm=0.0) for row in rows]}
    figures = reduce_metrics(steps, **options)
    assert figures.pop("grad_norm/critic") == 0.0
    return figures


def test_gradient_norms_are_means_over_steps() -> None:
    def norms(**of_steps: list[float]) -> dict[str, float]:
        return reduce_metrics(
            {
                role: [StepReport(metrics=[{Metric(f"loss/{role}"): 0.0}], gradient_norm=norm) for norm in of_role]
                for role, of_role in of_steps.items()
            }
        )

    assert norms(actor=[1.0, 3.0])["grad_norm"] == 2.0
    assert norms(critic=[1.0, 3.0])["grad_norm/critic"] == 2.0, "an update that trains it alone"
    both = norms(actor=[1.0], critic=[5.0, 7.0])
    assert (both["grad_norm/actor"], both["grad_norm/critic"]) == (1.0, 6.0)
    assert both["loss/critic"] == 0.0


def test_means_are_of_all_micro_batches() -> None:
    rows = [[{POLICY_LOSS: 1.0}, {POLICY_LOSS: 3.0}], [{POLICY_LOSS: 5.0}]]
    assert reduced(rows) == {"loss/policy_avg": 3.0}


def test_places_without_a_micro_batch_count_as_zero() -> None:
    rows = [[{RATIO: 1.0}, {RATIO: 3.0}]]
    assert reduced(rows) == {"val/ratio": 2.0, "val/ratio_var": 2.0}
    assert reduced(rows, num_places=4) == {"val/ratio": 1.0, "val/ratio_var": 2.0}
    assert reduced([[{RATIO: 1.0}]])["val/ratio_var"] == 0.0


def test_the_sampler_is_compared_on_the_tokens_of_the_first_step_alone() -> None:
    first = [
        {SAMPLER_DIFFERENCE: 0.3, LARGEST_SAMPLER_DIFFERENCE: 0.2, SAMPLER_TOKENS: 2.0},
        {SAMPLER_DIFFERENCE: 0.1, LARGEST_SAMPLER_DIFFERENCE: 0.1, SAMPLER_TOKENS: 6.0},
    ]
    later = [{SAMPLER_DIFFERENCE: 9.0, LARGEST_SAMPLER_DIFFERENCE: 9.0, SAMPLER_TOKENS: 9.0}]
    assert reduced([first, later], num_places=8) == {
        "val/sampler_logprob_diff": pytest.approx(0.05),
        "val/sampler_logprob_diff_max": 0.2,
    }
    empty = {SAMPLER_DIFFERENCE: 0.0, LARGEST_SAMPLER_DIFFERENCE: 0.0, SAMPLER_TOKENS: 0.0}
    assert reduced([[empty]])["val/sampler_logprob_diff"] == 0.0
