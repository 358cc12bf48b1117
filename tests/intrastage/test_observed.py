"""Costs are learnt from spans of what training ran: fitted to sizes, without the first, with backwards in halves."""

from __future__ import annotations

import pytest

from fuse.intrastage.cost_profile import Shape
from fuse.intrastage.observed import MEMORY, MESSAGE, ObservedCosts, fit, one_of_each
from fuse.trace import Span

SMALL, LARGE = Shape(2, 16), Shape(2, 64)


def span(name: str, shape: Shape, seconds: float, category: str = "train", **sizes: int) -> Span:
    arguments = {"tokens": shape.size, "sequences": shape.num_sequences, **sizes}
    return Span(name, category, 100.0, 100.0 + seconds, arguments)


def halves(stage: str, shape: Shape, token_s: float = 1e-3) -> list[Span]:
    """F, I and W of a micro-batch, in proportion 1, 1 and 2."""
    return [span(f"{kind} {stage}.0", shape, n * token_s * shape.size) for kind, n in (("F", 1), ("I", 1), ("W", 2))]


def test_costs_are_in_proportion_to_tokens_where_points_are_few() -> None:
    observed = ObservedCosts({"actor": "actor.0"})
    assert observed.profile([SMALL]) is None
    observed.add(halves("actor.0", SMALL))
    profile = observed.profile([SMALL, LARGE, SMALL])
    assert profile is not None
    small, large = profile.stages
    assert (small.pipeline, small.stage, small.shape, large.shape) == ("actor.0", 0, SMALL, LARGE)
    assert small.forward_ticks * profile.tick_s == pytest.approx(0.032)
    assert (large.input_grad_ticks, large.weight_grad_ticks) == (12_800, 25_600)
    assert large.backward_ticks == 12_800 + 25_600, "a backward that was not seen whole costs as much as its halves"


def test_no_profile_before_every_stage_has_run_backwards() -> None:
    observed = ObservedCosts({"actor": "actor.0", "critic": "critic.0"})
    observed.add([*halves("actor.0", SMALL), span("F critic.0.0", SMALL, 0.1)])
    assert observed.profile([SMALL]) is None
    observed.add([span("B critic.0.0", SMALL, 0.2)])
    profile = observed.profile([SMALL])
    assert profile is not None
    assert [one.input_grad_ticks is None for one in profile.stages] == [False, True]


def test_messages_and_memory_are_told_by_spans_of_their_own() -> None:
    observed = ObservedCosts({"actor": "actor.0"})
    observed.add(halves("actor.0", SMALL))
    observed.add([span("message actor.0.0", SMALL, 0.004, MESSAGE), Span("step actor", "optimizer", 0.0, 1.0)])
    observed.add([span("memory actor.0.0", SMALL, 0.0, MEMORY, activation_bytes=3200, weight_grad_bytes=320)])
    profile = observed.profile([LARGE])
    assert profile is not None
    assert profile.transfer_ticks("actor.0", SMALL) == 400
    assert (profile.stages[0].activation_bytes, profile.stages[0].weight_grad_bytes) == (12_800, 1_280)


def test_what_is_forgotten_leaves_how_a_backward_splits() -> None:
    observed = ObservedCosts({"actor": "actor.0"})
    observed.add(halves("actor.0", SMALL))
    observed.forget()
    assert observed.profile([SMALL]) is None
    observed.add([span("F actor.0.0", SMALL, 0.3), span("B actor.0.0", SMALL, 0.9)])
    profile = observed.profile([SMALL])
    assert profile is not None
    assert (profile.stages[0].input_grad_ticks, profile.stages[0].weight_grad_ticks) == (30_000, 60_000)


def test_a_fit_leaves_out_the_first_and_has_no_negative_part() -> None:
    line = [(tokens, 0.5 + 0.01 * tokens) for tokens in (10, 20, 30, 40, 50, 60)]
    assert fit([(10, 99.0), *line]) == pytest.approx((0.5, 0.01))
    assert fit([(10, 99.0), (10, 1.0), (20, 4.0)]) == (0.0, pytest.approx(0.15)), "the median of proportions"
    assert fit([(10, 99.0), (10, 1.0)]) == (0.0, pytest.approx(5.0)), "with two points both count"
    falling = fit([(10, 9.0), *((tokens, 10 - tokens / 10) for tokens in (10, 20, 30, 40, 50, 60))])
    assert falling == (pytest.approx(6.5), 0.0)
    through_zero = fit([(10, 9.0), *((tokens, 0.01 * tokens - 0.05) for tokens in (10, 20, 30, 40, 50, 60))])
    assert through_zero[0] == 0.0


def test_one_of_each_size() -> None:
    shapes = [Shape(2, 64), Shape(2, 16), Shape(2, 64), Shape(2, 32)]
    assert one_of_each(shapes) == (Shape(2, 16), Shape(2, 64), Shape(2, 64))
