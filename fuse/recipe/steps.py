"""Steps of a recipe: commands that run one after another, each once, and go on where they were ended."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from schedules.files import write_whole

_POLL_S = 0.1
_CHECKPOINT = re.compile(r"checkpoint-\d+")
_FOLLOWER = """
import os, signal, subprocess, sys, threading
signal.signal(signal.SIGINT, lambda *_: None)
process = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, close_fds=False)
threading.Thread(target=lambda: (os.read(0, 1), process.terminate()), daemon=True).start()
sys.exit(process.wait() & 255)
"""
"""Runs a command, and asks it to end, once, when whoever holds its standard input has closed that, or died."""


class StepError(RuntimeError):
    """A step has failed, and not because of what it was given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A command that writes the JSON file `results` when it is done.

    command: without what makes it go on from a checkpoint. resume: that, where there is one. inputs: what it reads, by
    the step that makes it. settings: what decides its results. checkpoints: where it has some that nobody needs when
    it is complete.
    """

    name: str
    output_dir: Path
    command: Sequence[str]
    resume: Callable[[], Sequence[str]]
    inputs: Mapping[str, Path]
    settings: Mapping[str, Any]
    checkpoints: Path | None = None

    @property
    def record(self) -> Path:
        """Of a step that is complete: its settings, seconds and metrics."""
        return self.output_dir / f"{self.name}.json"

    @property
    def results(self) -> Path:
        return self.output_dir / f"{self.name}.results.json"

    @property
    def log(self) -> Path:
        return self.output_dir / f"{self.name}.log"


def run_step(step: Step, how_to_make: str, tell: Callable[[str], None], lock: int) -> dict[str, Any]:
    """Run a step, unless it is complete; returns its record.

    how_to_make: the command, up to the names of steps, that makes what is missing. lock: a file that the step holds
    open for as long as it runs.

    Raises:
        ValueError: an input is missing, the step was completed with other settings, or refuses what it is given.
        StepError: it failed.
    """
    settings = dict(step.settings) | {"inputs": _inputs(step, how_to_make)}
    if step.record.exists():
        record: dict[str, Any] = json.loads(step.record.read_text(encoding="utf-8"))
        if record["settings"] != json.loads(json.dumps(settings)):
            changed = sorted(name for name in settings if record["settings"].get(name) != settings[name])
            raise ValueError(
                f"step {step.name} was completed with other {', '.join(changed) or 'settings'}: "
                f"remove {step.record} to run it again, or name another --output-dir"
            )
        _remove_checkpoints(step)
        tell(f"{step.name}: complete ({step.record})")
        return record
    tell(f"{step.name}: starting")
    start_s = time.monotonic()
    _run([*step.command, *step.resume()], step, tell, lock)
    record = {
        "settings": settings,
        "seconds": time.monotonic() - start_s,
        "metrics": json.loads(step.results.read_text(encoding="utf-8")),
    }
    write_whole(step.record, json.dumps(record, indent=2) + "\n")
    step.results.unlink()
    _remove_checkpoints(step)
    return record


@contextmanager
def locked(output_dir: Path) -> Iterator[int]:
    """Have the directory alone; the file that is open as long.

    Raises: ValueError where another run has it.
    """
    with open(output_dir / ".lock", "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another recipe, or a step that it left, is at work in {output_dir}: wait for it, or end it"
            ) from None
        yield file.fileno()


def _inputs(step: Step, how_to_make: str) -> dict[str, str]:
    """Which run of each step made what this one reads."""
    made = {}
    for maker, path in step.inputs.items():
        record = step.output_dir / f"{maker}.json"
        if not path.exists() or not record.exists():
            raise ValueError(f"step {step.name} needs {path}, which is not complete: make it by {how_to_make} {maker}")
        made[maker] = hashlib.sha256(record.read_bytes()).hexdigest()
    return made


def _remove_checkpoints(step: Step) -> None:
    """Of a step whose record is written; a kill on the way leaves the rest to the next run."""
    for path in [] if step.checkpoints is None else list(step.checkpoints.iterdir()):
        if _CHECKPOINT.fullmatch(path.name):
            shutil.rmtree(path)


def _run(command: Sequence[str], step: Step, tell: Callable[[str], None], lock: int) -> None:
    """The command writes to the log itself: it can end in order when this process has been killed."""
    last = ""
    with open(step.log, "a", encoding="utf-8") as log, open(step.log, encoding="utf-8", errors="replace") as written:
        print(f"$ {shlex.join(command)}", file=log, flush=True)
        written.seek(0, os.SEEK_END)
        process = subprocess.Popen(
            [sys.executable, "-c", _FOLLOWER, *command],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            pass_fds=(lock,),
        )
        try:
            for line in _lines(written, process):
                last = line
                tell(line if line.startswith(f"{step.name}:") else f"{step.name}: {line}")
            status = process.wait()
        except BaseException as error:
            _end(process)
            if isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(
                    f"interrupted in step {step.name}: the same command again goes on from its last checkpoint"
                ) from error
            raise
    if status == 2:
        raise ValueError(f"step {step.name}: {last.partition(': ')[2] or last}")
    if status:
        raise StepError(
            f"step {step.name} failed with status {status}: {last} (see {step.log}); the same command again goes on "
            "from its last checkpoint"
        )


def _lines(file: TextIO, process: subprocess.Popen[bytes]) -> Iterator[str]:
    """What is written to the file until the process has ended, without empty lines."""
    rest, has_ended = "", False
    while not has_ended:
        has_ended = process.poll() is not None
        while text := file.readline():
            rest += text
            if rest.endswith("\n"):
                if rest.strip():
                    yield rest.strip()
                rest = ""
        if not has_ended:
            time.sleep(_POLL_S)
    if rest.strip():
        yield rest.strip()


def _end(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.close()
    process.wait()
