"""`fuse bench iteration --emulate`: whole iterations on devices that wait as long as operations would take.

Everything is real but what devices compute: trainer, driver, policies, planner, executor and Ray. Beside what an
iteration took stands what simulator and planner predict of it from the same lengths and costs, and nothing else: the
rollout under the variant's policy, the planned schedules of its training, optimizer steps and new weights.

Emulated seconds are those of this machine's clock over `--time-scale`, so whatever the driver takes is in them; what it
takes for emulation alone, before ranks train, is not.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from fuse.benchmarks.emulated.cluster import EmulatedCluster
from fuse.benchmarks.emulated.costs import SCORING_BATCH_TOKENS, EmulatedCosts
from fuse.benchmarks.iteration import workload as made
from fuse.benchmarks.iteration.emulate_options import variants_of
from fuse.benchmarks.iteration.rates import Scale
from fuse.benchmarks.iteration.rounds import Measured, Rounds, as_json, make_workload
from fuse.benchmarks.iteration.trainer import fuse_config, fuse_variant
from fuse.benchmarks.iteration.turn import Response, Turn, Variant
from fuse.benchmarks.iteration.workload import Workload
from fuse.benchmarks.options import tell
from fuse.config.run import RunConfig
from fuse.interstage.length_trace import LengthTrace
from fuse.interstage.migration import EngineLimits
from fuse.interstage.policies import ADAPTIVE, NONE, policy_of
from fuse.interstage.rollout import Rollout
from fuse.interstage.simulate import simulate
from fuse.interstage.simulate_tail import TailWork, simulate_tail
from fuse.interstage.tail import TailSettings
from fuse.workers.ray_session import local_cluster

_KV_BYTES_PER_TOKEN = 1_600_000
_PASSES = 3
"""A forward, and two of a backward."""


@contextmanager
def devices() -> Iterator[EmulatedCluster]:
    """Emulated devices, for any number of measurements."""
    with local_cluster(1), EmulatedCluster() as cluster:
        yield cluster


def measure(arguments: argparse.Namespace, costs: EmulatedCosts, cluster: EmulatedCluster) -> Measured:
    """Take the turns of all variants, one variant after the other: nothing else runs on emulated devices."""
    num_devices, scale = arguments.emulate, arguments.time_scale
    workload = make_workload(arguments, _size(num_devices))
    rounds = Rounds(workload, arguments.warmup)
    with _temporary_directory() as unnamed, _own_cache(unnamed / "cache"):
        directory = arguments.traces or unnamed
        configs = {
            name: fuse_config(
                workload,
                {**fusion, "balance_stages": False, "inference_batch_tokens": SCORING_BATCH_TOKENS},
                num_devices=num_devices,
                engine="transformers",
                output_dir=directory / name,
            )
            for name, fusion in variants_of(arguments).items()
        }
        cluster.use(num_devices, costs.scaled(scale), workload.batch)
        for name, config in configs.items():
            with fuse_variant(workload, config, cluster=cluster, tell=tell) as real:
                variant = _Emulated(real, workload, config, cluster, costs, scale)
                for round_index in range(workload.num_rounds):
                    rounds.take(name, variant, round_index)
    return Measured(
        rounds.turns,
        Scale(
            num_devices=num_devices,
            epochs=workload.epochs,
            training_flops=lambda responses: workload.epochs * _training_flops(costs, responses),
            product_flops_per_s=costs.device_flops_per_s,
        ),
        {name: as_json(config) for name, config in configs.items()},
    )


def _size(num_devices: int) -> made.Size:
    """A model of next to nothing, with a layer for each device's stage and the KV of a large one.

    For so much KV policies do not expect moving it to be cheaper than computing it again, which is what is emulated.
    """
    heads, bytes_of_key_and_value = 4, 2 * 4
    head_dim = _KV_BYTES_PER_TOKEN // (num_devices * heads * bytes_of_key_and_value) // 2 * 2
    return made.Size(layers=num_devices, hidden=8, vocab=128, prompt_tokens=128, head_dim=head_dim)


@contextmanager
def _temporary_directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fuse-bench-") as name:
        yield Path(name)


@contextmanager
def _own_cache(directory: Path) -> Iterator[None]:
    """What emulated operations take is no measurement of this machine, and those of other costs are not wanted here."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(directory)
    try:
        yield
    finally:
        if before is None:
            del os.environ["XDG_CACHE_HOME"]
        else:
            os.environ["XDG_CACHE_HOME"] = before


