"""I and W do what B does: the same gradients, the same work, and each half only its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from fuse.intrastage.live_memory import LiveMemory
from fuse.micro_batch import Metrics, MicroBatch

from .chains import BATCHES, EVERY, KINDS, ONE, chain_of, forward, micro_batch_of, model_of, run

RANGES = ((0, 1), (1, 2), (2, 4))  # one layer in the middle, whose work can be told
OPTIONS: dict[str, Mapping[str, Any]] = {
    "plain": {},
    "recomputed": {"gradient_checkpointing": True},
    "bfloat16": {"autocast": torch.bfloat16},
    "recomputed bfloat16": {"autocast": torch.bfloat16, "gradient_checkpointing": True},
}


def stages_of(name: str, *, split: bool, layer_ranges: Any = RANGES, kind: str = "transformers", **options: Any) -> Any:
    return chain_of(kind, model_of(name), layer_ranges, split_backward=split, **options)


def gradients_of(stages: list[Any]) -> dict[str, Tensor]:
    """By stage and global name; the stages have none any more."""
    found = {}
    for stage in stages:
        for name, parameter in stage.named_parameters():
            assert parameter.grad is not None, name
            found[f"{stage.stage} {name}"] = parameter.grad
            parameter.grad = None
    return found


def whole(stages: list[Any]) -> dict[str, Tensor]:
    run(stages)
    return gradients_of(stages)


def halves(stages: list[Any]) -> dict[str, Tensor]:
    """All input gradients first, then all weight gradients, as late as a schedule may put them."""
    forward(stages)
    for index in range(len(BATCHES)):
        grad = None
        for stage in reversed(stages):
            grad = stage.backward_input(index, grad)
    for stage in stages:
        for index in range(len(BATCHES)):
            stage.backward_weight(index)
    return gradients_of(stages)


CASES = [
    *((*one, "plain") for one in EVERY),
    *(("transformers", name, options) for name in ("llama", "neox") for options in OPTIONS),
    *(("megatron", "qwen2", options) for options in OPTIONS),
]


@pytest.mark.parametrize(("kind", "name", "options"), sorted(set(CASES)))
def test_halves_give_the_gradients_of_a_whole_backward(kind: str, name: str, options: str) -> None:
    expected = whole(stages_of(name, split=False, kind=kind, **OPTIONS[options]))
    stages = stages_of(name, split=True, kind=kind, **OPTIONS[options])
    unsplit, split = whole(stages), halves(stages)
    assert min(gradient.abs().max() for gradient in expected.values()) > 0
    for parameter, gradient in expected.items():
        assert torch.equal(split[parameter], unsplit[parameter]), parameter
        torch.testing.assert_close(split[parameter], gradient, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", ["plain", "recomputed bfloat16"])
def test_a_tied_head_on_one_stage_gets_both_of_its_gradients(options: str, kind: str) -> None:
    expected = whole(stages_of("qwen2", split=False, layer_ranges=ONE, kind=kind, **OPTIONS[options]))
    split = halves(stages_of("qwen2", split=True, layer_ranges=ONE, kind=kind, **OPTIONS[options]))
    for parameter, gradient in expected.items():
        torch.testing.assert_close(split[parameter], gradient, rtol=1e-6, atol=1e-6)


def test_a_head_in_recomputed_chunks_can_be_split() -> None:
    def chunked(hidden: Tensor, head: nn.Module, micro_batch: MicroBatch) -> tuple[Tensor, Metrics]:
        chunks = [checkpoint(head, rows, use_reentrant=False) for rows in hidden.split(3)]
        return (torch.cat(chunks) * micro_batch.targets).square().mean(), {}

    expected = whole(stages_of("llama", split=False))
    split = halves(stages_of("llama", split=True, loss=chunked))
    for parameter, gradient in expected.items():
        torch.testing.assert_close(split[parameter], gradient, rtol=1e-5, atol=1e-6)


def flops(run: Callable[..., object], *arguments: object) -> int:
    with FlopCounterMode(display=False) as counter:
        run(*arguments)
    return counter.get_total_flops()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", ["plain", "recomputed"])
def test_halves_share_the_work_of_a_whole_backward(options: str, kind: str) -> None:
    """The middle stage: every linear layer costs I and W the same; recomputing is I's, once."""
    batch = micro_batch_of(7)
    micro_batch_input = torch.randn(2, 7, 32)

    def middle() -> Any:
        stage = stages_of("qwen3", split=True, kind=kind, **OPTIONS[options])[1]
        stage.forward(0, batch, micro_batch_input.clone())
        return stage

    grad = torch.randn(2, 7, 32)
    stage = middle()
    both = flops(stage.backward_input, 0, grad), flops(stage.backward_weight, 0)
    assert sum(both) == flops(middle().backward, 0, grad)
    linear = sum(2 * 14 * weight.numel() for _, weight in stage.named_parameters() if weight.ndim == 2)
    assert both[1] == linear
    assert both[0] == linear * (2 if options == "recomputed" else 1)


@pytest.mark.parametrize("kind", KINDS)
def test_w_holds_what_it_needs_and_nothing_else_until_it_has_run(kind: str) -> None:
    """Between the halves: inputs and output gradients of the linear layers. Afterwards: nothing."""
    stage = stages_of("llama", split=True, kind=kind)[1]
    for attempt in range(2):
        grad = torch.randn(2, 7, 32)
        with LiveMemory() as live:
            stage_input = torch.randn(2, 7, 32)
            stage.forward(0, micro_batch_of(7), stage_input)
            after_forward = live.bytes
            stage.backward_input(0, grad)
            del stage_input
            between = live.bytes
            stage.backward_weight(0)
            after = live.bytes
        if attempt == 0:
            continue  # its gradients stay: the parameters had none
        rows, hidden, inner, keys = 14, 32, 48, 16
        inputs = hidden + hidden + hidden + inner  # of q, k and v; of o; of gate and up; of down
        output_grads = hidden + 2 * keys + hidden + 2 * inner  # of q; k, v; o; gate, up; `grad` is down's
        assert between == 4 * rows * (inputs + output_grads)
        assert 0 < between < after_forward
        assert after == 0


@pytest.mark.parametrize("options", ["bfloat16", "recomputed bfloat16"])
def test_micro_batches_hold_no_copies_of_the_weights(options: str) -> None:
    """Weights cast for products are cast again in the backward: several micro-batches are under way at once."""
    stage = stages_of("llama", split=True, **OPTIONS[options])[1]
    weights = sum(2 * parameter.numel() for _, parameter in stage.named_parameters())
    with LiveMemory() as live:
        for index in range(3):
            stage.forward(index, micro_batch_of(1), torch.randn(2, 1, 32).bfloat16())
        assert 0 < live.bytes < weights


def test_a_stage_scores_and_refuses_halves_as_it_was_built() -> None:
    for kind in KINDS:
        assert not stages_of("llama", split=False, kind=kind)[1].can_split_backward
        assert stages_of("llama", split=True, kind=kind)[1].can_split_backward
    split = stages_of("llama", split=True)
    with torch.no_grad():
        hidden = torch.randn(1, 3, 32)
        linear = next(one for one in split[1].model.modules() if isinstance(one, nn.Linear))
        assert torch.equal(linear(hidden), torch.nn.functional.linear(hidden, linear.weight))
