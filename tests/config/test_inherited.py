"""Every option of transformers.TrainingArguments works, cannot matter, or is refused by name."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from fuse import PPOConfig
from fuse.config import inherited

_FIELDS = {field.name: field for field in dataclasses.fields(TrainingArguments)}


def test_every_option_is_in_one_list() -> None:
    lists = (inherited.WORKS, inherited.CANNOT_MATTER.keys(), inherited.REMEDIES.keys())
    in_no_one = {name for name in _FIELDS if sum(name in one for one in lists) != 1}
    assert in_no_one == set()


def _other(default: Any) -> Any:
    if isinstance(default, bool):
        return not default
    return default + 1 if isinstance(default, (int, float)) else "other"


@pytest.mark.parametrize("name", sorted(inherited.REMEDIES.keys() & _FIELDS.keys()))
def test_what_would_have_no_effect_is_refused_by_name(name: str, tmp_path: Path) -> None:
    value = _other(_FIELDS[name].default)
    line = f"{name}={value!r} is not supported: {inherited.REMEDIES[name]}"
    with pytest.raises(ValueError, match=f"^{re.escape(line)}$"):
        PPOConfig(output_dir=str(tmp_path), use_cpu=True, **{name: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"save_strategy": "epoch"},
            "save_strategy='epoch' is not supported: set save_strategy='steps' and save_",
        ),
        ({"save_strategy": "best"}, "save_strategy='best' is not supported: set save_strategy='steps' and save_steps"),
        ({"eval_strategy": "epoch"}, "eval_strategy='epoch' is not supported: set eval_strategy='steps'"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "lr_scheduler_type='reduce_lr_on_plateau' is not supported"),
        (
            {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"},
            "lr_scheduler_type='reduce_lr_on_plateau' is not supported: .* choose another",
        ),
        ({"lr_scheduler_type": "greedy", "eval_strategy": "steps"}, "lr_scheduler_type='greedy' is not supported"),
        ({"hub_strategy": "checkpoint"}, "hub_strategy='checkpoint' is not supported: .*'end'"),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, "gradient_checkpointing_kwargs=.* leave it out"),
        ({"max_steps": 0}, "max_steps=0 must be at least 1, or -1 for no limit"),
    ],
)
def test_a_value_without_effect_is_refused_in_one_line(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        PPOConfig(output_dir=str(tmp_path), use_cpu=True, **options)
    assert "\n" not in str(refusal.value)


def test_an_option_that_a_later_transformers_adds_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inherited, "WORKS", inherited.WORKS - {"weight_decay"})
    PPOConfig(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match=r"weight_decay=0\.5 is not supported: leave it out"):
        PPOConfig(output_dir=str(tmp_path), use_cpu=True, weight_decay=0.5)


def test_what_scripts_for_trl_set_is_accepted(tmp_path: Path) -> None:
    config = PPOConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        eval_strategy="steps",
        eval_steps=100,
        remove_unused_columns=False,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        dataloader_num_workers=2,
        do_train=True,
    )
    copied = dataclasses.replace(config, seed=1)
    assert (copied.seed, copied.eval_steps) == (1, 100)
