"""Cases of the schedule evaluator and of its local search, with the instructions that callgrind counts."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import torch

from fuse.benchmarks.kernels.rows import Case, Instructions
from fuse.benchmarks.schedule_calls import ScheduleCalls
from schedules import evaluate

_PROGRAM = "fuse.benchmarks.schedule_calls"
_TIMED_EVALUATIONS = 10
_COUNTED_EVALUATIONS, _COUNTED_STEPS = 100, 10_000
_TIME_LIMIT_S = 300.0


def schedule_cases(num_ranks: int = 16, num_micro_batches: int = 64) -> Iterator[Case]:
    """One evaluation against the Python reference, and one step of local search against an evaluation.

    Data types are those of times, in ticks. A step reads what it needs and no more, so it has no roofline.
    """
    calls = ScheduleCalls(num_ranks, num_micro_batches)
    per_evaluation, per_step = count_instructions(num_ranks, num_micro_batches)
    evaluation = Case(
        kernel="schedule_evaluation",
        shape=[calls.num_ops],
        dtype=torch.int32,
        # Of each operation its place, duration, predecessor, transfer time and memory; its start is written.
        bytes_moved=calls.num_ops * (5 * 4 + 8),
        result_bytes=calls.num_ops * 4,
        instructions=per_evaluation,
        implementation="native C++",
        function=lambda: calls.evaluate(_TIMED_EVALUATIONS),
        references={"Python": lambda: [evaluate(calls.schedule) for _ in range(_TIMED_EVALUATIONS)]},
        num_calls=_TIMED_EVALUATIONS,
    )
    yield evaluation
    yield replace(
        evaluation,
        kernel="local_search",
        bytes_moved=0,
        result_bytes=0,
        instructions=per_step,
        function=lambda: calls.search(_COUNTED_STEPS),
        references={"full evaluation": lambda: calls.evaluate(_COUNTED_STEPS)},
        num_calls=_COUNTED_STEPS,
    )


def count_instructions(num_ranks: int, num_micro_batches: int) -> tuple[Instructions, Instructions]:
    """Of an evaluation and of a step: what a process that does many takes, less one that does none."""
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        missing = Instructions(None, "valgrind, which counts instructions, is not installed")
        return missing, missing
    counts = []
    for num_evaluations, num_steps in ((0, 0), (_COUNTED_EVALUATIONS, 0), (0, _COUNTED_STEPS)):
        arguments = map(str, (num_ranks, num_micro_batches, num_evaluations, num_steps))
        command = [valgrind, "--tool=callgrind", "--callgrind-out-file=/dev/null", sys.executable, "-m", _PROGRAM]
        process = subprocess.run(
            [*command, *arguments],
            env=os.environ | {"PYTHONHASHSEED": "0"},
            capture_output=True,
            text=True,
            timeout=_TIME_LIMIT_S,
        )
        found = re.search(r"Collected : (\d+)", process.stderr)
        if process.returncode != 0 or found is None:
            failed = Instructions(None, f"valgrind failed: {(process.stderr.splitlines() or ['no output'])[-1]}")
            return failed, failed
        counts.append(int(found[1]))
    nothing, evaluations, steps = counts
    return (
        Instructions((evaluations - nothing) // _COUNTED_EVALUATIONS, "counted by callgrind"),
        Instructions((steps - nothing) // _COUNTED_STEPS, "counted by callgrind"),
    )
