"""`fuse bench rollout` without `--against`: whole rollouts, generation and inference, under each migration policy.

The same samples of the same lengths on real workers, policies in turn. Beside each the simulator's makespan, with costs
that were measured on these workers until each rollout's end, and that of an oracle that knows all lengths.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from transformers import PreTrainedModel

from fuse.benchmarks.lengths import Mix
from fuse.benchmarks.measure import alternate, idle_shares
from fuse.benchmarks.options import Row, tell
from fuse.benchmarks.rollout.fleet import model_fleet
from fuse.driver.fleet import Fleet
from fuse.driver.rollout_state import RolloutReport
from fuse.engines.engine import SamplingParams
from fuse.interstage.costs import CostModel
from fuse.interstage.length_trace import LengthTrace
from fuse.interstage.migration import Policy, Threshold
from fuse.interstage.policies import ADAPTIVE, KNOWN, NONE, POLICIES, policy_of
from fuse.interstage.rollout import Rollout
from fuse.interstage.simulate import simulate
from fuse.sample import Sample, SpecialTokens
from fuse.trace import now_s

_CALIBRATION_ROUNDS = 3
_NO_TOKEN = -1
_LINE = (
    "{lengths}, {policy}: {seconds:.2f} s ({gain:.2f} times as fast as none; simulated {simulated_seconds:.2f} s and "
    "{simulated_gain:.2f}, oracle {oracle_seconds:.2f} s), idle {idle_share:.0%}, {migrations:.0f} migrations"
)


def run_policies(model: PreTrainedModel, mixes: Sequence[Mix], arguments: argparse.Namespace) -> list[Row]:
    """A row per mix and policy."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="fuse-bench-") as directory, _fleet(model, directory, arguments) as fleet:
        for mix in mixes:
            for row in _Rollouts(fleet, model, mix, arguments).rows():
                print(_LINE.format_map(row), flush=True)
                rows.append(row)
    return rows


def _fleet(model: PreTrainedModel, directory: str, arguments: argparse.Namespace) -> Fleet:
    return model_fleet(
        model,
        special=SpecialTokens(pad=_NO_TOKEN, eos=(), stop=()),
        prompt_tokens=arguments.prompt_tokens,
        output_dir=directory,
        num_devices=arguments.devices,
        engine=arguments.engine,
        engine_batch_size=arguments.batch,
        response_length=arguments.context - arguments.prompt_tokens,
    )


@dataclass(frozen=True, slots=True)
class _Run:
    """A rollout, and what the next one like it should cost."""

    report: RolloutReport
    idle_share: float
    costs: CostModel | None


