"""TRL's trainers in `fuse bench iteration`: the same models, prompts and tokens, in a process of their own.

What each generates with is its own, `model.generate`, in batches that end with their longest response. Every step
computes logits and draws from them; then the token that this project's trainer generated takes the place of the one
drawn, and padding once a response is over. All that follows is left alone, on micro-batches of the same samples.
`trl_ppo` and `trl_grpo` make the trainers so.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.logging import set_verbosity_error

from fuse.benchmarks.iteration.turn import PeakMemory, Response, Turn, Variant
from fuse.benchmarks.iteration.workload import Workload
from fuse.benchmarks.peer_process import PeerProcess
from fuse.state_dict import adopt_state_dict, load_state_dict
from fuse.training.model_spec import ModelSpec

VERSION = "1.12.0"
"""The last one with PPO; its GRPO is compared with, too."""


def require_trl() -> None:
    """Raises: ValueError when this version of TRL is not installed."""
    try:
        found = version("trl")
    except PackageNotFoundError:
        found = "none"
    if found != VERSION:
        raise ValueError(
            f"--peer trl compares with trl {VERSION}, the last one with PPO, and {found} is installed: "
            f"pip install trl=={VERSION}"
        )


@contextmanager
def trl_variant(workload: Workload, num_threads: int) -> Iterator[Variant]:
    """A process in which TRL's trainer waits for its turn, with as many compute threads as others have devices."""
    with PeerProcess("the process of TRL's trainer", _serve, workload, num_threads) as process:
        process.answer()  # it waits
        yield partial(_turn, process)


def _turn(process: PeerProcess, same: tuple[Response, ...] | None) -> Turn:
    assert same is not None, "TRL's trainer is given tokens that another one generated"
    assert process.process_id is not None
    memory = PeakMemory({"trainer": [process.process_id]})
    turn: Turn = process.ask(same)
    return replace(turn, peak_bytes=memory.read())


# In the process


def _serve(connection: Connection, workload: Workload, num_threads: int) -> None:
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    torch.set_num_threads(num_threads)
    set_verbosity_error()
    with tempfile.TemporaryDirectory(prefix="fuse-bench-") as directory, contextlib.redirect_stdout(io.StringIO()):
        program: Any = import_module(f"fuse.benchmarks.iteration.trl_{workload.algorithm}")
        program.train(connection, workload, directory)


@dataclass(slots=True)
class State:
    """Of the turn under way, the update-th."""

    update: int
    same: tuple[Response, ...]
    start_s: float
    generation_s: float = 0.0
    training_start_s: float = 0.0
    num_permutations: int = 0
    generated: list[Response] = field(default_factory=list)


class Turns:
    """The rounds, each at its turn: what the trainer reads its batches from. state: of the turn under way."""

    state: State

    def __init__(
        self, connection: Connection, workload: Workload, trainer: Any, batches: Callable[[int], Iterator[Any]]
    ) -> None:
        self._connection, self._workload, self._trainer, self._batches = connection, workload, trainer, batches

    def __iter__(self) -> Iterator[Any]:
        self._connection.send(None)
        for round_index in range(self._workload.num_rounds):
            same = self._connection.recv()
            self.state = State(update=round_index + 1, same=same, start_s=time.perf_counter())
            yield from self._batches(round_index)
            self._connection.send(self._ended())  # once the next batch is asked for
        self._connection.recv()  # nothing more comes: the other side ends

    def _ended(self) -> Turn:
        state, end_s = self.state, time.perf_counter()
        total_s, training_s = end_s - state.start_s, end_s - state.training_start_s
        inference_s = total_s - state.generation_s - training_s
        # What was logged last of each figure: some are logged at the first optimizer step of an update alone.
        metrics = {name: value for logged in self._trainer.state.log_history for name, value in logged.items()}
        phases = {"generation": state.generation_s, "inference": inference_s, "training": training_s}
        responses = tuple(state.generated)
        return Turn(seconds=total_s, responses=responses, metrics=metrics, phases=phases, exposed_s=phases)


def trainable(model: PreTrainedModel) -> PreTrainedModel:
    """As the model was: weights came as shared memory, and what was only unpickled does not return hidden states."""
    return _rebuilt(model, load_state_dict)


def shared(model: PreTrainedModel) -> PreTrainedModel:
    """The same of a model that is not trained, which reads the weights where they are."""
    return _rebuilt(model, adopt_state_dict)


def _rebuilt(model: PreTrainedModel, load: Callable[[PreTrainedModel, Mapping[str, Tensor]], None]) -> PreTrainedModel:
    built = ModelSpec.of(model).build(torch.device("cpu"))
    load(built, model.state_dict())
    return built.requires_grad_(True)


@contextmanager
def forced_draws(same: tuple[Response, ...], pad_token_id: int) -> Iterator[None]:
    """Have sampling draw, and then return these responses, token by token."""
    longest = max(len(one.response_ids) for one in same)
    padded = [(*one.response_ids, *[pad_token_id] * (longest - len(one.response_ids))) for one in same]
    columns: Iterator[Tensor] = iter(torch.tensor(padded).split(1, dim=1))
    draw = torch.multinomial

    def multinomial(*args: Any, **options: Any) -> Tensor:
        draw(*args, **options)
        return next(columns)

    with mock.patch.object(torch, "multinomial", multinomial):
        yield
