"""`fuse bench iteration`: whole PPO iterations on your model, prompts and devices, with and without fusion.

Variants iterate in turn: off (stage by stage, one model after the other), inter (scoring while others are generated),
intra (actor and critic trained at once), both, and with --peer trl TRL's PPOTrainer. Lengths of responses are forced,
or natural; every variant generates and trains on the same tokens, which is checked.

  fuse bench iteration --model smollm2 --batch 32 --max-new-tokens 128 --peer trl
  fuse bench iteration --model PATH --prompts prompts.jsonl --prompt-column question --peer trl --json out.json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, ExitStack
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from rich.console import Console

from fuse.benchmarks import smollm2
from fuse.benchmarks.iteration_rows import SERIAL, TRL, bound, check_same_tokens, markdown, row_of, tables
from fuse.benchmarks.measure import describe_machine
from fuse.commands.output import output_file, write_json

if TYPE_CHECKING:  # takes seconds to import, and tables of earlier runs do without
    from fuse.benchmarks.iteration_turns import Turn, Variant
    from fuse.benchmarks.iteration_workload import Workload

FUSION: Mapping[str, Mapping[str, bool]] = MappingProxyType(
    {
        SERIAL: {"inter_stage_fusion": False, "intra_stage_fusion": False},
        "inter": {"inter_stage_fusion": True, "intra_stage_fusion": False},
        "intra": {"inter_stage_fusion": False, "intra_stage_fusion": True},
        "both": {"inter_stage_fusion": True, "intra_stage_fusion": True},
    }
)
NATURAL, SYNTHETIC = "natural", "synthetic"
_OPTIONS = (
    "model", "prompts", "prompt_column", "lengths", "devices", "engine", "batch", "mini_batches", "micro_batch",
    "epochs", "max_new_tokens", "warmup", "repeats", "variants", "peer", "one_at_a_time", "smoke",
)  # fmt: skip
_SMOKE = {
    "batch": 8, "micro_batch": 2, "max_new_tokens": 16, "warmup": 1, "repeats": 1, "variants": [SERIAL, "both"],
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fuse bench iteration`."""
    parser.add_argument(
        "--model", metavar="PATH",
        help="the policy (default: a random Llama of 4 layers x 256); smollm2, where there is no directory of this "
        "name: SmolLM2-135M-Instruct, asked word problems unless --prompts says otherwise (make setup-smollm2)",
    )  # fmt: skip
    parser.add_argument("--pad-token", metavar="TOKEN", help="padding token, where the tokenizer names none")
    parser.add_argument("--prompts", type=Path, metavar="FILE.jsonl", help="prompts (default: 32 random tokens each)")
    parser.add_argument("--prompt-column", metavar="NAME", help="their column: strings or lists of chat messages")
    parser.add_argument(
        "--lengths", metavar="FILE.csv",
        help="response lengths: column output_tokens, scaled so that the longest has --max-new-tokens; synthetic: a "
        f"long-tailed mix; {NATURAL}: up to the end-of-sequence token or --max-new-tokens (default: synthetic; with "
        f"--model smollm2 {NATURAL})",
    )  # fmt: skip
    parser.add_argument("--devices", type=int, default=2, metavar="N", help="GPUs, or cores without one (default: 2)")
    parser.add_argument(
        "--engine", choices=("transformers", "vllm"), default="transformers", help="what generates, TRL's trainer apart"
    )
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="prompts per iteration (default: 64)")
    parser.add_argument("--micro-batch", type=int, default=8, metavar="N", help="samples trained at once (default: 8)")
    parser.add_argument(
        "--mini-batches", type=int, default=1, metavar="N", help="optimizer steps per epoch (default: 1)"
    )
    parser.add_argument("--epochs", type=int, default=1, metavar="N", help="PPO epochs per iteration (default: 1)")
    parser.add_argument(
        "--max-new-tokens", type=int, default=256, metavar="N", help="of the longest response (default: 256)"
    )
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="timed iterations of each (default: 5)")
    parser.add_argument(
        "--warmup", type=int, default=2, metavar="N",
        help="iterations of each before these, in which stages are measured and schedules solved (default: 2)",
    )  # fmt: skip
    parser.add_argument(
        "--variants", nargs="+", choices=FUSION, default=list(FUSION), metavar="VARIANT",
        help=f"of {', '.join(FUSION)} (default: all; {SERIAL} is always among them)",
    )  # fmt: skip
    parser.add_argument("--peer", choices=(TRL,), help="compare with TRL's PPOTrainer (trl 1.12.0), in one process")
    parser.add_argument(
        "--one-at-a-time", action="store_true",
        help="end each variant before the next starts; as always on GPUs, and where memory does not hold them all",
    )  # fmt: skip
    parser.add_argument("--traces", type=Path, metavar="DIR", help="keep traces and plans of each variant in DIR")
    parser.add_argument("--smoke", action="store_true", help=f"a tiny model, {SERIAL} and both, once, in a minute")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write machine, options and rows to FILE")
    parser.add_argument("--markdown", action="store_true", help="print the table of a README")
    parser.add_argument(
        "--from-json", type=Path, metavar="FILE", help="measure nothing: print the results of an earlier run"
    )


