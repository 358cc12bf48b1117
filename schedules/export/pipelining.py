"""A schedule as the CSV that torch.distributed.pipelining loads: a row per rank, its actions in order.

`_PipelineScheduleRuntime._load_csv(file, format="compute_comms")` reads it: compute actions such as `2F0` (stage,
kind, micro-batch) with the messages between them (`2SEND_F0`, `3RECV_F0`). Stages are numbered through: those of the
second pipeline follow those of the first, and so on. Torch's form without messages (`compute_only`) is not written: it
would have torch connect the last stage of one model with the first of the next.

Source: torch/distributed/pipelining/schedules.py of torch 2.13 (`_Action.from_str`, `_add_send_recv`).
"""

from __future__ import annotations

import itertools

from schedules.ir import Kind, Op, Problem, Schedule
from schedules.timing import evaluate
from schedules.validate import check
from schedules.walk import channel_from


def pipelining_csv(schedule: Schedule) -> str:
    """The schedule's rows.

    A message enters the rows of both its ranks at the time when the sender has made it. So two ranks list what they
    exchange in one order.

    Raises:
        ValueError: the schedule is illegal or has forward-only pipelines, or its pipelines differ in their number of
            micro-batches, for which torch has one number.
    """
    check(schedule)
    problem = schedule.problem
    for pipeline in problem.pipelines:
        if pipeline.is_forward_only:
            raise ValueError(
                f"pipeline {pipeline.name} is forward-only, of which torch.distributed.pipelining knows nothing; "
                "export a schedule without it"
            )
    counts = sorted({pipeline.num_micro_batches for pipeline in problem.pipelines})
    if len(counts) > 1:
        raise ValueError(
            f"pipelines have {' and '.join(map(str, counts))} micro-batches, but torch.distributed.pipelining has one "
            "number for all stages; export one model alone"
        )
    return "".join(",".join(row) + "\r\n" for row in _with_messages(schedule))


def _with_messages(schedule: Schedule) -> list[list[str]]:
    """Operations enter their row when they start, messages both rows when the operation that makes them ends."""
    problem = schedule.problem
    timing = evaluate(schedule)
    moments: list[tuple[int, bool, int, int]] = []  # time, is a start, rank, index
    for rank, order in enumerate(schedule.ranks):
        for index in range(len(order)):
            moments.append((timing.start[rank][index], True, rank, index))
            moments.append((timing.end[rank][index], False, rank, index))
    rows: list[list[str]] = [[] for _ in schedule.ranks]
    for _, is_start, rank, index in sorted(moments):
        op = schedule.ranks[rank][index]
        channel = channel_from(problem, op)
        if is_start:
            rows[rank].append(_action(problem, op))
        elif channel is not None:
            way, target = ("F", op.stage + 1) if op.kind is Kind.F else ("B", op.stage - 1)
            rows[rank].append(f"{_stage(problem, op.pipeline, op.stage)}SEND_{way}{op.micro_batch}")
            rows[channel[3]].append(f"{_stage(problem, op.pipeline, target)}RECV_{way}{op.micro_batch}")
    return rows


def _action(problem: Problem, op: Op) -> str:
    return f"{_stage(problem, op.pipeline, op.stage)}{op.kind}{op.micro_batch}"


def _stage(problem: Problem, pipeline: int, stage: int) -> int:
    """The stage's number among those of all pipelines."""
    return stage + sum(earlier.num_stages for earlier in itertools.islice(problem.pipelines, pipeline))
