"""megatron-core stages on worlds of two processes. A program of `programs.py`.

Each rank writes what it measured to DIRECTORY/{world}-{rank}.json, by name of the check. The tests assert on those.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers import PreTrainedModel

from fuse.intrastage.communication import CommunicationError
from fuse.intrastage.executor import execute
from fuse.intrastage.live_memory import LiveMemory
from fuse.intrastage.megatron_stage import MegatronStage
from fuse.intrastage.program import program_of
from fuse.intrastage.transformers_stage import TransformersStage
from fuse.micro_batch import Metrics, MicroBatch
from fuse.ops.logprob import token_logprobs
from fuse.trace import SpanRecorder
from schedules.baselines import serial

from ..tiny_models import ModelKind, build, classifier, language_model, spread
from .forked import CONTEXT, TIMEOUT_S, World, run_world
from .pipelines import ADAMW, LAYERS, Run, batches_of, full_model, full_weights, loss
from .world import drawn

SIZES: Mapping[str, Any] = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
SHARED: dict[str, ModelKind] = {
    "llama": language_model(**SIZES),
    "qwen2 tied": language_model("qwen2", **SIZES, tie_word_embeddings=True),
    "qwen3": language_model("qwen3", **SIZES),
    "llama classifier": classifier(**SIZES),
}
LEARNING_RATE = 1e-3


def difference(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    return max((tensor - expected[name]).abs().max().item() for name, tensor in got.items())


def check_pipelines(rank: int) -> dict[str, float]:
    """Actor and critic of megatron stages in opposite directions, against transformers stages on the same world.

    Three steps: one model after the other, then fused at random.
    """
    run = Run.of(rank, 2, [("qwen2 tied", [0, 1], 4), ("llama classifier", [1, 0], 3), ("qwen3", [0, 1], 2)])
    found: dict[str, float] = {}
    megatron, transformers = {}, run.build()
    for (number, stage), twin in transformers.items():
        model = full_model(run.models[number])
        megatron[number, stage] = MegatronStage(
            type(model), model.config, stage=stage, num_stages=2, loss=loss, layer_range=LAYERS[2][stage]
        )
        megatron[number, stage].load_state_dict(model.state_dict())
        assert megatron[number, stage].boundary(run.batches()[0][0]).shape == twin.boundary(run.batches()[0][0]).shape
    communicators = run.communicators()
    optimizers = [run.optimizers(megatron), run.optimizers(transformers)]
    for step in range(3):
        schedule = serial(run.problem) if step == 0 else drawn(run.problem, step)
        for stages in (megatron, transformers):
            execute(program_of(schedule), rank, stages, run.batches(), communicators, SpanRecorder())
        for key, stage in megatron.items():
            gradients = stage.to_hugging_face({name: one.grad for name, one in stage.named_parameters()})
            expected = {name: one.grad for name, one in transformers[key].named_parameters()}
            assert gradients.keys() == expected.keys()
            found["gradients"] = max(found.get("gradients", 0.0), difference(gradients, expected))
        for name in optimizers[0]:
            norms = [one[name].step(LEARNING_RATE) for one in optimizers]
            found["norms"] = max(found.get("norms", 0.0), abs(norms[0] - norms[1]) / norms[1])
    for key, stage in megatron.items():
        exported, expected = dict(stage.export_weights()), dict(transformers[key].export_weights())
        assert exported.keys() == expected.keys()
        start = full_weights(run.models[key[0]])
        found["weights"] = max(found.get("weights", 0.0), difference(exported, expected))
        moved = min((weight - start[name]).abs().max().item() for name, weight in exported.items())
        found["moved"] = min(found.get("moved", 1.0), moved)
    assert ADAMW.max_grad_norm > 0
    assert ADAMW.weight_decay > 0
    return found


def logprob_loss(hidden: Tensor, head: nn.Module, micro_batch: MicroBatch) -> tuple[Tensor, Metrics]:
    """Weighted log-probabilities, whose entropy is measured on the side."""
    targets = torch.arange(len(hidden)) * 7 % 64
    logprobs, entropy = token_logprobs(hidden, head, targets, 0.7)
    ENTROPIES.append(entropy.detach())
    return -(logprobs * micro_batch.targets.squeeze(-1)).mean(), {}


ENTROPIES: list[Tensor] = []
LOSSES: Mapping[str, tuple[Sequence[Callable[..., Any]], Sequence[Callable[..., Any]]]] = {
    "llama": ([loss], [logprob_loss]),
    "qwen2 tied": ([loss, logprob_loss], [loss, logprob_loss]),
    "qwen3": ([logprob_loss], [loss]),
    "llama classifier": ([loss], [loss]),
}
"""Of each model on one stage and on two: both where the head is tied, whose gradient has two parts."""


def check_tensor_parallel(rank: int) -> dict[str, float]:
    """Every matrix on two ranks, in one stage and in two, against a whole model: two AdamW steps."""
    found: dict[str, float] = {}
    for name, losses in LOSSES.items():
        for layer_ranges, of_layout in zip((((0, 3),), ((0, 1), (1, 3))), losses, strict=True):
            for one in of_layout:
                key = f"{name}, {len(layer_ranges)} stages, {one.__name__}"
                compared = compare(shared_model(name, 3), layer_ranges, one)
                found |= {f"{key}: {what}": value for what, value in compared.items()}
    return found


def check_bfloat16(rank: int) -> dict[str, float]:
    """Smallest cosine between gradients of whole float32 matrices and of shared bfloat16 ones.

    The latter by halved backwards that recompute the layers.
    """
    found = {}
    for name in ("qwen2 tied", "qwen3"):
        model = shared_model(name, 3)
        options = {"stage": 0, "num_stages": 1, "loss": loss}
        shared = MegatronStage(
            *SHARED[name],
            tensor_group=dist.group.WORLD,
            autocast=torch.bfloat16,
            gradient_checkpointing=True,
            split_backward=True,
            **options,
        )
        whole = TransformersStage(*SHARED[name], **options)
        for stage in (shared, whole):
            stage.load_state_dict(model.state_dict())
            stage.forward(0, batches_of(1)[0], None)
        shared.backward_input(0, None)
        shared.backward_weight(0)
        whole.backward(0, None)
        gradients = shared.to_hugging_face({key: one.grad for key, one in shared.named_parameters()})
        found[name] = min(
            nn.functional.cosine_similarity(gradients[key].flatten(), one.grad.flatten(), dim=0).item()
            for key, one in whole.named_parameters()
        )
    return found


@cache
def shared_model(name: str, seed: int) -> PreTrainedModel:
    """Everyone's: it stays as it is."""
    model: PreTrainedModel = spread(build(SHARED[name], seed=seed))
    return model


