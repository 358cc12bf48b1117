"""Parity is not vacuous: each plausible mistake in the algorithm makes the comparison fail."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fuse import sample
from fuse.algorithms import gae
from fuse.driver import stage_by_stage
from fuse.ops import shaped_gae
from fuse.training import layout, scoring, steps

from .cases import BASELINE, EARLY_STOPS, MINI_BATCHES, PAST_STOP, Case
from .oracle import Recording
from .replay import mismatches, replay

Recorded = Callable[[Case], Recording]


def score_on_the_last_token(patch: pytest.MonkeyPatch) -> None:
    def shape_rewards(kl: Tensor, scores: Tensor, token_rows: Tensor, value_offsets: Tensor, kl_coef: float) -> Tensor:
        rewards = kl.new_zeros(int(value_offsets[-1]))
        rewards[token_rows] = -kl_coef * kl
        ends = torch.bucketize(value_offsets[1:], token_rows)  # the tokens of all samples up to each
        rewards[token_rows[ends - 1]] += scores
        return rewards

    patch.setattr(shaped_gae, "shape_rewards", shape_rewards)
    patch.setattr(gae, "shaped_gae", shaped_gae.shaped_gae_reference)


def advantages_whitened_over_value_positions(patch: pytest.MonkeyPatch) -> None:
    def whitened_too_soon(
        logprobs: Tensor, reference: Tensor, scores: Tensor, values: Tensor, *offsets: Tensor, **options: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        kl, _, returns = shaped_gae.shaped_gae_reference(logprobs, reference, scores, values, *offsets, **options)
        shift = torch.repeat_interleave(offsets[1][:-1] - offsets[0][:-1], offsets[0].diff())
        return kl, shaped_gae.whiten(returns - values)[torch.arange(len(kl)) + shift], returns

    patch.setattr(gae, "shaped_gae", whitened_too_soon)


def biased_variance(patch: pytest.MonkeyPatch) -> None:
    def whiten(values: Tensor, *, shift_mean: bool = True) -> Tensor:
        variance, mean = torch.var_mean(values, unbiased=False)
        whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
        return whitened if shift_mean else whitened + mean

    patch.setattr(shaped_gae, "whiten", whiten)
    patch.setattr(gae, "shaped_gae", shaped_gae.shaped_gae_reference)


def reference_without_temperature(patch: pytest.MonkeyPatch) -> None:
    right = scoring.log_probabilities
    patch.setattr(scoring, "log_probabilities", lambda temperature, *args: right(1.0, *args))


def responses_not_cut_after_their_stop_token(patch: pytest.MonkeyPatch) -> None:
    right = sample.response_length

    def response_length(response_ids: Any, stop_token_ids: Any, pad_token_id: int) -> int:
        return right(response_ids, (), pad_token_id)

    patch.setattr(stage_by_stage, "response_length", response_length)


def a_step_per_mini_batch(patch: pytest.MonkeyPatch) -> None:
    def trl_optimizer_steps(permutations: Any, *, accumulation: int, last_of_pass: bool, **options: Any) -> Any:
        return steps.optimizer_steps(permutations, **options)

    patch.setattr(layout, "trl_optimizer_steps", trl_optimizer_steps)


def unchanged(patch: pytest.MonkeyPatch) -> None:
    pass


@pytest.mark.parametrize(
    ("break_it", "case", "options"),
    [
        pytest.param(score_on_the_last_token, EARLY_STOPS, {}, id="score_on_the_last_token"),
        pytest.param(advantages_whitened_over_value_positions, EARLY_STOPS, {}, id="advantages_masked_with_p1"),
        pytest.param(biased_variance, EARLY_STOPS, {}, id="biased_variance"),
        pytest.param(reference_without_temperature, BASELINE, {}, id="reference_without_temperature"),
        pytest.param(responses_not_cut_after_their_stop_token, PAST_STOP, {}, id="responses_not_cut"),
        pytest.param(a_step_per_mini_batch, MINI_BATCHES, {}, id="a_step_per_mini_batch"),
        pytest.param(unchanged, BASELINE, {"max_grad_norm": 0.5}, id="gradient_clipping"),
        pytest.param(unchanged, BASELINE, {"lr_scheduler_type": "constant"}, id="constant_learning_rate"),
    ],
)
def test_a_wrong_variant_is_caught(
    break_it: Callable[[pytest.MonkeyPatch], None],
    case: Case,
    options: dict[str, Any],
    recorded: Recorded,
    in_process_workers: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recording = recorded(case)
    break_it(monkeypatch)
    outcome = replay(case, recording, tmp_path, num_devices=1, trl_quirks=case.quirks, **options)
    assert mismatches(recording, outcome, ignored={"lr"}), "the comparison did not notice"
