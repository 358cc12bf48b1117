"""What `fuse simulate --tail-training` adds: rollouts whose free devices train, and what that saves of an update."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median

import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from fuse.interstage.few_pipelines import on_few_pipelines
from fuse.interstage.migration import Policy
from fuse.interstage.policies import NONE
from fuse.interstage.rollout import Rollout, SimulationResult
from fuse.interstage.simulate_tail import TailResult, TailWork, simulate_tail
from fuse.interstage.tail import Sharing, TailSettings

_MODELS = {"critic": 2, "groups": 1}
"""What trains early, and the models that train: actor and critic, or a policy alone."""


def add_tail_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of tail training."""
    parser.add_argument(
        "--tail-training", choices=tuple(_MODELS),
        help="train on free devices before all samples are there: the critic's, or complete groups of a policy without "
        "one, of an update's first optimizer step, which is on all samples; adds an update's seconds",
    )  # fmt: skip
    parser.add_argument("--epochs", type=int, default=1, help="passes over the samples of an update (default: 1)")
    parser.add_argument("--group-size", type=int, default=8, help="samples of a group, consecutive rows (default: 8)")
    parser.add_argument("--micro-batch", type=int, default=4, help="most samples of a micro-batch (default: 4)")
    parser.add_argument(
        "--train-token-s", type=float, metavar="S",
        help="device-seconds to train one model on a token (default: three forwards, a third of the costs' inference "
        "of three models each)",
    )  # fmt: skip
    parser.add_argument(
        "--train-stages", type=int, default=1, metavar="N",
        help="devices of a pipeline that trains a model (default: 1, a whole one on each device)",
    )  # fmt: skip
    add_sharing_argument(parser)


def add_sharing_argument(parser: argparse.ArgumentParser) -> None:
    """The option of devices that decode and train at once."""
    parser.add_argument(
        "--tail-sharing", type=float, nargs=2, metavar=("DECODING", "TRAINING"),
        help="how many times as long each takes on a device that does both; where that pays, a replica trains beside a "
        "few last samples if none is free (default: none does)",
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class TailRow:
    """An update under a policy, without and with tail training; seconds.

    training_s: of all epochs, spread over the devices. first_step_s: of what may be trained early, in device-seconds,
    and hidden_share the part of it that was. spare_share: the device-seconds of the plain rollout in
    which whole replicas could be idle, in its parts.
    """

    policy: str
    plain_rollout_s: float
    rollout_s: float
    training_s: float
    first_step_s: float
    hidden_share: float
    spare_share: float
    gain: float


def simulate_row(
    arguments: argparse.Namespace, name: str, rollout: Rollout, policy: Policy, plain: SimulationResult
) -> tuple[TailRow, TailResult]:
    """One batch under one policy. plain: the same without tail training."""
    costs, devices = rollout.costs, rollout.num_devices
    token_s = costs.inference_token_s if arguments.train_token_s is None else arguments.train_token_s
    if not token_s > 0:
        raise ValueError(f"training on a token takes {token_s} s: give --train-token-s, above 0")
    groups: NDArray[np.int64] = np.arange(rollout.num_samples)
    if arguments.tail_training == "groups":
        groups = groups // arguments.group_size
    stages, factors = arguments.train_stages, arguments.tail_sharing
    settings = TailSettings(
        micro_batch_size=arguments.micro_batch,
        num_stages=stages,
        num_kept=devices // stages,
        num_replicas=devices // stages,
        sharing=None if factors is None else Sharing(decoding=factors[0], training=factors[1]),
    )
    work = TailWork(groups=groups, token_s=token_s, micro_batch_s=costs.inference_s, settings=settings)
    pipelines = [range(first, first + stages) for first in range(0, devices, stages)]
    policy = on_few_pipelines(policy, pipelines, costs, can_transfer=rollout.can_transfer)
    result = simulate_tail(rollout, policy, work)
    tokens = int((rollout.prompt_tokens + rollout.response_tokens).sum())
    first_step_s = tokens * token_s
    training_s = first_step_s * arguments.epochs * _MODELS[arguments.tail_training] / devices
    hidden_share = result.trained_tokens / tokens
    rollout_s = result.rollout.makespan_s
    left_s = training_s - hidden_share * first_step_s / devices
    return (
        TailRow(
            policy=name,
            plain_rollout_s=plain.makespan_s,
            rollout_s=rollout_s,
            training_s=training_s,
            first_step_s=first_step_s,
            hidden_share=hidden_share,
            spare_share=plain.idle_s(stages) / first_step_s,
            gain=(plain.makespan_s + training_s) / (rollout_s + left_s),
        ),
        result,
    )


def mean_row(rows: Sequence[TailRow]) -> TailRow:
    """Of one policy's rows: means, and the gain of the mean update."""
    means = {
        name: fmean(getattr(row, name) for row in rows)
        for name in ("plain_rollout_s", "rollout_s", "training_s", "first_step_s", "hidden_share", "spare_share")
    }
    plain_s = fmean(row.plain_rollout_s + row.training_s for row in rows)
    with_s = fmean((row.plain_rollout_s + row.training_s) / row.gain for row in rows)
    return TailRow(policy=rows[0].policy, gain=plain_s / with_s, **means)


def hidden_where_long_enough(rows: Sequence[TailRow]) -> str:
    """What is hidden of what may train early where replicas could idle long enough for it; nothing where none could."""
    shares = [row.hidden_share for row in rows if row.spare_share >= 1]
    if not shares:
        return ""
    return (
        f"where replicas could idle for as long as what may train early takes ({len(shares)} of {len(rows)}): "
        f"{min(shares):.0%} to {max(shares):.0%} of it is hidden, {median(shares):.0%} in the median"
    )


def show_tail(console: Console, rows: Sequence[tuple[str, TailRow]]) -> None:
    """A line per setting and policy. rows: with the setting's name."""
    titles = ("lengths", "policy", "rollout", "+ tail", "training", "hidden", "idle/work", "update gain")
    table = Table(*titles, box=SIMPLE, padding=(0, 0, 0, 1))
    for column in table.columns[2:]:
        column.justify = "right"
    for setting, row in rows:
        table.add_row(
            *(setting, row.policy, f"{row.plain_rollout_s:.4g}", f"{row.rollout_s:.4g}", f"{row.training_s:.4g}"),
            *(f"{row.hidden_share:.0%}", f"{row.spare_share:.2f}", f"{row.gain:.3f}x"),
        )
    console.print(table)
    if found := hidden_where_long_enough([row for _, row in rows if row.policy != NONE]):  # which scores at the end
        console.print(found)
