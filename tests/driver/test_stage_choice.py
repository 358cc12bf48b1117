"""Opposite replicas are taken where they are predicted to train sooner than plain 1F1B, sums of gradients included."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from fuse.driver.model_size import ModelSize
from fuse.driver.stage_choice import StageChoice
from fuse.intrastage.opposite import UpdateCosts, has_opposites, with_opposites
from fuse.intrastage.placement import place
from fuse.intrastage.search_time import SearchTime
from fuse.training.model_spec import ModelSpec

from ..intrastage.test_stage_balance import layer_costs
from ..tiny_models import build, language_model

SPEC = ModelSpec.of(build(language_model(num_hidden_layers=8)))
PLAIN = place("actor", 4, 4)
OPPOSITE = with_opposites(PLAIN)


def choice(num_micro_batches: int = 4) -> StageChoice:
    """Layers of 10 ms forward and 20 ms backward."""
    return StageChoice(
        specs={"actor": SPEC},
        costs={"actor": layer_costs("actor")},
        num_micro_batches=num_micro_batches,
        is_fused=True,
        tensor_parallel_size=1,
        tick_s=1e-3,
        within=SearchTime(60.0),
    )


def test_bubbles_are_filled_where_sums_of_gradients_cost_little(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        found = choice().soonest(PLAIN, OPPOSITE, UpdateCosts(0.0, 0.0))
    assert has_opposites(found.placement)
    assert [one.ranks for one in found.placement] == [(0, 1, 2, 3), (3, 2, 1, 0)]
    # Stages of 2 layers take 20 and 40 ms. Plain 1F1B: (4 + 3) x 60 ms.
    assert "0.420 s by plain 1F1B" in caplog.text
    assert caplog.text.count("two opposite replicas of the actor: a step of 4 micro-batches") == 1
    assert found.unfused is not None
    assert found.unfused.placement == (replace(PLAIN[0], layer_ranges=((0, 2), (2, 4), (4, 6), (6, 8))),)


def test_they_are_not_where_these_cost_more_than_the_bubbles(caplog: pytest.LogCaptureFixture) -> None:
    size = ModelSize.of(SPEC)
    with caplog.at_level(logging.INFO):
        found = choice().soonest(PLAIN, OPPOSITE, UpdateCosts(0.0, 1.0 / size.total))
    assert not has_opposites(found.placement)
    assert found.unfused is None, "one after the other is how it trains"
    assert found.update_s == 0
    assert "plain 1F1B: a step of 4 micro-batches" in caplog.text


def test_the_optimizers_work_is_shared() -> None:
    """Two opposite replicas hold all parameters twice, and step each of them once."""
    stages = choice().cut_with_update(OPPOSITE, UpdateCosts(1.0, 0.0))
    assert stages.unfused is not None
    assert stages.unfused.update_s == max(ModelSize.of(SPEC).stages(PLAIN[0]))
    size = ModelSize.of(SPEC)
    assert stages.update_s is not None
    assert size.total / 4 <= stages.update_s <= max(size.stages(stages.placement[0])), "however they are cut"


def test_many_micro_batches_leave_little_to_fill() -> None:
    costs = UpdateCosts(0.0, 0.0)
    gains = []
    for count in (4, 16):
        plain, opposite = (choice(count).cut_with_update(one, costs) for one in (PLAIN, OPPOSITE))
        gains.append(choice(count)._step_s(plain) / choice(count)._step_s(opposite))
    assert gains[0] > gains[1]
