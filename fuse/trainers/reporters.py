"""Where metrics are reported to: a resumed run goes on in the run that it was there, not in a new one beside it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import CallbackHandler

TENSORBOARD = "tensorboard"
_SHORT_ID = 8


def reported_to(handler: CallbackHandler) -> dict[str, str]:
    """Where reports go that have no name of their own, for a checkpoint: TensorBoard's directory."""
    directories = [str(one.logging_dir) for one in _tensorboards(handler) if one.logging_dir is not None]
    return {TENSORBOARD: directories[0]} if directories else {}


def continue_reports(handler: CallbackHandler, kept: Mapping[str, str], num_steps: int) -> None:
    """Have TensorBoard go on in the directory that a checkpoint names, in place of what is there after that step."""
    directory = kept.get(TENSORBOARD)
    if directory is None or not Path(directory).is_dir():
        return
    for callback in _tensorboards(handler):
        callback.logging_dir = directory
        callback.tb_writer = callback._SummaryWriter(log_dir=directory, purge_step=num_steps + 1)


@contextmanager
def named_for(run_id: str, args: Any) -> Iterator[None]:
    """Within it reporters begin: Weights & Biases and Trackio know a run by an id, or a name, that stays with it.

    What the user has set stays as it is: WANDB_RUN_ID, WANDB_RESUME, run_name.
    """
    own = {"WANDB_RUN_ID": run_id, "WANDB_RESUME": "allow"}
    own = {name: value for name, value in own.items() if name not in os.environ}
    name, is_tracked = args.run_name, "trackio" in (args.report_to or ())
    os.environ.update(own)
    if name is None and is_tracked:
        args.run_name = f"{Path(str(args.output_dir)).name}-{run_id[:_SHORT_ID]}"
    try:
        yield
    finally:
        args.run_name = name
        for variable in own:
            os.environ.pop(variable, None)


def _tensorboards(handler: CallbackHandler) -> list[Any]:
    return [callback for callback in handler.callbacks if isinstance(callback, TensorBoardCallback)]
