"""What `fuse bench iteration --emulate` is asked for; loads nothing heavy."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fuse.benchmarks.emulated.costs import EmulatedCosts, costs_from_json
from fuse.benchmarks.emulated.h100 import NAMES, costs_named
from fuse.benchmarks.iteration.rows import FUSION, NATURAL, SERIAL, SYNTHETIC, TAIL
from fuse.commands.options import option_name
from fuse.commands.simulated_speculation import SPECULATION, add_speculation_arguments, speculation_of
from fuse.interstage.length_trace import read_length_trace
from schedules.reading import read_json

SETTING: Mapping[str, Any] = MappingProxyType(
    {"batch": 512, "mini_batches": 8, "max_new_tokens": 1024, "repeats": 1, "costs": NAMES[0]}
)
"""Defaults where devices are emulated. Waits differ by little from one iteration to the next."""
TIME_SCALE = 2.0
_MOST_DEVICES = 64
_NOT_EMULATED: Mapping[str, object] = MappingProxyType(
    {
        "algorithm": "ppo", "model": None, "pad_token": None, "prompts": None, "prompt_column": None, "devices": None,
        "engine": "transformers", "peer": None, "bf16": False, "smoke": False, "one_at_a_time": False,
    }
)  # fmt: skip
"""Options that mean nothing to devices that compute nothing, and what they are then."""
_TRAINING, _SCORING = ("actor", "critic"), ("reference", "critic", "reward")


def add_emulation(parser: argparse.ArgumentParser) -> None:
    """The options of emulation."""
    setting = ", ".join(f"{option_name(name)} {value}" for name, value in SETTING.items())
    parser.add_argument(
        "--emulate", type=int, metavar="N",
        help="emulate N devices on this machine: everything but what devices compute is real, and that is waited for "
        f"(defaults are then {setting})",
    )  # fmt: skip
    parser.add_argument(
        "--costs", metavar="NAME|FILE.json",
        help=f"of an emulated device: {', '.join(NAMES)} (actor, then critic, of Llamas on 8 H100s), or a file like "
        "`costs` in what --json writes",
    )  # fmt: skip
    parser.add_argument(
        "--time-scale", type=float, metavar="X",
        help=f"seconds that an emulated second takes here (default: {TIME_SCALE}); the less, the more the driver's own "
        "time counts",
    )  # fmt: skip
    parser.add_argument(
        "--tail-training", action="store_true", default=None,
        help=f"have a whole critic on each device, and a variant more, {TAIL}: both, and what the critic has of the "
        "optimizer step is trained on devices that are free before all samples are there",
    )  # fmt: skip
    add_speculation_arguments(parser)


def check_emulation(arguments: argparse.Namespace) -> None:
    """Refuse what cannot be emulated, or is about emulation without any.

    Raises:
        ValueError: with the first such option.
    """
    if arguments.emulate is None:
        for name in ("costs", "time_scale", "tail_training", *SPECULATION):
            if getattr(arguments, name) is not None:
                raise ValueError(f"{option_name(name)} is of emulated devices: add --emulate N")
        return
    if not 2 <= arguments.emulate <= _MOST_DEVICES:
        raise ValueError(f"--emulate is {arguments.emulate}: give 2 to {_MOST_DEVICES} devices")
    for name, value in _NOT_EMULATED.items():
        if getattr(arguments, name) != value:
            raise ValueError(f"{option_name(name)} means nothing to emulated devices: leave it or --emulate out")
    if arguments.lengths == NATURAL:
        raise ValueError(f"--lengths is {NATURAL}, but emulated devices know no tokens: give a file, or synthetic")
    if not 0 < arguments.time_scale <= 100:
        raise ValueError(f"--time-scale is {arguments.time_scale}: give a number above 0, at most 100")
    per_step = arguments.batch // arguments.mini_batches // arguments.micro_batch
    if per_step < 2:
        raise ValueError(
            f"a mini-batch of {per_step} micro-batch fills no pipeline: lower --micro-batch to have several"
        )
    if arguments.tail_training and arguments.mini_batches > 1:
        raise ValueError(
            f"--tail-training with --mini-batches {arguments.mini_batches}: what is trained early is simulated of one "
            "step on all samples: give --mini-batches 1"
        )
    costs_of(arguments)
    if arguments.lengths not in (None, SYNTHETIC):
        read_length_trace(Path(arguments.lengths), at_least=arguments.batch)


def variants_of(arguments: argparse.Namespace) -> dict[str, Mapping[str, Any]]:
    """Options of the trainer's configuration, by variant."""
    asked = {name: fusion for name, fusion in FUSION.items() if name in {SERIAL, *arguments.variants}}
    if not arguments.tail_training:
        return {name: {**fusion, "tail_training": "off"} for name, fusion in asked.items()}
    asked[TAIL] = FUSION["both"]
    return {
        name: {**fusion, "critic_stages": 1, "tail_training": "auto" if name == TAIL else "off"}
        for name, fusion in asked.items()
    }


def costs_of(arguments: argparse.Namespace) -> EmulatedCosts:
    """With how engines are asked to draft, or else as the costs say.

    Raises: ValueError when there are none of this name, nor in a file of this name, or of impossible drafts.
    """
    costs = _plain_costs(arguments.costs)
    return replace(costs, speculation=speculation_of(arguments, costs.speculation))


def _plain_costs(option: str) -> EmulatedCosts:
    if option in NAMES:
        return costs_named(option)
    if not Path(option).exists():
        raise ValueError(f"--costs {option} is neither a file nor one of {', '.join(NAMES)}")
    return costs_from_json(read_json(Path(option), "emulated costs"), _TRAINING, _SCORING)
