"""The learning rates of a run: one schedule, from which every role has its own rate or all have the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from fuse.config.run import RunConfig

LearningRates = Mapping[str, float]
"""By role."""


def learning_rate_schedule(
    args: RunConfig, model: nn.Module, num_steps: int
) -> tuple[torch.optim.Optimizer, LRScheduler]:
    """The schedule that `args` names over so many steps.

    Its optimizer holds the parameters but no gradients: the workers' optimizers are the ones that step. Its first group
    has `learning_rate`; behind it there is one for each rate of `args.own_learning_rates`.

    Raises:
        ValueError: `lr_scheduler_kwargs` that the schedule does not take.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    for rate in args.own_learning_rates.values():
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": rate})
    assert not isinstance(args.lr_scheduler_kwargs, str), "TrainingArguments parses it"
    try:
        schedule = get_scheduler(
            args.lr_scheduler_type,
            optimizer,
            num_warmup_steps=args.get_warmup_steps(num_steps),
            num_training_steps=num_steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
    except TypeError as error:
        name = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
        raise ValueError(
            f"lr_scheduler_kwargs={args.lr_scheduler_kwargs!r} do not fit lr_scheduler_type={name!r} ({error}): "
            f"give what transformers.get_scheduler takes for it"
        ) from error
    optimizer.step()  # without gradients: tells the schedule that the workers step
    return optimizer, schedule


def learning_rates(args: RunConfig, schedule: LRScheduler, roles: Iterable[str]) -> dict[str, float]:
    """Of these roles, where the schedule is now."""
    common, *own = map(float, schedule.get_last_lr())
    return dict.fromkeys(roles, common) | dict(zip(args.own_learning_rates, own, strict=True))


def logged_rates(args: RunConfig, schedule: LRScheduler, name: str) -> dict[str, float]:
    """What is logged: the common rate as `name`, and others behind it by their roles."""
    common, *own = map(float, schedule.get_last_lr())
    return {name: common} | {f"{name}/{role}": rate for role, rate in zip(args.own_learning_rates, own, strict=True)}


def restore_learning_rates(schedule: LRScheduler, saved: Mapping[str, Any], checkpoint: Path) -> None:
    """Go on where the schedule of a checkpoint was.

    Raises: ValueError where that had rates for other roles.
    """
    before, now = len(saved["base_lrs"]), len(schedule.base_lrs)
    if before != now:
        had = "a critic_learning_rate" if before > now else "no critic_learning_rate"
        raise ValueError(
            f"{checkpoint} was written with {had}, and this run has {'none' if before > now else 'one'}: resume with "
            "the same or start afresh"
        )
    schedule.load_state_dict(dict(saved))
