"""Micro-batches regrouped by length: the same gradients, weights and metrics as those that were drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fuse.algorithms.batch import Experience, Segments, Targets
from fuse.algorithms.group_batch import GroupTargets
from fuse.algorithms.grpo_loss import GRPOLossSettings, grpo_loss
from fuse.algorithms.online_dpo import PAIR, PairTargets, pair_loss
from fuse.algorithms.policy_loss import PolicyTargets, clipped_policy_loss
from fuse.algorithms.proximal_rloo_loss import proximal_rloo_policy_loss
from fuse.algorithms.rloo_loss import rloo_loss
from fuse.algorithms.sampler_correction import CorrectionSettings
from fuse.algorithms.surrogates import SURROGATES, SurrogateSettings
from fuse.algorithms.value_loss import ValueTargets, clipped_value_loss
from fuse.intrastage.opposite import with_opposites
from fuse.intrastage.optimizer import AdamWConfig
from fuse.intrastage.placement import Replica, place, replicas_of
from fuse.intrastage.training_schedule import Plan, halved_serial_schedule
from fuse.micro_batch import Loss, Metric
from fuse.trace import SpanRecorder
from fuse.training.layout import RaggedLayout
from fuse.training.model_spec import ModelSpec
from fuse.training.rank import TrainingRank, TrainingSettings
from fuse.training.regrouping import Dealing, Remembering, drawn_metrics, prepared, row_weights, said
from fuse.training.rounds import Round, StepPart, rounds, step_reports
from fuse.training.steps import OptimizerStep, StepReport, optimizer_steps
from schedules.fused.greedy import greedy

from ..distributed.fake_nccl import FakeNccl
from ..tiny_models import build, classifier, language_model, spread

VOCABULARY = 64
LENGTHS = (3, 9, 1, 4, 0, 12, 2, 2, 7, 1, 5, 11)
"""Of responses; one is empty."""


def experience(**targets: type[Targets]) -> Experience:
    """Twelve samples with random numbers to compare with, all of them counting."""
    random = torch.Generator().manual_seed(1)
    prompts = tuple(tuple(range(1, 2 + index % 3)) for index in range(len(LENGTHS)))
    responses = tuple(tuple(torch.randint(VOCABULARY, (length,), generator=random).tolist()) for length in LENGTHS)
    segments = Segments.from_lengths(LENGTHS, max(LENGTHS))

    def made(kind: Any) -> Targets:
        count = int(segments.offsets(kind.positions)[-1])
        columns = {field.name: torch.randn(count, generator=random) for field in fields(kind)}
        columns["mask"] = torch.ones(count, dtype=torch.bool)
        for name in columns.keys() & {"old_logprobs", "sampler_logprobs", "reference_logprobs"}:
            columns[name] = columns[name] * 0.3 - np.log(VOCABULARY)
        if "token_ids" in columns:
            columns["token_ids"] = torch.tensor([token for response in responses for token in response])
        targets: Targets = kind(**columns)
        return targets

    return Experience(
        prompts=prompts,
        responses=responses,
        lengths=LENGTHS,
        width=max(LENGTHS),
        segments=segments,
        targets={role: made(kind) for role, kind in targets.items()},
    )


SURROGATE = SurrogateSettings(epsilon_low=0.2, epsilon_high=0.3)
GRPO = GRPOLossSettings(
    temperature=0.9,
    loss_type="dapo",
    level="token",
    surrogate=SURROGATE,
    beta=0.1,
    weighs_kl=True,
    is_on_policy=False,
    max_tokens=16,
    micro_batches_per_rollout=3,
    entropy_coef=0.01,
    off_policy_threshold=0.2,
    correction=CorrectionSettings(mode="token_truncate", least=None, most=2.0),
)
LOSSES: Mapping[str, tuple[Loss, type[Targets], int]] = {
    "policy": (partial(clipped_policy_loss, temperature=0.9, cliprange=0.2), PolicyTargets, 1),
    "value": (partial(clipped_value_loss, vf_coef=0.5, cliprange=0.2), ValueTargets, 1),
    "values without clipping": (partial(clipped_value_loss, vf_coef=0.5, cliprange=None), ValueTargets, 1),
    **{
        f"GRPO {name}": (partial(grpo_loss, settings=replace(GRPO, loss_type=name)), GroupTargets, 1)
        for name in SURROGATES
    },
    "GSPO": (partial(grpo_loss, settings=replace(GRPO, loss_type="grpo", level="sequence")), GroupTargets, 1),
    "RLOO": (partial(rloo_loss, temperature=0.9, epsilon_low=0.2, epsilon_high=0.2), GroupTargets, 1),
    "proximal RLOO": (partial(proximal_rloo_policy_loss, temperature=0.9, cliprange=0.2), GroupTargets, 1),
    "pairs": (partial(pair_loss, beta=0.1, form="sigmoid", temperature=0.9), PairTargets, PAIR),
}
DRAWN = Round(
    {
        "actor": StepPart(
            micro_batches=((3, 5, 2, 7), (4, 6), (0, 1, 8, 9, 10, 11)), weights=(0.2, 0.3, 0.5), is_last=True
        )
    }
)
"""Different in number, weight and length; samples of a pair are side by side."""


class Sum:
    """The weighted losses of micro-batches, added up: gradients by position, and metrics of each."""

    def __init__(self, loss: Loss, of: Experience, part: StepPart, changed: float = 1.0) -> None:
        """changed: what the regrouped micro-batches' weights are multiplied with, to be wrong."""
        generator = torch.Generator().manual_seed(2)
        kind = of.targets["actor"]
        offsets = of.segments.offsets(kind.positions).tolist()
        head = nn.Linear(8, 1 if isinstance(kind, ValueTargets) else VOCABULARY, bias=False)
        head.weight.data.copy_(torch.randn(head.weight.shape, generator=generator))
        hidden = torch.randn(offsets[-1], 8, generator=generator, requires_grad=True)
        self.metrics: list[dict[Metric, Tensor]] = []
        self.said: list[Tensor] = []
        for index, samples in enumerate(part.micro_batches):
            micro_batch = replace(RaggedLayout().micro_batches(of, samples, 1.0)["actor"], weight=part.weights[index])
            if part.shares:
                rows = row_weights(of, "actor", samples, part.shares[index])
                weighted = {field.name: getattr(rows, field.name) * changed for field in fields(rows)}
                micro_batch = replace(micro_batch, row_weights=replace(rows, **weighted))
            own = torch.cat([torch.arange(offsets[sample], offsets[sample + 1]) for sample in samples])
            value, metrics = Remembering(loss)(hidden[own], head, micro_batch)
            value.backward()
            kept = said(metrics)
            if kept is None:
                self.metrics.append(dict(metrics))
            else:
                self.said.append(kept)
        assert hidden.grad is not None
        assert head.weight.grad is not None
        self.gradients = torch.cat([hidden.grad.flatten(), head.weight.grad.flatten()])


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    ("normalization", "dealing"),
    [
        ("micro_batch", Dealing()),
        ("token", Dealing(times=1.5)),
        ("micro_batch", Dealing(in_pieces=True)),
        ("micro_batch", Dealing(packs=True)),
    ],
)
def test_gradients_and_metrics_are_those_of_the_micro_batches_that_were_drawn(
    name: str, normalization: Any, dealing: Dealing
) -> None:
    loss, kind, unit = LOSSES[name]
    of = experience(actor=kind)
    as_drawn, dealt = (
        prepared([DRAWN], of, loss_normalization=normalization, units=units, dealing=dealing)[0].parts["actor"]
        for units in ({}, {"actor": unit})
    )
    assert not as_drawn.shares
    assert dealt.micro_batches != as_drawn.micro_batches
    expected, found = Sum(loss, of, as_drawn), Sum(loss, of, dealt)
    scale = float(expected.gradients.abs().max())
    assert scale > 1e-3
    torch.testing.assert_close(found.gradients, expected.gradients, rtol=1e-5, atol=1e-6 * scale)
    rows = drawn_metrics({"actor": loss}, partial(RaggedLayout().micro_batches, of), of, "actor", [dealt], found.said)
    assert [list(row) for row in rows] == [list(row) for row in expected.metrics]
    for row, own in zip(rows, expected.metrics, strict=True):
        assert row == pytest.approx({metric: float(value) for metric, value in own.items()}, rel=1e-5, abs=1e-6)

    wrong = Sum(loss, of, dealt, changed=1.01)
    assert float((wrong.gradients - expected.gradients).abs().max()) > 1e-3 * scale


