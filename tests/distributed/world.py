"""Pipelines on worlds of real processes, measured against one process. A program of `programs.py`.

Worlds of 1, 2, 4 and again 1 ranks; each rank writes what it measured to DIRECTORY/{world}-{rank}.json, by name of the
check. The tests assert on those.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import random
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Trainer

from fuse.intrastage.communication import CommunicationError, Transfer, open_pipelines
from fuse.intrastage.cost_profile import profile_to_json
from fuse.intrastage.executor import execute
from fuse.intrastage.measure import measure
from fuse.intrastage.optimizer import ModelOptimizer
from fuse.intrastage.planned_times import PlannedTimes, times_of, with_planned
from fuse.intrastage.program import program_of
from fuse.trace import SpanRecorder
from fuse.training.state import load_state, save_state
from schedules import Kind, Pipeline, Problem, Schedule, random_problems
from schedules.baselines import gpipe, one_f_one_b, serial
from schedules.formats import schedule_to_text

from .forked import CONTEXT, TIMEOUT_S, World, run_world
from .late_scoring import compare
from .opposites import check_opposites
from .pipelines import ADAMW, LAYERS, MODELS, Run, add_gradients, batches_of, full_model, full_weights


def drawn(problem: Problem, seed: int) -> Schedule:
    """A random legal schedule."""
    return random_problems.random_schedule(problem, random.Random(seed))


def check_gradients(rank: int, world: int, directory: Path) -> dict[str, float]:
    found = {}
    for name in MODELS if world == 2 else ("llama", "qwen2 tied", "neox classifier"):
        for baseline in (one_f_one_b, gpipe):
            run = Run.of(rank, world, [(name, range(world), 2 * world)])
            found[f"{name}, {baseline.__name__}"] = run.gradient_difference(baseline(run.problem))
    return found


def check_two_models(rank: int, world: int, directory: Path) -> dict[str, float]:
    """Actor and critic in opposite directions: one after the other, and fused at random."""
    forwards, backwards = list(range(world)), list(range(world))[::-1]
    run = Run.of(rank, world, [("llama", forwards, 4), ("neox classifier", backwards, 3)])
    recorder = SpanRecorder()
    found = {"serial": run.gradient_difference(serial(run.problem), recorder)}
    spans = recorder.drain()
    found["num_spans"] = len(spans)
    found["named"] = float(any(span.name == f"F llama.0.{rank}.2" for span in spans))
    found["overlaps"] = sum(later.start_s < span.end_s for span, later in itertools.pairwise(spans))
    for seed in range(4):
        found[f"random {seed}"] = run.gradient_difference(drawn(run.problem, seed))
    return found


def check_placements(rank: int, world: int, directory: Path) -> dict[str, float]:
    """Virtual stages; replicas; a whole model on one rank; neighbouring stages on one rank."""
    placements = {
        "virtual": [("llama", [0, 1, 0, 1], 3), ("llama classifier", [1, 0], 2)],
        "same rank": [("llama", [0, 0, 1, 1], 3), ("llama classifier", [1], 2)],
        "replicas": [("qwen2 tied", [0, 1], 3), ("qwen2 tied", [1, 0], 2)],
    }
    found = {}
    for name, placed in placements.items():
        run = Run.of(rank, world, placed)
        found[name] = run.gradient_difference(drawn(run.problem, 0))
    return found


def check_replicas(rank: int, world: int, directory: Path) -> dict[str, float]:
    """The actor over all ranks, the critic with half the stages and two replicas, as the published placement has it."""
    run = Run.of(rank, world, [("llama", range(4), 6), ("neox classifier", [1, 0], 3), ("neox classifier", [3, 2], 2)])
    return {f"random {seed}": run.gradient_difference(drawn(run.problem, seed)) for seed in range(3)}


def check_splits(rank: int, world: int, directory: Path) -> dict[str, float]:
    """Random models on random ranks, stages that share and return to ranks included, some with split backwards."""
    found = {}
    for seed in range(4):
        problem, models = random_fusion(world, random.Random(seed))
        schedule = random_problems.random_schedule(problem, random.Random(seed))
        recorder = SpanRecorder()
        found[f"random {seed}"] = Run(rank, problem, models).gradient_difference(schedule, recorder)
        spans = with_planned(recorder.drain(), plan_of(schedule).of_rank(rank))
        record = {"schedule": schedule_to_text(schedule), "spans": [span._asdict() for span in spans]}
        (directory / f"spans-{world}-{seed}-{rank}.json").write_text(json.dumps(record))
        found["num_halves"] = found.get("num_halves", 0) + sum(op.kind in (Kind.I, Kind.W) for _, op in schedule.ops())
    return found


def plan_of(schedule: Schedule) -> PlannedTimes:
    """A tick is a millisecond."""
    seconds = {op: 1e-3 * schedule.problem.ticks(op) for _, op in schedule.ops()}
    return times_of(schedule, seconds, (0.0,) * len(schedule.problem.pipelines))


def random_fusion(world: int, generator: random.Random) -> tuple[Problem, tuple[str, ...]]:
    models = tuple(generator.choices(["llama", "qwen2 tied", "neox classifier"], k=generator.randint(2, 3)))
    pipelines = []
    for number in range(len(models)):
        stages = generator.choice(list(LAYERS))
        halves = (1,) * stages if number == 0 or generator.random() < 0.5 else None
        pipelines.append(
            Pipeline(
                name=f"model{number}",
                ranks=tuple(generator.randrange(world) for _ in range(stages)),
                num_micro_batches=generator.randint(2, 4),
                forward_ticks=(1,) * stages,
                backward_ticks=(2,) * stages,
                input_grad_ticks=halves,
                weight_grad_ticks=halves,
            )
        )
    return Problem(num_ranks=world, pipelines=tuple(pipelines)), models


def check_steps(rank: int, world: int, directory: Path) -> dict[str, float]:
    """Three optimizer steps, clipped and with weight decay, against one process with torch's own functions."""
    placed = [("qwen2 tied", range(world), 4)]
    if world == 2:
        placed += [("neox classifier", [1], 2), ("neox classifier", [0], 3)]
    else:
        placed += [("llama", [1, 0], 3), ("llama", [2, 3], 2), ("neox", [3, 0, 1, 2], 4)]
    run = Run.of(rank, world, placed)
    stages, communicators = run.build(), run.communicators()
    optimizers = run.optimizers(stages)
    expected = {name: list(reference_steps(name, run, 3)) for name in optimizers}
    found: dict[str, float] = {}
    for step in range(3):
        schedule = drawn(run.problem, step)
        execute(program_of(schedule), rank, stages, run.batches(), communicators, SpanRecorder())
        for name, optimizer in optimizers.items():
            norm = optimizer.step(1e-3 / (step + 1))
            if optimizer.model_shapes:
                error = abs(norm - expected[name][step][0]) / norm
                found[f"{name} norm"] = max(found.get(f"{name} norm", 0.0), error)
    for name, optimizer in optimizers.items():
        weights, start = expected[name][-1][1], full_weights(name)
        for parameter_name, parts in optimizer.state():
            difference = (parts["parameter"] - weights[parameter_name]).abs().max().item()
            found[f"{name} weights"] = max(found.get(f"{name} weights", 0.0), difference)
            moved = (parts["parameter"] - start[parameter_name]).abs().max().item()
            found[f"{name} moved"] = min(found.get(f"{name} moved", 1.0), moved)
    return found


