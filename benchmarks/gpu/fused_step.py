"""Fused steps of actor and critic on two ranks, in opposite directions, against the same steps on one rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import Qwen2Config

from fuse.algorithms.batch import Experience
from fuse.benchmarks.gpu.setup import Row, Setup, random_model, spec_for
from fuse.benchmarks.peer_process import PeerProcess
from fuse.benchmarks.training.batches import made_experience
from fuse.benchmarks.training.settings import SETTINGS
from fuse.device_clock import clock_of
from fuse.intrastage import communication
from fuse.intrastage.optimizer import AdamWConfig
from fuse.intrastage.placement import place
from fuse.intrastage.training_schedule import Plan, halved_serial_schedule
from fuse.trace import SpanRecorder
from fuse.training.rank import TrainingRank
from fuse.training.rounds import rounds
from fuse.training.steps import OptimizerStep
from schedules.fused.greedy import greedy

_BOUND = 1e-5
_MODELS = ("actor", "critic")
_NUM_MICRO_BATCHES = 4
_SHARING_NCCL = (2, 30)
"""The first version of NCCL that lets ranks share a GPU, and only where it is told to."""
_SHARES = {"NCCL_MULTI_RANK_GPU_ENABLE": "1"}
_TIMEOUT_S = 60.0

Weights = Mapping[str, NDArray[np.float32]]

# With such an eps, rounding of the smallest gradients stays rounding of weights.
_SETTINGS = replace(SETTINGS, adamw=AdamWConfig(max_grad_norm=1.0, eps=1e-3), timeout_s=_TIMEOUT_S)


def check(setup: Setup) -> Iterator[Row]:
    """The largest difference of any weight."""
    name = "fused steps of two ranks"
    devices, environment = ["cpu", "cpu"], {}
    if setup.device == "cuda":
        devices = ["cuda:0", "cuda:1"]
        if torch.cuda.device_count() < 2:
            devices, environment = ["cuda:0", "cuda:0"], _SHARES
            version: tuple[int, ...] = torch.cuda.nccl.version()
            if version < _SHARING_NCCL:
                told = ".".join(map(str, version))
                reason = f"NCCL {told} refuses two ranks on one GPU; 2.30 and later do not have to"
                yield Row(name=name, measured="not possible", ok=None, detail=reason)
                return
    alone = _trained(setup, devices[:1], environment)
    try:
        together = _trained(setup, devices, environment)
    except communication.CommunicationError as error:
        if not environment:
            raise
        yield Row(name=name, measured="not possible", ok=None, detail=f"on one GPU: {error}")
        return
    started = {
        f"{model}: {key}": one.detach().float().cpu().numpy()
        for model in _MODELS
        for key, one in random_model(_small(setup), model, torch.float32).named_parameters()
    }
    difference, moved = _difference(together, alone), _difference(alone, started)
    yield Row(
        name=name,
        measured=f"off by {difference:.2g}",
        bound=f"{_BOUND:.2g}",
        ok=difference <= _BOUND < moved,
        detail=f"from one rank after two steps, the second fused, by which weights move up to {moved:.2g}; "
        f"on {', '.join(devices)}",
    )


def _difference(ours: Weights, theirs: Weights) -> float:
    assert ours.keys() == theirs.keys()
    return max(float(np.abs(one - theirs[name]).max()) for name, one in ours.items())


def _small(setup: Setup) -> Setup:
    """As many layers as ranks, and a float32 that two processes can hold beside each other."""
    model = Qwen2Config(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=96, tie_word_embeddings=True, max_position_embeddings=64,
    )  # fmt: skip
    return replace(setup, model=model, prompt_tokens=4, response_tokens=8)


def _trained(setup: Setup, devices: Sequence[str], environment: Mapping[str, str]) -> Weights:
    """The weights that as many ranks train."""
    with ExitStack() as stack:
        ranks = [
            stack.enter_context(
                PeerProcess(
                    f"rank {rank}", _serve_rank, _small(setup), rank, tuple(devices),
                    environment=environment, context=setup.context,
                )
            )
            for rank in range(len(devices))
        ]  # fmt: skip
        port = ranks[0].answer()
        for other in ranks[1:]:
            other.send(port)
        weights: dict[str, NDArray[np.float32]] = {}
        for rank in ranks:
            weights |= rank.answer()
    return weights


def _serve_rank(connection: Connection, setup: Setup, rank: int, devices: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    count, device = len(devices), torch.device(devices[rank])
    if rank == 0:
        store = communication.serve_store("127.0.0.1", _TIMEOUT_S)
        port = store.port
        connection.send(port)
    else:
        port = connection.recv()
    communication.connect(rank, count, "127.0.0.1", port, device, _TIMEOUT_S)
    placement = (*place("actor", count, count), *place("critic", count, count, reverse=True))
    specs = {model: spec_for(setup, model, torch.float32) for model in _MODELS}
    training = TrainingRank(rank, device, specs, placement, _SETTINGS, SpanRecorder(clock_of(device)))
    for model in _MODELS:
        training.load_weights(model, random_model(setup, model, torch.float32).state_dict())
    samples = tuple((2 * index, 2 * index + 1) for index in range(_NUM_MICRO_BATCHES))
    step = OptimizerStep(micro_batches=samples, weight=1 / len(samples))
    of_step = rounds({model: [step] for model in _MODELS}, dict.fromkeys(_MODELS, 1), is_fused=True)
    serial = halved_serial_schedule(placement, of_step[0].counts)
    for schedule in (serial, greedy(serial.problem)):
        rates = [dict.fromkeys(_MODELS, 1e-2)]
        training.train(_experience(setup), of_step, rates, {of_step[0].counts: Plan(schedule).for_ranks})
    connection.send(
        {
            f"{model}: {name}": one.cpu().numpy()
            for model in _MODELS
            for name, one in training.export_weights(model).items()
        }
    )
    communication.disconnect()


def _experience(setup: Setup) -> Experience:
    """Random tokens of different lengths, with random advantages and returns."""
    most = setup.response_tokens
    lengths = [most - index % 5 for index in range(2 * _NUM_MICRO_BATCHES)]
    made = made_experience(setup.prompt_tokens, lengths, setup.model.vocab_size)
    generator = torch.Generator().manual_seed(0)

    def drawn(role: str, name: str) -> Any:
        targets: Any = made.targets[role]
        like = getattr(targets, name)
        return replace(targets, **{name: torch.randn(like.shape, generator=generator)})

    return replace(made, targets={"actor": drawn("actor", "advantages"), "critic": drawn("critic", "returns")})
