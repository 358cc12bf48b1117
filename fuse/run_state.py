"""What a checkpoint says of its run beside transformers' TrainerState, as JSON."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from schedules.reading import parse_json

NAME = "run_state.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """Where a run is, as its driver knows it.

    run_id: of the run, the same when it is resumed. saved_s: `time.time()` when this was written.
    run: what must not change on resumption. options: of the configuration, what a change of is told. reports: where
    metrics went. Both are {} in checkpoints of versions that did not keep them.
    """

    run_id: str
    saved_s: float
    run: dict[str, int]
    lr_scheduler: dict[str, Any]
    random_generators: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    reports: dict[str, str] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> RunState:
        """Raises: ValueError for a file that is damaged or absent."""
        try:
            return cls(**parse_json(path.read_text(encoding="utf-8"), any_number=True))  # type: ignore[arg-type]
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"cannot read {path} ({error}): resume from another checkpoint") from error

    @classmethod
    def load(cls, path: Path, run: dict[str, int]) -> RunState:
        """Read a state and check that it belongs to a run like `run`.

        Raises:
            ValueError: the checkpoint's run differs, naming what; or the file is damaged.
        """
        state = cls.read(path)
        for name in (*run, *(state.run.keys() - run.keys())):
            if (written := state.run.get(name, 0)) != (value := run.get(name, 0)):
                raise ValueError(
                    f"{path.parent} was written with {name}={written}, this run has {name}={value}: "
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
    """Have the process's generators go on where `random_generators` was called."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    numpy_state = state["numpy"]
    key = np.asarray(numpy_state["state"]["key"], dtype=np.uint32)
    np.random.set_state({**numpy_state, "state": {"key": key, "pos": numpy_state["state"]["pos"]}})
    torch.set_rng_state(torch.frombuffer(bytearray.fromhex(state["torch"]), dtype=torch.uint8))
