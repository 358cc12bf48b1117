"""Live progress of a run: a bar on a terminal, elsewhere lines, never more than a few seconds apart."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback

from fuse.activity import SILENCE_S, Activity
from fuse.commands.results import mean_reward
from fuse.commands.run_text import update_text
from fuse.printable import printable

if TYPE_CHECKING:  # takes seconds to import, of which there is something to tell
    from fuse.trainers.trainer import Trainer


class UpdateProgress(TrainerCallback):
    """Shows what the run is doing, and what people look at first of the latest update.

    Without a terminal it prints a line of the first update, of the last, and of every other that ends at least
    `SILENCE_S` after the update of the last line. clock: seconds.
    """

    def __init__(self, console: Console, label: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console, clock
        self._progress = Progress(
            TextColumn(label),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[update]}{task.description}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._label = label
        self._printed_s: float | None = None  # of the last update's line
        self._task = self._progress.add_task("starting", total=None, update="")
        self.activity = Activity()
        self.activity.listen(self.tell)

    def start(self) -> None:
        self._progress.start()

    def watch(self, trainer: Trainer) -> None:
        """Show the trainer's progress, in place of transformers' own, which prints every metric of every update."""
        for standard in (ProgressCallback, PrinterCallback):
            trainer.callback_handler.remove_callback(standard)
        trainer.add_callback(self)
        trainer.activity = self.activity

    def tell(self, text: str) -> None:
        """What the run is doing."""
        text = printable(text)
        if self._console.is_terminal:
            self._progress.update(self._task, description=text)
        else:
            self._print(text)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._progress.update(self._task, total=state.max_steps, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        reward = mean_reward(logs or {})
        if logs is None or reward is None:
            return
        text = update_text(logs)
        self._progress.update(self._task, completed=state.global_step, update=f"{text}; ")
        now_s = self._clock()
        is_due = self._printed_s is None or now_s - self._printed_s >= SILENCE_S
        if not self._console.is_terminal and (is_due or state.global_step == state.max_steps):
            self._printed_s = now_s
            self._print(f"{state.global_step}/{state.max_steps}: {text}")

    def announce(self, text: str) -> None:
        """A line that stays."""
        self._print(printable(text))

    def stop(self) -> None:
        """Leave the terminal as it was; safe to call twice."""
        self._progress.stop()

    def _print(self, text: str) -> None:
        self._console.print(f"{self._label} {text}", highlight=False, markup=False, soft_wrap=True)


@contextmanager
def run_progress(console: Console, label: str) -> Iterator[UpdateProgress]:
    """A run's progress, from before there is a trainer."""
    progress = UpdateProgress(console, label)
    with progress.activity.lasting():
        progress.start()
        try:
            yield progress
        finally:
            progress.stop()
