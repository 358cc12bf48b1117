"""An advantage model rewards runs: every response scores what one process computes of both positions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fuse import PPOTrainer
from fuse.commands.make_trainer import _critic
from fuse.commands.models import load_classifier
from fuse.trainers.group_rewards import _model_tokens
from fuse.training.advantage_model import EXPECTED_REWARD, REWARD

from .. import tiny_models
from ..tiny_models import build, word_tokenizer
from . import tiny, tiny_group


def advantage_model() -> Any:
    model = build(tiny_models.advantage_model(**tiny.OPTIONS), seed=2)
    torch.nn.init.normal_(model.score.weight, std=0.5)
    return model


@torch.no_grad()
def advantage(model: Any, prompt: Sequence[int], response: Sequence[int]) -> float:
    hidden = model.model(torch.tensor([[*prompt, *response]])).last_hidden_state[0]
    outputs = model.score(hidden)
    return float(outputs[-1, REWARD] - outputs[len(prompt) - 1, EXPECTED_REWARD])


@pytest.mark.usefixtures("in_process_workers")
@pytest.mark.parametrize("scoring", ["whole", "sharded"])
def test_ppo_scores_what_one_process_computes(scoring: str, tmp_path: Path) -> None:
    model = advantage_model()
    trainer = PPOTrainer(
        args=tiny.config(tmp_path, num_devices=1, total_episodes=8, scoring=scoring, save_strategy="no"),
        processing_class=tiny.tokenizer(),
        model=tiny.policy(),
        ref_model=None,
        reward_model=model,
        train_dataset=tiny.rows(),
        value_model=tiny.scorer(1),
    )
    with trainer.updates() as updates:
        samples = [sample for iteration in updates for sample in iteration.samples]
    scores = [one.scores["reward"] for one in samples if one.scores is not None]
    expected = [advantage(model, one.prompt_ids, one.response_ids[: one.length]) for one in samples]
    assert scores == pytest.approx(expected, abs=1e-5)
    assert len({round(score, 4) for score in scores}) > 4


@pytest.mark.usefixtures("in_process_workers")
def test_a_run_without_a_critic_reads_it_in_its_own_tokens(tmp_path: Path) -> None:
    """From its directory, with letters of other numbers."""
    model = advantage_model()
    own = word_tokenizer([*reversed(tiny.VOCABULARY)], unknown=tiny.VOCABULARY[0], splits=True, pad_token="<pad>")
    model.save_pretrained(tmp_path / "reward")
    own.save_pretrained(tmp_path / "reward")
    made = tiny_group.trainer(tmp_path, rewards=str(tmp_path / "reward"), max_steps=1)
    with made.updates() as updates:
        samples = [sample for iteration in updates for sample in iteration.samples]
    for sample in samples:
        text = tiny.tokenizer().decode(sample.response_ids[: sample.length], skip_special_tokens=True)
        prompt, response = (
            own(one, add_special_tokens=False).input_ids for one in (str(sample.columns["prompt"]), text)
        )
        assert sample.rewards[0] == pytest.approx(advantage(model, prompt, response), abs=1e-5)


def test_a_prompt_ends_before_a_token_that_is_partly_the_responses() -> None:
    tokenizer = word_tokenizer({"a": 0, "b": 1, "<unk>": 2}, unknown="<unk>", splits=True)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert _model_tokens(tokenizer, "ab", "ba") == ((0, 1), (1, 0))
    assert _model_tokens(tokenizer, [{"role": "user", "content": "ab"}], "b") == ((0, 1), (1,))

    class Merging:
        def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
            return {"input_ids": [len(text[index : index + 2]) * 10 + index for index in range(0, len(text), 2)]}

    assert _model_tokens(Merging(), "abc", "de") == ((20,), (22, 14))
    assert _model_tokens(Merging(), "a", "b") == ((20,), ())


def test_its_critic_has_its_layers_and_expects_nothing(tmp_path: Path) -> None:
    model = advantage_model()
    model.save_pretrained(tmp_path)
    loaded = load_classifier(str(tmp_path))
    critic = _critic(None, loaded, tiny.policy(), pad_token_id=0)
    assert critic.config.num_labels == 1
    tokens = torch.tensor([[3, 4, 5]])
    assert critic(input_ids=tokens).logits.item() == 0
    torch.testing.assert_close(critic.base_model(tokens).last_hidden_state, model.base_model(tokens).last_hidden_state)


def test_it_is_no_critic(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="value_model is a LlamaForSequenceClassification with 2 labels, none of"):
        PPOTrainer(
            args=tiny.config(tmp_path, num_devices=1),
            processing_class=tiny.tokenizer(),
            model=tiny.policy(),
            ref_model=None,
            reward_model=advantage_model(),
            train_dataset=tiny.rows(),
            value_model=advantage_model(),
        )
