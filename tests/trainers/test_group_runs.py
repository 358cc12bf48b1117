"""Whole runs without a critic: real engines, real rewards, and what must not change them."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerState

from fuse import GRPOTrainer, RLOOTrainer
from fuse.metric_table import entry_of
from fuse.trainers import reward_calls
from fuse.workers import generation_handle

from ..tiny_models import word_tokenizer
from ..workers.holding import HeldUntilOthersCome
from . import tiny, tiny_group
from .test_deaths import engine_of_device_1

pytestmark = pytest.mark.usefixtures("pooled_workers")

REUSED = {"steps_per_generation": 4, "num_iterations": 2, "max_steps": 8, "beta": 0.1}
"""Two updates of four optimizer steps each."""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, worker_pool: Any) -> GRPOTrainer:
    with worker_pool.in_use():
        return tiny_group.train(tmp_path_factory.mktemp("plain"), **REUSED)


def test_two_devices_fused_or_not_are_the_run_on_one(plain: GRPOTrainer, tmp_path: Path) -> None:
    """Trained by rounds of their own of the same tokens; the reference scores while others are generated, or after."""
    fused = tiny_group.train(tmp_path / "fused", num_devices=2, **REUSED)
    apart = tiny_group.train(tmp_path / "apart", num_devices=2, inter_stage_fusion=False, **REUSED)
    for trainer in (fused, apart):
        assert tiny.difference(trainer.model, plain.model) < tiny.ROUNDING
        assert [one["reward"] for one in logs(trainer)] == pytest.approx([one["reward"] for one in logs(plain)])
    assert tiny.difference(plain.model, tiny.policy()) > tiny.STEP


def test_the_sampler_is_what_is_trained(plain: GRPOTrainer) -> None:
    assert [entry["step"] for entry in logs(plain)] == [4, 8], "an update of four optimizer steps counts as four"
    for entry in logs(plain):
        assert entry["val/sampler_logprob_diff"] < 1e-5
        assert entry["grad_norm"] > 0
        assert entry["num_tokens"] > 0
        assert not [name for name in entry if not entry_of(name)], "docs/metrics.md has them all"
        assert entry.keys() >= {"tokens_per_s/training", "objective/kl_quartile_4", "completions/clipped_ratio"}
    assert logs(plain)[0]["learning_rate"] == pytest.approx(1e-2 * 5 / 8), "the last of its four steps"


def test_a_resumed_run_is_the_uninterrupted_one(plain: GRPOTrainer, tmp_path: Path) -> None:
    """A checkpoint that is due at step 3 is written when the update that it belongs to ends, at step 4."""
    saving = {"save_strategy": "steps", "save_steps": 3, **REUSED}
    whole = tiny_group.train(tmp_path, **saving)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-8"]
    resumed = tiny_group.trainer(tmp_path, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.state.global_step == 8
    for trainer in (whole, resumed):
        assert tiny.difference(trainer.model, plain.model) == 0


def test_a_reference_that_follows_is_resumed_to_the_bit(tmp_path: Path) -> None:
    """It moves in the middle of the update before the checkpoint and of the one after it; see also tests/parity."""
    following = {"sync_ref_model": True, "ref_model_sync_steps": 3, **REUSED}
    saving = {"save_strategy": "steps", "save_steps": 4, **following}
    whole = tiny_group.train(tmp_path, **saving)
    assert whole.ref_model is not None
    for num_devices, most in ((1, 0.0), (2, tiny.ROUNDING)):
        resumed = tiny_group.trainer(tmp_path, num_devices=num_devices, **saving)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
        assert resumed.ref_model is not None
        assert tiny.difference(resumed.ref_model, whole.ref_model) <= most
        assert tiny.difference(resumed.model, whole.model) <= most
    assert tiny.difference(whole.ref_model, tiny.policy()) > 10 * tiny.ROUNDING
    assert tiny.difference(whole.ref_model, whole.model) > 10 * tiny.ROUNDING
    staying = tiny_group.trainer(tmp_path, **{**saving, "sync_ref_model": False})
    with pytest.raises(ValueError, match="was written with sync_ref_model=1, this run has sync_ref_model=0: resume"):
        staying.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_a_dead_engine_costs_no_sample(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed when the first group is finished, which the other engine has; without a reference nobody is asked for
    scores. It is held up until then."""
    options: dict[str, Any] = {"num_devices": 2, "max_steps": 1, "max_completion_length": 100, "stop_token": "none"}

    def model() -> Any:
        return tiny.policy(max_position_embeddings=128)

    undisturbed = tiny_group.trainer(tmp_path / "undisturbed", model=model(), **options)
    undisturbed.max_new_tokens = dict.fromkeys(range(4), 4)
    undisturbed.train()
    engines: list[int] = []

    def kill_an_engine(completions: list[str], target: list[str], **kwargs: Any) -> list[float]:
        while engines:
            os.kill(engines.pop(), signal.SIGKILL)
        return tiny_group.count_target(completions, target)

    monkeypatch.setattr(generation_handle, "GenerationWorker", HeldUntilOthersCome)
    disturbed = tiny_group.trainer(tmp_path / "disturbed", model=model(), rewards=kill_an_engine, **options)
    disturbed.max_new_tokens = dict.fromkeys(range(4), 4)
    with caplog.at_level(logging.WARNING), disturbed.updates() as updates:
        engines.append(engine_of_device_1(disturbed))
        list(updates)
    assert "its samples go on elsewhere" in caplog.text
    assert tiny.difference(disturbed.model, undisturbed.model) < tiny.ROUNDING


