"""Prompts whose rewards have no spread: groups of an update that teach nothing, and prompts that PPO leaves out."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fuse import GRPOTrainer, OnlineDPOTrainer, PPOTrainer, ReinforcePlusPlusTrainer
from fuse.driver.fleet import Fleet
from fuse.trainers.spread_filter import FIRST_PROBE_ID, left_out, probes, untried

from . import tiny, tiny_group


def nearly_alike(completions: list[str], target: list[str], completion_ids: Any, **kwargs: Any) -> list[float]:
    """By thousandths where the letter is a or c, else by whole numbers."""
    return [
        ids[0] + index / 10 if letter not in "ac" else (ids[0] + index / 10) / 1000
        for index, (letter, ids) in enumerate(zip(target, completion_ids, strict=True))
    ]


GROUPS: dict[str, Any] = {"rewards": nearly_alike, "max_steps": 4, "beta": 0.1}


@pytest.mark.usefixtures("in_process_workers")
@pytest.mark.parametrize("algorithm", [GRPOTrainer, OnlineDPOTrainer])
def test_groups_below_the_variance_teach_nothing(
    algorithm: type, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = tiny_group.trainer(tmp_path, algorithm=algorithm, min_reward_variance=0.01, **GROUPS)
    seen = 0
    with caplog.at_level(logging.INFO), made.updates() as updates:
        for iteration in updates:
            alike = [one.columns["target"] in ("a", "c") for one in iteration.samples]
            assert iteration.metrics["spread_filter/groups"] == sum(alike) / 4
            experience, metrics = made._algorithm.estimate(iteration.samples)
            if algorithm is GRPOTrainer:
                assert [length == 0 for length in experience.lengths] == alike
                rewards = [one.rewards[0] for one in iteration.samples]
                assert metrics["reward"] == pytest.approx(statistics.fmean(rewards)), "of all groups"
            else:
                of_pairs = zip(experience.responses[::2], experience.responses[1::2], strict=True)
                for (chosen, rejected), is_alike in zip(of_pairs, alike[::4], strict=True):
                    assert chosen == rejected or not is_alike, "a response, twice"
            seen += sum(alike) // 4
    assert seen > 0
    assert "groups have rewards of a variance below 0.01, and teach nothing" in caplog.text


@pytest.mark.usefixtures("in_process_workers")
def test_dynamic_sampling_replaces_groups_below_the_variance(tmp_path: Path) -> None:
    options = {**GROUPS, "max_steps": 2, "dynamic_sampling": True}
    made = tiny_group.trainer(tmp_path, min_reward_variance=0.01, **options)
    with made.updates() as updates:
        iterations = list(updates)
    assert all(one.columns["target"] not in ("a", "c") for iteration in iterations for one in iteration.samples)
    assert sum(iteration.metrics["dynamic_sampling/replaced_groups"] for iteration in iterations) > 0
    assert all(iteration.metrics["spread_filter/groups"] == 0 for iteration in iterations)


@pytest.mark.usefixtures("in_process_workers")
def test_an_update_may_be_without_any_group(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = tiny_group.trainer(tmp_path, min_reward_variance=1e6, **{**GROUPS, "max_steps": 1, "beta": 0.0})
    made.train()
    assert tiny.difference(made.model, tiny.policy()) == 0
    assert "all 2 groups have rewards of a variance below 1e+06, and the update learns nothing of them" in caplog.text


def by_target(prompts: list[str], responses: list[str], target: list[int]) -> list[float]:
    """The same for every fourth prompt."""
    return [1.0 if row % 4 == 0 else float(len({*text})) for text, row in zip(responses, target, strict=True)]


PROMPTS: dict[str, Any] = {
    "reward": by_target,
    "min_reward_variance": 0.0,
    "reward_variance_samples": 6,
    "num_sample_generations": 0,
    "save_strategy": "steps",
    "save_steps": 1,
}


@pytest.mark.usefixtures("in_process_workers")
def test_ppo_leaves_out_prompts_and_a_resumed_run_tries_none_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        whole = tiny.trainer(tmp_path, total_episodes=32, **PROMPTS)
        with whole.updates() as updates:
            rows = [int(str(one.columns["target"])) for iteration in updates for one in iteration.samples]
    variances = whole.state.reward_variances
    out = {row for row, variance in enumerate(variances) if not variance}
    assert out >= {0, 4, 8, 12}
    assert not out & {*rows}
    assert len({*rows[:8]}) == 8, "a pass has each prompt once"
    assert all(row["spread_filter/prompts"] == len(out) for row in whole.state.log_history if "eps" in row)
    assert f"{len(out)} of 16 prompts that were tried have equal rewards, and are left out" in caplog.text

    @contextmanager
    def refuse(fleet: Fleet, role: str) -> Iterator[None]:
        raise AssertionError("prompts are tried again")
        yield

    monkeypatch.setattr(Fleet, "generating_by", refuse)
    resumed = tiny.trainer(tmp_path / "resumed", total_episodes=32, **PROMPTS)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.reward_variances == variances
    assert tiny.difference(resumed.policy_model, whole.policy_model) == 0.0


def test_prompts_are_tried_as_far_as_the_run_will_consume_them() -> None:
    variances: list[float | None] = [None, 1.0, None, 0.0, None, None]
    tried = []
    order = [3, 1, 5, 0, 2, 4]
    for rows in untried(variances, order, num_needed=3, min_variance=0.5, num_together=2):
        tried.append(rows)
        for row in rows:
            variances[row] = 0.1 if row == 5 else 2.0
    assert tried == [[5, 0], [2, 4]]
    assert left_out(variances, 0.5, batch_size=4) == {3, 5}
    with pytest.raises(ValueError, match=r"min_reward_variance=0\.5 leaves 4 of 6 prompts, fewer than one batch of 5"):
        left_out(variances, 0.5, batch_size=5)


def test_probes_have_noise_of_their_own(tmp_path: Path) -> None:
    dataset = tiny.rows()
    made = tiny.trainer(tmp_path)._samples_of
    samples = probes([5, 2], 3, made)
    assert [one.id - FIRST_PROBE_ID for one in samples] == [15, 16, 17, 6, 7, 8]
    assert [one.prompt_ids for one in samples[::3]] == [tuple(dataset[row]["input_ids"]) for row in (5, 2)]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            lambda path: tiny.config(path, reward_variance_samples=1, min_reward_variance=0.1),
            "reward_variance_samples=1 must be at least 2",
        ),
        (lambda path: tiny.config(path, reward_variance_samples=8), "reward_variance_samples=8 without min_reward_var"),
        (lambda path: tiny.config(path, min_reward_variance=-1.0), "min_reward_variance=-1.0 must not be negative"),
        (
            lambda path: tiny_group.config(
                path, ReinforcePlusPlusTrainer.CONFIG, num_generations=1, min_reward_variance=0.1
            ),
            "min_reward_variance=0.1 with num_generations=1: one reward has no variance",
        ),
    ],
)
def test_what_cannot_be_is_refused(make: Any, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=reason):
        make(tmp_path)


def test_a_reference_that_engines_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"min_reward_variance=0\.1 with a ref_model that is not built like model"):
        PPOTrainer(
            args=tiny.config(tmp_path, min_reward_variance=0.1),
            processing_class=tiny.tokenizer(),
            model=tiny.policy(),
            ref_model=tiny.policy(num_hidden_layers=3),
            reward_model=by_target,
            train_dataset=tiny.rows(),
            value_model=tiny.scorer(1),
        )
