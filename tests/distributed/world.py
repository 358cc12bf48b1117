"""Pipelines on worlds of real processes, measured against one process. Run as a script: `world.py DIRECTORY`.

Forks worlds of 1, 2, 4 and again 1 ranks, one after the other, which import torch once for all; each rank writes
what it measured to DIRECTORY/{world}-{rank}.json, by name of the check. The tests assert on those.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GPTNeoXForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
)

from fuse.intrastage.communication import (
    CommunicationError,
    connect,
    disconnect,
    open_model,
    open_pipelines,
    serve_store,
)
from fuse.intrastage.cost_profile import profile_to_json
from fuse.intrastage.executor import execute
from fuse.intrastage.measure import measure
from fuse.intrastage.optimizer import AdamWConfig, ModelOptimizer
from fuse.intrastage.planned_times import PlannedTimes, times_of
from fuse.intrastage.transformers_stage import TransformersStage
from fuse.micro_batch import Metrics, MicroBatch
from fuse.trace import SpanRecorder
from fuse.training.state import load_state, save_state
from schedules import Kind, Op, Pipeline, Problem, Schedule, random_problems, violations
from schedules.baselines import gpipe, one_f_one_b, serial
from schedules.formats import schedule_to_text

TIMEOUT_S = 30.0
SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 5, "num_attention_heads": 2}
MODELS: dict[str, tuple[type[PreTrainedModel], PretrainedConfig]] = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES)),
    "qwen2 tied": (Qwen2ForCausalLM, Qwen2Config(**SIZES, num_key_value_heads=1, tie_word_embeddings=True)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES, num_key_value_heads=1, head_dim=8)),
    "neox": (GPTNeoXForCausalLM, GPTNeoXConfig(**SIZES)),
    "llama classifier": (LlamaForSequenceClassification, LlamaConfig(**SIZES, num_labels=1)),
    "neox classifier": (GPTNeoXForSequenceClassification, GPTNeoXConfig(**SIZES, num_labels=1)),
}
LAYERS = {1: ((0, 5),), 2: ((0, 1), (1, 5)), 4: ((0, 1), (1, 3), (3, 4), (4, 5))}
ADAMW = AdamWConfig(weight_decay=0.1, max_grad_norm=0.05)


def loss(hidden: Tensor, head: nn.Module, micro_batch: MicroBatch) -> tuple[Tensor, Metrics]:
    return (head(hidden) * micro_batch.targets).square().mean(), {}


def full_model(name: str) -> PreTrainedModel:
    torch.manual_seed(5)
    model_class, config = MODELS[name]
    model = model_class(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def batches_of(count: int, seed: int = 0) -> list[MicroBatch]:
    """Micro-batches of different lengths and sizes."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for index in range(count):
        rows, tokens = 1 + index % 2, 3 + 4 * (index % 3)
        batches.append(
            MicroBatch(
                input_ids=torch.randint(0, 64, (rows, tokens), generator=generator),
                head_index=torch.arange(1, rows * tokens, 2),
                targets=torch.randn(len(range(1, rows * tokens, 2)), 1, generator=generator),
            )
        )
    return batches


def add_gradients(model: PreTrainedModel, batches: Sequence[MicroBatch]) -> None:
    head = model.get_output_embeddings() or model.score
    for batch in batches:
        hidden = model.base_model(batch.input_ids).last_hidden_state.flatten(0, 1)[batch.head_index]
        loss(hidden, head, batch)[0].backward()


