"""Live progress of a run: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from fuse.trainer import PPOTrainer

NUM_LINES = 20


class UpdateProgress(TrainerCallback):
    """Shows the mean reward and the seconds of the latest update."""

    def __init__(self, console: Console, label: str) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn(label),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._label = label

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._task = self._progress.add_task("starting", total=state.max_steps, completed=state.global_step)
        self._progress.start()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs is None or "objective/scores" not in logs:
            return
        text = f"reward {logs['objective/scores']:.3f}, {logs['time/total']:.1f} s per update"
        self._progress.update(self._task, completed=state.global_step, description=text)
        every = max(1, state.max_steps // NUM_LINES)
        if not self._console.is_terminal and (state.global_step % every == 0 or state.global_step == state.max_steps):
            self._console.print(f"{self._label} {state.global_step}/{state.max_steps}: {text}")

    def stop(self) -> None:
        """Leave the terminal as it was; safe to call twice."""
        self._progress.stop()


@contextmanager
def update_progress(trainer: PPOTrainer, console: Console, label: str) -> Iterator[None]:
    """Show the trainer's progress in place of transformers' own, which prints every metric of every update."""
    for standard in (ProgressCallback, PrinterCallback):
        trainer.callback_handler.remove_callback(standard)
    progress = UpdateProgress(console, label)
    trainer.add_callback(progress)
    try:
        yield
    finally:
        progress.stop()
