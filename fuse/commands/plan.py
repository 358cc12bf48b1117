"""Say what a run would hold in memory on each device, and whether it fits, before there are devices or weights.

  fuse plan --model qwen2.5-7b --num-devices 8 --device-memory-gb 80

A model is a path of its configuration or weights, which are not read, a name on the Hugging Face Hub, or one of
qwen2.5-1.5b, -3b, -7b, -32b, -72b, llama3-8b, -70b. The other models have the policy's shape unless they are named;
`none` leaves one out. GB are 1e9 bytes. Micro-batches are planned as long as prompts and responses can be.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from transformers import PretrainedConfig

from fuse.commands.known_models import config_of, spec_of
from fuse.commands.lora import add_lora_arguments, lora_config
from fuse.commands.output import output_file, write_json
from fuse.commands.plan_adapters import adapted
from fuse.commands.plan_table import GB, show
from fuse.config.auxiliary import largest_text
from fuse.driver.memory import Ledger, ledger
from fuse.driver.memory_setup import SCORING_CHOICES, MemorySetup, Scoring, planned_models
from fuse.driver.size_cut import cut_by_size
from fuse.engines.limits import num_positions
from fuse.intrastage.cost_profile import Shape
from fuse.intrastage.opposite import can_have_opposites, has_opposites, with_opposites, without_opposites
from fuse.intrastage.placement import Replica, place, share_ranks
from fuse.roles import GENERATING, role_of, training

_MOST_SEQUENCES = 1 << 12
_MOST_TOKENS = 1 << 20
_COUNTS = (
    *("num_devices", "tensor_parallel_size", "prompt_length", "response_length", "micro_batch_size"),
    *("generation_tensor_parallel_size", "num_micro_batches", "actor_stages", "critic_stages", "engine_batch_size"),
    *("auxiliary_max_length", "auxiliary_micro_batch_tokens"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fuse plan`."""
    yes_or_no = argparse.BooleanOptionalAction
    parser.add_argument("--model", required=True, metavar="MODEL", help="policy: a path or a name")
    parser.add_argument(
        "--critic-model",
        metavar="MODEL",
        help="critic, or none (default: the policy's shape, and with --lora-r its base)",
    )
    parser.add_argument("--reward-model", metavar="MODEL", help="reward model, or none (default: the policy's shape)")
    parser.add_argument("--ref-model", metavar="MODEL", help="reference, or none (default: the policy's shape)")
    parser.add_argument("--num-devices", type=int, required=True, metavar="N", help="GPUs")
    parser.add_argument("--device-memory-gb", type=float, metavar="GB", help="of each (default: this machine's GPU)")
    parser.add_argument("--prompt-length", type=int, default=512, metavar="N", help="longest, in tokens (default: 512)")
    parser.add_argument("--response-length", type=int, default=512, metavar="N", help="longest (default: 512)")
    parser.add_argument("--micro-batch-size", type=int, default=1, metavar="N", help="sequences (default: 1)")
    parser.add_argument(
        "--num-micro-batches", type=int, metavar="N", help="of an optimizer step (default: 2 a device, 8 at least)"
    )
    parser.add_argument("--actor-stages", type=int, metavar="N", help="pipeline stages (default: one per device)")
    parser.add_argument("--critic-stages", type=int, metavar="N", help="pipeline stages (default: one per device)")
    parser.add_argument(
        "--engine-batch-size",
        type=int,
        default=64,
        metavar="N",
        help="samples that an engine decodes (default: 64)",
    )
    parser.add_argument("--engine", choices=["transformers", "vllm"], default="transformers", help="what generates")
    parser.add_argument(
        "--scoring",
        choices=["whole", "sharded", "auto"],
        default="auto",
        help="models that score: whole on every device, in shares, or, as runs have it, the first of these that fits "
        "(default: auto)",
    )
    parser.add_argument(
        "--sleep", action=yes_or_no, default=False, help="engines free weights and cache during training (default: no)"
    )
    parser.add_argument(
        "--offload", action=yes_or_no, default=False, help="what trains lies in host memory meanwhile (default: no)"
    )
    parser.add_argument(
        "--ema",
        action=yes_or_no,
        default=False,
        help="stages keep an average of the policy, by ema_decay (default: no)",
    )
    parser.add_argument(
        "--auxiliary-max-length",
        type=int,
        metavar="N",
        help="longest row of an auxiliary_dataset (default: no such rows)",
    )
    parser.add_argument(
        "--auxiliary-micro-batch-tokens",
        type=int,
        metavar="N",
        help="most of a micro-batch of such rows (default: those of --micro-batch-size samples, or of a row)",
    )
    parser.add_argument("--bf16", action=yes_or_no, default=True, help="compute in bfloat16 (default: yes)")
    parser.add_argument("--gradient-checkpointing", action=yes_or_no, default=False, help="recompute layers")
    parser.add_argument(
        "--tensor-parallel-size", type=int, default=1, metavar="N", help="devices that share a stage (default: 1)"
    )
    parser.add_argument(
        "--generation-tensor-parallel-size",
        type=int,
        default=1,
        metavar="N",
        help="devices that share an engine, which is then vLLM's (default: 1)",
    )
    parser.add_argument(
        "--bidirectional",
        action=yes_or_no,
        help="without a critic, two replicas of the policy in opposite pipelines (default: where they fit)",
    )
    add_lora_arguments(parser)
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the figures to FILE")


