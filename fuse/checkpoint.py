"""Checkpoint directories: written under a temporary name, renamed when complete, so that one that exists is whole.

    checkpoint-12/
        config.json, model.safetensors, tokenizer files   the policy, as `from_pretrained` reads it
        ema/                                              with `ema_decay`, the average of its weights, alike
        state/                                            both models and optimizers, sharded, by global parameter names
        trainer_state.json                                transformers' TrainerState: progress and metrics
        run_state.json                                    whose it is, learning-rate schedule, random generators

All of it is JSON and safetensors: nothing that is loaded can run code. With `save_only_model` there is no state/.

What is written, replaced or deleted lies meanwhile in `.checkpoint-12.*.tmp`, whose name no other process has. Whoever
works there holds a shared lock on the output directory, and whoever tidies up behind killed runs an exclusive one: the
system takes locks from processes that end, and process ids, which containers repeat, play no part.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from fuse import run_state
from fuse.run_state import RunState

_CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")
_RUST_ERROR = re.compile(r"\(os error \d+\)")
_REPLACED = "replaced"
_NUM_LISTED = 5
RUN_STATE_NAME = run_state.NAME
WORKER_STATE_NAME = "state"

logger = logging.getLogger(__name__)


class SaveError(OSError):
    """Something could not be written to disk; the message names the path and why."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One that lies in an output directory. run_id: of the run that wrote it; None where it does not tell."""

    path: Path
    step: int
    run_id: str | None
    saved_s: float

    @property
    def is_resumable(self) -> bool:
        return self.run_id is not None and (self.path / WORKER_STATE_NAME).is_dir()


# Starting


def start(output_dir: Path, resume_from: str | bool | None) -> Path | None:
    """The checkpoint that a run in `output_dir` goes on from, as `find` has it; None where it starts afresh.

    What killed runs left there, or beside the checkpoint, is tidied up. A fresh start warns of checkpoints that are
    there already.

    Raises:
        ValueError: there is no such checkpoint.
    """
    _tidy(output_dir)
    if is_asked_for(resume_from):
        if str(resume_from).lower() != "true":
            _tidy(Path(str(resume_from)).absolute().parent)  # which may be another run's output directory
        return find(output_dir, resume_from)
    if others := checkpoints(output_dir):
        logger.warning(
            "%s holds %s of other runs: this run leaves them, but replaces those of its own steps; to go on with the "
            "last of them, resume from it",
            output_dir,
            _names(others),
        )
    return None


def is_asked_for(resume_from: str | bool | None) -> TypeGuard[str | bool]:
    """Whether a run is to go on from a checkpoint; command lines say "true" and "false" in words."""
    return bool(resume_from) and str(resume_from).lower() != "false"


def find(output_dir: Path, resume_from: str | bool) -> Path:
    """The checkpoint to resume from: a path, or with True (or "true") the last one in `output_dir`.

    Where several runs have left theirs, that of the run that saved last; a warning says which this is.

    Raises:
        ValueError: there is none.
    """
    if str(resume_from).lower() == "true":
        return _last(output_dir)
    path = Path(str(resume_from)).absolute()
    for part in (RUN_STATE_NAME, WORKER_STATE_NAME):
        if not (path / part).exists():
            raise ValueError(f"{path} is not a complete checkpoint (no {part}): give a checkpoint-N directory that is")
    return path


def _last(output_dir: Path) -> Path:
    found = checkpoints(output_dir)
    resumable = [one for one in found if one.is_resumable]
    if not resumable:
        needed = f"{RUN_STATE_NAME} and {WORKER_STATE_NAME}"
        without = f" ({_names(found)} cannot be resumed without {needed})" if found else ""
        raise ValueError(f"no checkpoint to resume from in {output_dir}{without}: start without resume_from_checkpoint")
    last = resumable[-1]
    if others := [one for one in resumable if one.run_id != last.run_id]:
        logger.warning(
            "%s holds checkpoints of several runs: resuming from %s, of the run that saved last, and not from %s; "
            "to resume from another one give its path",
            output_dir,
            last.path.name,
            _names(others),
        )
    return last.path.absolute()


