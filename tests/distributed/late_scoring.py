"""An actor that trains by GRPO on a world, with its log-probabilities and a reference's within the steps, or apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from fuse.algorithms.batch import Experience
from fuse.algorithms.group_batch import GroupTargets, actor_experience
from fuse.algorithms.grpo_loss import GRPOLossSettings, grpo_loss
from fuse.algorithms.surrogates import SurrogateSettings
from fuse.intrastage.forward_only import Scorer, with_scorers
from fuse.intrastage.opposite import with_opposites
from fuse.intrastage.optimizer import AdamWConfig
from fuse.intrastage.placement import Replica, place, replicas_of
from fuse.intrastage.training_schedule import Plan, halved_serial_schedule
from fuse.intrastage.transformers_stage import TransformersStage
from fuse.sample import Sample
from fuse.trace import SpanRecorder
from fuse.training.late_scores import OLD_LOGPROBS, REFERENCE_LOGPROBS, SCORED_BY, fill, with_scores
from fuse.training.layout import RaggedLayout
from fuse.training.model_spec import ModelSpec
from fuse.training.rank import TrainingRank, TrainingSettings
from fuse.training.regrouping import prepared
from fuse.training.rounds import RankRound, Round, rounds
from fuse.training.score_pipelines import ScorePipelines
from fuse.training.scoring import MicroBatchLimit, ScoringSettings, reading_of
from fuse.training.steps import OptimizerStep
from schedules import Problem, Schedule
from schedules.fused.greedy import greedy

from ..tiny_models import build, language_model, spread

STEPS = [
    OptimizerStep(micro_batches=((0, 1), (2,), (3, 4)), weight=1 / 3),
    OptimizerStep(micro_batches=((5,), (6, 7), (8, 9)), weight=1 / 3),
    OptimizerStep(micro_batches=((1, 2, 3), (4,), (0,)), weight=1 / 3),
]
"""The third trains on samples of the first once more, which other replicas may have scored."""

SCORING = ScoringSettings(temperature=0.7, limit=MicroBatchLimit(), autocast=None, is_sharded=True)
SETTINGS = TrainingSettings(
    backend="transformers",
    split_backward=True,
    losses={
        "actor": partial(
            grpo_loss,
            settings=GRPOLossSettings(
                temperature=0.7,
                loss_type="grpo",
                level="token",
                surrogate=SurrogateSettings(epsilon_low=0.2, epsilon_high=0.2),
                beta=0.5,
                weighs_kl=False,
                is_on_policy=False,
                max_tokens=6,
                micro_batches_per_rollout=3,
            ),
        )
    },
    targets={"actor": GroupTargets},
    layout=RaggedLayout(),
    adamw=AdamWConfig(max_grad_norm=0.5),
    autocast=None,
    gradient_checkpointing=False,
    timeout_s=300.0,
)

Make = Callable[[Problem], Schedule]


@cache
def model(role: str) -> Any:
    return spread(build(language_model("qwen2", num_hidden_layers=5), seed=2 * (role == "reference")))


def experience() -> Experience:
    """Ten samples of different lengths, none of which has been scored."""
    generator = torch.Generator().manual_seed(0)
    lengths = [1 + index % 5 for index in range(10)]
    tokens = [torch.randint(0, 64, (3 + length,), generator=generator).tolist() for length in lengths]
    samples = [Sample(index, tuple(each[:3]), response_ids=each[3:]) for index, each in enumerate(tokens)]
    count = sum(lengths)
    targets = GroupTargets(
        token_ids=torch.tensor([token for each in tokens for token in each[3:]]),
        sampler_logprobs=torch.zeros(count),
        old_logprobs=torch.full((count,), -4.0),
        reference_logprobs=torch.zeros(count),
        advantages=torch.randn(count, generator=generator),
        batch_weights=torch.full((count,), 1 / count),
        mask=torch.ones(count, dtype=torch.bool),
    )
    return actor_experience(samples, lengths, targets)


@cache
def whole(role: str) -> TransformersStage:
    """All of a model, which scores."""
    own = model(role)
    stage = TransformersStage(type(own), own.config, stage=0, num_stages=1, loss=SETTINGS.losses["actor"])
    stage.load_state_dict(own.state_dict())
    return stage


def scored_apart(of_update: Sequence[Round], columns: Sequence[str]) -> Experience:
    """The same samples scored by whole models in this process, by the micro-batches that steps would score."""
    known, read = experience(), reading_of("reference_logprobs", SCORING, None).read
    for one in with_scores(of_update, columns):
        for column, micro_batches in one.scored.items():
            for samples in micro_batches:
                made = SETTINGS.layout.micro_batches(known, samples, 1.0)["actor"]
                made = replace(made, targets=made.targets.token_ids)
                fill(known, column, [(samples, whole(SCORED_BY[column]).infer(made, None, read))])
    return known


def fused(problem: Problem) -> Schedule:
    return greedy(problem)


def heedless(problem: Problem) -> Schedule:
    """Micro-batches are scored when all has been trained."""
    free = replace(problem, pipelines=tuple(replace(one, before=None) for one in problem.pipelines))
    trained = [one for one in free.pipelines if not one.is_forward_only]
    orders = greedy(free).ranks
    late = tuple(tuple(sorted(order, key=lambda op: op.pipeline >= len(trained))) for order in orders)
    return Schedule(free, late)


class LateTraining:
    """One rank: an actor over all ranks of the world, and a reference in shares. is_opposite: in two replicas."""

    def __init__(self, rank: int, world: int, *, is_opposite: bool, regroups: bool) -> None:
        self.columns = [OLD_LOGPROBS] if is_opposite else [OLD_LOGPROBS, REFERENCE_LOGPROBS]
        plain = place("actor", world, world)
        self._placement = with_opposites(plain) if is_opposite else plain
        steps = rounds({"actor": STEPS}, {"actor": len(self._placement)}, is_fused=True)
        units = {"actor": 1} if regroups else {}
        self.rounds = prepared(steps, experience(), loss_normalization="micro_batch", units=units)
        self._rank, self._world = rank, world
        self._spec = {role: ModelSpec.of(model(role)) for role in ("actor", "reference")}

    def train(self, columns: Sequence[str], make: Make) -> tuple[list[RankRound], dict[str, Tensor]]:
        """Take the steps, within which `columns` are scored; others are known before. The steps, and weights here."""
        cpu = torch.device("cpu")
        actor = {"actor": self._spec["actor"]}
        training = TrainingRank(self._rank, cpu, actor, self._placement, SETTINGS, SpanRecorder())
        training.load_weights("actor", model("actor").state_dict())
        shared = {"reference": (self._spec["reference"], torch.float32)}
        pipelines = ScorePipelines(
            self._rank, self._world, cpu, shared, training, SCORING, SpanRecorder(), SETTINGS.timeout_s
        )
        pipelines.shares["reference"].load_state_dict(model("reference").state_dict())
        known = scored_apart(self.rounds, [column for column in SCORED_BY if column not in columns])
        of_update = with_scores(self.rounds, columns)
        every = [Scorer(name=OLD_LOGPROBS, model="actor")]
        every.append(Scorer(name=REFERENCE_LOGPROBS, model="actor", ranks=tuple(range(self._world))))
        placement: tuple[Replica, ...] = with_scorers(self._placement, [one for one in every if one.name in columns])
        plans = {}
        for one in of_update:
            problem = halved_serial_schedule(replicas_of(placement, one.counts), one.counts).problem
            plans[one.counts] = Plan(make(problem)).for_ranks
        scorers = {column: pipelines.scorers[column] for column in columns}
        rates: list[Mapping[str, float]] = [{"actor": 1e-2}] * len(of_update)
        found = training.train(known, of_update, rates, plans, scorers)
        return found, training.export_weights("actor")


def compare(rank: int, world: int, *, is_opposite: bool, regroups: bool = False) -> dict[str, Any]:
    """Whether values and weights have the bits that they have apart; how far they are without the order."""
    setup = LateTraining(rank, world, is_opposite=is_opposite, regroups=regroups)
    _, expected = setup.train([], fused)
    apart = scored_apart(setup.rounds, setup.columns)
    steps, weights = setup.train(setup.columns, fused)
    _, wrong = setup.train(setup.columns, heedless)
    values: dict[str, list[bool]] = {column: [] for column in setup.columns}
    offsets = apart.segments.token_offsets.tolist()
    for step in steps:
        for column, found in step.scored.items():
            whole = getattr(apart.targets["actor"], column)
            for samples, own in found:
                rows = [row for one in samples for row in range(offsets[one], offsets[one + 1])]
                values[column].append(torch.equal(own, whole[rows]))
    return {
        "values": values,
        "weights": all(torch.equal(weight, expected[name]) for name, weight in weights.items()),
        "moved": max(
            float((weight - model("actor").state_dict()[name]).abs().max()) for name, weight in weights.items()
        ),
        "without the order": max(float((wrong[name] - weight).abs().max()) for name, weight in weights.items()),
    }