def test_pairs_stay_together_and_less_is_padded() -> None:
    of = experience(actor=PairTargets)
    (dealt,) = prepared([DRAWN], of, loss_normalization="micro_batch", units={"actor": PAIR})
    drawn_pairs, pairs = (
        {own[start : start + 2] for own in one.parts["actor"].micro_batches for start in range(0, len(own), 2)}
        for one in (DRAWN, dealt)
    )
    assert pairs == drawn_pairs
    drawn_tokens, tokens = (
        [RaggedLayout().shape(of, samples).size for samples in one.parts["actor"].micro_batches]
        for one in (DRAWN, dealt)
    )
    assert max(tokens) < max(drawn_tokens)
    assert sum(tokens) < sum(drawn_tokens)


def test_packed_micro_batches_have_about_as_many_tokens_over_all_rounds_of_a_step() -> None:
    of = experience(actor=PolicyTargets)
    halves = [StepPart(micro_batches=((0, 1, 2), (3, 4, 5)), weights=(0.25, 0.25), is_last=False)]
    halves.append(StepPart(micro_batches=((6, 7, 8), (9, 10, 11)), weights=(0.25, 0.25), is_last=True))
    dealt = prepared(
        [Round({"actor": half}) for half in halves],
        of,
        loss_normalization="micro_batch",
        units={"actor": 1},
        dealing=Dealing(packs=True),
    )
    layout = RaggedLayout(packs=True)
    tokens = [[layout.shape(of, samples).size for samples in one.parts["actor"].micro_batches] for one in dealt]
    assert sum(map(sum, tokens)) == sum(of.lengths) + sum(map(len, of.prompts))
    assert all(len(of_round) == 2 for of_round in tokens)
    assert max(map(max, tokens)) <= 1.1 * min(map(min, tokens))
    assert all(of_round == sorted(of_round, reverse=True) for of_round in tokens), "what ends a round is small"