def _names(found: Sequence[Checkpoint]) -> str:
    rest = len(found) - _NUM_LISTED
    return ", ".join(one.path.name for one in found[:_NUM_LISTED]) + (f" and {rest} more" if rest > 0 else "")


def checkpoints(output_dir: Path) -> list[Checkpoint]:
    """Those in `output_dir`, of whatever run, in the order in which they were saved."""
    found = [
        _checkpoint(path, int(match[1]))
        for path in output_dir.glob("checkpoint-*")
        if (match := _CHECKPOINT_NAME.fullmatch(path.name)) and path.is_dir()
    ]
    return sorted(found, key=lambda one: (one.saved_s, one.step))


def _checkpoint(path: Path, step: int) -> Checkpoint:
    try:
        state = RunState.read(path / RUN_STATE_NAME)
    except ValueError:  # another program's, or damaged
        return Checkpoint(path, step, None, path.stat().st_mtime)
    return Checkpoint(path, step, state.run_id, state.saved_s)


# Saving


@contextmanager
def writing(output_dir: Path, step: int) -> Iterator[Path]:
    """Give a temporary directory that becomes `output_dir/checkpoint-{step}` when the body ends without an error.

    Raises:
        SaveError: it could not be written; what was there before is as it was.
    """
    final = output_dir / f"checkpoint-{step}"
    with saving(final):
        output_dir.mkdir(parents=True, exist_ok=True)
        with _aside(final) as aside:
            written = aside / final.name  # not `aside` itself, which nobody else may read
            written.mkdir()
            yield written
            _flush(written)
            if final.exists():  # an earlier run's: keep it whole until the new one stands in its place
                final.rename(aside / _REPLACED)
            written.rename(final)
            _flush_directory(output_dir)


@contextmanager
def saving(path: Path) -> Iterator[None]:
    """Have the body's failures to write say in one line that `path` was not saved.

    Raises:
        SaveError: a full disk, a read-only directory and their like.
    """
    try:
        yield
    except Exception as error:
        if not (
            isinstance(error, OSError) or _RUST_ERROR.search(str(error))
        ):  # safetensors and tokenizers raise others
            raise
        raise SaveError(f"cannot save {path}: {' '.join(str(error).split())}") from error


def rotate(output_dir: Path, keep: int | None, written: Path) -> None:
    """Of the run that has just saved `written`, delete all but the newest `keep` checkpoints; None keeps all.

    Raises:
        SaveError: one could not be deleted.
    """
    if keep is None or keep <= 0:
        return
    found = checkpoints(output_dir)
    (run_id,) = (one.run_id for one in found if one.path == written)
    earlier = [one.path for one in found if one.run_id == run_id and one.path != written]
    for path in earlier[: max(0, len(earlier) - (keep - 1))]:
        with saving(path), _aside(path) as aside:
            path.rename(aside / "deleted")  # at once: a part of a checkpoint is none


# Behind the scenes


@contextmanager
def _aside(final: Path) -> Iterator[Path]:
    """A directory beside the checkpoint `final` for what is being done to it, gone afterwards."""
    with _locked(final.parent, fcntl.LOCK_SH):
        aside = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".tmp", dir=final.parent))
        try:
            yield aside
        finally:
            _settle(aside)


def _tidy(output_dir: Path) -> None:
    """Settle what killed runs left; where a run is writing, a later start does."""
    if not output_dir.is_dir():
        return
    with _locked(output_dir, fcntl.LOCK_EX | fcntl.LOCK_NB) as is_locked:
        if is_locked:
            for aside in output_dir.glob(".checkpoint-*.tmp"):
                _settle(aside)


def _settle(aside: Path) -> None:
    """Bring back a checkpoint that was to be replaced and was not, and delete the rest."""
    replaced, final = aside / _REPLACED, aside.parent / aside.name.split(".")[1]
    if replaced.exists() and not final.exists():
        replaced.rename(final)
    shutil.rmtree(aside, ignore_errors=True)  # workers of a run that was killed may write there to the last


@contextmanager
def _locked(directory: Path, operation: int) -> Iterator[bool]:
    """Whether the lock is held: not where another run has it, nor on file systems without locks."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, operation)
            is_locked = True
        except OSError:
            is_locked = False
        yield is_locked
    finally:
        os.close(descriptor)


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
