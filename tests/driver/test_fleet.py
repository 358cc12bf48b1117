"""What a fleet plans rollouts by, without its workers."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fuse.driver import fleet as fleet_module
from fuse.driver import update
from fuse.driver.engines import Engines
from fuse.driver.fleet import Fleet
from fuse.driver.memory import RESERVE_SHARE, free_for_micro_batches
from fuse.engines.engine import SamplingParams
from fuse.interstage.migration import EngineLimits, StageByStage, Threshold
from fuse.interstage.rollout_planner import PolicyName, RolloutPlanner, RolloutSettings
from fuse.intrastage.placement import Replica
from fuse.sample import Sample
from fuse.trace import PhaseClock
from fuse.trainers.reward_calls import RewardCalls
from fuse.trainers.rollouts import Rollouts
from fuse.training.model_spec import ModelSpec
from fuse.workers.errors import WorkerError

from ..memory_setups import memory_setup
from ..tiny_models import language_model

PARAMS = SamplingParams(seed=0, temperature=1.0, max_new_tokens=8)


def settings(policy: PolicyName = "threshold") -> RolloutSettings:
    return RolloutSettings(
        policy=policy,
        num_devices=2,
        limits=EngineLimits(max_batch=8, kv_capacity_tokens=8 * 80, max_new_tokens=8),
        kv_bytes_per_token=2048,
        inference_batch_tokens=16384,
    )


class FakeRollout:
    """Stands in for `LiveRollout`: remembers under which policy it would have run."""

    policies: list[Any]

    def __init__(self, *_: Any, policy: Any, **__: Any) -> None:
        self.policies.append(policy)

    def run(self) -> Any:
        return SimpleNamespace(lost_engines=(), scoring_calls=((8, 0.5),), makespan_s=2.0)


class LearningPlanner(RolloutPlanner):
    """Plans by a policy of its own, and counts what it is taught."""

    def __init__(self, settings: RolloutSettings) -> None:
        super().__init__(settings, num_scoring=3)
        self.num_taught = 0

    def policy(self, samples: Any) -> Any:
        return "learnt"

    def observe(self, samples: Any, scoring_calls: Any = (), seconds: Any = None) -> None:
        self.num_taught += 1
        self.seconds = seconds
        self.scoring_calls = tuple(scoring_calls)


@pytest.fixture
def planner() -> LearningPlanner:
    return LearningPlanner(settings())


@pytest.fixture
def fleet(planner: LearningPlanner, monkeypatch: pytest.MonkeyPatch) -> Fleet:
    monkeypatch.setattr(FakeRollout, "policies", [], raising=False)
    monkeypatch.setattr(fleet_module, "LiveRollout", FakeRollout)
    made: Any = Fleet(
        SimpleNamespace(
            training=SimpleNamespace(tensor_parallel_size=1, timeout_s=1.0),
            scoring=SimpleNamespace(is_sharded=False),
            pad_token_id=0,
            offloads_training=False,
            engines_sleep=False,
        ),
        {},
    )  # type: ignore[arg-type]
    made._rollouts, made._engines = planner, SimpleNamespace(workers=[])
    return made  # type: ignore[no-any-return]


def test_an_evaluation_has_a_fixed_policy_and_teaches_nothing(fleet: Fleet, planner: LearningPlanner) -> None:
    samples = [Sample(index, (1, 2)) for index in range(3)]
    fleet.roll_out(samples, PARAMS, teaches=False)
    assert FakeRollout.policies == [Threshold(remaining=3, num_kept=2)]
    assert planner.num_taught == 0
    fleet.roll_out(samples, PARAMS)
    assert FakeRollout.policies[1:] == ["learnt"]
    assert planner.num_taught == 1
    assert planner.scoring_calls == ((8, 0.5),)
    assert planner.seconds == 2.0
    fleet.roll_out(samples, PARAMS, policy=StageByStage())
    assert planner.seconds is None, "that was not as planned"
    settings: Any = fleet.settings
    settings.scoring.is_sharded = True
    fleet.roll_out(samples, PARAMS)
    assert planner.scoring_calls == (), "pieces follow one another, and none has its devices to itself"


@pytest.mark.parametrize("fused", [True, False])
def test_what_an_evaluation_cost_is_forgotten(fused: bool) -> None:
    calls: list[Any] = []

    def record(name: str) -> Any:
        return lambda *args, **options: calls.append((name, options.get("teaches")))

    fake: Any = SimpleNamespace(
        roll_out=record("roll_out"),
        generate=record("generate"),
        infer=record("infer"),
        forget_spans=record("forget_spans"),
    )
    with RewardCalls(None, lambda _: []) as rewards:
        rollouts = Rollouts(rewards, fused, lambda _: None)
        rollouts.roll_out(fake, [], PARAMS, PhaseClock(), teaches=False)
        assert calls[-1] == ("forget_spans", None)
        assert ("roll_out", False) in calls or not fused
        calls.clear()
        rollouts.roll_out(fake, [], PARAMS, PhaseClock())
    assert ("forget_spans", None) not in calls


class Answer:
    """Of an engine that may have died."""

    def __init__(self, error: WorkerError | None) -> None:
        self._error = error

    def result(self) -> str:
        if self._error is not None:
            raise self._error
        return "weights loaded"


@pytest.mark.parametrize(("num_deaths", "survives"), [(0, True), (1, True), (2, True), (4, False)])
def test_an_engine_that_dies_while_it_takes_anothers_place_is_replaced(
    num_deaths: int, survives: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    died = WorkerError(1, "generation worker", "its process died", is_death=True)
    answers = iter([Answer(died)] * num_deaths + [Answer(None)])
    replaced: list[int] = []
    cluster: Any = SimpleNamespace()
    nothing: Any = SimpleNamespace(num_devices=0, engine_devices=1)
    engines = Engines(cluster, nothing, nothing, [], list)
    engines.workers = [nothing, nothing]
    monkeypatch.setattr(engines, "replace", replaced.append)
    call: Any = lambda _: next(answers)  # noqa: E731  (its type is a worker's)
    if survives:
        assert engines._answer(1, call(None), call) == "weights loaded"
        assert replaced == [1] * num_deaths
    else:
        with pytest.raises(WorkerError, match="its process died"):
            engines._answer(1, call(None), call)


def test_what_devices_say_is_free_is_not_all_for_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are dropped when it is measured, and a cache may yet grow; the stages are those that were placed."""
    specs = {"actor": ModelSpec(model_class=language_model()[0], config=language_model()[1], dtype=torch.float32)}
    memory = memory_setup(specs, (Replica("actor", 0, (0, 1)),), 2, device_memory_bytes=10**10, accelerator="cuda")
    placed = (Replica("actor", 0, (0, 1), ((0, 2), (2, 2))),)
    workers: Any = [SimpleNamespace(free_bytes=lambda free=free: free) for free in (2 * 10**9, 3 * 10**9)]
    monkeypatch.setattr(update, "gather", list)
    assert update.fullest_free_bytes(workers, None, placed) == 2 * 10**9
    moved = replace(memory, placement=placed)
    first, second = free_for_micro_batches(moved, [2 * 10**9, 3 * 10**9])
    assert first is not None
    assert second is not None
    assert update.fullest_free_bytes(workers, memory, placed) == first < second
    size = memory.models["actor"].size
    reserve = round(RESERVE_SHARE * 10**10)
    assert first < 2 * 10**9 - reserve - 4 * (size.embedding + sum(size.layers))


def test_policies_are_told_the_least_capacity_of_the_engines() -> None:
    assert settings().within([]).limits == settings().limits
    assert settings().within([300, 200]).limits.kv_capacity_tokens == 200
    assert settings().within([10_000]).limits == settings().limits
    assert RolloutPlanner(settings().within([200]), num_scoring=3).limits.kv_capacity_tokens == 200


def test_a_fixed_policy_is_what_the_run_asks_for() -> None:
    assert RolloutPlanner(settings("none"), num_scoring=3).fixed_policy(4) == StageByStage()
    assert RolloutPlanner(settings("adaptive"), num_scoring=3).fixed_policy(4) == Threshold(remaining=4, num_kept=2)
