"""Weights on a device, of stages that train and of copies or shares that score: each frozen tensor once.

As `fuse.training.frozen_tensors` has it: whoever on a device needs the same frozen tensor in the same type holds one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from fuse import roles
from fuse.driver.ledger_entry import Entry, Phase
from fuse.driver.memory_setup import MemorySetup
from fuse.driver.model_size import FrozenSizes
from fuse.intrastage.layer_range import even_layer_range
from fuse.training.model_spec import Origin

_FrozenBytes = Mapping[tuple[Origin, torch.dtype], int]


@dataclass(frozen=True, slots=True)
class _Held:
    """own: bytes of what is nobody else's. frozen: of what may be."""

    role: str
    what: str
    phases: tuple[Phase, ...]
    own: int
    frozen: _FrozenBytes


def weight_entries(setup: MemorySetup, device: int) -> Iterator[Entry]:
    """Those of a device; what several hold is in one of its own."""
    held = [*_stages(setup, device), *_scoring(setup, device)]
    holders = Counter(key for one in held for key in one.frozen)
    common: dict[Phase, dict[tuple[Origin, torch.dtype], int]] = {phase: {} for phase in Phase}
    for one in held:
        alone = sum(num_bytes for key, num_bytes in one.frozen.items() if holders[key] == 1)
        yield Entry(one.role, one.what, dict.fromkeys(one.phases, one.own + alone))
        for phase in one.phases:
            common[phase] |= {key: num_bytes for key, num_bytes in one.frozen.items() if holders[key] > 1}
    if any(common.values()):
        yield Entry("base", "weights", {phase: sum(of_phase.values()) for phase, of_phase in common.items()})


def away_phases(setup: MemorySetup) -> tuple[Phase, ...]:
    """Those in which what trains is there."""
    return (Phase.TRAINING,) if setup.offloads_training else tuple(Phase)


def _stages(setup: MemorySetup, device: int) -> Iterator[_Held]:
    """Of every model that trains, all stages together."""
    rank = device // setup.tensor_parallel_size
    for role in roles.training(setup.models):
        model = setup.models[role]
        parameters = trained = 0
        frozen: list[FrozenSizes] = []
        for replica in setup.placement:
            if replica.model == role:
                sizes = model.size.tensors_of(replica), model.size.tensors_of(replica, trained=True)
                for stage, (owner, held, learned) in enumerate(zip(replica.ranks, *sizes, strict=True)):
                    if owner == rank:
                        parameters, trained = parameters + sum(held), trained + sum(learned)
                        frozen.append(model.size.frozen_of(replica, stage))
        scores_here = any(_source(setup, one) == role for one in roles.scoring(setup.models)) and (
            setup.scoring == "sharded" or _is_scored_in_place(setup, role, device)
        )
        shared = sum(size for of_stage in frozen for _, size in of_stage)
        shares = setup.tensor_parallel_size
        yield _Held(
            role,
            "weights",
            tuple(Phase) if scores_here else away_phases(setup),
            model.weight_bytes(-(-(parameters - shared) // shares), -(-trained // shares), setup.autocast),
            _bytes((one for of_stage in frozen for one in of_stage), model.frozen_dtype(setup.autocast)),
        )


def _scoring(setup: MemorySetup, device: int) -> Iterator[_Held]:
    """Copies or shares of models that score. What trains is scored in float32, through copies or as it is."""
    for role in roles.scoring(setup.models):
        size, dtype = setup.models[role].size, _scoring_dtype(setup, role)
        if setup.scoring == "sharded":
            if role not in shared_roles(setup):
                continue
            part = device, setup.num_devices, even_layer_range(len(size.layers), device, setup.num_devices)
            what, total, frozen = "scoring share", size.stage(*part), size.frozen(*part)
        elif _is_scored_in_place(setup, role, device):
            continue
        else:
            what, total, frozen = "scoring copy", size.total, size.frozen(0, 1)
        own = total - sum(one for _, one in frozen)
        yield _Held(role, what, tuple(Phase), own * dtype.itemsize, _bytes(frozen, dtype))


def _bytes(frozen: Iterable[tuple[Origin, int]], dtype: torch.dtype) -> _FrozenBytes:
    return {(origin, dtype): size * dtype.itemsize for origin, size in frozen}


def shared_roles(setup: MemorySetup) -> tuple[str, ...]:
    """Those of which every device has a share to score with."""
    trained = roles.training(setup.models)
    own = [role for role in roles.scoring(setup.models) if _source(setup, role) not in trained]
    return tuple(own) if setup.scoring == "sharded" else ()


def _source(setup: MemorySetup, role: str) -> str:
    """Whose weights a role has."""
    return setup.models[role].spec.variant_of or role


def _is_scored_in_place(setup: MemorySetup, role: str, device: int) -> bool:
    rank, source = device // setup.tensor_parallel_size, _source(setup, role)
    own = [replica for replica in setup.placement if replica.model == source and rank in replica.ranks]
    return len(own) == 1 and len(own[0].ranks) == 1 and setup.tensor_parallel_size == 1


def _scoring_dtype(setup: MemorySetup, role: str) -> torch.dtype:
    """As `ModelWorker` has it."""
    is_rounded = setup.autocast is not None and role not in roles.training(setup.models)
    return setup.models[role].spec.dtype if is_rounded else torch.float32
