"""Scores are counted from those of the reference's own responses: which these are, and that they are made once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from fuse import PPOTrainer
from fuse.driver.fleet import Fleet
from fuse.ops.sampling import sample_tokens_reference
from fuse.sample import Sample, response_length
from fuse.trainers.reference_scores import FIRST_REFERENCE_ID, missing_rows, score_references

from ..tiny_models import spread
from . import tiny

PAD, EOS, NUM_TOKENS = 0, 1, 8
OPTIONS: dict[str, Any] = {
    "reward_baseline": "reference",
    "num_devices": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "num_sample_generations": 0,
}


def told_apart(prompts: list[str], responses: list[str], target: list[int]) -> list[float]:
    """Another number for every response."""
    return [sum(ord(letter) / 16**place for place, letter in enumerate(text, 1)) for text in responses]


def trainer(output_dir: Path, *, reward: Any = told_apart, episodes: int = 24, **options: Any) -> PPOTrainer:
    """One whose reference is another model than the policy begins as."""
    return PPOTrainer(
        args=tiny.config(output_dir, **{**OPTIONS, "total_episodes": episodes, **options}),
        processing_class=tiny.tokenizer(),
        model=tiny.policy(),
        ref_model=spread(tiny.policy()),
        reward_model=reward,
        train_dataset=tiny.rows(),
        value_model=tiny.scorer(1),
    )


def response_of(model: PreTrainedModel, row: int, seed: int, temperature: float) -> list[int]:
    """A token after the other, by whole forwards: those that count."""
    prompt, response = tiny.rows()[row]["input_ids"], list[int]()
    while len(response) < NUM_TOKENS and EOS not in response:
        logits = model(torch.tensor([[*prompt, *response]])).logits[:, -1]
        keys = (torch.tensor([key]) for key in (seed, FIRST_REFERENCE_ID + row, len(response)))
        token, _ = sample_tokens_reference(logits, torch.tensor([temperature]), *keys)
        response.append(int(token))
    return response[: response_length(response, (EOS,), PAD)]


@pytest.mark.usefixtures("in_process_workers")
@pytest.mark.parametrize("rewards", ["function", "model"])
def test_every_prompt_has_the_score_of_a_response_of_the_reference(rewards: str, tmp_path: Path) -> None:
    reward = told_apart if rewards == "function" else tiny.scorer(2)
    made = trainer(tmp_path, reward=reward)
    expected = []
    with torch.no_grad():
        for row in range(16):
            response = response_of(made.ref_model, row, made.args.seed, made.args.sampling_temperature)
            text = made.processing_class.decode(response, skip_special_tokens=True)
            if rewards == "function":
                expected += told_apart([""], [text], [row])
            else:
                hidden = reward.model(torch.tensor([[*tiny.rows()[row]["input_ids"], *response]])).last_hidden_state
                expected.append(float(reward.score(hidden[0, -1])))
    with made.updates() as updates:
        iterations = list(updates)
    assert made.state.reference_scores == pytest.approx(expected, abs=1e-5)
    assert len(set(expected)) > 8
    assert None not in made.state.reference_scores
    for iteration in iterations:
        for sample in iteration.samples:
            assert sample.baseline == made.state.reference_scores[int(str(sample.columns["target"]))]
        over = sum(one.score - one.baseline for one in iteration.samples) / 8  # type: ignore[operator]
        assert iteration.metrics["objective/scores_over_reference"] == pytest.approx(over, abs=1e-6)


@pytest.mark.usefixtures("in_process_workers")
def test_the_policy_begins_as_it_would_without_and_learns_something_else(tmp_path: Path) -> None:
    def samples_of(baseline: str, **options: Any) -> tuple[list[tuple[list[int], list[float]]], PPOTrainer]:
        made = trainer(tmp_path / baseline, episodes=8, reward_baseline=baseline, **options)
        with made.updates() as updates:
            samples = [sample for iteration in updates for sample in iteration.samples]
        return [(one.response_ids, one.logprobs) for one in samples], made

    without, plain = samples_of("none")
    with_it, counted = samples_of("reference", engines_sleep="on", offload_training="on")
    assert len(without) == 8
    assert with_it == without
    assert tiny.difference(counted.policy_model, plain.policy_model) > 1e-4


@pytest.mark.usefixtures("in_process_workers")
def test_a_resumed_run_makes_none_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trainer(tmp_path)
    whole.train()

    @contextmanager
    def refuse(fleet: Fleet, role: str) -> Iterator[None]:
        raise AssertionError("the reference generates again")
        yield

    monkeypatch.setattr(Fleet, "generating_by", refuse)
    resumed = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.reference_scores == whole.state.reference_scores
    assert tiny.difference(resumed.policy_model, whole.policy_model) == 0.0


@pytest.mark.usefixtures("pooled_workers")
def test_stages_on_two_devices_do_as_one_device_does(tmp_path: Path) -> None:
    one, two = (trainer(tmp_path / str(count), num_devices=count, save_strategy="no") for count in (1, 2))
    one.train()
    two.train()
    assert None not in one.state.reference_scores
    assert two.state.reference_scores == one.state.reference_scores
    assert tiny.difference(two.policy_model, one.policy_model) < tiny.ROUNDING


def test_rows_without_a_score_are_scored_some_at_a_time() -> None:
    scores: list[float | None] = [None, 0.5, None, None, None]
    missing = missing_rows(scores, [3, 1, 0, 3, 4])
    assert missing == [3, 0, 4]
    rolled_out = []

    def roll_out(samples: Sequence[Sample], num_before: int) -> None:
        rolled_out.append((num_before, [sample.id - FIRST_REFERENCE_ID for sample in samples]))
        for sample in samples:
            sample.score = float(sample.prompt_ids[0])

    found = score_references(
        scores,
        missing,
        samples_of=lambda rows: [Sample(index, (10 + row,)) for index, row in enumerate(rows)],
        roll_out=roll_out,
        num_together=2,
    )
    assert found == [10.0, 0.5, None, 13.0, 14.0]
    assert rolled_out == [(0, [3, 0]), (2, [4])]
