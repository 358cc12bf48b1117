"""Measures what a model's embedding, a layer and its head cost, before its layers are shared out among stages."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from fuse.algorithms.batch import Experience, Segments, Targets, counted_tokens, made_up_targets
from fuse.intrastage.cost_profile import Profile
from fuse.intrastage.measure import measure
from fuse.intrastage.stage import Stage
from fuse.training.model_spec import ModelSpec
from fuse.training.rank import TrainingSettings

_NUM_STAGES = 3
_REPEATS = 1
_MOST_TOKENS = 512
"""On more than so many, a layer and a head cost what they cost on these in proportion; one sequence is the least."""


@dataclass(frozen=True, slots=True)
class TypicalBatch:
    """A micro-batch to measure on. response_tokens: of its longest response; the others end evenly spread before that.

    Layers compute on padding too, but heads do not: with responses of one length they would seem dearer than they are.
    """

    num_sequences: int
    prompt_tokens: int
    response_tokens: int

    def at_most(self, num_tokens: int) -> TypicalBatch:
        """As many of the sequences as have so many tokens together, and at least one."""
        fitting = num_tokens // (self.prompt_tokens + self.response_tokens)
        return replace(self, num_sequences=min(self.num_sequences, max(1, fitting)))


def measure_layer_costs(
    rank: int,
    device: torch.device,
    tensor_group: dist.ProcessGroup | None,
    specs: Mapping[str, ModelSpec],
    settings: TrainingSettings,
    batch: TypicalBatch,
    tick_s: float,
) -> Profile:
    """Stages 0, 1 and 2 of a pipeline per role, of one layer each; the first embeds, the last has the head.

    All devices call this at once. They are timed by what the process computes, on CPUs, whose cores may be generating
    meanwhile. Weights are made up, and memory is not measured.

    rank: of the schedules. tensor_group: the devices that share this one's stages; None for itself alone.
    """
    batch = batch.at_most(_MOST_TOKENS)
    vocabulary_size = min(spec.config.get_text_config().vocab_size for spec in specs.values())
    experience = _experience(batch, vocabulary_size, settings.targets)
    made = settings.layout.micro_batches(experience, range(batch.num_sequences), 1.0)
    stages: dict[tuple[int, int], Stage] = {}
    for pipeline, (role, spec) in enumerate(specs.items()):
        for stage in range(_NUM_STAGES):
            built = settings.build_stage(
                role,
                spec,
                stage=stage,
                num_stages=_NUM_STAGES,
                layer_range=(0, 1),
                device=device,
                tensor_group=tensor_group,
            )
            for _, parameter in built.named_parameters():
                torch.nn.init.constant_(parameter, 0.02)
            stages[pipeline, stage] = built
    return measure(
        rank,
        [(role, (rank,) * _NUM_STAGES) for role in specs],
        stages,
        [[made[role].to(device)] for role in specs],
        (),  # everything is on one rank
        repeats=_REPEATS,
        tick_s=tick_s,
        times_only=True,
        clock=time.process_time if device.type == "cpu" else time.perf_counter,
    )


def _experience(batch: TypicalBatch, vocabulary_size: int, targets: Mapping[str, type[Targets]]) -> Experience:
    tokens = tuple(token % vocabulary_size for token in range(batch.prompt_tokens + batch.response_tokens))
    count = batch.num_sequences
    lengths = tuple(math.ceil(batch.response_tokens * (index + 1) / count) for index in range(count))
    segments = Segments.from_lengths(lengths, batch.response_tokens)
    responses = tuple(tokens[batch.prompt_tokens :][:length] for length in lengths)
    return Experience(
        prompts=(tokens[: batch.prompt_tokens],) * count,
        responses=responses,
        lengths=lengths,
        width=batch.response_tokens,
        segments=segments,
        targets={
            role: made_up_targets(kind, counted_tokens(responses, lengths), segments) for role, kind in targets.items()
        },
    )
