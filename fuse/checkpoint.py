"""Checkpoint directories: written under a temporary name, renamed when complete, so that one that exists is whole.

    checkpoint-12/
        config.json, model.safetensors, tokenizer files   the policy, as `from_pretrained` reads it
        state/                                            both models and optimizers, sharded, by global parameter names
        trainer_state.json                                transformers' TrainerState: progress and metrics
        run_state.json                                    learning-rate schedule, random generators, what the run was

All of it is JSON and safetensors: nothing that is loaded can run code.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

_CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")
RUN_STATE_NAME = "run_state.json"
WORKER_STATE_NAME = "state"


@contextmanager
def writing(output_dir: Path, step: int) -> Iterator[Path]:
    """Give a temporary directory that becomes `output_dir/checkpoint-{step}` when the body ends without an error."""
    final = output_dir / f"checkpoint-{step}"
    temporary = output_dir / f".checkpoint-{step}.{os.getpid()}.tmp"
    temporary.mkdir(parents=True)
    try:
        yield temporary
        _flush(temporary)
        if final.exists():  # an earlier run's: keep it whole until the new one stands beside it
            replaced = output_dir / f".checkpoint-{step}.{os.getpid()}.old"
            final.rename(replaced)
            temporary.rename(final)
            shutil.rmtree(replaced)
        else:
            temporary.rename(final)
        _flush_directory(output_dir)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def find(output_dir: Path, resume_from: str | bool) -> Path:
    """The checkpoint to resume from: a path, or with True the last complete one in `output_dir`.

    With True what a run left there that was cut off while it wrote is tidied up first.

    Raises:
        ValueError: there is none.
    """
    if resume_from is True:
        _tidy(output_dir)
        checkpoints = complete(output_dir)
        if not checkpoints:
            raise ValueError(f"no checkpoint to resume from in {output_dir}: start without resume_from_checkpoint")
        return checkpoints[-1]
    path = Path(str(resume_from))
    if not (path / RUN_STATE_NAME).is_file():
        raise ValueError(f"{path} is not a complete checkpoint (no {RUN_STATE_NAME}): give a checkpoint-N directory")
    return path


def _tidy(output_dir: Path) -> None:
    """Delete what was never finished, and bring back a checkpoint that was about to be replaced."""
    for replaced in output_dir.glob(".checkpoint-*.old"):
        final = output_dir / replaced.name.split(".")[1]
        if final.exists():
            shutil.rmtree(replaced)
        else:
            replaced.rename(final)
    for unfinished in output_dir.glob(".checkpoint-*.tmp"):
        shutil.rmtree(unfinished)


def complete(output_dir: Path) -> list[Path]:
    """Resumable checkpoints in `output_dir`, oldest first."""
    found = [
        (int(match.group(1)), path)
        for path in output_dir.glob("checkpoint-*")
        if (match := _CHECKPOINT_NAME.fullmatch(path.name)) and (path / RUN_STATE_NAME).is_file()
    ]
    return [path for _, path in sorted(found)]


def rotate(output_dir: Path, keep: int | None) -> None:
    """Delete all but the newest `keep` checkpoints; None keeps all."""
    if keep is not None and keep > 0:
        for path in complete(output_dir)[:-keep]:
            shutil.rmtree(path)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """What the driver needs beside transformers' TrainerState; `run` holds what must not change on resumption."""

    run: dict[str, int]
    lr_scheduler: dict[str, Any]
    random_generators: dict[str, Any]

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path, run: dict[str, int]) -> RunState:
        """Read a state and check that it belongs to a run like `run`.

        Raises:
            ValueError: the checkpoint's run differs, naming what.
        """
        state = cls(**json.loads(path.read_text()))
        for name, value in run.items():
            if state.run.get(name) != value:
                raise ValueError(
                    f"{path.parent} was written with {name}={state.run.get(name)}, this run has {name}={value}: "
                    "resume with the same value or start afresh"
                )
        return state


def random_generators() -> dict[str, Any]:
    """State of the process's generators, as JSON: reward functions and callbacks may draw from them."""
    version, internal, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=False)
    return {
        "python": [version, list(internal), gauss],
        "numpy": {
            "bit_generator": numpy_state["bit_generator"],
            "state": {"key": numpy_state["state"]["key"].tolist(), "pos": numpy_state["state"]["pos"]},
            "has_gauss": numpy_state["has_gauss"],
            "gauss": numpy_state["gauss"],
        },
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
    }


def restore_random_generators(state: dict[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    numpy_state = state["numpy"]
    key = np.asarray(numpy_state["state"]["key"], dtype=np.uint32)
    np.random.set_state({**numpy_state, "state": {"key": key, "pos": numpy_state["state"]["pos"]}})
    torch.set_rng_state(torch.frombuffer(bytearray.fromhex(state["torch"]), dtype=torch.uint8))


def _flush(directory: Path) -> None:
    """Put every file below `directory` on the disk: a rename may reach it before the data it promises."""
    for root, _, names in os.walk(directory):
        for name in names:
            with open(Path(root) / name, "rb") as file:
                os.fsync(file.fileno())
        _flush_directory(Path(root))


def _flush_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