def compare(
    model: PreTrainedModel, layer_ranges: tuple[tuple[int, int], ...], one: Callable[..., Tensor]
) -> dict[str, float]:
    """Largest differences between a chain of stages shared by the world and a lone transformers stage."""
    options = {"loss": one, "num_stages": len(layer_ranges)}
    shared = [
        MegatronStage(
            type(model), model.config, stage=stage, layer_range=layers, tensor_group=dist.group.WORLD, **options
        )
        for stage, layers in enumerate(layer_ranges)
    ]
    halved = [
        MegatronStage(
            type(model),
            model.config,
            stage=stage,
            layer_range=layers,
            tensor_group=dist.group.WORLD,
            split_backward=True,
            **options,
        )
        for stage, layers in enumerate(layer_ranges)
    ]
    whole = TransformersStage(type(model), model.config, stage=0, num_stages=1, loss=one)
    for stage in (*shared, *halved, whole):
        stage.load_state_dict(model.state_dict())
    chains = [shared, [whole]]
    adamws = [torch.optim.AdamW([p for s in chain for _, p in s.named_parameters()], LEARNING_RATE) for chain in chains]
    found = {"losses": 0.0, "gradients": 0.0, "entropies": 0.0, "halves": compare_halves(shared, halved)}
    for step in range(2):
        losses = []
        ENTROPIES.clear()
        for chain in chains:
            for index, batch in enumerate(batches_of(2, seed=step)):
                hidden = None
                for stage in chain:
                    hidden = stage.forward(index, batch, hidden)
                losses.append(chain[-1]._in_flight._forwarded[index].output.detach())
                gradient = None
                for stage in reversed(chain):
                    gradient = stage.backward(index, gradient)
        found["losses"] = max(
            found["losses"], *((a - b).abs().item() for a, b in zip(losses[:2], losses[2:], strict=True))
        )
        for got, wanted in zip(ENTROPIES[:2], ENTROPIES[2:], strict=True):
            found["entropies"] = max(found["entropies"], (got - wanted).abs().max().item())
        tie_gradients(shared)
        expected = {name: parameter.grad for name, parameter in whole.named_parameters()}
        for stage in shared:
            gradients = stage.to_hugging_face({name: p.grad for name, p in stage.named_parameters()})
            found["gradients"] = max(found["gradients"], difference(gradients, expected))
        for adamw in adamws:
            adamw.step()
            adamw.zero_grad()
    exported: dict[str, Tensor] = {}
    for stage in shared:
        exported |= stage.export_weights()
        assert [(name, exported[name].shape) for name in stage.exported_shapes()] == [*stage.exported_shapes().items()]
        check_export_memory(stage)
    expected = dict(whole.named_parameters())
    assert exported.keys() == expected.keys()
    found["weights"] = difference(exported, expected)
    return found


