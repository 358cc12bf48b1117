"""Which rows of a dataset are used: masks count, what is too long is refused, left out or cut, by number."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from fuse import PPOTrainer
from fuse.config.prompt_tokens import PromptTokens
from fuse.trainers import prompt_checks, prompts
from fuse.trainers.prompt_checks import usable_prompts
from fuse.trainers.prompts import make_samples, prompt_tokens

from . import tiny, tiny_group

LONG = [[2] * 60, [3, 4], [5] * 70, [6] * 56]
"""The context has 64 tokens, of which a response takes 8."""


def rows(prompts: list[Any]) -> list[dict[str, Any]]:
    return [{"input_ids": prompt, "target": index} for index, prompt in enumerate(prompts)]


def trainer(output_dir: Path, dataset: Any, eval_dataset: Any = None, **options: Any) -> PPOTrainer:
    return PPOTrainer(
        args=tiny.config(output_dir, gradient_accumulation_steps=1, **options),
        processing_class=tiny.tokenizer(),
        model=tiny.policy(),
        ref_model=None,
        reward_model=tiny.count_a,
        train_dataset=dataset,
        value_model=tiny.scorer(1),
        eval_dataset=eval_dataset,
    )


def test_all_that_is_too_long_is_counted(tmp_path: Path) -> None:
    message = (
        "^dataset row 0 has 60 prompt tokens, more than the model's context of 64 less response_length=8, "
        "and so have 1 more of 4 rows: .*long_prompts"
    )
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, rows(LONG))


@pytest.mark.parametrize("make", [list, Dataset.from_list], ids=["list", "Dataset"])
def test_long_prompts_are_left_out(make: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="fuse"):
        made = trainer(tmp_path, make(rows(LONG)), eval_dataset=rows(LONG[1:3]), long_prompts="drop")
    assert caplog.messages == [
        "2 of 4 prompts of train_dataset have more than 56 tokens and are left out",
        "1 of 2 prompts of eval_dataset have more than 56 tokens and are left out",
    ]
    assert sorted(row["target"] for batch in made.get_train_dataloader() for row in batch) == [1, 3]
    assert [row["target"] for batch in made.get_eval_dataloader() for row in batch] == [0]


def test_long_prompts_keep_their_ends(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ends = [*range(2, 16)] * 5
    with caplog.at_level(logging.WARNING, logger="fuse"):
        made = trainer(tmp_path, rows([ends, [3, 4]]), long_prompts="truncate")
    assert caplog.messages == ["1 of 2 prompts of train_dataset have more than 56 tokens: their last 56 are used"]
    (batch,) = made.get_train_dataloader()
    prompts = {sample.prompt_ids for sample in made._training_samples(batch)}
    assert prompts == {tuple(ends[-56:]), (3, 4)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"long_prompts": "drop"}, "2 of 2 prompts of train_dataset have more than 56 tokens, .* leaves none"),
        ({"long_prompts": "cut"}, "long_prompts='cut' is unknown: use 'error', 'drop' or 'truncate'"),
        ({"long_prompts": "drop", "response_length": 64}, "response_length=64 leaves no room for prompts in .* of 64"),
        ({"long_prompts": "truncate", "response_length": 70}, "response_length=70 leaves no room"),
    ],
)
def test_what_leaves_no_prompts_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        trainer(tmp_path, rows([[2] * 57, [2] * 58]), **options)
    assert "\n" not in str(refusal.value)


def masked(tokens: list[int], mask: list[int]) -> dict[str, Any]:
    return {"input_ids": tokens, "attention_mask": mask, "target": 0}


def test_tokens_that_a_mask_leaves_out_do_not_count(tmp_path: Path) -> None:
    padded = [masked([0] * 60 + [5, 6], [0] * 60 + [1, 1]), masked([99, 7, 0], [0, 1, 1])]
    made = trainer(tmp_path, padded)
    (batch,) = made.get_train_dataloader()
    assert {sample.prompt_ids for sample in make_samples(batch, 0, 0)} == {(5, 6), (7, 0)}
    _, lengths = usable_prompts(padded, "train_dataset", tiny.policy().config, tiny.config(tmp_path), 0)
    assert prompt_tokens([lengths, [5]]) == PromptTokens(2, 5)
    assert prompt_tokens([lengths, [5]], 1) == PromptTokens(1, 1), "of which one is kept"
    assert prompt_tokens([lengths, [5]], collates=True) == PromptTokens(2)


def test_prompts_are_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    right = prompts.counted_tokens

    def counted_tokens(row: Any, index: int) -> list[int]:
        counted.append(index)
        return right(row, index)

    for module in (prompts, prompt_checks):
        monkeypatch.setattr(module, "counted_tokens", counted_tokens)
    tiny_group.trainer(tmp_path, eval_dataset=tiny_group.rows(3))
    assert counted == [*range(16), *range(3)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (masked([5, 6], [0, 0]), "row 1 has an empty prompt"),
        (masked([5, 6], [1]), "row 1 has 2 input_ids and an attention_mask of 1"),
        ({"input_ids": ["a"], "target": 0}, "row 1 has 'a' among its input_ids: they are"),
        ({"input_ids": [2.5], "target": 0}, "row 1 has '2.5' among its input_ids"),
        ({"input_ids": [[2, 3]], "target": 0}, r"row 1 has '\[2, 3\]' among its input_ids"),
        ({"input_ids": None, "target": 0}, "row 1 has input_ids of type NoneType, not a list"),
        ({"input_ids": [2, 16], "target": 0}, "row 1 holds token 16, the models have 16: tokenise with"),
        ({"input_ids": [2, -100], "target": 0}, "row 1 has '-100' among its input_ids"),
    ],
)
def test_rows_that_are_no_prompts_are_refused(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    first = {**dict.fromkeys(row), "input_ids": [2], "target": 0}
    with pytest.raises(ValueError, match=message) as refusal:
        trainer(tmp_path, [first, row])
    assert "\n" not in str(refusal.value)


def test_the_end_token_alone_is_no_prompt_where_it_pads(tmp_path: Path) -> None:
    made = tiny.tokenizer()
    made.pad_token = made.eos_token
    with pytest.raises(ValueError, match="row 1 has an empty prompt"):
        PPOTrainer(
            args=tiny.config(tmp_path),
            processing_class=made,
            model=tiny.policy(),
            ref_model=None,
            reward_model=tiny.count_a,
            train_dataset=rows([[2], [made.eos_token_id]] * 4),
            value_model=tiny.scorer(1),
        )


def test_evaluation_prompts_are_all_used(tmp_path: Path) -> None:
    for count in (3, 8, 11):
        made = trainer(tmp_path, tiny.rows(), eval_dataset=tiny.rows(count), per_device_eval_batch_size=8)
        assert [row["target"] for batch in made.get_eval_dataloader() for row in batch] == [*range(count)]
