"""Rounds in which all variants generate the same tokens, or the run ends."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fuse.benchmarks.iteration.rounds import Rounds, check_same_tokens
from fuse.benchmarks.iteration.turn import Response, Variant
from fuse.benchmarks.iteration.workload import Workload

from .made import ONE, made_turn


def test_other_tokens_are_noticed() -> None:
    check_same_tokens("both", [ONE, ONE], [ONE, ONE])
    with pytest.raises(AssertionError, match=r"both generated .* than off: response 1 of a round, from position 2 "):
        check_same_tokens("both", [ONE, replace(ONE, response_ids=(3, 4, 6))], [ONE, ONE])
    with pytest.raises(AssertionError, match=r"from position 2 \(2 tokens, 3 there\)"):
        check_same_tokens("both", [replace(ONE, response_ids=(3, 4))], [ONE])
    with pytest.raises(AssertionError):
        check_same_tokens("both", [replace(ONE, prompt_ids=(1,))], [ONE])


def fixed(*responses: Response) -> Variant:
    """It generates the same all the time."""
    return lambda same: made_turn(1.0, responses)


def made_workload(**options: Any) -> Workload:
    figures: dict[str, Any] = {"prompts": ((1, 2),) * 3, "lengths": (3, 3, 3), "batch": 1, "micro_batch": 1}
    figures["mini_batches"] = 1
    return Workload(models=None, epochs=1, max_new_tokens=3, **(figures | options))  # type: ignore[arg-type]


def test_a_run_ends_at_the_first_other_token() -> None:
    rounds = Rounds(made_workload(), num_warmup=1)
    for name in ("off", "both"):
        for round_index in range(2):
            rounds.take(name, fixed(ONE), round_index)
    assert {name: len(turns) for name, turns in rounds.turns.items()} == {"off": 1, "both": 1}
    with pytest.raises(AssertionError, match="trl generated other tokens"):
        rounds.take("trl", fixed(replace(ONE, response_ids=(3, 4, 6))), 0)
    with pytest.raises(AssertionError, match="trl does not keep to the lengths"):
        rounds.take("trl", fixed(replace(ONE, response_ids=(3, 4))), 1)


def test_natural_lengths_may_be_any_but_are_the_same_for_all() -> None:
    rounds = Rounds(made_workload(lengths=None), num_warmup=1)
    rounds.take("off", fixed(replace(ONE, response_ids=(3,))), 0)
    rounds.take("off", fixed(ONE), 1)
    with pytest.raises(AssertionError, match="both generated other tokens"):
        rounds.take("both", fixed(ONE), 0)