def run(arguments: argparse.Namespace) -> int:
    """Measure, print the tables, and write them to `arguments.json`."""
    if arguments.from_json is not None:
        _print(_read(arguments.from_json), arguments)
        return 0
    if arguments.smoke:
        for name, value in _SMOKE.items():
            setattr(arguments, name, value)
    _check(arguments)
    if arguments.lengths is None and smollm2.is_meant_by(arguments.model):
        arguments.lengths = NATURAL
    turns = _measure(arguments)
    options = {name: getattr(arguments, name) for name in _OPTIONS}
    results = {
        "machine": describe_machine(),
        "date": datetime.now(UTC).date().isoformat(),
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in options.items()},
        "rows": [row_of(name, turns) for name in turns],
    }
    if arguments.json:
        write_json(arguments.json, results)
    _print(results, arguments)
    return 0


def _print(results: Mapping[str, Any], arguments: argparse.Namespace) -> None:
    if arguments.markdown:
        print(markdown(results))
    else:
        for table in tables(results["rows"]):
            Console().print(table)
        Console().print(bound(results["rows"]), highlight=False)


def _read(path: Path) -> Mapping[str, Any]:
    try:
        results = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}): name a file that --json wrote") from error
    if not isinstance(results, dict) or not {"machine", "date", "options", "rows"} <= results.keys():
        raise ValueError(f"{path} holds no results of this benchmark: name a file that --json wrote")
    return results


def _check(arguments: argparse.Namespace) -> None:
    """Refuse what cannot be measured, before anything heavy is loaded."""
    for name in ("batch", "mini_batches", "micro_batch", "epochs", "max_new_tokens", "repeats", "warmup"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}: it must be at least 1")
    if arguments.devices < 2:
        raise ValueError(f"--devices is {arguments.devices}: there is nothing to fuse on fewer than 2")
    if arguments.batch % (arguments.mini_batches * arguments.micro_batch):
        raise ValueError(
            f"--batch is {arguments.batch}, which {arguments.mini_batches} mini-batches of micro-batches of "
            f"{arguments.micro_batch} do not make: choose them so that their product divides it"
        )
    if arguments.prompts is not None and arguments.model is None:
        raise ValueError("--prompts needs the tokenizer of a model: add --model PATH")
    if arguments.prompt_column is not None and arguments.prompts is None:
        raise ValueError("--prompt-column names a column of --prompts: add --prompts FILE.jsonl")
    if arguments.pad_token is not None and arguments.model is None:
        raise ValueError("--pad-token names a token of a model's tokenizer: add --model PATH")
    if arguments.traces is not None and arguments.traces.exists() and not arguments.traces.is_dir():
        raise ValueError(f"--traces is {arguments.traces}, which is a file: name a directory")


def _measure(arguments: argparse.Namespace) -> dict[str, list[Turn]]:
    """By variant, one turn per repeat."""
    import torch

    from fuse.workers.ray_session import local_cluster

    on_gpus = torch.cuda.is_available()
    _check_machine(arguments, torch.cuda.device_count() if on_gpus else len(os.sched_getaffinity(0)), on_gpus)
    workload = _workload(arguments)
    with ExitStack() as stack:
        variants = _variants(arguments, workload, _directory(arguments, stack))
        together = not on_gpus and not arguments.one_at_a_time and _fit(variants, workload, arguments.devices)
        groups = [list(variants)] if together else [[name] for name in variants]
        rounds = _Rounds(workload, arguments.warmup)
        for names in groups:
            with ExitStack() as living:
                # Side by side they take turns on the same cores, which the cluster counts once for each.
                living.enter_context(local_cluster(arguments.devices * len(names)))
                started = {}
                for name in names:
                    print(f"{name}: starting ...", file=sys.stderr, flush=True)
                    started[name] = living.enter_context(variants[name])
                for round_index in range(workload.num_rounds):
                    for name, variant in started.items():
                        rounds.take(name, variant, round_index)
    return rounds.turns


