"""`fuse bench iteration`: whole PPO or GRPO iterations on your model, prompts and devices, with and without fusion.

Variants iterate in turn: off (stage by stage, one model after the other), inter (scoring while others are generated),
intra (actor and critic trained at once; of PPO), both, and with --peer trl TRL's trainer. Lengths of responses are
forced, or natural; every variant generates and trains on the same tokens, which is checked.

  fuse bench iteration --model smollm2 --batch 32 --max-new-tokens 128 --peer trl
  fuse bench iteration --algorithm grpo --peer trl
  fuse bench iteration --sweep batch=32,64,128 --sweep epochs=1,4 --json sweep.json
  fuse bench iteration --compare earlier.json
  fuse bench iteration --emulate 8 --costs h100-33b --lengths lengths.csv
  fuse bench iteration --model PATH --prompts prompts.jsonl --prompt-column question --peer trl --json out.json
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from fuse.benchmarks import smollm2
from fuse.benchmarks.checkout import describe_checkout
from fuse.benchmarks.instances import read_json
from fuse.benchmarks.iteration.changes import MOST_LOST, changes, changes_table, check_same_work, other_machine
from fuse.benchmarks.iteration.emulate_options import SETTING, TIME_SCALE, add_emulation, check_emulation, costs_of
from fuse.benchmarks.iteration.emulated_rows import (
    emulated_markdown,
    emulated_row,
    emulated_sweep_table,
    emulated_table,
)
from fuse.benchmarks.iteration.rows import FUSION, NATURAL, SERIAL, SMOKE_NOTE, TRL, bound, markdown, row_of, tables
from fuse.benchmarks.iteration.sweep import SWEPT, draw, picture_files, points, swept
from fuse.benchmarks.measure import describe_machine
from fuse.benchmarks.options import add_engine_option, add_json_option, add_selection, plain_options, tell
from fuse.benchmarks.peer_process import end_if_started_again
from fuse.commands.options import add_numbers, check_counts, option_name
from fuse.commands.output import write_json

_OPTIONS = (
    "algorithm", "num_generations", "model", "prompts", "prompt_column", "lengths", "devices", "engine", "batch",
    "mini_batches", "micro_batch",
    "epochs", "max_new_tokens", "warmup", "repeats", "variants", "peer", "bf16", "one_at_a_time", "smoke",
    "emulate", "costs", "time_scale", "tail_training", "speculation", "acceptance", "draft_share",
)  # fmt: skip
_DEFAULTS: Mapping[str, Any] = {
    "devices": 2, "batch": 128, "micro_batch": 8, "mini_batches": None, "max_new_tokens": 256, "repeats": 3,
}  # fmt: skip
"""Of options that have others where devices are emulated."""
_REPORTED = (*_OPTIONS, "pad_token")
_FIELDS = ("machine", "date", "options", "rows")
_SMOKE = {
    "batch": 8, "micro_batch": 2, "mini_batches": 1, "max_new_tokens": 16, "warmup": 1, "repeats": 1,
    "variants": [SERIAL, "both"],
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
        devices=(_DEFAULTS["devices"], "GPUs, or cores without one"),
        batch=(_DEFAULTS["batch"], "samples per iteration"),
        micro_batch=(_DEFAULTS["micro_batch"], "samples trained at once"),
        epochs=(1, "epochs per iteration"),
        max_new_tokens=(_DEFAULTS["max_new_tokens"], "of the longest response"),
        repeats=(_DEFAULTS["repeats"], "timed iterations of each"),
        warmup=(2, "iterations of each before these, in which stages are measured and schedules solved"),
    )
    parser.add_argument(
        "--mini-batches", type=int, metavar="N", help="optimizer steps per epoch (default: one for each micro-batch)"
    )
    text = f"of {', '.join(FUSION)} (default: all; {SERIAL} is always among them)"
    add_selection(parser, "--variants", list(FUSION), text)
    parser.add_argument("--peer", choices=(TRL,), help="compare with TRL's trainer (trl 1.12.0), in one process")
    parser.add_argument("--bf16", action="store_true", help="compute in bf16 as runs with this option do")
    parser.add_argument(
        "--one-at-a-time", action="store_true",
        help="end each variant before the next starts; as always on GPUs, and where memory does not hold them all",
    )  # fmt: skip
    add_emulation(parser)
    parser.set_defaults(**dict.fromkeys(_DEFAULTS))  # to tell what was given
    parser.add_argument("--traces", type=Path, metavar="DIR", help="keep traces and plans of each variant in DIR")
    parser.add_argument(
        "--smoke",
        action="store_true",
        help=f"a tiny model, {SERIAL} and both, once, in a minute: shows that it runs; it proves nothing about speed",
    )
    add_json_option(parser)
    keys = ", ".join(option_name(name).removeprefix("--") for name in SWEPT)
    parser.add_argument(
        "--sweep", type=swept, nargs="+", action="extend", metavar="KEY=V1,V2",
        help=f"measure every combination of values, and draw them beside --json (sweep.png, sweep.html); of {keys}",
    )  # fmt: skip
    parser.add_argument(
        "--compare", type=Path, metavar="OLD.json",
        help="say what changed since an earlier run, beyond what repeats differ by, and exit with 1 where a figure has "
        f"lost more than {100 * MOST_LOST:.0f} %%",
    )  # fmt: skip
    parser.add_argument("--markdown", action="store_true", help="print the table of a README")
    parser.add_argument(
        "--from-json", type=Path, metavar="FILE", help="measure nothing: print the results of an earlier run"
    )


def run(arguments: argparse.Namespace) -> int:
    """Measure, print the tables, and write them to `arguments.json`. Returns 1 where `--compare` finds a loss."""
    end_if_started_again()
    old = None if arguments.compare is None else read_json(arguments.compare, _FIELDS, "results of this benchmark")
    if arguments.from_json is not None:
        results = read_json(arguments.from_json, _FIELDS, "results of this benchmark")
        _print(results, arguments)
        return _compare(old, results)
    if arguments.smoke:
        for name, value in _SMOKE.items():
            setattr(arguments, name, value)
    if arguments.sweep:
        return _sweep(arguments)
    settled = _settled(arguments)
    if old is not None:
        check_same_work(old["options"], plain_options(settled, _OPTIONS))
    with _devices(settled) as devices:
        results = _measure(settled, devices)
    if arguments.json:
        write_json(arguments.json, results)
    _print(results, arguments)
    return _compare(old, results)


def _settled(arguments: argparse.Namespace) -> argparse.Namespace:
    """The arguments that can be measured, with what follows from others.

    Raises:
        ValueError: they cannot.
    """
    arguments = _filled(arguments)
    check_emulation(arguments)
    _check(arguments)
    settled = argparse.Namespace(**vars(arguments))
    if settled.emulate is not None:
        settled.devices = settled.emulate
    if settled.algorithm == "grpo":  # nothing is trained at once with the policy
        settled.variants = [name for name in settled.variants if name in (SERIAL, "both")]
    if settled.lengths is None and smollm2.is_meant_by(settled.model):
        settled.lengths = NATURAL
    return settled


def _devices(arguments: argparse.Namespace) -> AbstractContextManager[Any]:
    """Those of all settings, where they are emulated."""
    if arguments.emulate is None:
        return nullcontext()
    from fuse.benchmarks.iteration import emulation  # seconds

    return emulation.devices()


def _measure(arguments: argparse.Namespace, devices: Any) -> dict[str, Any]:
    """The results of one setting, as JSON has them."""
    # seconds, which tables of earlier runs do without
    from fuse.benchmarks.iteration import emulation, rounds

    costs: dict[str, Any] = {}
    make_row = row_of
    if arguments.emulate is None:
        measured = rounds.measure(arguments)
    else:
        emulated = costs_of(arguments)
        measured, make_row, costs = (
            emulation.measure(arguments, emulated, devices),
            emulated_row,
            {"costs": asdict(emulated)},
        )
    return {
        "machine": describe_machine() | {"product_flops_per_s": measured.scale.product_flops_per_s},
        "date": datetime.now(UTC).date().isoformat(),
        **describe_checkout(),
        "options": plain_options(arguments, _OPTIONS),
        "configuration": {"command": plain_options(arguments, _REPORTED), "trainers": measured.trainers},
        **costs,
        "rows": [make_row(name, measured.turns, measured.scale) for name in measured.turns],
    }


def _filled(arguments: argparse.Namespace) -> argparse.Namespace:
    """The same with a default for whatever was not given."""
    defaults: dict[str, Any] = dict(_DEFAULTS)
    if arguments.emulate is not None:
        defaults |= {**SETTING, "devices": None, "time_scale": TIME_SCALE}
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    filled = argparse.Namespace(**(vars(arguments) | defaults | given))
    check_counts(filled, "batch", "micro_batch")
    if filled.mini_batches is None:
        filled.mini_batches = max(1, filled.batch // filled.micro_batch)
    return filled


def _sweep(arguments: argparse.Namespace) -> int:
    """Measure each point, and write what there is after each, so that nothing is lost when one fails."""
    if arguments.compare is not None or arguments.markdown or arguments.traces is not None:
        raise ValueError("--sweep has several results, which --compare, --markdown and --traces do not take")
    settings = [(values, _settled(point)) for values, point in points(arguments)]
    png, html = picture_files(arguments.json)
    results: dict[str, Any] = {"sweep": {one.name: one.values for one in arguments.sweep}, "points": []}
    with _devices(settings[0][1]) as devices:
        for index, (values, point) in enumerate(settings, 1):
            tell(f"point {index} of {len(settings)}: {', '.join(f'{name} {value}' for name, value in values.items())}")
            measured = _measure(point, devices)
            results = {name: measured[name] for name in ("machine", "date", "commit", "dirty")} | results
            names = [name for name in ("options", "configuration", "costs", "rows") if name in measured]
            results["points"].append({"settings": values} | {name: measured[name] for name in names})
            if arguments.json:
                write_json(arguments.json, results)
            _print(measured, arguments)
            gc.collect()  # models and trainers of a point, which hold one another
    if settings[0][1].emulate is not None:
        Console().print(emulated_sweep_table(results["points"]))
    draw(results["points"], png, html)
    tell(f"{png} and {html} show them")
    return 0


def _compare(old: Mapping[str, Any] | None, new: Mapping[str, Any]) -> int:
    """Print what changed; 1 where it is a loss that fails."""
    if old is None:
        return 0
    found = changes(old, new)
    Console().print(changes_table(found, other_machine(old, new)))
    return int(any(change.fails for change in found))


def _print(results: Mapping[str, Any], arguments: argparse.Namespace) -> None:
    is_emulated = results["options"].get("emulate") is not None
    if arguments.markdown:
        print(emulated_markdown(results) if is_emulated else markdown(results))
        return
    if is_emulated:
        Console().print(emulated_table(results["rows"]))
    for table in tables(results["rows"]):
        Console().print(table)
    Console().print(bound(results["rows"]), highlight=False)
    if results["options"].get("smoke"):
        Console().print(SMOKE_NOTE, highlight=False)


def _check(arguments: argparse.Namespace) -> None:
    """Refuse what cannot be measured, before anything heavy is loaded."""
    check_counts(arguments, "mini_batches", "epochs", "max_new_tokens", "repeats", "warmup")
    if arguments.emulate is None and arguments.devices < 2:
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