@dataclass(frozen=True)
class Run:
    """Some models' pipelines on this world. `models` names each pipeline's model; equal names are replicas."""

    rank: int
    problem: Problem
    models: tuple[str, ...]

    @staticmethod
    def of(rank: int, world: int, placed: Sequence[tuple[str, Sequence[int], int]]) -> Run:
        pipelines = tuple(
            Pipeline(
                name=f"{name.replace(' ', '-')}.{index}",
                ranks=tuple(ranks),
                num_micro_batches=count,
                forward_ticks=(1,) * len(ranks),
                backward_ticks=(2,) * len(ranks),
            )
            for index, (name, ranks, count) in enumerate(placed)
        )
        return Run(rank, Problem(num_ranks=world, pipelines=pipelines), tuple(name for name, _, _ in placed))

    def build(self) -> dict[tuple[int, int], TransformersStage]:
        """This rank's stages by (pipeline, stage), with the full models' weights."""
        stages = {}
        for number, (name, pipeline) in enumerate(zip(self.models, self.problem.pipelines, strict=True)):
            for stage, owner in enumerate(pipeline.ranks):
                if owner == self.rank:
                    layer_range = LAYERS[pipeline.num_stages][stage]
                    stages[number, stage] = TransformersStage(
                        *MODELS[name],
                        stage=stage,
                        num_stages=pipeline.num_stages,
                        loss=loss,
                        layer_range=layer_range,
                        split_backward=pipeline.can_split,
                    )
                    stages[number, stage].load_state_dict(full_model(name).state_dict())
        return stages

    def batches(self) -> list[list[MicroBatch]]:
        return [batches_of(one.num_micro_batches, seed) for seed, one in enumerate(self.problem.pipelines)]

    def communicators(self):
        return open_pipelines([(one.name, one.ranks) for one in self.problem.pipelines], TIMEOUT_S)

    def optimizers(self, stages: Mapping[tuple[int, int], TransformersStage]) -> dict[str, ModelOptimizer]:
        """One per model, with this rank's stages by (replica, stage)."""
        optimizers = {}
        for name in dict.fromkeys(self.models):
            numbers = [number for number, model in enumerate(self.models) if model == name]
            groups = open_model([self.problem.pipelines[number].ranks for number in numbers], TIMEOUT_S)
            own = {(numbers.index(number), s): stage for (number, s), stage in stages.items() if number in numbers}
            optimizers[name] = ModelOptimizer(name, own, groups, ADAMW)
        return optimizers

    def gradient_difference(
        self, schedule: Schedule, recorder: SpanRecorder | None = None, planned: PlannedTimes | None = None
    ) -> float:
        """Largest difference between the stages' gradients after the schedule and one process's; ties left apart."""
        stages, recorder = self.build(), recorder or SpanRecorder()
        execute(schedule, self.rank, stages, self.batches(), self.communicators(), recorder, planned=planned)
        worst = 0.0
        for number, name in enumerate(self.models):
            model = full_model(name)
            add_gradients(model, self.batches()[number])
            expected = {name: parameter.grad for name, parameter in model.named_parameters()}
            for key, stage in stages.items():
                if key[0] == number:
                    for parameter_name, parameter in stage.named_parameters():
                        if parameter_name not in stage.tied_names:
                            difference = (parameter.grad - expected[parameter_name]).abs().max().item()
                            worst = max(worst, difference)
        return worst


def random_schedule(problem: Problem, seed: int) -> Schedule:
    """A random legal schedule: any operation whose inputs are there goes next on its rank."""
    for attempt in range(100):
        generator = random.Random(f"{seed} {attempt}")
        ops = [
            Op(number, stage, micro_batch, kind)
            for number, one in enumerate(problem.pipelines)
            for stage in range(one.num_stages)
            for micro_batch in range(one.num_micro_batches)
            for kind in (Kind.F, Kind.B)
        ]
        done: set[Op] = set()
        ranks: list[list[Op]] = [[] for _ in range(problem.num_ranks)]
        while ops:
            op = generator.choice([op for op in ops if needs(op, problem) <= done])
            ops.remove(op)
            done.add(op)
            ranks[problem.rank_of(op)].append(op)
        schedule = Schedule(problem, tuple(map(tuple, ranks)))
        if not violations(schedule):
            return schedule
    raise AssertionError("no legal schedule in 100 attempts")


def needs(op: Op, problem: Problem) -> set[Op]:
    last = problem.pipelines[op.pipeline].num_stages - 1
    needed = set()
    if op.kind is Kind.F and op.stage > 0:
        needed.add(Op(op.pipeline, op.stage - 1, op.micro_batch, Kind.F))
    if op.kind is Kind.B:
        before = op.stage + 1, Kind.B if op.stage < last else Kind.F
        needed.add(Op(op.pipeline, min(before[0], last), op.micro_batch, before[1]))
    if op.micro_batch > 0:  # in order at each stage, so that messages are in order too
        needed.add(Op(op.pipeline, op.stage, op.micro_batch - 1, op.kind))
    return needed


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
        found[f"random {seed}"] = run.gradient_difference(random_schedule(run.problem, seed))
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
        found[name] = run.gradient_difference(random_schedule(run.problem, 0))
    return found


def check_replicas(rank: int, world: int, directory: Path) -> dict[str, float]:
    """The actor over all ranks, the critic with half the stages and two replicas, as the published placement has it."""
    run = Run.of(rank, world, [("llama", range(4), 6), ("neox classifier", [1, 0], 3), ("neox classifier", [3, 2], 2)])
    return {f"random {seed}": run.gradient_difference(random_schedule(run.problem, seed)) for seed in range(3)}


