"""Several models over one base: devices hold each frozen tensor once, which the ledger knows, and nothing writes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from fuse.driver.ledger_entry import Phase
from fuse.driver.memory import ledger
from fuse.driver.one_base import origins_of, own_weights
from fuse.intrastage.adapters import base_of, with_adapter
from fuse.intrastage.opposite import with_opposites
from fuse.intrastage.placement import Replica, place
from fuse.intrastage.training_schedule import Plan, halved_serial_schedule
from fuse.trace import SpanRecorder
from fuse.training.model_spec import ModelSpec
from fuse.training.rank import TrainingRank
from fuse.training.rounds import rounds
from fuse.training.scoring import MicroBatchLimit, ScoringSettings
from fuse.training.steps import optimizer_steps
from fuse.workers import model_worker
from fuse.workers.model_worker import ModelWorker

from ..distributed.fake_nccl import FakeNccl
from ..memory_setups import memory_setup
from ..tiny_models import build, classifier, language_model, spread
from .test_rank import EXPERIENCE, SETTINGS

LORA = LoraConfig(r=2, target_modules="all-linear")
LAYERS = {"num_hidden_layers": 4}


def models() -> dict[str, Any]:
    """The base of all is the policy's; the reward model's last layer has been trained since."""
    policy = spread(build(language_model(**LAYERS)))
    scorers = [build(classifier(**LAYERS), seed=seed) for seed in (1, 2)]
    for scorer in scorers:
        scorer.model.load_state_dict(policy.model.state_dict())
    scorers[1].model.layers[3].mlp.up_proj.weight.data += 1
    actor = base_of(with_adapter(policy, LORA, "peft_config"))
    critic = base_of(with_adapter(scorers[0], LORA, "value_peft_config", replacing=("score",)))
    return {"actor": actor, "critic": critic, "reference": actor, "reward": scorers[1]}


MODELS = models()
ORIGINS = origins_of(
    MODELS,
    SimpleNamespace(  # type: ignore[arg-type]
        training=SETTINGS, variants={"reference": object()}, mixed_roles=()
    ),
)
SPECS = {role: ModelSpec.of(model) for role, model in MODELS.items()}


def spec(role: str) -> ModelSpec:
    made = replace(SPECS[role], origins=ORIGINS[role])
    if role != "reference":
        return made
    return replace(made, adapters=replace(made.adapters, active=None), variant_of="actor")


def test_what_is_equal_is_found_by_its_bits() -> None:
    layer = "model.layers.{}.mlp.up_proj.weight"
    assert {origin.role for origin in ORIGINS["reference"].values()} == {"actor"}
    assert ORIGINS["reward"][layer.format(2)].role == "actor"
    assert ORIGINS["reward"][layer.format(3)].role == "reward"
    trained = {name for name, one in MODELS["critic"].named_parameters() if one.requires_grad}
    assert trained
    assert not trained & ORIGINS["critic"].keys()
    assert {name for name, origin in ORIGINS["critic"].items() if origin.role == "critic"} == {
        "score.original_module.weight"
    }


def with_lent(role: str, stored: Mapping[str, Any], origins: Mapping[str, Any]) -> dict[str, Tensor]:
    """As `get_weights`, without an object store."""
    lent = {name: stored[one.role][one.name] for name, one in origins.items() if one.role != role}
    return stored[role] | lent


LAYOUTS: dict[str, tuple[int, tuple[Replica, ...]]] = {
    "one device": (1, (*place("actor", 1, 1), *place("critic", 1, 1))),
    "opposite": (2, (*place("actor", 2, 2), *place("critic", 2, 2, reverse=True))),
    "one direction": (2, (*place("actor", 2, 2), *place("critic", 2, 2))),
    "opposite replicas": (3, (*with_opposites(place("actor", 3, 3)), *place("critic", 3, 1))),
}


def held(device: int, num_devices: int, placement: tuple[Replica, ...], scoring: str) -> tuple[int, int]:
    """Bytes of weights that a device's worker has after a step, and of frozen ones if each stage had its own."""
    trained = {role: spec(role) for role in ("actor", "critic")}
    others = {role: spec(role) for role in ("critic", "reference", "reward")}
    settings = ScoringSettings(temperature=1.0, limit=MicroBatchLimit(), autocast=None, is_sharded=scoring == "sharded")
    worker: Any = ModelWorker(device, "cpu", trained, others, SETTINGS, settings)
    worker._world_size, worker._tensor_group = num_devices, None
    worker.place(placement)
    stored: dict[str, Mapping[str, Tensor]] = {
        role: own_weights(role, model, spec(role)) for role, model in MODELS.items()
    }
    for role in trained:
        worker.load_training_weights(role, stored)
    for role in others:
        worker.load_scoring_weights(role, stored)
    steps = optimizer_steps([np.arange(6)], num_mini_batches=1, micro_batch_size=2)
    counts = {role: sum(one.model == role for one in placement) for role in trained}
    (one,) = rounds(dict.fromkeys(trained, steps), counts, is_fused=True)
    plan = Plan(halved_serial_schedule(placement, one.counts)).for_ranks
    worker._training.train(EXPERIENCE, [one], [dict.fromkeys(trained, 1e-2)], {one.counts: plan})

    stages = [(role, stage) for role in trained for stage in worker._training.stages_of(role).values()]
    for role, stage in stages:
        start = dict(MODELS[role].named_parameters())
        moved = {name for name, own in stage.named_parameters() if not torch.equal(own, start[name])}
        assert moved == {  # A has no gradient while B is zero
            name for name, _ in stage.named_parameters() if start[name].requires_grad and ".lora_A." not in name
        }
    parts = [stage.model for _, stage in stages]
    parts += [share.model for share in worker._pipelines.shares.values()]
    parts += [worker._scoring[role] for role in others if worker.has_copy(role)]
    parameters = [parameter for part in parts for parameter in part.parameters()]
    storages = {own.untyped_storage().data_ptr(): own.nbytes for own in parameters}
    return sum(storages.values()), sum(own.nbytes for own in parameters)


