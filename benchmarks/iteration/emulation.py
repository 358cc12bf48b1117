"""`fuse bench iteration --emulate`: whole iterations on devices that wait as long as operations would take.

Everything is real but what devices compute: trainer, driver, policies, planner, executor and Ray. Beside what an
iteration took stands what simulator and planner predict of it from the same lengths and costs, and nothing else: the
rollout under the variant's policy, the planned schedules of its training, optimizer steps and new weights.

Emulated seconds are those of this machine's clock over `--time-scale`, so whatever the driver takes is in them.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fuse.benchmarks.emulated.cluster import EmulatedCluster
from fuse.benchmarks.emulated.costs import EmulatedCosts
from fuse.benchmarks.iteration import workload as made
from fuse.benchmarks.iteration.rates import Scale
from fuse.benchmarks.iteration.rounds import Measured, Rounds, as_json, make_workload
from fuse.benchmarks.iteration.rows import FUSION, SERIAL
from fuse.benchmarks.iteration.trainer import fuse_config, fuse_variant
from fuse.benchmarks.iteration.turn import Response, Turn, Variant
from fuse.benchmarks.iteration.workload import Workload
from fuse.benchmarks.options import tell
from fuse.interstage.length_trace import LengthTrace
from fuse.interstage.migration import EngineLimits
from fuse.interstage.policies import ADAPTIVE, NONE, policy_of
from fuse.interstage.rollout import Rollout
from fuse.interstage.simulate import simulate
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
                {**fusion, "balance_stages": False},
                num_devices=num_devices,
                engine="transformers",
                output_dir=directory / name,
            )
            for name, fusion in FUSION.items()
            if name in {SERIAL, *arguments.variants}
        }
        cluster.use(num_devices, costs.scaled(scale), workload.batch)
        for name, config in configs.items():
            with _variant(workload, config, cluster, costs, scale) as variant:
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


@contextmanager
def _variant(
    workload: Workload, config: Any, cluster: EmulatedCluster, costs: EmulatedCosts, scale: float
) -> Iterator[Variant]:
    """A trainer on the cluster's devices; its turns are in emulated seconds."""
    num_turns = 0

    def turn(same: tuple[Response, ...] | None) -> Turn:
        nonlocal num_turns
        taken = variant(same)
        num_turns += 1
        assert cluster.models is not None
        trained = cluster.models.trained[num_turns - 1]
        rollout_s = _rollout_s(workload, num_turns - 1, config.inter_stage_fusion, costs, cluster.num_devices)
        training_s = sum(one.predicted_s(costs) for one in trained)
        return replace(
            taken,
            seconds=taken.seconds / scale,
            phases=_over(taken.phases, scale),
            exposed_s=_over(taken.exposed_s, scale),
            simulated_phases={"rollout": rollout_s, "training": training_s, "weights": costs.weights_s},
        )

    with fuse_variant(workload, config, cluster=cluster, tell=tell) as variant:
        yield turn


def _over(seconds: Mapping[str, float], scale: float) -> dict[str, float]:
    return {name: one / scale for name, one in seconds.items()}


def _rollout_s(workload: Workload, round_index: int, is_fused: bool, costs: EmulatedCosts, num_devices: int) -> float:
    """What the simulator says of a round's rollout, under a policy that knows the lengths of the rounds before."""
    assert workload.lengths is not None
    first = round_index * workload.batch
    prompt_tokens = np.array([len(prompt) for prompt in workload.prompts])
    response_tokens = np.array(workload.lengths)
    batch = slice(first, first + workload.batch)
    limits = EngineLimits(
        max_batch=workload.batch,
        kv_capacity_tokens=workload.batch * (int(prompt_tokens.max()) + workload.max_new_tokens),
        max_new_tokens=workload.max_new_tokens,
    )
    rollout = Rollout(
        prompt_tokens=prompt_tokens[batch],
        response_tokens=response_tokens[batch],
        num_devices=num_devices,
        costs=costs.rollout,
        limits=limits,
        can_transfer=False,
    )
    if not is_fused or not first:  # nothing is known of lengths before the first
        return simulate(
            rollout, policy_of(NONE, rollout, LengthTrace(prompt_tokens[:0], response_tokens[:0], ()))
        ).makespan_s
    past = LengthTrace(prompt_tokens[:first], response_tokens[:first], (None,) * first)
    return simulate(rollout, policy_of(ADAPTIVE, rollout, past)).makespan_s


def _training_flops(costs: EmulatedCosts, responses: Sequence[Response]) -> int:
    tokens = sum(len(one.prompt_ids) + len(one.response_ids) for one in responses)
    return int(_PASSES * tokens * sum(one.forward_flops_per_token for one in costs.training.values()))
