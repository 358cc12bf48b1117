"""What the trainer refuses before anything has started: one line each, with the remedy."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from fuse import PPOTrainer

from . import tiny

Change = Callable[[dict[str, Any]], None]


def _arguments(output_dir: Path) -> dict[str, Any]:
    return {
        "args": tiny.config(output_dir),
        "processing_class": tiny.tokenizer(),
        "model": tiny.policy(),
        "ref_model": None,
        "reward_model": tiny.count_a,
        "train_dataset": tiny.rows(),
        "value_model": tiny.scorer(1),
    }


def _no_padding(arguments: dict[str, Any]) -> None:
    arguments["processing_class"].pad_token = None


def _same_models(arguments: dict[str, Any]) -> None:
    arguments["ref_model"] = arguments["model"]


def _option(**options: Any) -> Change:
    def change(arguments: dict[str, Any]) -> None:
        arguments["args"] = tiny.config(Path(arguments["args"].output_dir), **options)

    return change


def _replace(**replacements: Any) -> Change:
    return lambda arguments: arguments.update(replacements)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_no_padding, "no pad token: set tokenizer.pad_token"),
        (_same_models, "model and ref_model are the same object"),
        (_replace(train_dataset=None), "train_dataset is None"),
        (_replace(train_dataset=datasets.DatasetDict({"train": [], "test": []})), "train_dataset is a DatasetDict"),
        (
            _replace(train_dataset=iter(tiny.rows())),
            "train_dataset is a list_iterator, of which rows cannot be counted",
        ),
        (_replace(eval_dataset={"train": tiny.rows()}), r"eval_dataset is a dict .*eval_dataset\['train'\]"),
        (_replace(value_model=None), "value_model is None"),
        (_replace(reward_model=3), "reward_model is 3: pass a sequence classifier"),
        (_replace(peft_config=object()), "peft_config is not supported"),
        (_replace(optimizers=(object(), None)), "optimizers must be"),
        (_replace(train_dataset=tiny.rows(7)), "7 rows, fewer than one batch of 8"),
        (_replace(train_dataset=[{"text": "a"}] * 8), "no column 'input_ids' .it has: text."),
        (_replace(train_dataset=[{"input_ids": []}] * 8), "row 0 has an empty prompt"),
        (_replace(train_dataset=[{"input_ids": [2] * 60}] * 8), "row 0 has 60 prompt tokens.* context of 64"),
        (_replace(train_dataset=[{"input_ids": [99]}] * 8), "row 0 holds token 99, the models have 16"),
        (_replace(value_model=tiny.scorer(1, vocab_size=12)), "vocabulary mismatch: the policy has 16.*value_model"),
        (_replace(ref_model=tiny.policy(vocab_size=32)), "vocabulary mismatch: the policy has 16.*ref_model has 32"),
        (_option(num_mini_batches=3), "num_mini_batches=3 does not divide the batch of 8"),
        (_option(whiten_rewards=True, num_mini_batches=2), "whiten_rewards needs mini-batches of at least 8"),
        (_option(num_devices=2, actor_stages=3), "actor_stages=3 neither divides the 2 pipeline ranks"),
        (_option(num_devices=2, actor_stages=1, num_mini_batches=4), "cannot feed 2 data-parallel replicas"),
    ],
)
def test_refused_with_one_line_and_nothing_written(change: Change, message: str, tmp_path: Path) -> None:
    output_dir = tmp_path / "out"
    arguments = _arguments(output_dir)
    change(arguments)
    with pytest.raises(ValueError, match=message) as refusal:
        PPOTrainer(**arguments)
    assert "\n" not in str(refusal.value)
    assert not output_dir.exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"engine": "vllm"}, r"needs vLLM 0\.32, which is not installed"),
        ({"kv_transfer": "nixl"}, r"kv_transfer='nixl' needs nixl 1\.5\.1, which is not installed"),
    ],
)
def test_a_missing_package_is_reported_before_anything_starts(
    option: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ValueError, match=message):
        tiny.trainer(tmp_path, **option)


def test_there_must_be_something_to_resume_from(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path / "out")
    with pytest.raises(ValueError, match="no checkpoint to resume from"):
        trainer.train(resume_from_checkpoint=True)
