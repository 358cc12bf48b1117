"""Ranks of training in worlds of threads under NCCL's rules of waiting. Worlds of processes: tests/distributed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fuse.algorithms.algorithm import LossNormalization
from fuse.algorithms.policy_loss import PolicyTargets
from fuse.algorithms.value_loss import ValueTargets
from fuse.intrastage.opposite import with_opposites
from fuse.intrastage.optimizer import AdamWConfig
from fuse.intrastage.placement import Replica, place, replicas_of
from fuse.intrastage.training_schedule import Plan, halved_serial_schedule
from fuse.micro_batch import Metric, Metrics, MicroBatch
from fuse.trace import SpanRecorder
from fuse.training import layer_costs
from fuse.training.layer_costs import TypicalBatch
from fuse.training.layout import RaggedLayout
from fuse.training.model_spec import ModelSpec
from fuse.training.rank import TrainingRank, TrainingSettings
from fuse.training.regrouping import prepared
from fuse.training.rounds import RankRound, rounds
from fuse.training.steps import OptimizerStep, optimizer_steps
from schedules.fused.greedy import greedy

from ..distributed.fake_nccl import FakeNccl
from ..tiny_models import build, classifier, language_model, spread

TARGETS = {"actor": PolicyTargets, "critic": ValueTargets}
EXPERIENCE = layer_costs._experience(TypicalBatch(num_sequences=8, prompt_tokens=3, response_tokens=4), 64, TARGETS)
MODELS = {
    "actor": spread(build(language_model("qwen2", num_hidden_layers=4, tie_word_embeddings=True))),
    "critic": spread(build(classifier(num_hidden_layers=4))),
}


def loss(hidden: Tensor, head: nn.Module, micro_batch: MicroBatch) -> tuple[Tensor, Metrics]:
    value = head(hidden).square().mean() * micro_batch.weight
    return value, {Metric("loss"): value.detach()}


SETTINGS = TrainingSettings(
    backend="transformers",
    split_backward=True,
    losses={"actor": loss, "critic": loss},
    targets=TARGETS,
    layout=RaggedLayout(),
    adamw=AdamWConfig(max_grad_norm=0.1),
    autocast=None,
    gradient_checkpointing=False,
    timeout_s=300.0,
)


@cache
def trained(
    num_ranks: int, placement: tuple[Replica, ...], slots: int, *, kept: tuple[str, ...] | None = None
) -> dict[str, Tensor]:
    """The weights after a profile, an update with halved backwards, which observes costs, and a fused one.

    kept: offload everything but the weights of these before each.
    """
    serial = halved_serial_schedule(placement, 4)
    steps = optimizer_steps([np.arange(8)], num_mini_batches=1, micro_batch_size=2)
    of_update = rounds({"actor": steps, "critic": steps}, {"actor": 1, "critic": 2}, is_fused=True)
    plans = [{of_update[0].counts: Plan(schedule).for_ranks} for schedule in (serial, greedy(serial.problem))]

    def run(rank: int) -> dict[str, Tensor]:
        specs = {name: ModelSpec.of(model) for name, model in MODELS.items()}
        training = TrainingRank(rank, torch.device("cpu"), specs, placement, SETTINGS, SpanRecorder())
        for name, model in MODELS.items():
            training.load_weights(name, model.state_dict())
        training.profile(EXPERIENCE, [[0, 1]])
        for by_counts in plans:
            if kept is not None:
                training.offload.put_away(kept)
                training.offload.put_away(kept)
                assert set(resident(training)) == {f"{role} parameter" for role in kept}
            training.train(EXPERIENCE, of_update, [{"actor": 1e-2, "critic": 1e-2}], by_counts)
        return {
            f"{model}: {name}": weight for model in specs for name, weight in training.export_weights(model).items()
        }

    return {name: weight for of_rank in FakeNccl(num_ranks, slots).run(run) for name, weight in of_rank.items()}


def resident(training: TrainingRank) -> Iterator[str]:
    """What has memory on the device."""
    for role, optimizer in training._optimizers.items():
        for _, parts in optimizer.state():
            yield from (f"{role} {part}" for part, tensor in parts.items() if tensor.untyped_storage().nbytes())


@pytest.mark.parametrize("kept", [(), ("critic",)])
def test_what_was_offloaded_trains_as_if_it_had_stayed(kept: tuple[str, ...]) -> None:
    placement = (*place("actor", 2, 2), *place("critic", 2, 2, reverse=True))
    expected = trained(2, placement, 64)
    found = trained(2, placement, 64, kept=kept)
    assert all(torch.equal(weight, expected[name]) for name, weight in found.items())
    assert found.keys() == expected.keys()


@pytest.mark.parametrize("slots", [0, 64])
def test_a_rank_profiles_observes_and_trains_under_nccls_rules(slots: int) -> None:
    expected = trained(1, (*place("actor", 1, 1), *place("critic", 1, 1)), 64)
    found = trained(4, (*place("actor", 4, 4), *place("critic", 4, 2, reverse=True)), slots)
    assert found.keys() == expected.keys()
    assert not torch.equal(found["critic: score.weight"], MODELS["critic"].score.weight)
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


FIVE = OptimizerStep(micro_batches=((0, 1), (2,), (3, 4), (5,), (6, 7)), weight=1 / 5)
"""An odd number of micro-batches of different sizes, as halves of which one replica trains three."""


@cache
def actor_steps(num_ranks: int, placement: tuple[Replica, ...], slots: int) -> list[Any]:
    """By rank, after two steps on five micro-batches: norms, weights told, and bits of (replica, stage)."""
    of_step = rounds({"actor": [FIVE]}, {"actor": len(placement)}, is_fused=True)
    counts = of_step[0].counts
    serial = halved_serial_schedule(placement, counts)
    plans = [Plan(serial).for_ranks, Plan(greedy(serial.problem)).for_ranks]
    spec = ModelSpec.of(MODELS["actor"])

    def run(rank: int) -> Any:
        training = TrainingRank(rank, torch.device("cpu"), {"actor": spec}, placement, SETTINGS, SpanRecorder())
        training.load_weights("actor", MODELS["actor"].state_dict())
        steps = [training.train(EXPERIENCE, of_step, [{"actor": 1e-2}], {counts: plan})[0] for plan in plans]
        held = {key: dict(stage.named_parameters()) for key, stage in training.stages_of("actor").items()}
        rows = [len(of_step.metrics.get("actor", ())) for of_step in steps]
        norms = [of_step.gradient_norms["actor"] for of_step in steps]
        return norms, training.export_weights("actor"), held, rows

    return FakeNccl(num_ranks, slots).run(run)


@pytest.mark.parametrize("slots", [0, 64])
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_opposite_replicas_train_what_one_pipeline_does(num_ranks: int, slots: int) -> None:
    """Of three ranks, the middle one holds its stage twice."""
    plain = place("actor", num_ranks, num_ranks)
    expected, found = actor_steps(num_ranks, plain, 64), actor_steps(num_ranks, with_opposites(plain), slots)
    weights = {name: weight for _, told, _, _ in expected for name, weight in told.items()}
    told_here = [name for _, told, _, _ in found for name in told]
    assert sorted(told_here) == sorted(weights), "each once"
    for norms, told, _, _ in found:
        assert norms == found[0][0], "the same on all ranks"
        assert norms == pytest.approx(expected[0][0], rel=1e-5)
        for name, weight in told.items():
            torch.testing.assert_close(
                weight, weights[name], rtol=0, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
            )
    copies: dict[int, list[dict[str, Tensor]]] = {}
    for _, _, held, _ in found:
        for (_, stage), parameters in held.items():
            copies.setdefault(stage, []).append(parameters)
    assert [len(copies[stage]) for stage in range(num_ranks)] == [2] * num_ranks
    for first, second in copies.values():
        for name, weight in first.items():
            assert torch.equal(weight, second[name]), name
    assert [rows for _, _, _, rows in found] == [[2, 2], *[[0, 0]] * (num_ranks - 2), [3, 3]]


def steps_of(num_epochs: int, num_mini_batches: int, micro_batch_size: int = 2) -> list[OptimizerStep]:
    order = [np.random.default_rng(epoch).permutation(8) for epoch in range(num_epochs)]
    return optimizer_steps(order, num_mini_batches=num_mini_batches, micro_batch_size=micro_batch_size)


STEPS = {"actor": steps_of(1, 1), "critic": steps_of(2, 2)}
"""One of the actor, four of the critic."""
RATES = {"actor": 1e-2, "critic": 3e-2}


def taken(
    num_ranks: int,
    steps: Mapping[str, Sequence[OptimizerStep]],
    *,
    is_fused: bool = True,
    rates: Mapping[str, float] = RATES,
    loss_normalization: LossNormalization = "micro_batch",
) -> tuple[dict[str, Tensor], list[list[RankRound]]]:
    """The weights after these steps, and what ranks told of them; a role without any is not there at all."""
    roles = [role for role, of_role in steps.items() if of_role]
    models = {role: MODELS[role] for role in roles}
    placement = tuple(
        replica for role in roles for replica in place(role, num_ranks, num_ranks, reverse=role == "critic")
    )
    drawn = rounds(steps, dict.fromkeys(steps, 1), is_fused=is_fused)
    of_update = prepared(drawn, EXPERIENCE, loss_normalization=loss_normalization, units={})
    plans = {}
    for counts in {one.counts for one in of_update}:
        serial = halved_serial_schedule(replicas_of(placement, counts), counts)
        plans[counts] = Plan(greedy(serial.problem) if is_fused else serial).for_ranks

    def run(rank: int) -> tuple[dict[str, Tensor], list[RankRound]]:
        specs = {name: ModelSpec.of(model) for name, model in models.items()}
        training = TrainingRank(rank, torch.device("cpu"), specs, placement, SETTINGS, SpanRecorder())
        for name, model in models.items():
            training.load_weights(name, model.state_dict())
        told = training.train(EXPERIENCE, of_update, [rates] * len(of_update), plans)
        weights = {f"{name}: {key}": one for name in specs for key, one in training.export_weights(name).items()}
        return weights, told

    by_rank = FakeNccl(num_ranks, 64).run(run)
    return {name: one for weights, _ in by_rank for name, one in weights.items()}, [told for _, told in by_rank]


def difference(first: Mapping[str, Tensor], second: Mapping[str, Tensor], role: str) -> float:
    names = [name for name in first if name.startswith(role)]
    assert names
    return max(float((first[name] - second[name]).abs().max()) for name in names)


@pytest.fixture(scope="module")
def one_after_the_other() -> dict[str, Tensor]:
    """The actor's steps, then the critic's, each alone on a rank."""
    return {
        name: one
        for role in STEPS
        for name, one in taken(1, {other: STEPS[role] if other == role else [] for other in STEPS})[0].items()
    }


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("is_fused", [False, True])
def test_weights_are_those_of_each_roles_own_steps(
    num_ranks: int, is_fused: bool, one_after_the_other: dict[str, Tensor]
) -> None:
    found, told = taken(num_ranks, STEPS, is_fused=is_fused)
    for role in STEPS:
        assert difference(found, one_after_the_other, role) < 1e-5
    assert [sorted(one.gradient_norms) for one in told[0]] == (
        [["critic"]] * 3 + [["actor", "critic"]] if is_fused else [["actor", "critic"]] + [["critic"]] * 3
    )


def test_other_steps_and_other_rates_give_other_weights(one_after_the_other: dict[str, Tensor]) -> None:
    fewer, _ = taken(1, STEPS | {"critic": steps_of(1, 2)})
    assert difference(fewer, one_after_the_other, "actor") == 0.0
    assert difference(fewer, one_after_the_other, "critic") > 1e-3
    resting, _ = taken(1, STEPS, rates={"actor": RATES["actor"], "critic": 0.0})
    assert difference(resting, one_after_the_other, "actor") == 0.0
    initial = {f"critic: {name}": one for name, one in MODELS["critic"].state_dict().items()}
    assert difference({name: one for name, one in resting.items() if "critic" in name}, initial, "critic") == 0.0


def test_tokens_count_the_same_however_a_step_is_cut() -> None:
    """As in one micro-batch, whose mean is over all; responses have 1 to 4 tokens."""
    whole = {role: steps_of(1, 1, micro_batch_size=8) for role in STEPS}
    cut = {"actor": steps_of(1, 1, micro_batch_size=3), "critic": steps_of(1, 1, micro_batch_size=2)}
    expected, _ = taken(1, whole)
    by_token, _ = taken(1, cut, loss_normalization="token")
    by_micro_batch, _ = taken(1, cut)
    for role in STEPS:
        assert difference(by_token, expected, role) < 1e-4
        assert difference(by_micro_batch, expected, role) > 1e-3
