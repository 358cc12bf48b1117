"""`fuse bench iteration`: whole PPO or GRPO iterations on your model, prompts and devices, with and without fusion.

Variants iterate in turn: off (stage by stage, one model after the other), inter (scoring while others are generated),
intra (actor and critic trained at once; of PPO), both, and with --peer trl TRL's trainer. Lengths of responses are
forced, or natural; every variant generates and trains on the same tokens, which is checked.

  fuse bench iteration --model smollm2 --batch 32 --max-new-tokens 128 --peer trl
  fuse bench iteration --algorithm grpo --peer trl
  fuse bench iteration --model PATH --prompts prompts.jsonl --prompt-column question --peer trl --json out.json
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from fuse.benchmarks import smollm2
from fuse.benchmarks.instances import read_json
from fuse.benchmarks.iteration.rows import FUSION, NATURAL, SERIAL, SMOKE_NOTE, TRL, bound, markdown, row_of, tables
from fuse.benchmarks.measure import describe_machine
from fuse.benchmarks.options import add_engine_option, add_json_option, add_selection, plain_options
from fuse.commands.options import add_numbers, check_counts
from fuse.commands.output import write_json

_OPTIONS = (
    "algorithm", "num_generations", "model", "prompts", "prompt_column", "lengths", "devices", "engine", "batch",
    "mini_batches", "micro_batch",
    "epochs", "max_new_tokens", "warmup", "repeats", "variants", "peer", "one_at_a_time", "smoke",
)  # fmt: skip
_SMOKE = {
    "batch": 8, "micro_batch": 2, "max_new_tokens": 16, "warmup": 1, "repeats": 1, "variants": [SERIAL, "both"],
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fuse bench iteration`."""
    parser.add_argument(
        "--algorithm", choices=("ppo", "grpo"), default="ppo",
        help="grpo: with a KL penalty of 0.04, and a reward that takes no time (default: ppo)",
    )  # fmt: skip
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
    add_engine_option(parser, "what generates, TRL's trainer apart")
    add_numbers(
        parser,
        num_generations=(8, "responses to a prompt, of grpo"),
        devices=(2, "GPUs, or cores without one"),
        batch=(64, "samples per iteration"),
        micro_batch=(8, "samples trained at once"),
        mini_batches=(1, "optimizer steps per epoch"),
        epochs=(1, "epochs per iteration"),
        max_new_tokens=(256, "of the longest response"),
        repeats=(5, "timed iterations of each"),
        warmup=(2, "iterations of each before these, in which stages are measured and schedules solved"),
    )
    text = f"of {', '.join(FUSION)} (default: all; {SERIAL} is always among them)"
    add_selection(parser, "--variants", list(FUSION), text)
    parser.add_argument("--peer", choices=(TRL,), help="compare with TRL's trainer (trl 1.12.0), in one process")
    parser.add_argument(
        "--one-at-a-time", action="store_true",
        help="end each variant before the next starts; as always on GPUs, and where memory does not hold them all",
    )  # fmt: skip
    parser.add_argument("--traces", type=Path, metavar="DIR", help="keep traces and plans of each variant in DIR")
    parser.add_argument(
        "--smoke",
        action="store_true",
        help=f"a tiny model, {SERIAL} and both, once, in a minute: shows that it runs; it proves nothing about speed",
    )
    add_json_option(parser)
    parser.add_argument("--markdown", action="store_true", help="print the table of a README")
    parser.add_argument(
        "--from-json", type=Path, metavar="FILE", help="measure nothing: print the results of an earlier run"
    )


def run(arguments: argparse.Namespace) -> int:
    """Measure, print the tables, and write them to `arguments.json`."""
    if arguments.from_json is not None:
        fields = ("machine", "date", "options", "rows")
        _print(read_json(arguments.from_json, fields, "results of this benchmark"), arguments)
        return 0
    if arguments.smoke:
        for name, value in _SMOKE.items():
            setattr(arguments, name, value)
    _check(arguments)
    if arguments.algorithm == "grpo":  # nothing is trained at once with the policy
        arguments.variants = [name for name in arguments.variants if name in (SERIAL, "both")]
    if arguments.lengths is None and smollm2.is_meant_by(arguments.model):
        arguments.lengths = NATURAL
    from fuse.benchmarks.iteration import rounds  # seconds, which tables of earlier runs do without

    turns = rounds.measure(arguments)
    results = {
        "machine": describe_machine(),
        "date": datetime.now(UTC).date().isoformat(),
        "options": plain_options(arguments, _OPTIONS),
        "rows": [row_of(name, turns) for name in turns],
    }
    if arguments.json:
        write_json(arguments.json, results)
    _print(results, arguments)
    return 0


def _print(results: Mapping[str, Any], arguments: argparse.Namespace) -> None:
    if arguments.markdown:
        print(markdown(results))
        return
    for table in tables(results["rows"]):
        Console().print(table)
    Console().print(bound(results["rows"]), highlight=False)
    if results["options"].get("smoke"):
        Console().print(SMOKE_NOTE, highlight=False)


def _check(arguments: argparse.Namespace) -> None:
    """Refuse what cannot be measured, before anything heavy is loaded."""
    check_counts(arguments, "batch", "mini_batches", "micro_batch", "epochs", "max_new_tokens", "repeats", "warmup")
    if arguments.devices < 2:
        raise ValueError(f"--devices is {arguments.devices}: there is nothing to fuse on fewer than 2")
    if arguments.batch % (arguments.mini_batches * arguments.micro_batch):
        raise ValueError(
            f"--batch is {arguments.batch}, which {arguments.mini_batches} mini-batches of micro-batches of "
            f"{arguments.micro_batch} do not make: choose them so that their product divides it"
        )
    if arguments.algorithm == "grpo" and (arguments.num_generations < 2 or arguments.batch % arguments.num_generations):
        raise ValueError(
            f"--num-generations is {arguments.num_generations}: give at least 2, so that they divide --batch "
            f"{arguments.batch}"
        )
    if arguments.prompts is not None and arguments.model is None:
        raise ValueError("--prompts needs the tokenizer of a model: add --model PATH")
    if arguments.prompt_column is not None and arguments.prompts is None:
        raise ValueError("--prompt-column names a column of --prompts: add --prompts FILE.jsonl")
    if arguments.pad_token is not None and arguments.model is None:
        raise ValueError("--pad-token names a token of a model's tokenizer: add --model PATH")
    if arguments.traces is not None and arguments.traces.exists() and not arguments.traces.is_dir():
        raise ValueError(f"--traces is {arguments.traces}, which is a file: name a directory")
