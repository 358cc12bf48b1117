"""Ranks of training in worlds of threads under NCCL's rules of waiting. Worlds of processes: tests/distributed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fuse.algorithms.policy_loss import PolicyTargets
from fuse.algorithms.value_loss import ValueTargets
from fuse.intrastage.opposite import with_opposites
from fuse.intrastage.optimizer import AdamWConfig
from fuse.intrastage.placement import Replica, place
from fuse.intrastage.training_schedule import Plan, halved_serial_schedule
from fuse.micro_batch import Metric, Metrics, MicroBatch
from fuse.trace import SpanRecorder
from fuse.training import layer_costs
from fuse.training.layer_costs import TypicalBatch
from fuse.training.layout import RaggedLayout
from fuse.training.model_spec import ModelSpec
from fuse.training.rank import TrainingRank, TrainingSettings
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
    timeout_s=30.0,
)


def trained(
    num_ranks: int, placement: tuple[Replica, ...], slots: int, *, kept: tuple[str, ...] | None = None
) -> dict[str, Tensor]:
    """The weights after a profile, an update with halved backwards, which observes costs, and a fused one.

    kept: offload everything but the weights of these before each.
    """
    serial = halved_serial_schedule(placement, 4)
    plans = [{4: Plan(serial)}, {4: Plan(greedy(serial.problem))}]
    steps = optimizer_steps([np.arange(8)], num_mini_batches=1, micro_batch_size=2)

    def run(rank: int) -> dict[str, Tensor]:
        specs = {name: ModelSpec.of(model) for name, model in MODELS.items()}
        training = TrainingRank(rank, torch.device("cpu"), specs, placement, SETTINGS, SpanRecorder())
        for name, model in MODELS.items():
            training.load_weights(name, model.state_dict())
        training.profile(EXPERIENCE, [[0, 1]])
        for of_update in plans:
            if kept is not None:
                training.offload(kept)
                training.offload(kept)
                assert set(resident(training)) == {f"{role} parameter" for role in kept}
            training.train(EXPERIENCE, steps, [1e-2], of_update)
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
    expected = trained(1, (*place("actor", 1, 1), *place("critic", 1, 1)), slots)
    found = trained(4, (*place("actor", 4, 4), *place("critic", 4, 2, reverse=True)), slots)
    assert found.keys() == expected.keys()
    assert not torch.equal(found["critic: score.weight"], MODELS["critic"].score.weight)
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


FIVE = OptimizerStep(micro_batches=((0, 1), (2,), (3, 4), (5,), (6, 7)), weight=1 / 5)
"""An odd number of micro-batches of different sizes, as halves of which one replica trains three."""


def actor_steps(num_ranks: int, placement: tuple[Replica, ...], slots: int) -> list[Any]:
    """By rank, after two steps on five micro-batches: norms, weights told, and bits of (replica, stage)."""
    serial = halved_serial_schedule(placement, 5)
    plans = [Plan(serial), Plan(greedy(serial.problem))]
    spec = ModelSpec.of(MODELS["actor"])

    def run(rank: int) -> Any:
        training = TrainingRank(rank, torch.device("cpu"), {"actor": spec}, placement, SETTINGS, SpanRecorder())
        training.load_weights("actor", MODELS["actor"].state_dict())
        steps = [training.train(EXPERIENCE, [FIVE], [1e-2], {5: plan})[0] for plan in plans]
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
    expected, found = (actor_steps(num_ranks, one, slots) for one in (plain, with_opposites(plain)))
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
