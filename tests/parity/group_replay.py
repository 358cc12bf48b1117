"""fuse's trainers on what the oracle sampled, and how far they end from where it did."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fuse import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from fuse.engines.replay import ReplayEngine

from .cases import draw_adapters
from .group_cases import GroupCase, build_dataset, build_policy, build_tokenizer, peft_config, reward_functions
from .group_oracle import GroupRecording

METRIC_RTOL, METRIC_ATOL = 1e-3, 2e-6
WEIGHT_ATOL = 1e-5  # the oracle's weights move by 1e-3 and more

WALL_CLOCK = frozenset({"step_time"})
OF_ROLLOUTS = ("reward", "frac_reward", "completions/", "num_tokens")
"""What the oracle logs at the steps alone at which it generates."""

_TRAINERS = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupOutcome:
    """What a run logged, one mapping per update, and its final weights."""

    metrics: tuple[Mapping[str, float], ...]
    policy: Mapping[str, Tensor]


class RecordedRows:
    """The oracle's prompts, one row per group, by update."""

    def __init__(self, updates: Sequence[Sequence[dict[str, Any]]]) -> None:
        self._updates = updates

    def __len__(self) -> int:
        return len(self._updates)

    def __iter__(self) -> Iterator[Sequence[dict[str, Any]]]:
        return iter(self._updates)


def replay(case: GroupCase, recording: GroupRecording, output_dir: Path, **options: Any) -> GroupOutcome:
    """Train `case` with fuse on the recorded rollouts; `options` go over the case's."""
    trainer_class, config_class = _TRAINERS[case.algorithm]
    config = config_class(output_dir=str(output_dir), **{**case.training_options, **options})
    policy = build_policy(case)
    trainer = trainer_class(
        model=policy,
        reward_funcs=reward_functions(case),
        args=config,
        train_dataset=build_dataset(),
        processing_class=build_tokenizer(),
        peft_config=peft_config(case),
    )
    draw_adapters(policy)
    rows = {row["prompt"]: row for row in trainer.train_dataset}
    size, count = config.num_generations, config.rollouts_per_update
    by_rollout = [[rows[one["prompt"]] for one in rollout.prompts[::size]] for rollout in recording.rollouts]
    updates = [[*chain(*by_rollout[first : first + count])] for first in range(0, len(by_rollout), count)]
    samples = [
        (tokens, logprobs)
        for rollout in recording.rollouts
        for tokens, logprobs in zip(rollout.responses, rollout.logprobs, strict=True)
    ]
    recordings = dict(enumerate(samples))
    # A lambda, for workers do not know this module: it travels to them by value.
    trainer._settings = replace(trainer._settings, engine=lambda *_: ReplayEngine(recordings))
    trainer._permutation = lambda update, index: np.array(recording.rollouts[(update - 1) * count + index].order)
    trainer.get_train_dataloader = lambda: RecordedRows(updates)
    trainer.train()
    return GroupOutcome(metrics=tuple(trainer.state.log_history), policy=policy.state_dict())


def mismatches(recording: GroupRecording, outcome: GroupOutcome, *, ignored: Collection[str] = ()) -> list[str]:
    """Every logged metric and every weight that is not the oracle's, in words; empty means parity.

    An update of several optimizer steps logs the means of what the oracle logs of each.
    """
    found = []
    done = 0
    for ours in outcome.metrics:
        steps = recording.metrics[done : int(ours["step"])]
        done = int(ours["step"])
        names = {name for step in steps for name in step}
        for name in names - WALL_CLOCK - {*ignored, "step", "epoch"}:
            theirs = [step[name] for step in steps if step.get(name) is not None]
            if name == "num_tokens" or name == "learning_rate":
                expected = theirs[-1]
            else:
                expected = math.nan if not theirs else sum(theirs) / len(theirs)
            got = ours.get(name, math.nan)
            if not (math.isclose(got, expected, rel_tol=METRIC_RTOL, abs_tol=METRIC_ATOL) or got != got != expected):
                found.append(f"step {done}: {name} is {got}, the oracle's is {expected}")
    if done != len(recording.metrics):
        found.append(f"{done} steps, the oracle logged {len(recording.metrics)}")
    for name, weight in recording.policy.items():
        difference = (weight - outcome.policy[name]).abs().max().item()
        if not difference <= WEIGHT_ATOL:
            found.append(f"{name} is {difference:.1e} away from the oracle's")
    return found
