"""A profile measured on one rank: what it finds, and that the stages are as before."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fuse.intrastage.cost_profile import Shape
from fuse.intrastage.measure import measure
from fuse.intrastage.megatron_stage import MegatronStage
from fuse.intrastage.transformers_stage import TransformersStage
from fuse.micro_batch import Metrics, MicroBatch

from ..tiny_models import language_model, spread

MODEL = language_model(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_key_value_heads=2)
LOSS_S = 0.05


class Clock:
    """Time passes when it is looked at, and while a loss is computed."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        self.now_s += 1e-3
        return self.now_s


CLOCK = Clock()


def loss(hidden: Tensor, head: nn.Module, micro_batch: MicroBatch) -> tuple[Tensor, Metrics]:
    CLOCK.now_s += LOSS_S
    return head(hidden).square().mean(), {}


def stages_of(kind: type[Any], *, split: bool) -> dict[tuple[int, int], Any]:
    stages = {}
    for stage in range(3):
        stages[0, stage] = kind(*MODEL, stage=stage, num_stages=3, loss=loss, split_backward=split)
        spread(stages[0, stage].model, std=0.1)
    return stages


def batch_of(num_sequences: int, num_tokens: int) -> MicroBatch:
    ids = torch.zeros(num_sequences, num_tokens, dtype=torch.int64)
    return MicroBatch(input_ids=ids, head_index=torch.arange(num_tokens), targets=None)


@pytest.mark.parametrize("kind", [TransformersStage, MegatronStage])
@pytest.mark.parametrize("split", [True, False])
def test_a_rank_measures_its_stages_on_every_shape_and_leaves_them_as_they_were(split: bool, kind: type[Any]) -> None:
    stages = stages_of(kind, split=split)
    before = {key: [one.detach().clone() for one in stage.model.parameters()] for key, stage in stages.items()}
    batches = [batch_of(2, 8), batch_of(2, 16)]
    profile = measure(0, [("actor.0", (0, 0, 0))], stages, [batches], [], repeats=1, clock=CLOCK)

    assert [(cost.stage, cost.shape) for cost in profile.stages] == [
        (stage, Shape(2, tokens)) for stage in range(3) for tokens in (8, 16)
    ]
    assert profile.transfers == ()
    forward_s = [
        profile.stage_costs("actor.0", stage, Shape(2, 8)).forward_ticks * profile.tick_s for stage in range(3)
    ]
    assert forward_s == pytest.approx([1e-3, 1e-3, 1e-3 + LOSS_S])  # the loss is the last stage's to compute
    for cost in profile.stages:
        assert cost.forward_ticks > 0
        assert cost.backward_ticks > 0
        assert ((cost.input_grad_ticks or 0) > 0) == split
        assert ((cost.weight_grad_ticks or 0) > 0) == split

    middle = [profile.stage_costs("actor.0", 1, Shape(2, tokens)) for tokens in (8, 16)]
    rows, hidden, inner = 16, 32, 64
    # Of q, k and v; of o; of gate and up; of down. Then the gradients of their outputs, one each.
    linear_bytes = 4 * rows * (3 * hidden + inner + 5 * hidden + 2 * inner)
    assert [cost.weight_grad_bytes for cost in middle] == ([linear_bytes, 2 * linear_bytes] if split else [0, 0])
    assert 4 * rows * (4 * hidden + 3 * inner) < middle[0].activation_bytes < 4 * rows * 40 * hidden
    assert 1.9 < middle[1].activation_bytes / middle[0].activation_bytes < 2.1

    for key, stage in stages.items():
        assert all(one.grad is None for one in stage.model.parameters())
        assert all(torch.equal(one, old) for one, old in zip(stage.model.parameters(), before[key], strict=True))


def test_ranks_measure_one_after_the_other_where_none_is_to_contend(monkeypatch: pytest.MonkeyPatch) -> None:
    events = []
    monkeypatch.setattr(dist, "barrier", lambda: events.append("barrier"))

    def clock() -> float:
        events.append("computing")
        return float(len(events))

    stages = {(0, 2): stages_of(TransformersStage, split=False)[0, 2]}
    measure(1, [("actor.0", (1, 1, 1))], stages, [[batch_of(2, 8)]], [], repeats=1, clock=clock)
    assert set(events) == {"computing"}
    events.clear()
    pipelines = [("actor.0", (1, 1, 1)), ("critic.0", (2, 2, 2))]
    measure(1, pipelines, stages, [[batch_of(2, 8)], []], [], repeats=1, clock=clock, in_turn=True)
    assert [key for key, _ in groupby(events)] == ["barrier", "computing", "barrier"]
    assert events.count("barrier") == 3, "rank 0's turn comes before this one's, rank 2's after it"


def test_a_measurement_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="measure at least once"):
        measure(0, [], {}, [], [], repeats=0)