def run(arguments: argparse.Namespace) -> int:
    """Print the ledger of the fullest device, whether the run fits, and the largest that does."""
    choices, setups = SCORING_CHOICES[arguments.scoring], _setups(arguments)
    tried = (replace(one, scoring=scoring) for cut in _cuts(setups) for scoring in choices for one in cut)
    for setup in tried:  # there is at least one
        planned = ledger(setup)
        if planned.fits:
            break
    figures = _figures(planned, choices, num_positions(config_of(arguments.model)) or _MOST_TOKENS)
    show(Console(highlight=False), planned, figures)
    if arguments.json:
        write_json(arguments.json, figures)
    return 0


def _setups(arguments: argparse.Namespace) -> list[MemorySetup]:
    """What is asked for; where that is left open, first with opposite replicas and then without."""
    setup = _setup(arguments)
    if arguments.bidirectional is None and has_opposites(setup.placement):
        return [setup, replace(setup, placement=without_opposites(setup.placement), is_fused=False)]
    return [setup]


def _cuts(setups: list[MemorySetup]) -> Iterator[list[MemorySetup]]:
    """With even stages; then by size, where that takes less."""
    yield setups
    by_size = [replace(one, placement=cut_by_size(one)) for one in setups]
    yield [one for one, even in zip(by_size, setups, strict=True) if one != even]


def _setup(arguments: argparse.Namespace) -> MemorySetup:
    _check_counts(arguments)
    for name in ("tensor_parallel_size", "generation_tensor_parallel_size"):
        if arguments.num_devices % (value := getattr(arguments, name)):
            option = name.replace("_", "-")
            raise ValueError(f"--{option}={value} does not divide --num-devices={arguments.num_devices}: use a divisor")
    num_ranks = arguments.num_devices // arguments.tensor_parallel_size
    autocast = torch.bfloat16 if arguments.bf16 else None
    dtype = autocast or torch.float32
    actor = config_of(arguments.model)
    named = {"critic": arguments.critic_model, "reference": arguments.ref_model, "reward": arguments.reward_model}
    configs = {"actor": actor} | {
        role: config_of(name) if name else actor for role, name in named.items() if name != "none"
    }
    _check_vocabularies(configs)
    _check_engine(arguments, actor)
    stages = {"actor": arguments.actor_stages, "critic": arguments.critic_stages}
    placement = tuple(
        replica
        for index, role in enumerate(training(configs))
        for replica in place(role, num_ranks, stages[role] or num_ranks, reverse=index % 2 == 1)
    )
    num_micro_batches = arguments.num_micro_batches or max(8, 2 * num_ranks)
    if arguments.bidirectional is not False and _can_have_opposites(arguments, configs, placement, num_micro_batches):
        placement = with_opposites(placement)
    is_fused = share_ranks(placement)
    scores = {role: role_of(role).scores in ("values", "scores") for role in configs}
    specs = {role: spec_of(config, scores=scores[role], dtype=dtype) for role, config in configs.items()}
    if (lora := lora_config(arguments)) is not None:
        given = {role: name for role, name in named.items() if name not in (None, arguments.model)}
        specs |= adapted(specs, lora, of_other_models=given)
    models = planned_models(
        specs,
        autocast=autocast,
        gradient_checkpointing=arguments.gradient_checkpointing,
        split_backward=is_fused,
    )
    positions = num_positions(actor)
    if positions is not None and arguments.prompt_length + arguments.response_length > positions:
        raise ValueError(
            f"--prompt-length {arguments.prompt_length} and --response-length {arguments.response_length} are more "
            f"than the model's {positions} positions: lower one of them"
        )
    return MemorySetup(
        models=models,
        placement=placement,
        num_devices=arguments.num_devices,
        device_memory_bytes=_device_memory_bytes(arguments.device_memory_gb),
        accelerator="cuda",
        prompt_tokens=arguments.prompt_length,
        response_tokens=arguments.response_length,
        micro_batch_size=arguments.micro_batch_size,
        num_micro_batches=num_micro_batches,
        autocast=autocast,
        generation_dtype=dtype,
        engine_batch_size=arguments.engine_batch_size,
        inference_batch_size=64,
        inference_batch_tokens=16384,
        is_fused=is_fused,
        tensor_parallel_size=arguments.tensor_parallel_size,
        engine=arguments.engine,
        engine_devices=arguments.generation_tensor_parallel_size,
        engines_sleep=arguments.sleep,
        offloads_training=arguments.offload,
        averaged=frozenset({GENERATING} if arguments.ema else ()),
        text=_text(arguments),
    )


