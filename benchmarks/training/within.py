"""Steps of an actor that score their samples: within training, against scoring first and plain 1F1B, in turn.

A step's samples get log-probabilities by the actor and by a reference in shares, both of which its loss needs. First
means as runs without `forward_only` have it: through pipelines, the reference in as many pieces as there are devices,
then the actor in one, each by micro-batches within `_LIMIT`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import LlamaForCausalLM

from fuse.algorithms.batch import Experience, counted_tokens, made_up_targets
from fuse.algorithms.group_batch import GroupTargets
from fuse.algorithms.grpo_loss import GRPOLossSettings, grpo_loss
from fuse.algorithms.surrogates import SurrogateSettings
from fuse.benchmarks.llama import llama_config
from fuse.benchmarks.options import Row
from fuse.benchmarks.training.batches import Task, Workload
from fuse.benchmarks.training.rows import Side, medians, row_of, side_of
from fuse.benchmarks.training.settings import SETTINGS
from fuse.benchmarks.training.worker import LEARNING_RATE, TimedRound, TrainingWorker
from fuse.benchmarks.training.world import World, started
from fuse.interstage.migration import balance
from fuse.intrastage.cost_profile import Shape
from fuse.intrastage.forward_only import Scorer, with_scorers
from fuse.intrastage.measurement_store import MeasurementStore
from fuse.intrastage.observed import MESSAGE
from fuse.intrastage.placement import Replica, place
from fuse.intrastage.plan_settings import PlanSettings
from fuse.intrastage.planned_times import planned_times
from fuse.intrastage.training_planner import TrainingPlanner
from fuse.intrastage.training_schedule import Plan, RankPlan, serial_schedule, unfused
from fuse.trace import Span
from fuse.training.late_scores import OLD_LOGPROBS, REFERENCE_LOGPROBS, SCORED_BY, with_scores
from fuse.training.model_spec import ModelSpec
from fuse.training.reading import TokenSequence
from fuse.training.rounds import Round, rounds
from fuse.training.score_pipelines import Piece, ScorePipelines
from fuse.training.scoring import MicroBatchLimit, ScoringSettings
from fuse.training.steps import OptimizerStep

FIRST, WITHIN = "scoring first", "within"
_WARMUP = 1
_WATCHED = 4
_CONTEXT = 8192
_LIMIT = MicroBatchLimit(max_tokens=2048)
_SCORING = ScoringSettings(temperature=1.0, limit=_LIMIT, autocast=None, is_sharded=True)
_LOSS = GRPOLossSettings(
    temperature=1.0,
    loss_type="grpo",
    level="token",
    surrogate=SurrogateSettings(epsilon_low=0.2, epsilon_high=0.2),
    beta=0.1,
    weighs_kl=False,
    is_on_policy=False,
    max_tokens=_CONTEXT,
    micro_batches_per_rollout=1,
)
_SETTINGS = replace(SETTINGS, losses={"actor": partial(grpo_loss, settings=_LOSS)}, targets={"actor": GroupTargets})

Way = tuple[Round, RankPlan]
"""A step, with what it scores, and its schedule."""


class ScoringWorker(TrainingWorker):
    """A training worker that holds its stages of the actor, and its share of a reference."""

    def place_actor(self, spec: ModelSpec, placement: tuple[Replica, ...]) -> None:
        """Build what belongs here, with random weights."""
        self.place({"actor": spec}, placement)
        cpu, world = torch.device("cpu"), dist.get_world_size()
        self._pipelines = ScorePipelines(
            *(self._rank, world, cpu, {"reference": (spec, torch.float32)}, self._training, _SCORING),
            *(self._recorder, self._settings.timeout_s),
        )
        torch.manual_seed(1)
        self._pipelines.shares["reference"].load_state_dict(spec.model_class(spec.config).state_dict())

    def take_turns(
        self, experience: Experience, ways: Mapping[str, Way], repeats: int, warmup: int
    ) -> dict[str, list[list[TimedRound]]]:
        """Take the step each way in turn, as `_in_turn` has it."""

        def take(step: Round, plan: RankPlan) -> None:
            if not step.scored:
                self._score_first(experience, step)
            scorers = {column: self._pipelines.scorers[column] for column in step.scored}
            self._training.train(experience, [step], [{"actor": LEARNING_RATE}], {step.counts: plan}, scorers)

        return self._in_turn({name: [partial(take, *way)] for name, way in ways.items()}, repeats, warmup)

    def _score_first(self, experience: Experience, step: Round) -> None:
        samples = [sample for own in step.parts["actor"].micro_batches for sample in own]
        sequences = tuple(
            TokenSequence(experience.prompts[one], experience.responses[one][: experience.lengths[one]])
            for one in samples
        )
        shares = balance([len(one) for one in sequences], dist.get_world_size())
        self._flow("reference", [tuple(sequences[index] for index in share) for share in shares if share])
        self._flow("actor", [sequences])

    def _flow(self, role: str, pieces: Sequence[tuple[TokenSequence, ...]]) -> None:
        """Score pieces one behind the other, until all have come through."""
        for number, sequences in enumerate(pieces):
            self._pipelines.advance(Piece(number, (role,), sequences))
        self._pipelines.advance(None)
        dist.barrier()  # the driver goes on when it has all scores


class Within:
    """Workers on all devices, which hold one actor and one reference."""

    def __init__(self, world: World[ScoringWorker]) -> None:
        self._world = world
        self._messages: list[Span] = []
        self._plain = place("actor", world.size, world.size)
        reference = Scorer(name=REFERENCE_LOGPROBS, model="actor", ranks=tuple(range(world.size)))
        self._placement = with_scorers(self._plain, [Scorer(name=OLD_LOGPROBS, model="actor"), reference])

    @classmethod
    @contextmanager
    def start(cls, num_devices: int) -> Iterator[Within]:
        """Raises: as `started`."""
        with started(ScoringWorker, num_devices, _SETTINGS) as world:
            yield cls(world)

    def build(self, num_layers: int, *, hidden_size: int, vocab_size: int) -> None:
        """A random Llama, spread evenly over the devices, and another."""
        config = llama_config(num_layers=num_layers, context=_CONTEXT, hidden_size=hidden_size, vocab_size=vocab_size)
        spec = ModelSpec(model_class=LlamaForCausalLM, config=config, dtype=torch.float32)
        self._world.call(ScoringWorker.place_actor, spec, self._plain)

    def row(self, load: Workload, task: Task, layers: int, *, repeats: int, solve_s: float) -> Row:
        """Take the task's step both ways, in turn. The row is of `row_of`: serial is scoring first, then plain 1F1B.

        The setup of a serial step is its scoring. Both are planned by what operations took in `_WATCHED` steps.
        """
        whole = OptimizerStep(micro_batches=task.micro_batches, weight=1 / len(task.micro_batches))
        (plain,) = load.prepared(rounds({"actor": [whole]}, {"actor": 1}, is_fused=True))
        (scored,) = with_scores([plain], SCORED_BY)
        shapes = [load.shape(samples) for samples in load.micro_batches(task)]
        experience = _with_group_targets(load.experience)
        within = self._planned(experience, scored, shapes, solve_s)
        profile, problem = within.profile, within.schedule.problem
        assert profile is not None
        ways = {FIRST: (plain, Plan(serial_schedule(self._plain, plain.counts), profile)), WITHIN: (scored, within)}
        for_ranks = {name: (step, plan.for_ranks) for name, (step, plan) in ways.items()}
        by_rank = self._world.call(ScoringWorker.take_turns, experience, for_ranks, repeats, _WARMUP)
        names = [replica.name for replica in self._placement]
        sides: dict[str, Side] = {}
        for name, (step, plan) in ways.items():
            own = names[: 1 + len(step.scored)]
            planned = planned_times(plan.schedule, profile, own, [shapes] * len(own))
            by_repeat = zip(*(steps[name] for steps in by_rank), strict=True)
            sides[name] = medians([side_of(plan.schedule, planned, [one for (one,) in ranks]) for ranks in by_repeat])
        alone = replace(problem, pipelines=tuple(replace(one, before=None) for one in problem.pipelines[1:]))
        scoring = planned_times(unfused(alone), profile, names[1:], [shapes] * len(names[1:]))
        sides[FIRST]["planned_ms"] += 1e3 * scoring.makespan_s
        tokens = [shape.size for shape in shapes]
        made = {"actor": layers, "critic": 0}
        return row_of(WITHIN, made, task, tokens, sides[FIRST], sides[WITHIN], padding=load.padding(task))

    def _planned(self, experience: Experience, step: Round, shapes: Sequence[Shape], solve_s: float) -> Plan:
        """As a run plans the step that it has watched."""
        with tempfile.TemporaryDirectory() as name:
            directory = Path(name)
            store = MeasurementStore(directory, {"benchmark": WITHIN})
            planner = TrainingPlanner(self._placement, _plan_settings(directory, solve_s), store)
            ways = {WITHIN: (step, planner.plans([step.counts], shapes)[step.counts].for_ranks)}
            told = self._world.call(ScoringWorker.take_turns, experience, ways, _WATCHED, 0)
            spans = [span for of_rank in told for (one,) in of_rank[WITHIN] for span in one.spans]
            self._messages += [span for span in spans if span.category == MESSAGE]  # told once for a placement
            planner.observe([span for span in spans if span.category != MESSAGE] + self._messages)
            return planner.plans([step.counts], shapes)[step.counts]


def _with_group_targets(experience: Experience) -> Experience:
    """The same samples, for GRPO's loss."""
    token_ids = counted_tokens(experience.responses, experience.lengths)
    return replace(experience, targets={"actor": made_up_targets(GroupTargets, token_ids, experience.segments)})


def _plan_settings(directory: Path, solve_s: float) -> PlanSettings:
    return PlanSettings(
        fused=True,
        time_limit_s=solve_s,
        num_workers=1,
        num_updates=1000,
        steps_per_update=1,
        memory_limit_bytes=None,
        replan_drift=1e9,
        directory=directory,
        forces_scorers=True,
    )
