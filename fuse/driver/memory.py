"""The memory ledger: what a run holds on every device, by role and phase, from configurations alone.

A phase's bytes are the most that lies on a device at any moment of it. Training is planned for the longest micro-batch
there can be. Where a number depends on libraries (contexts, fragmentation), it is a constant of this file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from fuse import roles
from fuse.driver.held_weights import away_phases, shared_roles, weight_entries
from fuse.driver.ledger_entry import Entry, Phase, always
from fuse.driver.memory_setup import MemorySetup
from fuse.driver.training_bytes import fused_peaks, serial_peaks, step_problem
from fuse.engines.slot_cache import round_up
from fuse.intrastage.optimizer_shards import largest_share
from fuse.intrastage.placement import Replica
from fuse.roles import GENERATING
from fuse.workers.carriers.parcel import BUCKET_BYTES

PROCESS_BYTES = 700_000_000
"""Of a GPU, what a process of torch takes before its first tensor, with the libraries' workspaces."""
COMMUNICATOR_BYTES = 100_000_000
"""Of a GPU, what NCCL takes for two neighbours."""
RESERVE_SHARE = 0.03
"""Of a GPU's memory, what allocators lose between blocks."""
_PREFILL_TOKENS = 2048
"""That an engine computes in one step."""
_BLOCK_TOKENS = 16
"""Of vLLM's cache."""
_LEAST_CONTEXT = 64


@dataclass(frozen=True, slots=True)
class Ledger:
    """Entries by device. serial_bytes, fused_bytes: the fullest device's in training, without fusion and with it."""

    setup: MemorySetup
    devices: tuple[tuple[Entry, ...], ...]
    serial_bytes: int
    fused_bytes: int

    def total(self, device: int, phase: Phase) -> int:
        """Bytes on a device in a phase."""
        return _sum(self.devices[device], phase)

    @property
    def peak_bytes(self) -> dict[Phase, int]:
        """Of the device that is fullest in the phase."""
        return {phase: max(self.total(device, phase) for device in range(len(self.devices))) for phase in Phase}

    @property
    def fullest_device(self) -> int:
        """The device that has most at any time; of several the first."""
        return max(range(len(self.devices)), key=lambda device: max(self.total(device, phase) for phase in Phase))

    @property
    def spare_bytes(self) -> int:
        """What the fullest device has left; negative where the run does not fit."""
        return self.setup.device_memory_bytes - max(self.peak_bytes.values())

    @property
    def host_bytes(self) -> int:
        """In host memory: the driver's models and averages, and what trains as exported to what computes."""
        setup = self.setup
        distinct = [model for model in setup.models.values() if model.spec.variant_of is None]
        models = (*distinct, *(setup.models[role] for role in setup.averaged))
        own = sum(model.size.total * model.spec.dtype.itemsize for model in models)
        trained = {role: round(model.size.trained * model.size.total) for role, model in setup.models.items()}
        if setup.offloads_training:
            for replica in setup.placement:
                model = setup.models[replica.model]
                own += model.weight_bytes(model.size.total, trained[replica.model], setup.autocast)
            own += sum(8 * trained[role] for role in roles.training(setup.models))
            own += sum(4 * trained[role] for role in setup.averaged)
        copied = [role for role in roles.training(setup.models) if role == GENERATING or setup.scoring == "whole"]
        return own + sum(4 * setup.models[role].size.total for role in copied)

    @property
    def fits(self) -> bool:
        """Whether every device has room in every phase."""
        return self.spare_bytes >= 0


def fits(setup: MemorySetup, placement: tuple[Replica, ...]) -> bool:
    """Whether the run has room with this placement; a schedule of its own is made for what is free then."""
    return ledger(replace(setup, placement=placement), plans_fusion=False).fits


