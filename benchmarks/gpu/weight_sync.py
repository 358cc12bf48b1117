"""New weights from a process that trains to one that generates, through memory that both have: on a GPU by CUDA IPC."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch
import torch.multiprocessing  # registers how tensors travel: as handles of their memory
from torch import Tensor, nn

from fuse.benchmarks.gpu.setup import Row, Setup, gigabytes, random_model, synchronize
from fuse.benchmarks.peer_process import PeerProcess
from fuse.engines.engine import GenerationEngine
from fuse.engines.kv_memory import Layout, layout_of, num_bytes, views
from fuse.engines.transformers import TransformersEngine

_ROUNDS = 6


@dataclass(frozen=True, slots=True)
class Shared:
    """Weights of these names, one after the other in memory that both processes have, uint8 [bytes]."""

    names: tuple[str, ...]
    layout: Layout
    memory: Tensor

    def weights(self) -> dict[str, Tensor]:
        return dict(zip(self.names, views(self.memory, self.layout), strict=True))


def check(setup: Setup) -> Iterator[Row]:
    """Seconds from weights in float32 here to an engine that has them there, and whether it has them to the bit."""
    with PeerProcess("the engine's process", _serve_engine, setup, context=setup.context) as engine:
        model = random_model(setup, "actor", torch.float32)
        parameters = dict(model.named_parameters())
        layout = [(setup.dtype, shape) for _, shape in layout_of(list(parameters.values()))]
        memory = torch.empty(num_bytes(layout), dtype=torch.uint8, device=setup.device)
        shared = Shared(tuple(parameters), layout, memory.share_memory_() if setup.device == "cpu" else memory)
        targets = list(shared.weights().values())
        assert engine.answer() == "awake"
        seconds, differing = [], 0
        for index in range(_ROUNDS):
            with torch.no_grad():  # as an optimizer step would
                torch._foreach_add_(list(parameters.values()), 0.01)
            synchronize(setup)
            start_s = time.perf_counter()
            with torch.no_grad():
                torch._foreach_copy_(targets, list(parameters.values()))  # rounds to the engine's type
            synchronize(setup)
            engine.ask(shared if index == 0 else "again")
            seconds.append(time.perf_counter() - start_s)
            differing += engine.ask("bits") != _bits(shared.weights())
        engine.send("end")  # a forked process has both ends of its pipe, and would not notice that one is closed
    later_s, limit_s = statistics.median(seconds[1:]), setup.sync_limit_s
    size = sum(parameter.numel() for parameter in parameters.values())
    yield Row(
        name="weight sync",
        measured=f"{later_s:.4f} s",
        bound="" if limit_s is None else f"{limit_s:g} s",
        ok=not differing and (limit_s is None or later_s <= limit_s),
        detail=f"{size:,} weights, {gigabytes(memory.nbytes)}; the first {seconds[0]:.3f} s; "
        + (f"{differing} of {_ROUNDS} arrived otherwise" if differing else "to the bit"),
    )


def _serve_engine(connection: Connection, setup: Setup) -> None:
    model = random_model(setup, "actor", setup.dtype)
    engine: GenerationEngine = TransformersEngine(model, max_batch=1, max_context=setup.prompt_tokens + 8)
    connection.send("awake")
    shared: Shared | None = None
    while (question := connection.recv()) != "end":
        if question == "bits":
            connection.send(_bits(_parameters(model)))
            continue
        shared = question if isinstance(question, Shared) else shared
        assert shared is not None
        engine.load_weights(shared.weights())
        synchronize(setup)
        connection.send("loaded")


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _bits(weights: dict[str, Tensor]) -> dict[str, int]:
    """A sum of each tensor's bits, of which every change of one shows."""
    return {name: int(one.contiguous().view(torch.int16).sum(dtype=torch.int64)) for name, one in weights.items()}
