"""What emulated devices cost, by name and from files."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import pytest

from fuse.benchmarks.emulated.costs import costs_from_json
from fuse.benchmarks.emulated.h100 import NAMES, costs_named
from fuse.interstage.costs import LLAMA_33B_8_H800
from fuse.interstage.speculation import DRAFTS
from schedules import Kind

TRAINING, SCORING = ("actor", "critic"), ("reference", "critic", "reward")


@pytest.mark.parametrize("name", NAMES)
def test_costs_survive_json(name: str) -> None:
    for speculation in (None, DRAFTS["int8"]):
        costs = replace(costs_named(name), speculation=speculation)
        table = json.loads(json.dumps(asdict(costs)))
        assert costs_from_json(table, TRAINING, SCORING) == costs
        del table["speculation"]
        assert costs_from_json(table, TRAINING, SCORING) == replace(costs, speculation=None)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("decode", "step_s"), -1.0, r"costs.decode.step_s is -1.0: it must be a number, 0 to"),
        (("decode", "step_s"), 0, r"costs.decode.step_s is 0.0: a decode step takes time"),
        (("training", "actor"), 3, r"costs.training.actor is 3: it must be an object"),
        (("training", "actor", "forward", "token_s"), "1", r"costs.training.actor.forward.token_s is '1'"),
        (("scoring",), {}, r"costs.scoring: reference is missing"),
        (("speculation",), {}, r"costs: speculation is {}: it must be an object with acceptance, draft_share"),
        (("more",), 1, r"costs: unknown field more: remove it"),
    ],
)
def test_unusable_costs_are_refused(place: tuple[str, ...], value: object, message: str) -> None:
    table: dict[str, Any] = asdict(costs_named("h100-33b"))
    inner = table
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    with pytest.raises(ValueError, match=message):
        costs_from_json(table, TRAINING, SCORING)


def test_33b_is_derived_as_the_profile_of_h800_is() -> None:
    own, other = costs_named("h100-33b").rollout, LLAMA_33B_8_H800
    for name in ("step_s", "sample_s", "context_s", "prefill_token_s", "inference_token_s"):
        assert getattr(own, name) == pytest.approx(getattr(other, name), rel=0.05), name


def test_actor_and_critic_differ_where_the_pair_does() -> None:
    small, large = costs_named("h100-13b-33b"), costs_named("h100-33b-13b")
    assert small.training["actor"] == large.training["critic"]
    assert small.decode.step_s < large.decode.step_s
    # 13.0 and 32.5 billion parameters
    ratio = large.training["actor"].forward_flops_per_token / small.training["actor"].forward_flops_per_token
    assert ratio == pytest.approx(32.5 / 13.0, rel=0.01)


def test_seconds_alone_are_scaled() -> None:
    costs = costs_named("h100-33b")
    half = costs.scaled(0.5)
    assert half.decode.context_s == costs.decode.context_s / 2
    assert half.training["critic"].optimizer_s == costs.training["critic"].optimizer_s / 2
    assert half.device_flops_per_s == costs.device_flops_per_s
    assert half.training["actor"].forward_flops_per_token == costs.training["actor"].forward_flops_per_token
    assert half.scaled(2) == costs


def test_a_backward_takes_as_long_as_its_halves() -> None:
    actor = costs_named("h100-33b").training["actor"]
    whole, *halves = (actor.operation_s(kind, 1000, 4) for kind in (Kind.B, Kind.I, Kind.W))
    assert whole == sum(halves)
    assert actor.operation_s(Kind.F, 1000, 8) == actor.operation_s(Kind.F, 1000, 4) / 2
