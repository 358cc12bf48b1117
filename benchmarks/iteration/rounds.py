"""The rounds of `fuse bench iteration`: every variant iterates once in each, and all on the same tokens."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fuse.benchmarks import smollm2
from fuse.benchmarks.iteration import memory
from fuse.benchmarks.iteration import workload as made
from fuse.benchmarks.iteration.flops import TrainingFlops
from fuse.benchmarks.iteration.rates import Scale
from fuse.benchmarks.iteration.rows import FUSION, NATURAL, SERIAL, SYNTHETIC, TRL
from fuse.benchmarks.iteration.trainer import fuse_config, fuse_variant
from fuse.benchmarks.iteration.trl import require_trl, trl_variant
from fuse.benchmarks.iteration.turn import Response, Turn, Variant
from fuse.benchmarks.iteration.workload import Workload
from fuse.benchmarks.measure import product_flops_per_s
from fuse.benchmarks.options import tell
from fuse.driver.early_start import IMPORTED
from fuse.threads import torch_threads
from fuse.workers.ray_session import local_cluster


@dataclass(frozen=True, slots=True)
class Measured:
    """turns: by variant, one per repeat. scale: what they are divided by. trainers: by variant of this project's
    trainer, its whole configuration as JSON has it."""

    turns: Mapping[str, Sequence[Turn]]
    scale: Scale
    trainers: Mapping[str, Mapping[str, Any]]


def measure(arguments: argparse.Namespace) -> Measured:
    """Take the turns of all variants."""
    on_gpus = torch.cuda.is_available()
    _check_machine(arguments, torch.cuda.device_count() if on_gpus else len(os.sched_getaffinity(0)), on_gpus)
    workload = make_workload(arguments, made.SMOKE_SIZE if arguments.smoke else made.DEFAULT_SIZE)
    with tempfile.TemporaryDirectory(prefix="fuse-bench-") as unnamed:
        directory = arguments.traces or Path(unnamed)
        configs = {
            name: fuse_config(
                workload, fusion, num_devices=arguments.devices, engine=arguments.engine, output_dir=directory / name
            )
            for name, fusion in FUSION.items()
            if name in {SERIAL, *arguments.variants}
        }
        variants = {name: fuse_variant(workload, config) for name, config in configs.items()}
        if arguments.peer == TRL:  # last: the first one generates the tokens that TRL's is given
            variants[TRL] = trl_variant(workload, num_threads=arguments.devices)
        together = not on_gpus and not arguments.one_at_a_time and fit(variants, workload, arguments.devices)
        groups = [list(variants)] if together else [[name] for name in variants]
        rounds = Rounds(workload, arguments.warmup)
        for names in groups:
            with ExitStack() as living:
                # Side by side they take turns on the same cores, which the cluster counts once for each.
                living.enter_context(local_cluster(arguments.devices * len(names), IMPORTED))
                started = {}
                for name in names:
                    tell(f"{name}: starting ...")
                    started[name] = living.enter_context(variants[name])
                for round_index in range(workload.num_rounds):
                    for name, variant in started.items():
                        rounds.take(name, variant, round_index)
    scale = Scale(
        num_devices=arguments.devices,
        epochs=workload.epochs,
        training_flops=TrainingFlops(workload),
        product_flops_per_s=_product_flops_per_s(),
    )
    trainers = {name: as_json(config) for name, config in configs.items()}
    return Measured(rounds.turns, scale, trainers)


def fit(names: Collection[str], workload: Workload, num_devices: int) -> bool:
    """Whether memory holds all these variants at once; says so where it does not."""
    own = [memory.fuse_bytes(workload, num_devices) for name in names if name != TRL]
    needed, available = sum(own) + (memory.trl_bytes(workload) if TRL in names else 0), memory.available_bytes()
    if needed > available:
        tell(
            f"side by side the variants take about {needed / 1e9:.0f} GB, and {available / 1e9:.0f} GB are available: "
            "one at a time"
        )
    return needed <= available


class Rounds:
    """Takes turns, and holds them against each other. turns: by variant, those after the warm-up."""

    def __init__(self, workload: Workload, num_warmup: int) -> None:
        self._workload, self._num_warmup = workload, num_warmup
        self._same: dict[int, tuple[Response, ...]] = {}
        self.turns: dict[str, list[Turn]] = {}

    def take(self, name: str, variant: Variant, round_index: int) -> None:
        """One iteration of a variant.

        Raises:
            AssertionError: it generated other tokens than the first variant did in this round.
        """
        turn = variant(self._same.get(round_index))
        expected = self._same.setdefault(round_index, turn.responses)
        lengths = tuple(len(response.response_ids) for response in turn.responses)
        forced = self._workload.round_lengths(round_index)
        assert forced in (None, lengths), f"{name} does not keep to the lengths"
        check_same_tokens(name, turn.responses, expected)
        own = self.turns.setdefault(name, [])
        if round_index >= self._num_warmup:
            own.append(turn)
        count = round_index + 1 - self._num_warmup
        label = f"[{count}/{self._workload.num_rounds - self._num_warmup}]" if count > 0 else "[warm-up]"
        phases = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in turn.phases.items())
        tell(f"{label} {name}: {sum(lengths)} tokens in {turn.seconds:.2f} s ({phases})")


def check_same_tokens(name: str, responses: Sequence[Response], expected: Sequence[Response]) -> None:
    """Raises: AssertionError where a variant generated anything else than the first one did."""
    for index, (got, wanted) in enumerate(zip(responses, expected, strict=True)):
        if got != wanted:
            same = [one == other for one, other in zip(got.response_ids, wanted.response_ids, strict=False)]
            position = same.index(False) if False in same else len(same)
            raise AssertionError(
                f"{name} generated other tokens than {SERIAL}: response {index} of a round, from position {position} "
                f"({len(got.response_ids)} tokens, {len(wanted.response_ids)} there)"
            )


def as_json(config: Any) -> dict[str, Any]:
    """All fields, as transformers writes them."""
    fields: dict[str, Any] = json.loads(config.to_json_string())
    return fields


def _product_flops_per_s() -> float:
    """Of one device, in the type that is trained in: a GPU, or a thread of its own core."""
    with torch_threads(1):
        return product_flops_per_s(torch.float32)


def _check_machine(arguments: argparse.Namespace, num_present: int, on_gpus: bool) -> None:
    if arguments.devices > num_present:
        raise ValueError(
            f"--devices is {arguments.devices}, but this machine has {num_present} {'GPUs' if on_gpus else 'cores'}: "
            "lower it"
        )
    if arguments.peer == TRL:
        require_trl()
        if on_gpus:
            raise ValueError("--peer trl runs TRL's trainer in one process, on one of several GPUs: leave it out")


def make_workload(arguments: argparse.Namespace, size: made.Size) -> Workload:
    """What the arguments ask for. size: where no model is given.

    Raises:
        ValueError: no such model, or lengths or prompts that do not fill the rounds.
    """
    batch, longest = arguments.batch, arguments.max_new_tokens
    num_samples = (arguments.warmup + arguments.repeats) * batch
    group = arguments.num_generations if arguments.algorithm == "grpo" else 1
    num_prompts = num_samples // group
    lengths = None
    if arguments.lengths != NATURAL:
        path = None if arguments.lengths in (None, SYNTHETIC) else Path(arguments.lengths)
        lengths = made.forced_lengths(path, num_samples, batch, longest)
    if arguments.model:
        models = made.load_models(smollm2.resolve(arguments.model), arguments.pad_token)
    else:
        models = made.embedded_models(size, longest)
    if arguments.prompts is not None:
        prompts = made.read_prompts(arguments.prompts, arguments.prompt_column, models, num_prompts, longest)
    elif smollm2.is_meant_by(arguments.model):
        prompts = made.word_problem_prompts(models, num_prompts, longest)
    else:
        prompts = made.random_prompts(models, num_prompts, size.prompt_tokens)
    as_given = ("algorithm", "batch", "mini_batches", "micro_batch", "epochs", "max_new_tokens", "bf16")
    return Workload(
        models=models,
        prompts=tuple(prompt for prompt in prompts for _ in range(group)),
        lengths=lengths,
        num_generations=group,
        **{name: getattr(arguments, name) for name in as_given},
    )