def reference_steps(name: str, run: Run, count: int) -> Iterator[tuple[float, dict[str, Tensor]]]:
    """Norm and weights after each step of one process on all replicas' micro-batches."""
    model = copy.deepcopy(full_model(name))
    decayed = set(Trainer.get_decay_parameter_names(None, model))
    parameters = dict(model.named_parameters())
    adamw = torch.optim.AdamW(
        [
            {"params": [one for key, one in parameters.items() if key in decayed], "weight_decay": ADAMW.weight_decay},
            {"params": [one for key, one in parameters.items() if key not in decayed], "weight_decay": 0.0},
        ]
    )
    for step in range(count):
        for number, model_name in enumerate(run.models):
            if model_name == name:
                add_gradients(model, run.batches()[number])
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), ADAMW.max_grad_norm)
        for group in adamw.param_groups:
            group["lr"] = 1e-3 / (step + 1)
        adamw.step()
        adamw.zero_grad()
        yield norm.item(), {key: one.detach().clone() for key, one in parameters.items()}


def check_measure(rank: int, world: int, directory: Path) -> dict[str, float]:
    """Each rank's part of a profile, of a pipeline over both ranks and one that comes back to rank 1."""
    run = Run.of(rank, world, [("llama", [0, 1], 1), ("neox classifier", [1, 0, 0, 1], 1)])
    pipelines = [(one.name, one.ranks) for one in run.problem.pipelines]
    shapes = [batches_of(3)[:2]] * len(pipelines)
    profile = measure(rank, pipelines, run.build(), shapes, run.communicators(), repeats=1)
    (directory / f"profile-{rank}.json").write_text(json.dumps(profile_to_json(profile)))
    return {}