def check_export_memory(stage: MegatronStage) -> None:
    """An export holds two whole matrices at most, of those that tensor-parallel ranks share."""
    largest = max(one.numel() * stage._group.size() * 4 for _, one in stage.named_parameters())
    with gathering_copies(), LiveMemory() as memory:
        for _, tensor in stage.export_weights():
            del tensor
    assert 0 < memory.peak_bytes <= 2 * largest, (memory.peak_bytes, largest)


@contextmanager
def gathering_copies() -> Iterator[None]:
    """Has gathers made of copies that no mode sees: gloo's threads may hold tensors after the call has returned."""
    gather = dist.all_gather_into_tensor

    def gather_copies(whole: Tensor, shard: Tensor, **options: Any) -> None:
        with _disable_current_modes():
            copy = torch.empty_like(whole)
            gather(copy, shard.clone(), **options)
            whole.copy_(copy)

    with patch.object(dist, "all_gather_into_tensor", gather_copies):
        yield


def compare_halves(shared: list[MegatronStage], halved: list[MegatronStage]) -> float:
    """Largest difference between gradients of whole and halved backwards; W, all of them last, says nothing."""
    counts = []
    for chain in (shared, halved):
        batches = batches_of(2, seed=9)
        for index, batch in enumerate(batches):
            hidden = None
            for stage in chain:
                hidden = stage.forward(index, batch, hidden)
        with counting_reductions() as count:
            for index in range(len(batches)):
                gradient = None
                for stage in reversed(chain):
                    gradient = (stage.backward if chain is shared else stage.backward_input)(index, gradient)
        counts.append(count())
    assert counts[0] == counts[1] > 0
    with counting_reductions() as count:
        for stage in halved:
            for index in range(len(batches)):
                stage.backward_weight(index)
    assert count() == 0
    worst = 0.0
    for pair in zip(shared, halved, strict=True):
        gradients = [{name: one.grad for name, one in stage.named_parameters()} for stage in pair]
        worst = max(worst, difference(*gradients))
        assert all(gradient.abs().max() > 0 for gradient in gradients[0].values())
        for stage in pair:
            stage.model.zero_grad()
    return worst


@contextmanager
def counting_reductions() -> Iterator[Callable[[], int]]:
    with patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reductions:
        yield lambda: int(reductions.call_count)


def tie_gradients(stages: list[MegatronStage]) -> None:
    """What the optimizer does for a model whose first and last stage hold a tied weight."""
    for name in stages[0].tied_names:
        copies = [dict(stage.named_parameters())[name] for stage in (stages[0], stages[-1])]
        total = copies[0].grad + copies[1].grad
        for copy in copies:
            copy.grad = total.clone()


IS_PAST_THE_BARRIER = CONTEXT.Event()


def check_lost_peer(rank: int) -> dict[str, str]:
    """Rank 1 dies after the forward of a stage it shares. Afterwards the world is useless."""
    found = {}
    stage = MegatronStage(*SHARED["llama"], stage=0, num_stages=1, loss=loss, tensor_group=dist.group.WORLD)
    stage.load_state_dict(shared_model("llama", 3).state_dict())
    stage.forward(0, batches_of(1)[0], None)
    dist.barrier()
    if rank == 1:
        IS_PAST_THE_BARRIER.wait(TIMEOUT_S)
        os._exit(3)
    IS_PAST_THE_BARRIER.set()
    for name in ("backward", "forward"):
        try:
            stage.backward(0, None) if name == "backward" else stage.forward(1, batches_of(1)[0], None)
        except CommunicationError as error:
            found[name] = str(error)
    return found


def main(directory: Path) -> None:
    for name in SHARED:
        shared_model(name, 3)  # once for all processes
    checks = (check_pipelines, check_tensor_parallel, check_bfloat16)
    lost = World.start("lost", 2, check_lost_peer, directory, num_survivors=1)
    run_world("two", 2, lambda rank: {check.__name__: check(rank) for check in checks}, directory)
    lost.end()
