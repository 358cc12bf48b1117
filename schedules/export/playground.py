"""A page with sliders: schedules side by side, timed by the page itself. One file, which needs no network.

The page's script has the evaluator, and the greedy rule for pipelines of one stage per rank, the second in the opposite
direction; orders of baselines, and those that the solver has found, come with it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from schedules.baselines import chimera, gpipe, interleaved, one_f_one_b, serial, zero_bubble_h1, zero_bubble_v
from schedules.export.palette import look
from schedules.fused.solve import solve
from schedules.ir import Kind, Pipeline, Problem, Schedule

STAGES, MICRO_BATCHES = (2, 4, 6, 8), (4, 8, 12, 16)
"""What the sliders choose from: evenly spaced."""
QUARTERS = 4
"""Parts of a slider's tick, so that a stage of half a rank's layers, and half of its backward, have whole ones."""
_REFERENCE = ((2, 4, 2), (1, 2, 1))
"""Forward and backward ticks and memory of each model, for which schedules are solved."""
_HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Form:
    """How a model is cut.

    laps: stages of a rank. turns: the second lap goes back over the ranks; if not, it begins at the first again.
    halves: backwards are split into input and weight gradients of the same ticks, between which all memory is kept.
    """

    laps: int = 1
    turns: bool = False
    halves: bool = False


WHOLE = Form()
_BASELINES = {
    "GPipe": (gpipe, WHOLE),
    "1F1B": (one_f_one_b, WHOLE),
    "Interleaved 1F1B": (interleaved, Form(laps=2)),
    "Zero-bubble H1": (zero_bubble_h1, Form(halves=True)),
    "Zero-bubble V": (zero_bubble_v, Form(laps=2, turns=True, halves=True)),
}
"""One model after the other."""
_SOLVED = {"solved": WHOLE, "solved, halves": Form(halves=True)}


def playground_problem(num_models: int, num_stages: int, num_micro_batches: int, form: Form = WHOLE) -> Problem:
    """The problem of the sliders' first ticks, in quarters of them."""
    ranks, count = tuple(range(num_stages)), form.laps * num_stages
    pipelines = []
    for name, way, values in zip(("actor", "critic"), (ranks, ranks[::-1]), _REFERENCE, strict=True):
        forward, backward, held = (QUARTERS * value // form.laps for value in values)
        gradient = (backward // 2,) * count if form.halves else None
        pipelines.append(
            Pipeline(
                name=name,
                ranks=way * form.laps if not form.turns else way + way[::-1],
                num_micro_batches=num_micro_batches,
                forward_ticks=(forward,) * count,
                backward_ticks=(backward,) * count,
                input_grad_ticks=gradient,
                weight_grad_ticks=gradient,
                activation_bytes=(held,) * count,
                weight_grad_bytes=(held,) * count if form.halves else (),
            )
        )
    return Problem(num_ranks=num_stages, pipelines=tuple(pipelines[:num_models]))


def page(time_limit_s: float, num_workers: int, tell: Callable[[str], None] = lambda text: None) -> str:
    """The page. time_limit_s: of each search for a fused schedule. tell: hears how far they are."""
    orders = {
        f"{models} {stages} {count}": {
            name: {"laps": form.laps, "turns": form.turns, "halves": form.halves, "codes": codes(one)}
            for name, form, one in found
        }
        for models, stages, count, found in _known(time_limit_s, num_workers, tell)
    }
    data = {
        "stages": [STAGES[0], STAGES[-1]],
        "microBatches": [MICRO_BATCHES[0], MICRO_BATCHES[-1]],
        "orders": orders,
        "looks": [{kind.name: look(number, kind).fill for kind in Kind} for number in range(2)],
    }
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    blob = f'<script type="application/json" id="data">{text}</script>'
    document = (_HERE / "playground.html").read_text(encoding="utf-8").replace("<!--DATA-->", blob, 1)
    before, _, after = document.rpartition("/*JS*/")
    return before + (_HERE / "playground.js").read_text(encoding="utf-8") + after


def codes(schedule: Schedule) -> list[list[int]]:
    """The order of each rank, a number per operation: its pipeline, stage, kind (of FBIW) and micro-batch, packed.

    16,384 pipeline + 1,024 stage + 256 kind + micro-batch.
    """
    return [
        [((16 * op.pipeline + op.stage) * 4 + "FBIW".index(op.kind.name)) * 256 + op.micro_batch for op in order]
        for order in schedule.ranks
    ]


def _known(
    time_limit_s: float, num_workers: int, tell: Callable[[str], None]
) -> Iterator[tuple[int, int, int, list[tuple[str, Form, Schedule]]]]:
    sizes = [(models, stages, count) for models in (1, 2) for stages in STAGES for count in MICRO_BATCHES]
    for number, (models, stages, count) in enumerate(sizes, start=1):
        found = [
            (name, form, serial(playground_problem(models, stages, count, form), baseline))
            for name, (baseline, form) in _BASELINES.items()
            if baseline is not interleaved or count % stages == 0
        ]
        if models == 2:
            tell(f"solving: {number} of {len(sizes)}")
            if count % (stages // 2) == 0:
                found.append(("Chimera's order", WHOLE, _chimera(playground_problem(models, stages, count))))
            for name, form in _SOLVED.items():
                problem = playground_problem(models, stages, count, form)
                solution = solve(problem, time_limit_s=time_limit_s, num_workers=num_workers, seed=0)
                found.append((name, form, solution.schedule))
        yield models, stages, count, found


def _chimera(problem: Problem) -> Schedule:
    """Its order, found for two equal models, of these two."""
    actor, critic = problem.pipelines
    equal = replace(actor, name=critic.name, ranks=critic.ranks)
    return Schedule(problem, chimera(replace(problem, pipelines=(actor, equal))).ranks)