def check_state(rank: int, world: int, directory: Path) -> dict[str, float]:
    """Load what every earlier world saved, then train two steps and save for the later ones."""
    found: dict[str, float] = {}
    run = Run.of(rank, world, [("qwen2 tied", range(world), 2), ("llama classifier", list(range(world))[::-1], 2)])
    stages, communicators = run.build(), run.communicators()
    optimizers = {name.replace(" ", "_"): one for name, one in run.optimizers(stages).items()}
    for saved in sorted(directory.glob("state-*")):
        load_state(saved, optimizers)
        save_file(dump(optimizers), directory / f"loaded-{saved.name}-{world}-{rank}.safetensors")
        found[saved.name] = float(min(optimizer.num_steps for optimizer in optimizers.values()))
    for step in range(2):
        execute(program_of(drawn(run.problem, step)), rank, stages, run.batches(), communicators, SpanRecorder())
        for optimizer in optimizers.values():
            optimizer.step(1e-2)
    target = directory / f"state-{world}{'-again' if found and world == 1 else ''}"
    save_state(target, optimizers)
    save_file(dump(optimizers), directory / f"saved-{target.name}-{rank}.safetensors")
    return found


def dump(optimizers: Mapping[str, ModelOptimizer]) -> dict[str, Tensor]:
    return {
        f"{model}.{part}.{name}": tensor.clone()
        for model, optimizer in optimizers.items()
        for name, parts in optimizer.state()
        for part, tensor in parts.items()
    }


IS_WAITING = {dies: CONTEXT.Event() for dies in (True, False)}


def check_lost_peer(rank: int, world: int, directory: Path, *, dies: bool) -> dict[str, str]:
    """Rank 1 dies while rank 0 waits for it, or stops answering. The world is useless afterwards."""
    run = Run.of(rank, world, [("llama", range(world), 4)])
    timeout_s = TIMEOUT_S if dies else 20.0  # silence is told by nothing else
    stages, communicators = run.build(), open_pipelines([("actor", range(world))], timeout_s)
    if rank == 1:
        batches = iter(range(2))
        forward = stages[0, 1].forward

        def last_forward(*arguments: object) -> None:
            if next(batches, None) is None:
                if dies:
                    IS_WAITING[dies].wait(TIMEOUT_S)
                    os._exit(3)
                signal.pause()
            forward(*arguments)

        stages[0, 1].forward = last_forward
    wait = Transfer.wait

    def tell_and_wait(transfer: Transfer) -> Tensor:
        if "waiting for the input of B llama.0.0.2" in transfer.description:
            IS_WAITING[dies].set()
        return wait(transfer)

    Transfer.wait = tell_and_wait
    try:
        execute(program_of(one_f_one_b(run.problem)), rank, stages, run.batches(), communicators, SpanRecorder())
    except CommunicationError as error:
        return {"error": str(error)}
    return {"error": ""}


def check_death(rank: int, world: int, directory: Path) -> dict[str, str]:
    return check_lost_peer(rank, world, directory, dies=True)


def check_silence(rank: int, world: int, directory: Path) -> dict[str, str]:
    return check_lost_peer(rank, world, directory, dies=False)


def check_late_scores(rank: int, world: int, directory: Path) -> dict[str, Any]:
    """An actor in one pipeline, with a reference, and in two opposite replicas."""
    return {str(way): compare(rank, world, is_opposite=way) for way in (False, True)}


Check = Callable[[int, int, Path], Mapping[str, float | str]]
WORLDS: list[tuple[str, int, list[Check]]] = [
    ("one", 1, [check_state]),
    (
        "two",
        2,
        [
            check_gradients,
            check_two_models,
            check_placements,
            check_splits,
            check_measure,
            check_steps,
            check_opposites,
            check_late_scores,
            check_state,
        ],
    ),
    (
        "four",
        4,
        [
            check_gradients,
            check_two_models,
            check_replicas,
            check_splits,
            check_steps,
            check_opposites,
            check_late_scores,
            check_state,
        ],
    ),
    ("again", 1, [check_state]),
]

LOST: list[tuple[str, Check]] = [("death", check_death), ("silence", check_silence)]
"""Two ranks, of which rank 1 does not come back; rank 0 mostly waits, and so do these worlds beside the others."""


def main(directory: Path) -> None:
    def finding(world: int, checks: list[Check]) -> Callable[[int], Mapping[str, object]]:
        return lambda rank: {check.__name__: check(rank, world, directory) for check in checks}

    for name in MODELS:
        full_model(name)  # once for all processes
    lost = [World.start(name, 2, finding(2, [check]), directory, num_survivors=1) for name, check in LOST]
    for name, world, checks in WORLDS:
        run_world(name, world, finding(world, checks), directory)
    for started in lost:
        started.end()