def test_a_step_of_one_micro_batch_stays_as_it_is() -> None:
    one = Round({"actor": StepPart(micro_batches=((3, 1, 2),), weights=(1.0,), is_last=True)})
    of = experience(actor=PolicyTargets)
    assert prepared([one], of, loss_normalization="micro_batch", units={"actor": 1}) == [one]


@pytest.mark.parametrize(
    ("dealing", "expected"),
    [
        (Dealing(), 3),
        (Dealing(times=1.5), 4),
        (Dealing(times=2.0), 6),
        (Dealing(times=9.0), 6),  # as many as there are pairs
        (Dealing(at_least=5), 5),
        (Dealing(at_least=2), 3),  # never fewer
        (Dealing(times=0.5), 3),
        (Dealing(replicas=4), 4),  # one for each
        (Dealing(times=1.5, packs=True), 4),
    ],
)
def test_there_are_as_many_micro_batches_as_asked_for_and_none_is_larger(dealing: Dealing, expected: int) -> None:
    of = experience(actor=PairTargets)
    drawn, dealt = (
        prepared([DRAWN], of, loss_normalization="micro_batch", units={"actor": PAIR}, dealing=one)[0].parts["actor"]
        for one in (Dealing(), dealing)
    )
    assert len(dealt.micro_batches) == expected
    assert sorted(sample for own in dealt.micro_batches for sample in own) == list(range(len(LENGTHS)))
    largest, largest_drawn = (
        max(RaggedLayout().shape(of, samples).size for samples in one.micro_batches) for one in (dealt, drawn)
    )
    assert largest <= largest_drawn


def test_in_pieces_they_are_of_several_sizes() -> None:
    """Quarters and eighths; of small groups every other one is whole, and a step's only one is in pieces, too."""
    of = experience(actor=PolicyTargets)
    alone = Round({"actor": StepPart(micro_batches=(tuple(range(len(LENGTHS))),), weights=(1.0,), is_last=True)})
    pieces, of_one = (
        prepared([one], of, loss_normalization="micro_batch", units={"actor": 1}, dealing=Dealing(in_pieces=True))[0]
        .parts["actor"]
        .micro_batches
        for one in (DRAWN, alone)
    )
    assert pieces == ((4, 9), (6,), (2, 7), (0,), (3,), (10, 8, 1), (11,), (5,))
    assert list(map(len, of_one)) == [3, 1, 3, 1, 3, 1]


def test_a_sample_that_a_step_has_twice_counts_twice() -> None:
    """As where a rollout is used twice before the weights change."""
    loss, kind, _ = LOSSES["policy"]
    of = experience(actor=kind)
    twice = Round(
        {"actor": StepPart(micro_batches=((0, 1), (2, 5), (1, 0), (5, 2)), weights=(0.25,) * 4, is_last=True)}
    )
    (dealt,) = prepared([twice], of, loss_normalization="micro_batch", units={"actor": 1})
    expected, found = Sum(loss, of, twice.parts["actor"]), Sum(loss, of, dealt.parts["actor"])
    torch.testing.assert_close(found.gradients, expected.gradients, rtol=1e-5, atol=1e-7)
    laid_out = partial(RaggedLayout().micro_batches, of)
    assert len(drawn_metrics({"actor": loss}, laid_out, of, "actor", [dealt.parts["actor"]], found.said)) == 4


# Ranks of training

MODELS = {
    "actor": spread(build(language_model("qwen2", num_hidden_layers=2, tie_word_embeddings=True))),
    "critic": spread(build(classifier(num_hidden_layers=2))),
}


