"""A page with sliders: schedules side by side, timed by the page itself. One file, which needs no network.

The page's script has the evaluator and the greedy rule for pipelines of one stage per rank, the second in the opposite
direction; orders of baselines, and those that the solver has found, come with it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from schedules.baselines import chimera, gpipe, one_f_one_b, serial
from schedules.export.palette import look
from schedules.fused.solve import solve
from schedules.ir import Kind, Pipeline, Problem, Schedule

STAGES, MICRO_BATCHES = (2, 4, 6, 8), (4, 8, 12, 16)
"""What the sliders choose from: evenly spaced."""
_REFERENCE = ((2, 4, 2), (1, 2, 1))
"""Forward and backward ticks and memory of each model, for which schedules are solved."""
_HERE = Path(__file__).parent
_BASELINES = {"GPipe, one model after the other": gpipe, "1F1B, one model after the other": one_f_one_b}


def playground_problem(num_models: int, num_stages: int, num_micro_batches: int) -> Problem:
    """The problem of the sliders' first ticks."""
    ranks = tuple(range(num_stages))
    pipelines = tuple(
        Pipeline(
            name=name,
            ranks=direction,
            num_micro_batches=num_micro_batches,
            forward_ticks=(forward,) * num_stages,
            backward_ticks=(backward,) * num_stages,
            activation_bytes=(held,) * num_stages,
        )
        for name, direction, (forward, backward, held) in zip(
            ("actor", "critic"), (ranks, ranks[::-1]), _REFERENCE, strict=True
        )
    )
    return Problem(num_ranks=num_stages, pipelines=pipelines[:num_models])


def page(time_limit_s: float, num_workers: int, tell: Callable[[str], None] = lambda text: None) -> str:
    """The page. time_limit_s: of each search for a fused schedule. tell: hears how far they are."""
    orders = {
        f"{models} {stages} {count}": {name: codes(one) for name, one in found}
        for models, stages, count, found in _known(time_limit_s, num_workers, tell)
    }
    data = {
        "stages": [STAGES[0], STAGES[-1]],
        "microBatches": [MICRO_BATCHES[0], MICRO_BATCHES[-1]],
        "orders": orders,
        "looks": [[look(number, kind).fill for kind in (Kind.F, Kind.B)] for number in range(2)],
    }
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    blob = f'<script type="application/json" id="data">{text}</script>'
    document = (_HERE / "playground.html").read_text(encoding="utf-8").replace("<!--DATA-->", blob, 1)
    before, _, after = document.rpartition("/*JS*/")
    return before + (_HERE / "playground.js").read_text(encoding="utf-8") + after


def codes(schedule: Schedule) -> list[list[int]]:
    """The order of each rank, a number per operation: 512 pipeline + 256 where it is a backward + micro-batch."""
    return [
        [512 * op.pipeline + 256 * (op.kind is not Kind.F) + op.micro_batch for op in order] for order in schedule.ranks
    ]


def _known(
    time_limit_s: float, num_workers: int, tell: Callable[[str], None]
) -> Iterator[tuple[int, int, int, list[tuple[str, Schedule]]]]:
    sizes = [(models, stages, count) for models in (1, 2) for stages in STAGES for count in MICRO_BATCHES]
    for number, (models, stages, count) in enumerate(sizes, start=1):
        problem = playground_problem(models, stages, count)
        found = [(name, serial(problem, baseline)) for name, baseline in _BASELINES.items()]
        if models == 2:
            tell(f"solving: {number} of {len(sizes)}")
            if count % (stages // 2) == 0:
                found.append(("Chimera's order", _chimera(problem)))
            solution = solve(problem, time_limit_s=time_limit_s, num_workers=num_workers, seed=0)
            found.append(("solved", solution.schedule))
        yield models, stages, count, found


def _chimera(problem: Problem) -> Schedule:
    """Its order, found for two equal models, of these two."""
    actor, critic = problem.pipelines
    equal = replace(actor, name=critic.name, ranks=critic.ranks)
    return Schedule(problem, chimera(replace(problem, pipelines=(actor, equal))).ranks)
