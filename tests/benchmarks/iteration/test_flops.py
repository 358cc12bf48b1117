"""Floating-point operations of training, against those that torch counts."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fuse.benchmarks.iteration.flops import ForwardFlops, TrainingFlops
from fuse.benchmarks.iteration.turn import Response
from fuse.benchmarks.iteration.workload import SMOKE_SIZE, Workload, embedded_models

RESPONSES = (Response((1, 2, 3), (4, 5)), Response((1,), (2, 3, 4, 5)))


def test_a_forward_pass_of_one_token_costs_what_torch_counts() -> None:
    model = embedded_models(SMOKE_SIZE, 4).policy
    model.set_attn_implementation("eager")  # plain products, which torch counts on CPUs
    with FlopCounterMode(display=False) as counter:
        model(torch.tensor([[1]]))
    one = ForwardFlops.of(model)
    assert one.token + one.pair + one.output == counter.get_total_flops()


def test_a_longer_response_costs_its_tokens_and_pairs() -> None:
    one = ForwardFlops(token=100, pair=10, output=1)
    assert one(RESPONSES) == 2 * (5 * 100 + 15 * 10) + (2 + 4)


@pytest.mark.parametrize(("algorithm", "models"), [("ppo", ("policy", "critic")), ("grpo", ("policy",))])
def test_training_is_three_forward_passes_of_what_is_trained(algorithm: str, models: tuple[str, ...]) -> None:
    made = embedded_models(SMOKE_SIZE, 4)
    workload = Workload(
        models=made, prompts=((1,),), lengths=None, batch=2, mini_batches=1, micro_batch=1, epochs=4,
        max_new_tokens=4, algorithm=algorithm,  # type: ignore[arg-type]
    )  # fmt: skip
    once = sum(ForwardFlops.of(getattr(made, name))(RESPONSES) for name in models)
    assert TrainingFlops(workload)(RESPONSES) == 3 * 4 * once