def ledger(setup: MemorySetup, *, plans_fusion: bool = True) -> Ledger:
    """What the run holds.

    plans_fusion: look at a fused schedule, too. A run that fits without one fits with one, which is made for what is
        free; the search for the largest that fits does without.
    """
    tensor_size = setup.tensor_parallel_size
    problem = step_problem(
        setup.placement,
        {role: (setup.models[role].size, setup.models[role].bytes) for role in roles.training(setup.models)},
        num_micro_batches=setup.num_micro_batches,
        shape=setup.longest,
        splits=setup.is_fused,
        tensor_parallel_size=tensor_size,
    )
    held = [tuple(_held(setup, device)) for device in range(setup.num_devices)]
    beside = [  # micro-batches, by rank of the schedules
        max(_sum(held[device], Phase.TRAINING) for device in range(first, first + tensor_size))
        for first in range(0, setup.num_devices, tensor_size)
    ]
    serial = fused = serial_peaks(problem, setup.placement, setup.num_micro_batches)
    if setup.is_fused and plans_fusion:
        fused = fused_peaks(problem, [setup.device_memory_bytes - one for one in beside])
    devices = tuple(
        (*held[device], _activations(max(serial[device // tensor_size], fused[device // tensor_size])))
        for device in range(setup.num_devices)
    )
    serial_bytes, fused_bytes = (max(map(sum, zip(beside, peaks, strict=True))) for peaks in (serial, fused))
    return Ledger(setup, devices, serial_bytes, fused_bytes)


def free_for_micro_batches(setup: MemorySetup, free_bytes: Sequence[int | None]) -> list[int | None]:
    """Per device, what micro-batches under way may take, given what was measured as free between two updates.

    Not all of that is theirs: gradients, messages and working memory are yet to come, and what the cache of an engine
    may grow to is known from the ledger alone. None where a device does not tell.
    """
    left: list[int | None] = []
    for device, free in enumerate(free_bytes):
        held = tuple(_held(setup, device))
        to_come = _sum((entry for entry in held if entry.what in _TO_COME), Phase.TRAINING)
        planned = setup.device_memory_bytes - _sum(held, Phase.TRAINING)
        left.append(None if free is None else max(0, min(planned, free - to_come)))
    return left


def _sum(entries: Iterable[Entry], phase: Phase) -> int:
    return sum(entry.bytes.get(phase, 0) for entry in entries)


GRADIENTS, WORKING, MESSAGES, RESERVE = "gradients", "working memory", "messages", "reserve"
_TO_COME = frozenset({GRADIENTS, WORKING, MESSAGES, RESERVE})


def _activations(num_bytes: int) -> Entry:
    return Entry("training", "activations", {Phase.TRAINING: num_bytes})


def _held(setup: MemorySetup, device: int) -> Iterator[Entry]:
    """Everything on a device but the micro-batches under way."""
    yield from weight_entries(setup, device)
    yield from _trained(setup, device)
    yield from _exports(setup)
    yield from _engine(setup)
    yield from _working(setup, device)
    if setup.accelerator == "cuda":
        links = sum(2 * (len(replica.ranks) > 1) for replica in setup.placement) + len(roles.training(setup.models))
        links += setup.num_devices > 1 and bool(shared_roles(setup))
        links += setup.engine_devices > 1
        yield always("device", "contexts", 2 * PROCESS_BYTES + 2 * links * COMMUNICATOR_BYTES)
        yield always("device", RESERVE, round(RESERVE_SHARE * setup.device_memory_bytes))


def _trained(setup: MemorySetup, device: int) -> Iterator[Entry]:
    """Gradients of what trains in stages here, and AdamW's two moments, which ranks with the same stage share.

    An average of the weights lies with the moments.
    """
    rank, shares = device // setup.tensor_parallel_size, setup.tensor_parallel_size
    for role in roles.training(setup.models):
        replicas = [replica for replica in setup.placement if replica.model == role]
        trained = stepped = 0
        for replica in replicas:
            sizes = setup.models[role].size.tensors_of(replica, trained=True)
            for stage, (owner, learned) in enumerate(zip(replica.ranks, sizes, strict=True)):
                if owner == rank:
                    trained += sum(learned)
                    stepped += largest_share(learned, len({other.ranks[stage] for other in replicas}))
        trained, stepped = -(-trained // shares), -(-stepped // shares)
        yield Entry(role, GRADIENTS, {Phase.TRAINING: 4 * trained})
        moments = (12 if role in setup.averaged else 8) * stepped
        yield Entry(role, "moments", dict.fromkeys(away_phases(setup), moments))


def _exports(setup: MemorySetup) -> Iterator[Entry]:
    """What every rank that shares a stage gathers, of one model after the other: two matrices, of two weights of a
    layer each, or one embedding, in the type of whoever gets them."""
    if setup.tensor_parallel_size == 1:
        return
    dtypes = {GENERATING: setup.generation_dtype}
    if setup.scoring == "whole":
        dtypes |= {role: torch.float32 for role in roles.training(setup.models) if role in roles.scoring(setup.models)}
    sizes = {role: setup.models[role].size for role in dtypes}
    most = {role: max(size.largest, 4 * max(map(max, size.tensors[1:-1]), default=0)) for role, size in sizes.items()}
    yield Entry("training", "exports", {Phase.GENERATION: max(most[role] * dtypes[role].itemsize for role in dtypes)})


def _engine(setup: MemorySetup) -> Iterator[Entry]:
    size, itemsize = setup.models[GENERATING].size, setup.generation_dtype.itemsize
    awake = (Phase.GENERATION, Phase.INFERENCE) if setup.engines_sleep else tuple(Phase)
    weights = -(-size.total * itemsize // setup.engine_devices)  # but for norms, which are small
    yield Entry("engine", "weights", dict.fromkeys(awake, weights))
    yield Entry("engine", "KV cache", dict.fromkeys(awake, kv_cache_bytes(setup)))
    # Weights come a bucket at a time; vLLM keeps a tensor of it, and makes a matrix of it before it copies that.
    bucket = min(size.total * itemsize, max(BUCKET_BYTES, size.largest * itemsize))
    copies = 2 * size.largest * itemsize if setup.engine == "vllm" else 0
    yield Entry("engine", "exports", {Phase.GENERATION: bucket + copies})


def kv_cache_bytes(setup: MemorySetup) -> int:
    """The most that an engine's keys and values take on each of its devices: a full batch of the longest samples.

    Devices that share an engine have some heads each; where there are fewer heads than devices, several have the same.
    """
    context = max(_LEAST_CONTEXT, setup.prompt_tokens + setup.response_tokens)
    size = setup.models[GENERATING].size
    token_bytes = size.kv_values // min(size.kv_heads, setup.engine_devices) * setup.generation_dtype.itemsize
    if setup.engine == "transformers":
        return setup.engine_batch_size * round_up(context) * token_bytes
    sample_tokens = -(-context // _BLOCK_TOKENS) * _BLOCK_TOKENS
    full = (setup.engine_batch_size * sample_tokens + _BLOCK_TOKENS) * token_bytes
    if setup.generation_cache_bytes is not None:
        return setup.generation_cache_bytes // setup.engine_devices
    return min(full, setup.device_memory_bytes // 4)


def _working(setup: MemorySetup, device: int) -> Iterator[Entry]:
    """What computing takes beside what it keeps, and messages on their way."""
    actor = setup.models[GENERATING]
    logits = setup.engine_batch_size * actor.size.head_shape[0] * (setup.generation_dtype.itemsize + 8)
    yield Entry("engine", WORKING, {Phase.GENERATION: actor.bytes.scoring.at(_PREFILL_TOKENS) + logits})

    longest = setup.prompt_tokens + setup.response_tokens
    tokens = max(longest, min(setup.inference_batch_tokens, setup.inference_batch_size * longest))
    forward = (*roles.scoring(setup.models), *((GENERATING,) if setup.recomputes_logprobs else ()))
    scoring = [setup.models[role].bytes for role in forward]
    most = max((one.scoring.at(tokens) + one.head.scoring() for one in scoring), default=0)
    yield Entry("scoring", WORKING, {Phase.INFERENCE: most})
    if setup.scoring == "sharded" and setup.num_devices > 1:
        hidden = sum(setup.models[role].bytes.boundary.at(tokens) for role in roles.scoring(setup.models))
        yield Entry("scoring", MESSAGES, {Phase.INFERENCE: _MESSAGES // 2 * hidden})

    rank = device // setup.tensor_parallel_size
    working, messages = [0], 0
    for replica in setup.placement:
        model, last = setup.models[replica.model], len(replica.ranks) - 1
        trained = [*map(sum, model.size.tensors_of(replica, trained=True))]
        tied = sum(model.size.trained_tensors[0]) if model.size.tied else 0
        for stage, owner in enumerate(replica.ranks):
            if owner != rank:
                continue
            working.append(model.bytes.stage(setup.longest, 1, is_first=stage == 0, is_last=stage == last).working)
            # Gradients of replicas and of tied copies are added up in one piece of memory.
            is_shared = sum(other.model == replica.model for other in setup.placement) > 1
            working.append(4 * trained[stage] if is_shared else 8 * tied if stage in (0, last) else 0)
            messages += _MESSAGES * ((stage > 0) + (stage < last)) * model.bytes.boundary.at(setup.longest.size)
    yield Entry("training", WORKING, {Phase.TRAINING: max(working)})
    yield Entry("training", MESSAGES, {Phase.TRAINING: messages})


_MESSAGES = 4
"""To and from a neighbour, there and back: two receives are posted ahead, and two sends are on their way. Half of that
in scoring, which goes one way."""