@pytest.mark.parametrize("scoring", ["whole", "sharded"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_device_holds_what_the_ledger_has(layout: str, scoring: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of opposite pipelines a device has other layers of each model, and together each layer once."""
    monkeypatch.setattr(model_worker, "get_weights", with_lent)
    num_devices, placement = LAYOUTS[layout]
    setup = memory_setup({role: spec(role) for role in MODELS}, placement, num_devices, scoring=scoring)
    planned = ledger(setup, plans_fusion=False)
    found = FakeNccl(num_devices, 64).run(lambda device: held(device, num_devices, placement, scoring))
    weights = {"weights", "scoring share", "scoring copy"}
    for entries, (once, apart) in zip(planned.devices, found, strict=True):
        told = [one for one in entries if one.what in weights and one.role != "engine"]
        assert sum(one.bytes[Phase.TRAINING] for one in told) == once
        bases = [one.bytes[Phase.TRAINING] for one in told if one.role == "base"]
        assert bool(bases) == (once < apart)
    if layout != "opposite" or scoring == "whole":
        assert all(once < 0.7 * apart for once, apart in found)


def test_what_models_have_in_common_is_away_while_nobody_needs_it() -> None:
    specs = {role: spec(role) for role in ("actor", "critic")}
    stored = {
        role: {name: one.clone() for name, one in own_weights(role, MODELS[role], specs[role]).items()}
        for role in specs
    }
    name = "model.layers.0.mlp.up_proj.base_layer.weight"
    expected, common = stored["actor"][name].clone(), stored["actor"][name]

    def run(rank: int) -> None:
        _, placement = LAYOUTS["one device"]
        training = TrainingRank(rank, torch.device("cpu"), specs, placement, SETTINGS, SpanRecorder())
        for role in specs:
            training.load_weights(role, with_lent(role, stored, specs[role].origins))
        (stages,) = zip(*(training.stages_of(role).values() for role in specs), strict=True)
        held = [dict(stage.named_parameters())[name] for stage in stages]
        away = common.untyped_storage()
        training.offload.put_away(["actor"])
        assert away.nbytes(), "the actor needs it"
        training.offload.put_away([], [common])
        assert away.nbytes(), "a copy that scores needs it"
        training.offload.put_away([])
        assert not away.nbytes()
        training.offload.bring_weights("critic")
        assert all(torch.equal(one, expected) for one in held)
        training.offload.bring_all()
        assert all(
            parameter.untyped_storage().nbytes() for stage in stages for _, parameter in stage.named_parameters()
        )

    FakeNccl(1, 64).run(run)
