"""Figures of `fuse bench iteration` that can be held against other machines and trainers: rates by device and phase."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fuse.benchmarks.iteration.spread import medians, spread
from fuse.benchmarks.iteration.turn import Response, Turn
from fuse.benchmarks.options import Row


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """What turns are divided by.

    training_flops: of an iteration with these responses. product_flops_per_s: of one device, measured on products of
    large matrices of the type that is trained in.
    """

    num_devices: int
    epochs: int
    training_flops: Callable[[Sequence[Response]], int]
    product_flops_per_s: float


def rates(turns: Sequence[Turn], scale: Scale) -> Row:
    """Medians over turns, by the names that JSON has.

    tokens_per_s_per_device: of prompts and responses, over the whole iteration.
    phase_rates: tokens a second of a phase, by its name: of responses where samples are generated, of prompts and
        responses where they are inferred or trained on, once an epoch. Phases without tokens have none.
    exposed_s: seconds by kind, as `exposed_s` tells them, or a trainer that does one thing after the other.
    training_mfu: model FLOPs of training by the training phase, over what its devices do in products of matrices.
    """
    return {
        **spread("tokens_per_s_per_device", [_tokens(turn) / turn.seconds / scale.num_devices for turn in turns]),
        "phase_rates": medians([_phase_rates(turn, scale.epochs) for turn in turns]),
        "exposed_s": medians([turn.exposed_s for turn in turns]),
        "training_mfu": statistics.median(_mfu(turn, scale) for turn in turns),
    }


def _phase_rates(turn: Turn, epochs: int) -> dict[str, float]:
    generated = sum(len(one.response_ids) for one in turn.responses)
    tokens = {
        "generation": generated,
        "rollout": generated,
        "inference": _tokens(turn),
        "training": epochs * _tokens(turn),
    }
    return {name: tokens[name] / seconds for name, seconds in turn.phases.items() if name in tokens and seconds > 0}


def _tokens(turn: Turn) -> int:
    return sum(len(one.prompt_ids) + len(one.response_ids) for one in turn.responses)


def _mfu(turn: Turn, scale: Scale) -> float:
    best = turn.phases["training"] * scale.num_devices * scale.product_flops_per_s
    return scale.training_flops(turn.responses) / best