def _fit(names: Collection[str], workload: Workload, num_devices: int) -> bool:
    """Whether memory holds all these variants at once; says so where it does not."""
    from fuse.benchmarks.iteration_memory import available_bytes, fuse_bytes, trl_bytes

    own = [fuse_bytes(workload, num_devices) for name in names if name != TRL]
    needed, available = sum(own) + (trl_bytes(workload) if TRL in names else 0), available_bytes()
    if needed > available:
        print(
            f"side by side the variants take about {needed / 1e9:.0f} GB, and {available / 1e9:.0f} GB are available: "
            "one at a time",
            file=sys.stderr,
        )
    return needed <= available


class _Rounds:
    """Takes turns, and holds them against each other. turns: by variant, those after the warm-up."""

    def __init__(self, workload: Workload, num_warmup: int) -> None:
        self._workload, self._num_warmup = workload, num_warmup
        self._same: dict[int, Any] = {}
        self.turns: dict[str, list[Turn]] = {}

    def take(self, name: str, variant: Variant, round_index: int) -> None:
        """One iteration of a variant.

        Raises:
            AssertionError: it generated other tokens than the first variant did in this round.
        """
        turn = variant.turn(self._same.get(round_index))
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
        print(f"{label} {name}: {sum(lengths)} tokens in {turn.seconds:.2f} s ({phases})", file=sys.stderr, flush=True)


def _check_machine(arguments: argparse.Namespace, num_present: int, on_gpus: bool) -> None:
    if arguments.devices > num_present:
        raise ValueError(
            f"--devices is {arguments.devices}, but this machine has {num_present} {'GPUs' if on_gpus else 'cores'}: "
            "lower it"
        )
    if arguments.peer == TRL:
        from fuse.benchmarks.iteration_trl import require_trl

        require_trl()
        if on_gpus:
            raise ValueError("--peer trl runs TRL's trainer in one process, on one of several GPUs: leave it out")


def _workload(arguments: argparse.Namespace) -> Workload:
    from fuse.benchmarks import iteration_workload as made

    size = made.SMOKE_SIZE if arguments.smoke else made.DEFAULT_SIZE
    batch, longest = arguments.batch, arguments.max_new_tokens
    num_prompts = (arguments.warmup + arguments.repeats) * batch
    lengths = None
    if arguments.lengths != NATURAL:
        path = None if arguments.lengths in (None, SYNTHETIC) else Path(arguments.lengths)
        lengths = made.forced_lengths(path, num_prompts, batch, longest)
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
    return made.Workload(
        models=models,
        prompts=prompts,
        lengths=lengths,
        batch=batch,
        mini_batches=arguments.mini_batches,
        micro_batch=arguments.micro_batch,
        epochs=arguments.epochs,
        max_new_tokens=longest,
    )


def _variants(
    arguments: argparse.Namespace, workload: Workload, directory: Path
) -> dict[str, AbstractContextManager[Variant]]:
    """Entered, each starts its trainer. The first one generates the tokens that TRL's is given."""
    from fuse.benchmarks.iteration_fuse import fuse_variant

    variants: dict[str, AbstractContextManager[Variant]] = {
        name: fuse_variant(
            workload, fusion, num_devices=arguments.devices, engine=arguments.engine, output_dir=directory / name
        )
        for name, fusion in FUSION.items()
        if name in {SERIAL, *arguments.variants}
    }
    if arguments.peer == TRL:
        from fuse.benchmarks.iteration_trl import trl_variant

        variants[TRL] = trl_variant(workload, num_threads=arguments.devices)
    return variants


def _directory(arguments: argparse.Namespace, stack: ExitStack) -> Path:
    """Where traces and plans go."""
    if arguments.traces is not None:
        directory: Path = arguments.traces
        return directory
    return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fuse-bench-")))