def test_rewards_of_several_kinds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Plain, async, and of a model that reads text in its own tokens; one says nothing of a whole group."""
    states: list[TrainerState] = []

    async def brevity(completion_ids: list[list[int]], log_metric: Any, **kwargs: Any) -> list[float]:
        log_metric("longest", max(map(len, completion_ids)))
        return [-0.1 * len(ids) for ids in completion_ids]

    def of_one_prompt(
        prompts: list[str], completions: list[str], target: list[str], trainer_state: TrainerState, **kwargs: Any
    ) -> list[float | None]:
        states.append(trainer_state)
        assert len(prompts) == 4, "functions see whole groups"
        assert len(set(prompts)) == 1
        rewards = tiny_group.count_target(completions, target)
        return [None if prompts[0].endswith("a") else reward for reward in rewards]

    model = tiny.scorer(3)
    trainer = tiny_group.train(
        tmp_path,
        rewards=[brevity, of_one_prompt, model],
        reward_processing_classes=[None, None, tiny.tokenizer()],
        reward_weights=[0.5, 1.0, 2.0],
        max_steps=1,
    )
    (logged,) = logs(trainer)
    assert states[0] is trainer.state
    assert 1 <= logged["longest"] <= 8
    assert logged["rewards/brevity/mean"] == pytest.approx(-0.1 * logged["completions/mean_length"])
    assert {name for name in logged if name.startswith("rewards/")} >= {"rewards/of_one_prompt/std"}


def test_filters_reach_the_engines_and_functions_may_have_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the one likeliest token alone, the responses to a prompt are all the same."""
    monkeypatch.setattr(reward_calls, "_MOST_PROCESSES", 1)  # it imports what the trainer's state is of: seconds

    def share(completions: list[str], target: list[str], **kwargs: Any) -> list[float]:
        return [text.count(letter) / max(1, len(text)) for text, letter in zip(completions, target, strict=True)]

    options: dict[str, Any] = {"top_k": 1, "reward_workers": "process", "max_steps": 1}
    logged = logs(tiny_group.train(tmp_path, rewards=share, **options))[0]
    assert logged["frac_reward_zero_std"] == 1
    assert logs(tiny_group.train(tmp_path, max_steps=1))[0]["frac_reward_zero_std"] < 1


