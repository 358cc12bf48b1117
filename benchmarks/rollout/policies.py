"""`fuse bench rollout` without `--against`: whole rollouts, generation and inference, under each migration policy.

The same samples of the same lengths on real workers, policies in turn. Beside each the simulator's makespan, with costs
that were measured on these workers in the same rounds, and that of an oracle that knows all lengths.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from transformers import PreTrainedModel

from fuse.benchmarks.measure import idle_shares
from fuse.benchmarks.options import Row
from fuse.commands.models import critic_from_policy
from fuse.config.ppo import PPOConfig
from fuse.config.prompt_tokens import PromptTokens
from fuse.config.settings import fleet_settings
from fuse.driver.fleet import Fleet
from fuse.driver.rollout_state import RolloutReport
from fuse.engines.engine import SamplingParams
from fuse.interstage.adaptive import Adaptive
from fuse.interstage.costs import CostModel
from fuse.interstage.lengths import KnownLengths, Observation, learn
from fuse.interstage.migration import Policy, StageByStage, Threshold
from fuse.interstage.rollout import Rollout
from fuse.interstage.simulate import simulate
from fuse.interstage.tuning import LengthHistory, tune_threshold
from fuse.sample import Sample, SpecialTokens
from fuse.trace import now_s
from fuse.trainers.ppo import algorithm_of, fill_batch_sizes
from fuse.training.layout import RaggedLayout

POLICIES = ("none", "threshold", "adaptive")
_CALIBRATION_ROUNDS = 3
_NO_TOKEN = -1


def run_policies(
    model: PreTrainedModel, mixes: Mapping[str, tuple[Sequence[int], Sequence[int]]], arguments: argparse.Namespace
) -> list[Row]:
    """A row per mix and policy. mixes: by name, the lengths of the batch and those of the past."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="fuse-bench-") as directory, _fleet(model, directory, arguments) as fleet:
        for name, (lengths, past) in mixes.items():
            for row in _Mix(fleet, model, name, lengths, past, arguments).rows():
                print(format_row(row), flush=True)
                rows.append(row)
    return rows


def _fleet(model: PreTrainedModel, directory: str, arguments: argparse.Namespace) -> Fleet:
    """Workers with the model in all roles: what is timed is the same as with different weights."""
    config = PPOConfig(
        output_dir=directory,
        num_devices=arguments.devices,
        engine=arguments.engine,
        engine_batch_size=arguments.batch,
        response_length=arguments.context - arguments.prompt_tokens,
        balance_stages=False,
        intra_stage_fusion=False,
        report_to="none",
        use_cpu=True,
    )
    classifier = critic_from_policy(model, pad_token_id=0)
    special = SpecialTokens(pad=_NO_TOKEN, eos=(), stop=())
    prompts = PromptTokens(arguments.prompt_tokens, arguments.prompt_tokens)
    length = fill_batch_sizes(config, num_rows=arguments.batch)
    settings = fleet_settings(
        config, algorithm_of(config, special), length, RaggedLayout(), special, prompts, model.config
    )
    models = {"actor": model, "critic": classifier, "reference": model, "reward": classifier}
    return Fleet(settings, models)