def check_splits(rank: int, world: int, directory: Path) -> dict[str, float]:
    """Random models on random ranks, stages that share and return to ranks included, some with split backwards."""
    found = {}
    for seed in range(6 if world == 2 else 4):
        problem, models = random_fusion(world, random.Random(seed))
        schedule = random_problems.random_schedule(problem, random.Random(seed))
        recorder = SpanRecorder()
        found[f"random {seed}"] = Run(rank, problem, models).gradient_difference(schedule, recorder, plan_of(schedule))
        record = {"schedule": schedule_to_text(schedule), "spans": [asdict(span) for span in recorder.drain()]}
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
        schedule = random_schedule(run.problem, step)
        execute(schedule, rank, stages, run.batches(), communicators, SpanRecorder())
        for name, optimizer in optimizers.items():
            norm = optimizer.step(1e-3 / (step + 1))
            if optimizer.model_shapes:
                error = abs(norm - expected[name][step][0]) / norm
                found[f"{name} norm"] = max(found.get(f"{name} norm", 0.0), error)
    for name, optimizer in optimizers.items():
        weights, start = expected[name][-1][1], dict(full_model(name).named_parameters())
        for parameter_name, parts in optimizer.state():
            difference = (parts["parameter"] - weights[parameter_name]).abs().max().item()
            found[f"{name} weights"] = max(found.get(f"{name} weights", 0.0), difference)
            moved = (parts["parameter"] - start[parameter_name]).abs().max().item()
            found[f"{name} moved"] = min(found.get(f"{name} moved", 1.0), moved)
    return found


def reference_steps(name: str, run: Run, count: int) -> Iterator[tuple[float, dict[str, Tensor]]]:
    """Norm and weights after each step of one process on all replicas' micro-batches."""
    model = full_model(name)
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
        execute(random_schedule(run.problem, step), rank, stages, run.batches(), communicators, SpanRecorder())
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


def check_lost_peer(rank: int, world: int, directory: Path, *, dies: bool) -> dict[str, float | str]:
    """Rank 1 leaves, or stops answering, in the middle of a step. The world is useless afterwards."""
    run = Run.of(rank, world, [("llama", range(world), 4)])
    stages, communicators = run.build(), open_pipelines([("actor", range(world))], 10.0)
    if rank == 1:
        batches = iter(range(2))
        forward = stages[0, 1].forward

        def last_forward(*arguments: object) -> None:
            if next(batches, None) is None:
                if dies:
                    time.sleep(1)  # until rank 0 has sent all it can, and waits
                    os._exit(3)
                time.sleep(120)
            forward(*arguments)

        stages[0, 1].forward = last_forward
    start_s = time.monotonic()
    try:
        execute(one_f_one_b(run.problem), rank, stages, run.batches(), communicators, SpanRecorder())
    except CommunicationError as error:
        return {"error": str(error), "seconds": time.monotonic() - start_s}
    return {"error": "", "seconds": time.monotonic() - start_s}


def check_death(rank: int, world: int, directory: Path) -> dict[str, float | str]:
    return check_lost_peer(rank, world, directory, dies=True)


def check_silence(rank: int, world: int, directory: Path) -> dict[str, float | str]:
    return check_lost_peer(rank, world, directory, dies=False)


Ports = SimpleQueue  # of int
Check = Callable[[int, int, Path], Mapping[str, float | str]]
WORLDS: list[tuple[str, int, list[Check]]] = [
    ("one", 1, [check_state]),
    (
        "two",
        2,
        [check_gradients, check_two_models, check_placements, check_splits, check_measure, check_steps, check_state],
    ),
    ("four", 4, [check_gradients, check_two_models, check_replicas, check_splits, check_steps, check_state]),
    ("again", 1, [check_state]),
    ("death", 2, [check_death]),
    ("silence", 2, [check_silence]),
]

LOST = ("death", "silence")  # rank 1 does not come back


def run_rank(name: str, rank: int, world: int, ports: Ports, checks: Sequence[Check], directory: Path) -> None:
    torch.set_num_threads(1)
    if rank == 0:
        store = serve_store("127.0.0.1", TIMEOUT_S)
        for _ in range(world):
            ports.put(store.port)
    port = ports.get()
    connect(rank, world, "127.0.0.1", port, "gloo", TIMEOUT_S)
    found: dict[str, Mapping[str, float | str]] = {}
    for check in checks:
        start_s = time.monotonic()
        found[check.__name__] = check(rank, world, directory)
        print(f"{name} rank {rank}: {check.__name__} {time.monotonic() - start_s:.1f} s", flush=True)
    (directory / f"{name}-{rank}.json").write_text(json.dumps(found))
    if name not in LOST:
        disconnect()


def main(directory: Path) -> None:
    context = multiprocessing.get_context("fork")
    for name, world, checks in WORLDS:
        ports: Ports = context.SimpleQueue()  # the store itself is rank 0's: forking must find no threads
        ranks = [
            context.Process(target=run_rank, args=(name, rank, world, ports, checks, directory))
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        for process in ranks[:1] if name in LOST else ranks:
            process.join(120)
        for process in ranks:
            process.kill()
            process.join()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
