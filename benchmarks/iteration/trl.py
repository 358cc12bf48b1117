"""TRL's PPOTrainer in `fuse bench iteration`: the same models, prompts and tokens, in a process of its own.

It generates with `model.generate`, as it always does: batches of `local_rollout_forward_batch_size`, each until its
longest response ends. Every step computes logits and draws from them; then the token that this project's trainer
generated takes the place of the one drawn, and padding once a response is over. All that follows is left alone, on
micro-batches of the same samples.
"""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.trainer_callback import PrinterCallback
from transformers.utils.logging import set_verbosity_error

from fuse.benchmarks.iteration.turn import PeakMemory, Response, Turn
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
def trl_variant(workload: Workload, num_threads: int) -> Iterator[TrlVariant]:
    """A process in which TRL's trainer waits for its turn, with as many compute threads as others have devices."""
    with PeerProcess("the process of TRL's trainer", _serve, workload, num_threads) as process:
        process.answer()  # it waits
        yield TrlVariant(process)


class TrlVariant:
    """A `Variant` of TRL's trainer."""

    def __init__(self, process: PeerProcess) -> None:
        self._process = process

    def turn(self, same: tuple[Response, ...] | None) -> Turn:
        assert same is not None, "TRL's trainer is given tokens that another one generated"
        assert self._process.process_id is not None
        memory = PeakMemory({"trainer": [self._process.process_id]})
        turn: Turn = self._process.ask(same)
        return replace(turn, peak_bytes=memory.read())


# In the process


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


def _serve(connection: Connection, workload: Workload, num_threads: int) -> None:
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    torch.set_num_threads(num_threads)
    set_verbosity_error()
    with tempfile.TemporaryDirectory(prefix="fuse-bench-") as directory, contextlib.redirect_stdout(io.StringIO()):
        module = "trl_grpo" if workload.algorithm == "grpo" else "trl"
        import_module(f"fuse.benchmarks.iteration.{module}").train(connection, workload, directory)


def train(connection: Connection, workload: Workload, directory: str) -> None:
    ppo: Any = import_module("trl.experimental.ppo")
    ppo_trainer: Any = import_module("trl.experimental.ppo.ppo_trainer")
    models = workload.models
    policy, critic = (rebuilt(model, load_state_dict) for model in (models.policy, models.critic))
    reference, reward = (rebuilt(model, adopt_state_dict) for model in (models.reference, models.reward))
    trainer = ppo.PPOTrainer(
        args=ppo.PPOConfig(output_dir=directory, **workload.options()),
        processing_class=models.tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        train_dataset=workload.dataset(),
        value_model=critic,
    )
    trainer.remove_callback(PrinterCallback)
    turns = _Turns(connection, workload, trainer)
    trainer.dataloader = turns
    with _forced(ppo_trainer, workload, turns):
        trainer.train()


def rebuilt(model: PreTrainedModel, load: Callable[[PreTrainedModel, Mapping[str, Tensor]], None]) -> PreTrainedModel:
    """As the model was: weights came as shared memory, and what was only unpickled does not return hidden states."""
    built = ModelSpec.of(model).build(torch.device("cpu"))
    load(built, model.state_dict())
    return built.requires_grad_(True)


class _Turns:
    """The trainer's prompts, collated as it collates them, each batch at its turn."""

    def __init__(self, connection: Connection, workload: Workload, trainer: Any) -> None:
        self._connection, self._workload, self._trainer = connection, workload, trainer
        self.state: State

    def __iter__(self) -> Iterator[Any]:
        self._connection.send(None)
        for round_index in itertools.count():  # until the other side is gone
            same = self._connection.recv()
            self.state = State(update=round_index + 1, same=same, start_s=time.perf_counter())
            rows: Any = self._workload.rows(round_index)
            yield from DataLoader(rows, batch_size=len(rows), collate_fn=self._trainer.data_collator)
            self._connection.send(ended(self._trainer, self.state))


def ended(trainer: Any, state: State) -> Turn:
    end_s = time.perf_counter()
    total_s, training_s = end_s - state.start_s, end_s - state.training_start_s
    inference_s = total_s - state.generation_s - training_s
    return Turn(
        seconds=total_s,
        responses=tuple(state.generated),
        metrics=_last_logged(trainer.state.log_history),
        phases={"generation": state.generation_s, "inference": inference_s, "training": training_s},
        idle_share={},
        outside_share=None,
        bubbles={},
        peak_bytes={},
    )


def _last_logged(log_history: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """What was logged last of each figure: some are logged at the first optimizer step of an update alone."""
    return {name: value for logged in log_history for name, value in logged.items()}


@contextmanager
def _forced(ppo_trainer: Any, workload: Workload, turns: _Turns) -> Iterator[None]:
    """Have the trainer generate given tokens, and train on micro-batches of given samples."""
    generate, seed = ppo_trainer.generate, workload.options()["seed"]

    def forced(model: Any, queries: Tensor, pad_token_id: int, generation_config: Any) -> tuple[Tensor, Tensor]:
        start_s, state = time.perf_counter(), turns.state
        same = state.same[len(state.generated) : len(state.generated) + len(queries)]
        config = copy.copy(generation_config)
        config.max_new_tokens = max(len(one.response_ids) for one in same)
        with forced_draws(same, pad_token_id):
            sequences, logits = generate(model, queries, pad_token_id, config)
        state.generation_s += time.perf_counter() - start_s
        context = queries.shape[1]
        for one, row in zip(same, sequences.tolist(), strict=True):
            prompt = row[context - len(one.prompt_ids) : context]
            response = row[context : context + len(one.response_ids)]
            state.generated.append(Response(tuple(prompt), tuple(response)))
        return sequences, logits

    def permutation(length: int) -> Any:
        state = turns.state
        if not state.num_permutations:
            state.training_start_s = time.perf_counter()
        seeds = [seed, state.update, state.num_permutations]
        state.num_permutations += 1
        return np.random.default_rng(seeds).permutation(length)

    forced_numpy = SimpleNamespace(random=SimpleNamespace(permutation=permutation))
    with mock.patch.object(ppo_trainer, "generate", forced), mock.patch.object(ppo_trainer, "np", forced_numpy):
        yield


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