def test_what_several_reward_models_read(tmp_path: Path) -> None:
    """The text of prompt and completion, without the end token that was sampled, each in tokens of its own."""
    models: list[Any] = [tiny.scorer(3), tiny.scorer(4), tiny.scorer(5)]
    plain: Any = tiny.tokenizer()
    backwards = word_tokenizer([*tiny.VOCABULARY[:2], *tiny.VOCABULARY[:1:-1]], unknown="<pad>", splits=True)
    tokenizers: list[Any] = [plain, None, backwards, plain]
    trainer = tiny_group.trainer(
        tmp_path,
        rewards=[models[0], tiny_group.count_target, *models[1:]],
        reward_processing_classes=tokenizers,
        reward_weights=[1.0, 2.0, 3.0, 4.0],
        max_steps=1,
        num_devices=2,
    )
    assert [*trainer._models] == ["actor", "reward", "reward_1", "reward_2"], "the memory ledger counts each"
    with trainer.updates() as updates:
        samples = next(updates).samples
    for sample in samples:
        columns: Any = sample.columns
        response = plain.decode(sample.response_ids, skip_special_tokens=True)
        (said,) = tiny_group.count_target([response], [columns["target"]])
        of_models = []
        for model, tokenizer in zip(models, (plain, backwards, plain), strict=True):
            tokens = torch.tensor([tokenizer(columns["prompt"] + response)["input_ids"]])
            with torch.no_grad():
                of_models.append(float(model(tokens).logits))
        expected = [of_models[0], said, *of_models[1:]]
        assert sample.rewards == pytest.approx(expected, abs=1e-5)
        assert sample.score == pytest.approx(sum(weight * one for weight, one in enumerate(expected, 1)), abs=1e-4)
    assert any(sample.response_ids[-1] == 1 for sample in samples), "some end with the end token"


def test_samples_without_any_reward_teach_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def nothing(completions: list[str], **kwargs: Any) -> list[None]:
        return [None] * len(completions)

    with caplog.at_level(logging.WARNING):
        trainer = tiny_group.train(tmp_path, rewards=nothing, max_steps=1, adam_epsilon=1e-4)
    assert "no reward function returned a reward for 8 of 8 samples" in caplog.text
    assert "reward" not in logs(trainer)[0]
    assert tiny.difference(trainer.model, tiny.policy()) == 0


def test_conversations(tmp_path: Path) -> None:
    seen: list[Any] = []

    def last_words(prompts: Any, completions: Any, **kwargs: Any) -> list[float]:
        seen.append((prompts[0], completions[0]))
        return [float(len(messages[0]["content"])) for messages in completions]

    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    chats = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in tiny_group.rows()]
    tiny_group.train(tmp_path, rewards=last_words, train_dataset=chats, processing_class=tokenizer, max_steps=1)
    prompt, completion = seen[0]
    assert [message["role"] for message in (*prompt, *completion)] == ["user", "assistant"]


def test_evaluation_is_rewarded_and_logged(tmp_path: Path) -> None:
    trainer = tiny_group.train(
        tmp_path,
        eval_dataset=tiny_group.rows(3),
        eval_strategy="steps",
        eval_steps=1,
        num_generations_eval=2,
        num_sample_generations=0,
    )
    evaluations = [entry for entry in trainer.state.log_history if "eval_reward" in entry]
    assert [entry["step"] for entry in evaluations] == [1, 2]
    assert 0 <= evaluations[0]["eval_reward"] <= 1
    undisturbed = tiny_group.train(tmp_path / "undisturbed")
    assert tiny.difference(trainer.model, undisturbed.model) == 0


def test_rloo_learns_where_the_reference_is_in_the_reward(tmp_path: Path) -> None:
    trainer = tiny_group.train(tmp_path, algorithm=RLOOTrainer, num_devices=2, beta=0.1, max_steps=12)
    assert trainer.ref_model is not None
    rewards = [entry["reward"] for entry in logs(trainer)]
    assert sum(rewards[-4:]) > sum(rewards[:4])
    assert abs(logs(trainer)[-1]["kl"]) > 1e-4


def logs(trainer: GRPOTrainer) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]