class _Emulated:
    """A variant on emulated devices, whose turns are in emulated seconds, with what is predicted of them.

    real: in seconds of this machine.
    """

    def __init__(
        self,
        real: Variant,
        workload: Workload,
        config: RunConfig,
        cluster: EmulatedCluster,
        costs: EmulatedCosts,
        scale: float,
    ) -> None:
        self._real, self._workload, self._config = real, workload, config
        self._cluster, self._costs, self._scale = cluster, costs, scale
        self._num_turns = 0

    def __call__(self, same: tuple[Response, ...] | None) -> Turn:
        turn = self._real(same)
        self._num_turns += 1
        assert self._cluster.models is not None
        apart_s = self._cluster.models.apart_s
        phases = {**turn.phases, "training": turn.phases["training"] - apart_s}
        return replace(
            turn,
            seconds=(turn.seconds - apart_s) / self._scale,
            phases=_over(phases, self._scale),
            exposed_s=_over(turn.exposed_s, self._scale),
            simulated_phases={} if self._num_turns == 1 else self._simulated(),
        )

    def _simulated(self) -> dict[str, float]:
        """Of the last turn; of the first there is nothing to learn a policy from."""
        assert self._cluster.models is not None
        return {
            "rollout": self._rollout_s((self._num_turns - 1) * self._workload.batch),
            "training": sum(one.predicted_s(self._costs) for one in self._cluster.models.trained),
            "weights": self._costs.weights_s,
        }

    def _rollout_s(self, first: int) -> float:
        """What the simulator says of samples from `first` on, under a policy that knows the lengths of those before."""
        workload = self._workload
        assert workload.lengths is not None
        prompt_tokens = np.array([len(prompt) for prompt in workload.prompts])
        response_tokens = np.array(workload.lengths)
        rollout = Rollout(
            prompt_tokens=prompt_tokens[first : first + workload.batch],
            response_tokens=response_tokens[first : first + workload.batch],
            num_devices=self._cluster.num_devices,
            costs=self._costs.rollout,
            limits=EngineLimits(
                max_batch=workload.batch,
                kv_capacity_tokens=workload.batch * (int(prompt_tokens.max()) + workload.max_new_tokens),
                max_new_tokens=workload.max_new_tokens,
            ),
            can_transfer=False,
        )
        past = LengthTrace(prompt_tokens[:first], response_tokens[:first], (None,) * first)
        policy = policy_of(ADAPTIVE if self._config.inter_stage_fusion else NONE, rollout, past)
        if self._config.trains_early:
            return simulate_tail(rollout, policy, self._tail_work()).rollout.makespan_s
        return simulate(rollout, policy).makespan_s

    def _tail_work(self) -> TailWork:
        """Of whole critics, one on each device."""
        workload, num_devices = self._workload, self._cluster.num_devices
        parts = [getattr(self._costs.training["critic"], name) for name in ("forward", "input_grad", "weight_grad")]
        return TailWork(
            groups=np.arange(workload.batch),
            token_s=sum(part.token_s for part in parts),
            micro_batch_s=sum(part.fixed_s for part in parts),
            settings=TailSettings(
                micro_batch_size=workload.micro_batch, num_kept=num_devices, num_replicas=num_devices
            ),
        )


def _over(seconds: Mapping[str, float], scale: float) -> dict[str, float]:
    return {name: one / scale for name, one in seconds.items()}


def _training_flops(costs: EmulatedCosts, responses: Sequence[Response]) -> int:
    tokens = sum(len(one.prompt_ids) + len(one.response_ids) for one in responses)
    return int(_PASSES * tokens * sum(one.forward_flops_per_token for one in costs.training.values()))