class _Mix:
    """One batch of forced lengths, rolled out over and over."""

    def __init__(
        self,
        fleet: Fleet,
        model: PreTrainedModel,
        name: str,
        lengths: Sequence[int],
        past: Sequence[int],
        arguments: argparse.Namespace,
    ) -> None:
        self._fleet, self._name, self._arguments = fleet, name, arguments
        generator = np.random.default_rng(0)
        vocab_size = model.config.get_text_config().vocab_size
        self._prompts = generator.integers(0, vocab_size, (len(lengths), arguments.prompt_tokens)).tolist()
        self._lengths, self._past = np.array(lengths), np.array(past)
        self._limits = fleet.settings.rollout.limits
        self._tokens: tuple[tuple[int, ...], ...] | None = None

    def rows(self) -> list[Row]:
        """Calibrate, then time all policies in turn."""
        staying = Threshold(remaining=len(self._lengths), num_kept=self._arguments.devices)
        for shrink in range(1, 1 + _CALIBRATION_ROUNDS):  # other batches and contexts than the one that is timed, too
            self._roll_out(staying, len(self._lengths) // shrink)
        costs = self._fleet.rollout_costs
        assert costs is not None
        policies = self._policies(costs)
        runs: dict[str, list[_Run]] = {name: [] for name in policies}
        costs_of_rounds: list[CostModel] = []
        num_rounds = 1 + self._arguments.repeats
        print(f"{self._name}: {int(self._lengths.sum())} tokens, {num_rounds} rounds ...", file=sys.stderr, flush=True)
        for round_index in range(num_rounds):
            for name, policy in policies.items():
                run = self._roll_out(policy, len(self._lengths))
                if round_index:
                    runs[name].append(run)
            if round_index:  # shared machines are now faster, now slower: costs are those of the latest rollouts
                costs_of_rounds.append(self._fleet.rollout_costs or costs)

        def simulated_s(policy_with: Callable[[CostModel], Policy]) -> float:
            return statistics.median(self._simulated(each, policy_with(each)) for each in costs_of_rounds)

        simulated = {name: simulated_s(partial(_given, policy)) for name, policy in policies.items()}
        told = simulated_s(lambda costs: Adaptive(costs, KnownLengths(self._lengths)))
        return [self._row(name, runs, simulated, min(told, *simulated.values())) for name in policies]

    def _row(self, name: str, runs: Mapping[str, Sequence[_Run]], simulated: Mapping[str, float], oracle: float) -> Row:
        """One policy; seconds and shares are medians over repeats.

        oracle_seconds: simulated, of the best of all policies and of the adaptive one told all lengths.
        gain: of `none`'s seconds over these.
        decision_ms: from news to the calls it leads to, median over decisions; workers do not wait for it.
        """

        def middle(figure: Callable[[_Run], float], policy: str = name) -> float:
            return statistics.median(map(figure, runs[policy]))

        seconds = middle(lambda run: run.report.makespan_s)
        return {
            "lengths": self._name,
            "engine": self._arguments.engine,
            "policy": name,
            "num_samples": len(self._lengths),
            "num_tokens": int(self._lengths.sum()),
            "seconds": seconds,
            "generation_seconds": middle(lambda run: run.report.generation_s),
            "idle_share": middle(lambda run: run.idle_share),
            "migrations": middle(lambda run: run.report.num_migrations),
            "moved_bytes": middle(lambda run: run.report.moved_bytes),
            "simulated_seconds": simulated[name],
            "oracle_seconds": oracle,
            "gain": middle(lambda run: run.report.makespan_s, POLICIES[0]) / seconds,
            "simulated_gain": simulated[POLICIES[0]] / simulated[name],
            "decision_ms": 1e3 * middle(lambda run: statistics.median(run.report.decision_s)),
        }

    def _policies(self, costs: CostModel) -> dict[str, Policy]:
        history = LengthHistory(
            prompt_tokens=np.full(len(self._past), self._arguments.prompt_tokens), response_tokens=self._past
        )
        threshold = tune_threshold(
            history,
            num_samples=len(self._lengths),
            num_devices=self._arguments.devices,
            costs=costs,
            limits=self._limits,
        )
        model = learn([Observation(int(tokens)) for tokens in self._past], self._limits.max_new_tokens)
        made: tuple[Policy, ...] = (StageByStage(), threshold, Adaptive(costs, model.for_samples()))
        return dict(zip(POLICIES, made, strict=True))

    def _simulated(self, costs: CostModel, policy: Policy) -> float:
        rollout = Rollout(
            prompt_tokens=np.full(len(self._lengths), self._arguments.prompt_tokens),
            response_tokens=self._lengths,
            num_devices=self._arguments.devices,
            costs=costs,
            limits=self._limits,
        )
        return simulate(rollout, policy).makespan_s

    def _roll_out(self, policy: Policy, num_samples: int) -> _Run:
        """The first samples of the batch; the same tokens every time."""
        samples = [Sample(index, tuple(prompt)) for index, prompt in enumerate(self._prompts[:num_samples])]
        params = SamplingParams(seed=0, temperature=1.0, max_new_tokens=self._limits.max_new_tokens)
        forced = {index: int(tokens) for index, tokens in enumerate(self._lengths)}
        start_s = now_s()
        report = self._fleet.roll_out(samples, params, policy=policy, max_new_tokens=forced)
        idle = idle_shares(self._fleet.drain_spans(), start_s, start_s + report.makespan_s)
        assert [len(sample.response_ids) for sample in samples] == self._lengths[:num_samples].tolist()
        if num_samples == len(self._lengths):
            tokens = tuple(tuple(sample.response_ids) for sample in samples)
            assert self._tokens in (None, tokens), "tokens depend on the policy"
            self._tokens = tokens
        return _Run(report, statistics.mean(idle.values()))


@dataclass(frozen=True, slots=True)
class _Run:
    report: RolloutReport
    idle_share: float


def _given(policy: Policy, costs: CostModel) -> Policy:
    return policy


def format_row(row: Row) -> str:
    """One line for people."""
    return (
        f"{row['lengths']}, {row['policy']}: {row['seconds']:.2f} s ({row['gain']:.2f} times as fast as none; "
        f"simulated {row['simulated_seconds']:.2f} s and {row['simulated_gain']:.2f}, oracle "
        f"{row['oracle_seconds']:.2f} s), idle {row['idle_share']:.0%}, {row['migrations']:.0f} migrations"
    )
