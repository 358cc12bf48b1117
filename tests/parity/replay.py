"""fuse's PPOTrainer on what the oracle sampled, and how far it ends from where the oracle did."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fuse import PPOConfig, PPOTrainer
from fuse.engines.replay import ReplayEngine
from fuse.intrastage.adapters import base_of

from .cases import Case, build_dataset, build_models, build_tokenizer, draw_adapters, peft_config
from .oracle import Recording

METRIC_RTOL, METRIC_ATOL = 1e-3, 1e-6
WEIGHT_ATOL = 2e-5  # the oracle's weights move by 2e-3 and more

WALL_CLOCK_METRICS = frozenset({"eps"})
# Averages over padding too, in the oracle; without `trl_quirks`, over tokens.
PADDED_METRICS = frozenset({"policy/approxkl_avg", "policy/entropy_avg", "val/ratio", "val/ratio_var"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a run logged, one mapping per update, and its final weights."""

    metrics: tuple[Mapping[str, float], ...]
    policy: Mapping[str, Tensor]
    value: Mapping[str, Tensor]


class RecordedPrompts:
    """The oracle's batches of prompts, as a loader that makes passes over the dataset."""

    def __init__(self, queries: tuple[Tensor, ...], batches_per_pass: int) -> None:
        self._queries = iter(queries)
        self._batches_per_pass = batches_per_pass

    def __len__(self) -> int:
        return self._batches_per_pass

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for _, query in zip(range(self._batches_per_pass), self._queries, strict=False):
            yield {"input_ids": query}


class ReplayingTrainer(PPOTrainer):
    """Consumes the oracle's prompts and permutations instead of drawing its own."""

    def __init__(self, case: Case, recording: Recording, config: PPOConfig) -> None:
        models = build_models(case)
        self._prompts = RecordedPrompts(recording.queries, case.num_prompts // case.batch_size)
        super().__init__(
            args=config,
            processing_class=build_tokenizer(case),
            model=models.policy,
            ref_model=models.reference,
            reward_model=models.reward,
            train_dataset=build_dataset(case),
            value_model=models.value,
            peft_config=peft_config(case),
        )
        draw_adapters(self.policy_model)
        recordings = {
            index: (response.token_ids, response.logprobs) for index, response in enumerate(recording.responses)
        }
        # A lambda, for workers do not know this module: it travels to them by value.
        self._settings = replace(self._settings, engine=lambda *_: ReplayEngine(recordings))
        self._permutation = lambda update, epoch: recording.permutations[(update - 1) * config.num_ppo_epochs + epoch]

    def get_train_dataloader(self) -> Any:
        return self._prompts


def replay(case: Case, recording: Recording, output_dir: Path, **options: Any) -> Outcome:
    """Train `case` with fuse on the recorded rollouts; `options` go over the case's."""
    config = PPOConfig(output_dir=str(output_dir), bf16=False, **{**case.training_options, **options})
    trainer = ReplayingTrainer(case, recording, config)
    trainer.train()
    return Outcome(
        metrics=tuple(trainer.state.log_history),
        policy=base_of(trainer.policy_model).state_dict(),
        value=trainer.value_model.state_dict(),
    )


def mismatches(recording: Recording, outcome: Outcome, *, ignored: Collection[str] = ()) -> list[str]:
    """Every logged metric and every weight that is not the oracle's, in words; empty means parity."""
    found = []
    if len(outcome.metrics) != len(recording.metrics):
        found.append(f"{len(outcome.metrics)} updates, the oracle logged {len(recording.metrics)}")
    for theirs, ours in zip(recording.metrics, outcome.metrics, strict=False):
        for name, expected in theirs.items():
            if name in WALL_CLOCK_METRICS or name in ignored:
                continue
            got = ours.get(name, math.nan)
            if not math.isclose(got, expected, rel_tol=METRIC_RTOL, abs_tol=METRIC_ATOL):
                found.append(f"update {theirs['step']}: {name} is {got}, the oracle's is {expected}")
    for model, weights, got in (
        ("policy", recording.policy, outcome.policy),
        ("value", recording.value, outcome.value),
    ):
        if weights.keys() != got.keys():
            found.append(f"{model}: weights {sorted(weights.keys() ^ got.keys())} are in one of the two only")
        for name in weights.keys() & got.keys():
            difference = (weights[name] - got[name]).abs().max().item()
            if not difference <= WEIGHT_ATOL:
                found.append(f"{model} {name} is {difference:.1e} away from the oracle's")
    return found
