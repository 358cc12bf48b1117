"""Costs: fits recover what generated the measurements, and the cheaper migration is chosen."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pytest

from fuse.interstage.costs import (
    PROFILES,
    SMALL_CPU,
    MigrationKind,
    cheaper_migration,
    costs_from_json,
    costs_to_json,
    fit_affine,
    non_negative_least_squares,
)
from fuse.interstage.speculation import DRAFTS


def test_a_fit_recovers_the_costs_that_were_measured() -> None:
    costs = PROFILES["llama-33b-8xh800"]
    decode = [(b, b * c, costs.decode_step(b, b * c)) for b in (1, 8, 64) for c in (100, 1000)]
    assert fit_affine("decode", decode) == pytest.approx([costs.step_s, costs.sample_s, costs.context_s], rel=1e-6)
    transfer = [(n, costs.transfer(n)) for n in (10**5, 10**7, 10**9)]
    assert fit_affine("transfer", transfer) == pytest.approx([costs.transfer_s, costs.transfer_byte_s], rel=1e-6)


def test_a_cost_that_falls_with_size_is_fitted_as_constant() -> None:
    constant, slope = fit_affine("prefill", [(100.0, 3.0), (200.0, 2.0), (300.0, 1.0)])
    assert (constant, slope) == (pytest.approx(2.0), 0.0)


def test_times_that_scatter_add_up_to_what_was_measured() -> None:
    random = np.random.default_rng(0)
    rows = [(tokens, (1 + tokens / 100) * random.lognormal(0.0, 0.5)) for tokens in random.uniform(0, 1000, 400)]
    constant, slope = fit_affine("inference", rows)
    assert sum(constant + slope * tokens for tokens, _ in rows) == pytest.approx(sum(seconds for _, seconds in rows))
    assert slope == pytest.approx(0.01 * np.exp(0.5**2 / 2), rel=0.15)


def test_non_negative_least_squares_is_optimal_on_random_problems() -> None:
    random = np.random.default_rng(0)
    for _ in range(50):
        matrix, target = random.normal(size=(8, 3)), random.normal(size=8)
        solution = non_negative_least_squares(matrix, target)
        gradient = matrix.T @ (matrix @ solution - target)
        assert np.all(solution >= 0)
        assert np.all(gradient >= -1e-9)  # no coordinate is worth raising,
        assert abs(gradient @ solution) < 1e-9  # and those that are positive are worth no change


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ([(1.0, 10.0, 0.1)], "1 measurements of decode do not determine its costs"),
        ([(1.0, 0.0), (2.0, 1.0)], "hold a time that is not positive"),
    ],
)
def test_measurements_that_do_not_do_are_refused(rows: list[tuple[float, ...]], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        fit_affine("decode", rows)


def test_consecutive_steps_take_the_sum_of_the_steps() -> None:
    costs = PROFILES["llama-7b-h100"]
    one_by_one = sum(costs.decode_step(3, 100 + 3 * step) for step in range(7))
    assert costs.decode(3, 100, 7) == pytest.approx(one_by_one)


def test_inference_pays_for_each_micro_batch() -> None:
    costs = replace(SMALL_CPU, inference_s=1.0, inference_token_s=0.0, inference_batch_tokens=100)
    assert [costs.inference(tokens) for tokens in (1, 100, 101)] == [1.0, 1.0, 2.0]


def test_the_cheaper_migration_depends_on_the_context() -> None:
    costs = replace(
        SMALL_CPU, prefill_s=0.0, prefill_token_s=0.01, transfer_s=1.0, transfer_byte_s=1e-6, kv_bytes_per_token=1000
    )
    short, long = cheaper_migration(costs, 100), cheaper_migration(costs, 1000)
    assert (short.kind, short.seconds) == (MigrationKind.RECOMPUTE, 1.0)  # against 1.1 s
    assert (long.kind, long.seconds) == (MigrationKind.TRANSFER, 2.0)  # against 10 s
    assert long.num_bytes - 10 * short.num_bytes == 1000 * 1000
    assert cheaper_migration(costs, 1000, can_transfer=False).kind is MigrationKind.RECOMPUTE


def test_costs_survive_json() -> None:
    for costs in (
        *PROFILES.values(),
        replace(SMALL_CPU, hand_out_s=2e-3),
        replace(SMALL_CPU, speculation=DRAFTS["int8"]),
    ):
        assert costs_from_json(json.loads(json.dumps(costs_to_json(costs)))) == costs


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"step_s": -1.0}, "step_s is -1.0: a cost is a finite number >= 0"),
        ({"step_s": 0.0, "sample_s": 0.0, "context_s": 0.0}, "a decode step takes time"),
        ({"step_s": "fast"}, "step_s is 'fast': it must be a number"),
        ({"speed": 1.0}, "unknown field speed"),
        ({"speculation": {"acceptance": 0.9}}, "it must be an object with acceptance, draft_share, reads_context"),
        (
            {"speculation": asdict(DRAFTS["int8"]) | {"max_drafts": 2.5}},
            "max_drafts of speculation is 2.5: it must be int",
        ),
        ({"speculation": asdict(DRAFTS["int8"]) | {"acceptance": 1.5}}, "acceptance is 1.5: a chance is 0 to 1"),
    ],
)
def test_bad_json_is_refused(change: dict[str, object], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        costs_from_json(costs_to_json(SMALL_CPU) | change)
    with pytest.raises(ValueError, match="expected an object"):
        costs_from_json([])
    with pytest.raises(ValueError, match="field kv_bytes_per_token is missing"):
        costs_from_json({name: value for name, value in costs_to_json(SMALL_CPU).items() if name[:2] != "kv"})
