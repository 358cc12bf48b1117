"""torch.distributed.pipelining loads the CSV, and has in it what the schedule has."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from torch.distributed.pipelining.schedules import _Action, _PipelineScheduleRuntime

from schedules import Problem, Schedule
from schedules.baselines import one_f_one_b, serial, zero_bubble_v
from schedules.export.pipelining import pipelining_csv
from schedules.random_problems import random_problem, random_schedule

from ...examples import examples


def load(schedule: Schedule, path: Path, *, messages: bool = True) -> dict[int, list[_Action]]:
    """Write the CSV and let torch's runtime load it, without stages to run it on; torch adds messages left out."""
    text = pipelining_csv(schedule)
    path.write_text(text if messages else without_messages(text), newline="")
    runtime: Any = _PipelineScheduleRuntime.__new__(_PipelineScheduleRuntime)
    runtime.pp_group_size = schedule.problem.num_ranks
    runtime._num_stages = sum(pipeline.num_stages for pipeline in schedule.problem.pipelines)
    runtime._n_microbatches = schedule.problem.pipelines[0].num_micro_batches
    runtime._defer_pp_recv = False
    runtime._stages = []
    runtime.pipeline_order = {}
    runtime._load_csv(str(path), format="compute_comms" if messages else "compute_only")
    loaded: dict[int, list[_Action]] = runtime.pipeline_order_with_comms
    assert runtime.stage_index_to_group_rank == dict(
        enumerate(rank for pipeline in schedule.problem.pipelines for rank in pipeline.ranks)
    )
    return loaded


def without_messages(text: str) -> str:
    rows = (row.split(",") for row in text.splitlines())
    return "".join(",".join(name for name in row if "SEND" not in name and "RECV" not in name) + "\r\n" for row in rows)


def parts(action: _Action) -> tuple[int, str, int]:
    """Stage, what is done, micro-batch."""
    match = re.fullmatch(r"(\d+)([A-Z_]+)(\d+)", str(action))
    assert match, action
    return int(match[1]), match[2], int(match[3])


def names(actions: list[_Action]) -> list[str]:
    return [str(action) for action in actions]


def test_two_models_with_stages_of_their_own(fused: Schedule, tmp_path: Path) -> None:
    loaded = load(fused, tmp_path / "schedule.csv")
    first = names(loaded[0])
    assert first[0] == "0F0"
    assert "0SEND_F0" in first
    assert "0RECV_B2" in first
    # The critic's two stages are 2, on rank 1, and 3, on rank 0.
    assert {name[0] for name in first} == {"0", "3"}
    assert {name[0] for name in names(loaded[1])} == {"1", "2"}
    computed = [name for name in first if "SEND" not in name and "RECV" not in name]
    assert computed == [f"{3 if op.pipeline else 0}{op.kind}{op.micro_batch}" for op in fused.ranks[0]]


def test_no_model_sends_to_the_other(fused: Schedule, tmp_path: Path) -> None:
    text = names(load(fused, tmp_path / "schedule.csv")[1])
    assert not [name for name in text if name.startswith(("1SEND_F", "2RECV_F"))]


def test_split_backwards(split: Schedule, tmp_path: Path) -> None:
    kinds = Counter(parts(action)[1] for action in load(split, tmp_path / "schedule.csv")[1])
    assert kinds["I"] == kinds["W"] == kinds["F"] == 8
    assert not kinds["B"]


@pytest.mark.parametrize("seed", range(examples(15)))
def test_messages_meet(seed: int, tmp_path: Path) -> None:
    """Walk the rows as torch does, sends not waiting: every receive finds its message, and no rank is stuck."""
    random = Random(seed)
    problem = random_problem(random)
    equal = replace(problem, pipelines=tuple(replace(p, num_micro_batches=2) for p in problem.pipelines))
    rows = load(random_schedule(equal, random), tmp_path / "schedule.csv")
    sent: set[tuple[int, str, int]] = set()
    received: set[tuple[int, str, int]] = set()
    left = {rank: [parts(action) for action in actions] for rank, actions in rows.items()}
    progress = True
    while progress:
        progress = False
        for actions in left.values():
            while actions:
                stage, kind, micro_batch = actions[0]
                what, _, way = kind.partition("_")
                if what == "SEND":
                    sent.add((stage + (1 if way == "F" else -1), way, micro_batch))
                elif what == "RECV":
                    if (stage, way, micro_batch) not in sent:
                        break
                    received.add((stage, way, micro_batch))
                elif has_neighbour(equal, stage, kind):
                    assert (stage, "F" if kind == "F" else "B", micro_batch) in received
                actions.pop(0)
                progress = True
    assert not any(left.values())
    assert sent == received


def has_neighbour(problem: Problem, stage: int, kind: str) -> bool:
    """Whether a stage, counted through all pipelines, gets its input from another rank."""
    for pipeline in problem.pipelines:
        if stage < pipeline.num_stages:
            source = stage - 1 if kind == "F" else stage + 1
            exists = kind != "W" and 0 <= source < pipeline.num_stages
            return exists and pipeline.ranks[source] != pipeline.ranks[stage]
        stage -= pipeline.num_stages
    raise AssertionError(stage)


def test_one_model_as_torch_writes_it_itself(fused: Schedule, tmp_path: Path) -> None:
    alone = one_f_one_b(replace(fused.problem, pipelines=fused.problem.pipelines[:1]))
    text = without_messages(pipelining_csv(alone))
    assert text.splitlines() == ["0F0,0F1,0B0,0F2,0B1,0B2", "1F0,1B0,1F1,1B1,1F2,1B2"]
    lowered = load(alone, tmp_path / "alone.csv", messages=False)
    ours = load(alone, tmp_path / "ours.csv")
    for rank in lowered:
        theirs = [name for name in names(lowered[rank]) if "REDUCE" not in name and "SHARD" not in name]
        assert Counter(theirs) == Counter(names(ours[rank]))


def test_stages_that_turn_on_a_rank_exchange_nothing_there(split: Schedule, tmp_path: Path) -> None:
    pipeline = replace(
        split.problem.pipelines[0],
        ranks=(0, 1, 1, 0),
        **{
            field: getattr(split.problem.pipelines[0], field)[:1] * 4
            for field in ("forward_ticks", "backward_ticks", "input_grad_ticks", "weight_grad_ticks")
        },
        activation_bytes=(),
        weight_grad_bytes=(),
        transfer_ticks=0,
    )
    rows = load(
        zero_bubble_v(replace(split.problem, num_ranks=2, initial_bytes=(), pipelines=(pipeline,))), tmp_path / "v.csv"
    )
    assert not [name for name in names(rows[1]) if name.startswith(("1SEND_F", "2RECV_F", "2SEND_B", "1RECV_B"))]


def test_what_torch_cannot_have_is_refused(fused: Schedule) -> None:
    actor, critic = fused.problem.pipelines
    uneven = replace(fused.problem, pipelines=(actor, replace(critic, num_micro_batches=1)))
    with pytest.raises(ValueError, match="pipelines have 1 and 3 micro-batches"):
        pipelining_csv(serial(uneven))
    with pytest.raises(ValueError, match="illegal schedule"):
        pipelining_csv(Schedule(fused.problem, ((), fused.ranks[1])))