def _text(arguments: argparse.Namespace) -> Shape | None:
    """The largest micro-batch of text, where there is any."""
    length, tokens = arguments.auxiliary_max_length, arguments.auxiliary_micro_batch_tokens
    if length is None and tokens is None:
        return None
    return largest_text(
        max_length=length,
        most_tokens=tokens,
        micro_batch_size=arguments.micro_batch_size,
        longest_sample=arguments.prompt_length + arguments.response_length,
    )


def _can_have_opposites(
    arguments: argparse.Namespace, roles: Iterable[str], placement: Sequence[Replica], num_micro_batches: int
) -> bool:
    """Raises: ValueError when opposite replicas are asked for and cannot be."""
    is_possible = len(training(roles)) == 1 and can_have_opposites(placement, num_micro_batches)
    if arguments.bidirectional and not is_possible:
        raise ValueError(
            "--bidirectional needs --critic-model none, stages on at least 2 devices and a micro-batch for each "
            "replica: change that or leave it out"
        )
    return is_possible


def _check_counts(arguments: argparse.Namespace) -> None:
    for name in _COUNTS:
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}: it must be at least 1")


def _check_engine(arguments: argparse.Namespace, actor: PretrainedConfig) -> None:
    size, heads = arguments.generation_tensor_parallel_size, actor.get_text_config().num_attention_heads
    given = f"--generation-tensor-parallel-size={size}"
    if size > 1 and arguments.engine != "vllm":
        raise ValueError(f"{given} with --engine={arguments.engine}, whose matrices are whole: add --engine=vllm")
    if heads % size:
        raise ValueError(f"{given} does not divide the policy's {heads} attention heads: use a divisor")


def _check_vocabularies(configs: dict[str, PretrainedConfig]) -> None:
    sizes = {role: config.get_text_config().vocab_size for role, config in configs.items()}
    for role, size in sizes.items():
        if size < sizes["actor"]:
            raise ValueError(
                f"vocabulary mismatch: the policy has {sizes['actor']} tokens, the {role} {size}: use models of one "
                "tokenizer"
            )


def _device_memory_bytes(given_gb: float | None) -> int:
    if given_gb is not None:
        if not 0 < given_gb < 1e6:
            raise ValueError(f"--device-memory-gb is {given_gb:g}: give a device's memory, such as 80")
        return round(given_gb * GB)
    if not torch.cuda.is_available():
        raise ValueError("--device-memory-gb is missing, and there is no GPU here to ask: give a device's memory")
    return int(torch.cuda.get_device_properties(0).total_memory)


def _figures(planned: Ledger, choices: Sequence[Scoring], positions: int) -> dict[str, Any]:
    setup = planned.setup

    def fits(**changes: int) -> bool:
        changed: MemorySetup = replace(setup, **changes)  # type: ignore[arg-type]
        return any(ledger(replace(changed, scoring=one), plans_fusion=False).fits for one in choices)

    return {
        "fits": planned.fits,
        "spare_bytes": planned.spare_bytes,
        "peak_bytes": {str(phase): num_bytes for phase, num_bytes in planned.peak_bytes.items()},
        "serial_peak_bytes": planned.serial_bytes,
        "fused_peak_bytes": planned.fused_bytes,
        "max_response_length": _largest(
            lambda length: fits(response_tokens=length), max(1, positions - setup.prompt_tokens)
        ),
        "max_micro_batch_size": _largest(lambda size: fits(micro_batch_size=size), _MOST_SEQUENCES),
        "host_bytes": planned.host_bytes,
        "scoring": setup.scoring,
        "bidirectional": has_opposites(setup.placement),
        "layers": {replica.model: _layers(replica, setup) for replica in setup.placement},
        "parameters": {role: model.size.total for role, model in setup.models.items()},
        "fullest_device": planned.fullest_device,
        "devices": [
            [
                {"role": entry.role, "what": entry.what, "bytes": {str(key): one for key, one in entry.bytes.items()}}
                for entry in entries
            ]
            for entries in planned.devices
        ],
    }


def _layers(replica: Replica, setup: MemorySetup) -> list[int]:
    """Of every stage."""
    return [stop - start for start, stop in replica.ranges(len(setup.models[replica.model].size.layers))]


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` that fits; 0 when not even 1 does. What fits, fits when it is smaller."""
    least = 0
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if fits(middle) else (least, middle - 1)
    return least