class _Rollouts:
    """One batch of forced lengths, rolled out over and over."""

    def __init__(self, fleet: Fleet, model: PreTrainedModel, mix: Mix, arguments: argparse.Namespace) -> None:
        self._fleet, self._mix, self._arguments = fleet, mix, arguments
        self._lengths = np.array(mix.lengths)
        past_prompts = np.full(len(mix.past), arguments.prompt_tokens)
        self._past = LengthTrace(past_prompts, np.array(mix.past), (None,) * len(mix.past))
        shape = len(mix.lengths), arguments.prompt_tokens
        prompts = np.random.default_rng(0).integers(0, model.config.get_text_config().vocab_size, shape)
        self._prompts = list(map(tuple, prompts.tolist()))
        self._limits = fleet.settings.rollout.limits
        self._tokens: tuple[tuple[int, ...], ...] | None = None

    def rows(self) -> Iterator[Row]:
        """Calibrate, then time all policies in turn."""
        num_samples, repeats = len(self._lengths), self._arguments.repeats
        staying = Threshold(remaining=num_samples, num_kept=self._arguments.devices)
        for shrink in range(1, 1 + _CALIBRATION_ROUNDS):  # other batches and contexts than the one that is timed, too
            self._roll_out(staying, num_samples // shrink)
        costs = self._fleet.rollout_costs
        assert costs is not None
        policies = {name: policy_of(name, self._rollout(costs), self._past) for name in POLICIES}
        tell(f"{self._mix.name}: {self._lengths.sum()} tokens, {1 + repeats} rounds ...")
        # Those that came out the same, as where fusion is not expected to pay, are rolled out once a round.
        first = {name: next(one for one in policies if policies[one] == policy) for name, policy in policies.items()}
        timed = {name: partial(self._roll_out, policies[name], num_samples) for name in first.values()}
        runs_of = alternate(timed, repeats)
        runs = {name: runs_of[one] for name, one in first.items()}
        # Shared machines are now faster, now slower: costs are those known at the end of each rollout.
        rollouts = {name: [self._rollout(run.costs or costs) for run in own] for name, own in runs.items()}
        simulated = {name: _simulated(rollouts[name], policy) for name, policy in policies.items()}
        serial = {name: _simulated(rollouts[name], policies[NONE]) for name in policies}
        told = statistics.median(
            simulate(one, policy_of(KNOWN, one, self._past)).makespan_s for one in rollouts[ADAPTIVE]
        )
        oracle = min(told, *(_simulated(rollouts[ADAPTIVE], policy) for policy in policies.values()))
        for name in policies:
            yield self._row(name, runs, simulated[name], serial[name] / simulated[name], oracle)

    def _row(
        self, name: str, runs: Mapping[str, Sequence[_Run]], simulated: float, simulated_gain: float, oracle: float
    ) -> Row:
        """One policy; seconds and shares are medians over repeats.

        simulated_seconds: by the costs known when each of its rollouts had ended; simulated_gain: of `none`'s by these.

        oracle_seconds: simulated, of the best of all policies and of the adaptive one told all lengths.
        gain: of `none`'s seconds over these, median over rounds, in which both met the same machine.
        decision_ms: from news to the calls it leads to, median over decisions; workers do not wait for it.
        """

        def middle(figure: Callable[[_Run], float]) -> float:
            return statistics.median(map(figure, runs[name]))

        seconds = middle(lambda run: run.report.makespan_s)
        return {
            "lengths": self._mix.name,
            "engine": self._arguments.engine,
            "policy": name,
            "num_samples": len(self._lengths),
            "num_tokens": int(self._lengths.sum()),
            "seconds": seconds,
            "generation_seconds": middle(lambda run: run.report.generation_s),
            "idle_share": middle(lambda run: run.idle_share),
            "migrations": middle(lambda run: run.report.num_migrations),
            "moved_bytes": middle(lambda run: run.report.moved_bytes),
            "simulated_seconds": simulated,
            "oracle_seconds": oracle,
            "gain": statistics.median(
                none.report.makespan_s / own.report.makespan_s for none, own in zip(runs[NONE], runs[name], strict=True)
            ),
            "simulated_gain": simulated_gain,
            "decision_ms": 1e3 * middle(lambda run: statistics.median(run.report.decision_s)),
        }

    def _rollout(self, costs: CostModel) -> Rollout:
        """What is rolled out, to be simulated."""
        return Rollout(
            prompt_tokens=np.full(len(self._lengths), self._arguments.prompt_tokens),
            response_tokens=self._lengths,
            num_devices=self._arguments.devices,
            costs=costs,
            limits=self._limits,
        )

    def _roll_out(self, policy: Policy, num_samples: int) -> _Run:
        """The first samples of the batch; the same tokens every time."""
        samples = [Sample(index, prompt) for index, prompt in enumerate(self._prompts[:num_samples])]
        params = SamplingParams(seed=0, temperature=1.0, max_new_tokens=self._limits.max_new_tokens)
        start_s = now_s()
        report = self._fleet.roll_out(
            samples, params, policy=policy, max_new_tokens=dict(enumerate(self._lengths.tolist()))
        )
        idle = idle_shares(self._fleet.drain_spans(), start_s, start_s + report.makespan_s)
        assert [len(sample.response_ids) for sample in samples] == self._lengths[:num_samples].tolist()
        if num_samples == len(self._lengths):
            tokens = tuple(tuple(sample.response_ids) for sample in samples)
            assert self._tokens in (None, tokens), "tokens depend on the policy"
            self._tokens = tokens
        return _Run(report, statistics.mean(idle.values()), self._fleet.rollout_costs)


def _simulated(rollouts: Sequence[Rollout], policy: Policy) -> float:
    """Median seconds under a policy."""
    return statistics.median(simulate(one, policy).makespan_s for one in rollouts)
