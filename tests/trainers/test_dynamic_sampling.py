"""DAPO's dynamic sampling and overlong penalty: which groups are replaced, and that runs resume to the bit."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fuse import GRPOTrainer, OnlineDPOTrainer
from fuse.sample import Sample
from fuse.trainers.dynamic_sampling import DynamicSampling

from . import tiny, tiny_group


def of_some_targets(completions: list[str], target: list[str], completion_ids: Any, **kwargs: Any) -> list[float]:
    """Says the same of all responses to half of the prompts; of the others one is better."""
    return [
        0.5 if letter in "ac" else ids[0] + index / 10
        for index, (letter, ids) in enumerate(zip(target, completion_ids, strict=True))
    ]


def sampled(rewards: Sequence[Sequence[float]], most_rounds: int) -> tuple[list[int], list[int], dict[str, float]]:
    """Ids of samples that stay and that are replaced, for two groups of two; rewards: of each prompt's, as drawn."""
    drawn = iter(enumerate(rewards))

    def draw(count: int) -> list[Sample]:
        made = []
        for _ in range(count):
            prompt, (first, second) = next(drawn)
            made += [Sample(id=2 * prompt, prompt_ids=(1,), rewards=[first])]
            made += [Sample(id=2 * prompt + 1, prompt_ids=(1,), rewards=[second])]
        return made

    scored = iter([{"rewards/errors": 1.0, "told": 2.0}, {"rewards/errors": 2.0}, {"told": 4.0}])
    sampling = DynamicSampling(
        most_rounds=most_rounds,
        num_generations=2,
        reward_weights=(1.0,),
        draw=draw,
        score=lambda samples: next(scored),
    )
    samples, replaced, metrics = sampling.roll_out(2)
    return [one.id for one in samples], [one.id for one in replaced], metrics


def test_groups_are_replaced_in_their_places(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        samples, replaced, metrics = sampled([(1, 1), (0, 1), (2, 2), (3, 4)], most_rounds=5)
    assert samples == [6, 7, 2, 3]
    assert replaced == [0, 1, 4, 5]
    assert metrics == {
        "dynamic_sampling/replaced_groups": 2,
        "dynamic_sampling/rounds": 2,
        "dynamic_sampling/groups_without_spread": 0,
        "rewards/errors": 3,
        "told": 3,
    }
    assert "1 of 2 groups have equal rewards, and are replaced (round 2 of at most 5)" in caplog.text
    assert "still" not in caplog.text


def test_rounds_are_bounded_and_the_run_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        samples, replaced, metrics = sampled([(1, 1), (0, 1), (2, 2)], most_rounds=1)
    assert samples == [4, 5, 2, 3]
    assert replaced == [0, 1]
    assert metrics["dynamic_sampling/groups_without_spread"] == 1
    assert "after max_dynamic_rounds=1 rounds 1 of 2 groups still have equal rewards" in caplog.text


def test_nothing_is_drawn_where_all_groups_have_spread() -> None:
    samples, replaced, metrics = sampled([(1, 2), (0, 1)], most_rounds=5)
    assert (samples, replaced) == ([0, 1, 2, 3], [])
    assert metrics["dynamic_sampling/rounds"] == 0


@pytest.mark.usefixtures("in_process_workers")
@pytest.mark.parametrize("algorithm", [GRPOTrainer, OnlineDPOTrainer])
def test_a_run_replaces_groups_and_resumes_to_the_bit(algorithm: type, tmp_path: Path) -> None:
    """Updates consume other numbers of prompts than they train on, in an order that a resumed run continues."""
    options: dict[str, Any] = {
        "algorithm": algorithm,
        "rewards": of_some_targets,
        "dynamic_sampling": True,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 1,
        "beta": 0.1,
    }
    whole = tiny_group.trainer(tmp_path, **options)
    with whole.updates() as updates:
        iterations = list(updates)
    seen = [sample for iteration in iterations for sample in iteration.samples]
    assert all(sample.columns["target"] not in ("a", "c") for sample in seen)
    logs = [entry for entry in whole.state.log_history if "loss" in entry]
    replaced = sum(int(entry["dynamic_sampling/replaced_groups"]) for entry in logs)
    assert replaced > 0
    assert whole.state.episode == len(seen) + 4 * replaced
    assert all(entry["frac_reward_zero_std"] == 0 for entry in logs)
    assert whole.state.num_input_tokens_seen > sum(len(one.prompt_ids) + one.length for one in seen)

    consumed = [int(entry["episode"]) // 4 for entry in logs]
    per_update = len(iterations[0].samples) // 4
    resumed_at = next(step for step, count in enumerate(consumed[:-1], 1) if count % per_update)
    resumed = tiny_group.trainer(tmp_path, **options)
    with resumed.updates(str(tmp_path / f"checkpoint-{resumed_at}")) as updates:
        again = [sample for iteration in updates for sample in iteration.samples]
    later = [sample for iteration in iterations[resumed_at:] for sample in iteration.samples]
    assert [(one.id, one.prompt_ids, one.response_ids) for one in again] == [
        (one.id, one.prompt_ids, one.response_ids) for one in later
    ]
    assert tiny.difference(resumed.model, whole.model) == 0


@pytest.mark.usefixtures("in_process_workers")
def test_a_run_goes_on_where_no_prompt_has_spread(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def same(completions: list[str], **kwargs: Any) -> list[float]:
        return [1.0] * len(completions)

    with caplog.at_level(logging.WARNING):
        trainer = tiny_group.train(tmp_path, rewards=same, dynamic_sampling=True, max_dynamic_rounds=2, max_steps=1)
    (logged,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert logged["dynamic_sampling/replaced_groups"] == 4
    assert "after max_dynamic_rounds=2 rounds 2 of 2 groups still have equal rewards" in caplog.text


@pytest.mark.usefixtures("in_process_workers")
def test_long_responses_are_penalised_in_the_reward_alone(tmp_path: Path) -> None:
    """In the last 4 of 8 tokens, in proportion; what counts as spread is what the function said."""

    def same(completions: list[str], **kwargs: Any) -> list[float]:
        return [2.0] * len(completions)

    options: dict[str, Any] = {"overlong_penalty": 3.0, "overlong_buffer": 4, "max_steps": 1}
    trainer = tiny_group.trainer(tmp_path, rewards=same, dynamic_sampling=True, max_dynamic_rounds=1, **options)
    with trainer.updates() as updates:
        iteration = next(updates)
    penalties = [-3.0 * max(0, min(4, sample.length - 4)) / 4 for sample in iteration.samples]
    assert len({*penalties}) > 1
    metrics = iteration.metrics
    assert metrics["rewards/overlong_penalty/mean"] == pytest.approx(sum(penalties) / len(penalties))
    assert metrics["reward"] == pytest.approx(2 + sum(penalties) / len(penalties))
    assert metrics["grad_norm"] > 0
    assert metrics["dynamic_sampling/groups_without_spread"] == 2
