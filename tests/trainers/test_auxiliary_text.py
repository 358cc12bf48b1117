"""Rows of text beside samples: how they are read, in which order, and that runs learn them as one would by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fuse import GRPOTrainer, OnlineDPOTrainer
from fuse.intrastage.cost_profile import Shape
from fuse.trainers.auxiliary_text import AuxiliaryText, text_rows
from fuse.training.auxiliary import Text
from fuse.training.steps import OptimizerStep

from . import tiny, tiny_group

EOS = 1
LETTERS = {letter: index for index, letter in enumerate(tiny.VOCABULARY)}
ROWS = [{"prompt": "ab", "completion": "abc" * (1 + index % 3)} for index in range(6)]


def ids(text: str) -> tuple[int, ...]:
    return tuple(LETTERS[letter] for letter in text)


def written(directory: Path, rows: Sequence[Any] = ROWS) -> str:
    path = directory / "text.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(*rows: Any, **options: Any) -> list[Text]:
    return list(text_rows(rows, tiny.tokenizer(), **{"max_length": 64, **options}))


def test_of_a_response_its_tokens_and_its_end_are_learnt() -> None:
    for name in ("completion", "response", "chosen"):
        assert read({"prompt": "ab", name: "cde", "rejected": "n"}) == [Text((*ids("abcde"), EOS), (2, 3, 4, 5))]


def test_of_text_all_but_the_first_token_is_learnt_and_long_text_is_cut_into_rows() -> None:
    assert read({"text": "abc"}) == [Text((*ids("abc"), EOS), (1, 2, 3))]
    assert read({"story": "abcd"}, column="story", max_length=3) == [
        Text(ids("abc"), (1, 2)),
        Text((*ids("d"), EOS), (1,)),
    ]


def test_of_tokens_those_with_a_label_are_learnt() -> None:
    assert read({"input_ids": [2, 3, 4]}) == [Text((2, 3, 4), (1, 2))]
    assert read({"input_ids": [2, 3, 4], "labels": [-100, -100, 4]}) == [Text((2, 3, 4), (2,))]


def test_of_messages_the_last_is_learnt() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'user' %}n{% endif %}{% endfor %}"
    )
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    expected = [Text((*ids("anb"), EOS), (2, 3))]
    assert list(text_rows([{"messages": messages}], tokenizer, max_length=9)) == expected
    assert list(text_rows([{"prompt": messages[:1], "response": "b"}], tokenizer, max_length=9)) == expected


def test_what_is_too_long_is_cut_and_said(caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        {"prompt": "ab", "completion": "cd"},
        {"prompt": "abcd", "completion": "e"},
        {"prompt": "a", "completion": "b"},
    ]
    assert read(*rows, max_length=3) == [Text(ids("abc"), (2,)), Text((*ids("ab"), EOS), (1, 2))]
    assert "2 of 3 rows have more than 3 tokens and are cut, 1 of which have nothing to learn" in caplog.text


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (
            [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": ""}],
            "dataset row 1: there is no response",
        ),
        ([{"text": " "}], "dataset row 0: there is no text"),
        ([{"input_ids": [2], "labels": [2]}], "dataset row 0 has nothing to learn"),
        ([{"input_ids": [2, 3], "labels": [2]}], "dataset row 0: 2 input_ids and 1 labels"),
        ([{"messages": [{"role": "user", "content": "a"}]}], "dataset row 0: messages do not end with the assistant's"),
        (
            [{"question": "a"}],
            "rows have the columns question: give prompt and completion or response or chosen, messages",
        ),
        ([{"prompt": "", "completion": "b"}], "dataset row 0: an empty prompt"),
    ],
)
def test_rows_that_cannot_be_learnt_are_named(rows: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read(*rows)


def test_rows_are_drawn_in_seeded_passes_that_a_run_continues() -> None:
    rows = [Text((index, index), (1,)) for index in range(12)]
    text = AuxiliaryText(rows=rows, seed=3, batch_size=None, coef=1.0, largest=Shape(2, 2))
    steps = [OptimizerStep(micro_batches=((0, 1), (2,)), weight=0.5)] * 2

    def drawn(of: AuxiliaryText, update: int) -> list[int]:
        """Of an update, micro-batches of which are dealt by length."""
        made = of.beside(steps, update)
        assert all(sorted(len(batch.rows) for batch in step.auxiliary) == [1, 2] for step in made)
        return [row.input_ids[0] for step in made for batch in step.auxiliary for row in batch.rows]

    run = [row for update in (1, 2, 3, 4) for row in drawn(text, update)]
    assert sorted(run[:12]) == sorted(run[12:]) == list(range(12))
    assert run[:12] != run[12:]
    assert drawn(text, 4) == run[18:], "whoever asks first"
    other = AuxiliaryText(rows=rows, seed=4, batch_size=None, coef=1.0, largest=Shape(2, 2))
    assert drawn(other, 1) != run[:6]


def the_same(completions: list[str], **kwargs: Any) -> list[float]:
    return [1.0] * len(completions)


@pytest.mark.usefixtures("in_process_workers")
def test_without_rewards_that_differ_a_run_is_supervised_fine_tuning(tmp_path: Path) -> None:
    """Advantages are zero, so that what is left is a plain loop over the rows, in the order that is drawn."""
    trainer = tiny_group.trainer(
        tmp_path,
        rewards=the_same,
        auxiliary_dataset=written(tmp_path),
        auxiliary_coef=0.5,
        auxiliary_batch_size=4,
        max_steps=3,
        max_grad_norm=0.5,
        lr_scheduler_type="constant",
        num_devices=1,
    )
    model = tiny.policy()
    order = [trainer._text._row(place) for place in range(12)]  # type: ignore[union-attr]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    losses = []
    for step in range(3):
        rows = order[4 * step : 4 * step + 4]
        num_learnt = sum(len(row.learnt) for row in rows)
        optimizer.zero_grad()
        total = 0.0
        for row in rows:
            labels = torch.tensor([[token if i in row.learnt else -100 for i, token in enumerate(row.input_ids)]])
            mean = model(input_ids=torch.tensor([row.input_ids]), labels=labels).loss
            (0.5 * mean * len(row.learnt) / num_learnt).backward()
            total += mean.item() * len(row.learnt) / num_learnt
        losses.append(total)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    trainer.train()
    logged = [row["auxiliary/loss"] for row in trainer.state.log_history if "loss" in row]
    assert logged == pytest.approx(losses, rel=1e-4)
    assert tiny.difference(trainer.model, model) < tiny.ROUNDING


@pytest.mark.usefixtures("in_process_workers")
def test_a_resumed_run_goes_on_with_the_rows(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "num_sample_generations": 0,
        "total_episodes": 24,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    options |= {"auxiliary_dataset": written(tmp_path), "auxiliary_batch_size": 5, "auxiliary_coef": 1.0}
    whole = tiny.train(tmp_path / "whole", **options)
    resumed = tiny.trainer(tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert tiny.difference(resumed.policy_model, whole.policy_model) == 0.0
    without = tiny.train(tmp_path / "without", num_sample_generations=0, total_episodes=24)
    assert tiny.difference(without.policy_model, whole.policy_model) > 1e-3
    first, last = (whole.state.log_history[index]["auxiliary/loss"] for index in (0, 2))
    assert last < 0.9 * first, "the text is learnt"


@pytest.mark.usefixtures("pooled_workers")
def test_stages_fused_or_not_train_text_as_one_device_does(tmp_path: Path) -> None:
    """The critic takes more steps than the actor, whose text is dealt over them; plans see its micro-batches."""
    options: dict[str, Any] = {
        "auxiliary_dataset": written(tmp_path),
        "auxiliary_coef": 2.0,
        "num_sample_generations": 0,
        "num_ppo_epochs": 1,
        "critic_ppo_epochs": 2,
        "total_episodes": 24,
    }
    one = tiny.train(tmp_path / "one", num_micro_batches=1, **options)
    for fused in (True, False):
        two = tiny.train(tmp_path / f"fused-{fused}", num_devices=2, intra_stage_fusion=fused, **options)
        assert tiny.difference(two.policy_model, one.policy_model) < tiny.ROUNDING
        assert tiny.difference(two.value_model, one.value_model) < tiny.ROUNDING
        for row, other in zip(two.state.log_history, one.state.log_history, strict=True):
            assert row["auxiliary/loss"] == pytest.approx(other["auxiliary/loss"], rel=1e-3)


@pytest.mark.usefixtures("in_process_workers")
def test_pairs_and_groups_that_train_early_learn_text_too(tmp_path: Path) -> None:
    text = {"auxiliary_dataset": written(tmp_path), "auxiliary_coef": 1.0}
    for kind, options in ((GRPOTrainer, {"tail_training": "off"}), (GRPOTrainer, {}), (OnlineDPOTrainer, {})):
        made = tiny_group.train(tmp_path, algorithm=kind, **text, **options)
        losses = [row["auxiliary/loss"] for row in made.state.log_history if "auxiliary/loss" in row]
        assert len(losses) == 2
        assert losses[1] < losses[0]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"auxiliary_max_length": 65}, "auxiliary_max_length=65 is more than the model's context of 64"),
        ({"auxiliary_micro_batch_tokens": 9}, "auxiliary_micro_batch_tokens=9 has no room for a row of 10 tokens"),
        ({"trl_quirks": True}, "trl_quirks=True with auxiliary_dataset"),
        ({"auxiliary_coef": 0.0}, "auxiliary_coef=0.0 must be positive"),
        ({"auxiliary_batch_size": 0}, "auxiliary_batch_size=0 must be at least 1"),
        ({"auxiliary_dataset": None, "auxiliary_coef": 0.5}, "auxiliary_coef=0.5 without auxiliary_dataset"),
        ({"auxiliary_dataset": "nowhere.jsonl"}, "dataset nowhere.jsonl does not exist"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        tiny.trainer(tmp_path, **{"auxiliary_dataset": written(tmp_path), **options})


def test_rows_of_another_tokenizer_and_scoring_within_training_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rows hold token 99, the policy has 16: tokenise"):
        tiny.trainer(tmp_path, auxiliary_dataset=written(tmp_path, [{"input_ids": [2, 99]}]))
    options: dict[str, Any] = {"num_devices": 2, "actor_stages": 2, "forward_only": True, "old_logprobs": "trainer"}
    with pytest.raises(ValueError, match="forward_only=True with auxiliary_dataset"):
        tiny_group.trainer(tmp_path, auxiliary_dataset=written(tmp_path), **options)


def test_micro_batches_of_text_are_no_larger_than_those_of_samples_unless_a_row_is(tmp_path: Path) -> None:
    text = {"auxiliary_dataset": written(tmp_path)}
    assert tiny.trainer(tmp_path, **text)._text.largest == Shape(2, 10)  # type: ignore[union-attr]
    longer = tiny.trainer(tmp_path, **text, auxiliary_max_length=30)
    assert longer._text.largest == Shape(1, 30)  # type: ignore[union-attr]
    assert longer._settings.plan.longest == Shape(1, 30)
    more = tiny.trainer(tmp_path, **text, auxiliary_micro_batch_tokens=45)
    assert more._text.largest == Shape(4, 10)  # type: ignore[union-attr]