def trained(
    steps: Mapping[str, Sequence[OptimizerStep]],
    losses: Mapping[str, Loss],
    kinds: Mapping[str, type[Targets]],
    placement: tuple[Replica, ...],
    *,
    regroups: bool,
) -> tuple[dict[str, Tensor], dict[str, list[StepReport]]]:
    """Weights after these steps, and what is told of them."""
    num_ranks = 1 + max(rank for replica in placement for rank in replica.ranks)
    of = experience(**kinds)
    num_replicas = {role: sum(replica.model == role for replica in placement) for role in losses}
    of_update = rounds(steps, num_replicas, is_fused=True)
    units = dict.fromkeys(losses, 1) if regroups else {}
    dealt = prepared(of_update, of, loss_normalization="micro_batch", units=units)
    assert [one.counts for one in dealt] == [one.counts for one in of_update]
    plans = {}
    for counts in {one.counts for one in dealt}:
        plans[counts] = Plan(greedy(halved_serial_schedule(replicas_of(placement, counts), counts).problem)).for_ranks
    settings = TrainingSettings(
        backend="transformers",
        split_backward=True,
        losses=losses,
        targets=kinds,
        layout=RaggedLayout(),
        adamw=AdamWConfig(max_grad_norm=1.0),
        autocast=None,
        gradient_checkpointing=False,
        timeout_s=300.0,
    )

    def run(rank: int) -> Any:
        specs = {role: ModelSpec.of(MODELS[role]) for role in losses}
        training = TrainingRank(rank, torch.device("cpu"), specs, placement, settings, SpanRecorder())
        for role in losses:
            training.load_weights(role, MODELS[role].state_dict())
        told = training.train(of, dealt, [dict.fromkeys(losses, 1e-2)] * len(dealt), plans)
        weights = {f"{role}: {key}": one for role in losses for key, one in training.export_weights(role).items()}
        return weights, told

    by_rank = FakeNccl(num_ranks, 64).run(run)
    weights = {name: one for of_rank, _ in by_rank for name, one in of_rank.items()}
    reports = step_reports(
        dealt,
        [told for _, told in by_rank],
        placement,
        partial(drawn_metrics, losses, partial(RaggedLayout().micro_batches, of), of),
    )
    return weights, reports


def permuted(num_epochs: int, num_mini_batches: int) -> list[OptimizerStep]:
    order = [np.random.default_rng(epoch).permutation(len(LENGTHS)) for epoch in range(num_epochs)]
    return optimizer_steps(order, num_mini_batches=num_mini_batches, micro_batch_size=2)


PPO_STEPS = {"actor": permuted(1, 1), "critic": permuted(2, 1)}
"""The actor's one step is dealt over the critic's two."""
PPO_LOSSES = {"actor": LOSSES["policy"][0], "critic": LOSSES["value"][0]}
PPO_TARGETS: dict[str, type[Targets]] = {"actor": PolicyTargets, "critic": ValueTargets}


@pytest.mark.parametrize(
    ("steps", "losses", "kinds", "placement"),
    [
        pytest.param(
            PPO_STEPS,
            PPO_LOSSES,
            PPO_TARGETS,
            (*place("actor", 2, 2), *place("critic", 2, 1)),
            id="PPO, a pipeline of the actor and two replicas of the critic",
        ),
        pytest.param(
            {"actor": permuted(2, 1)},
            {"actor": LOSSES["GRPO bnpo"][0]},
            {"actor": GroupTargets},
            with_opposites(place("actor", 2, 2)),
            id="GRPO, opposite replicas",
        ),
    ],
)
def test_weights_and_reports_are_those_without_regrouping(
    steps: Mapping[str, Sequence[OptimizerStep]],
    losses: Mapping[str, Loss],
    kinds: Mapping[str, type[Targets]],
    placement: tuple[Replica, ...],
) -> None:
    expected, reports = trained(steps, losses, kinds, placement, regroups=False)
    found, found_reports = trained(steps, losses, kinds, placement, regroups=True)
    assert found.keys() == expected.keys()
    for role in losses:
        name = next(name for name in found if name.startswith(role) and "norm" not in name)
        initial = MODELS[role].state_dict()[name.removeprefix(f"{role}: ")]
        assert float((expected[name] - initial).abs().max()) > 1e-3
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}")
    assert found_reports.keys() == reports.keys()
    for role, of_role in reports.items():
        for one, other in zip(found_reports[role], of_role, strict=True):
            assert one.gradient_norm == pytest.approx(other.gradient_norm, rel=1e-4)
            for row, own in zip(one.metrics, other.metrics, strict=True):
                assert row == pytest.approx(own, rel=1e-4, abs=1e-4)
