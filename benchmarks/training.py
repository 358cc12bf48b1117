"""`fuse bench training`: steps of actor and critic on the same devices, one after the other and fused.

Random Llamas take real PPO steps on the CPU, by the serial and by the fused schedule in turn. Each setting is a pair of
sizes, a mix of lengths and a number of micro-batches; a row says how much faster fused steps are, how much faster the
plan said, and what explains the difference.

--profile-only stops at what the plan is made of: seconds and memory of every operation. --emulate N executes schedules
of N ranks with waits in place of computation, and says how far that is from the plan.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from fuse.benchmarks.measure import describe_machine
from fuse.commands.output import output_file, write_json

if TYPE_CHECKING:  # what workers are made of takes seconds to import, and emulation does without
    from fuse.benchmarks.training_batches import Workload
    from fuse.benchmarks.training_emulated import Row as EmulatedRow
    from fuse.benchmarks.training_steps import Row
    from fuse.intrastage.cost_profile import Profile

LAYERS_PER_DEVICE = {"1:1": (2, 2), "2:1": (2, 1), "1:2": (1, 2)}
"""Of actor and critic, by the ratio of their sizes."""

UNIFORM, MIXED = "uniform", "mixed"
_VOCAB_SIZE = 512
_OPTIONS = (
    "devices", "repeats", "sizes", "micro_batches", "lengths", "tokens", "sequences", "hidden", "solve_seconds",
    "emulate", "instances", "operation_ms",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fuse bench training`."""
    parser.add_argument("--devices", type=int, default=2, metavar="N", help="cores to train on (default: 2)")
    parser.add_argument(
        "--repeats", type=int, metavar="N", help="steps by each schedule, in turn (default: 9; emulated: 1)"
    )
    parser.add_argument(
        "--sizes", nargs="+", choices=LAYERS_PER_DEVICE, default=list(LAYERS_PER_DEVICE), metavar="A:C",
        help="sizes of actor and critic: the larger has two layers per device (default: 1:1 2:1 1:2)",
    )  # fmt: skip
    parser.add_argument(
        "--micro-batches", nargs="+", type=int, default=[2, 4, 8], metavar="N",
        help="micro-batches per optimizer step (default: 2 4 8)",
    )  # fmt: skip
    parser.add_argument(
        "--lengths", type=Path, metavar="FILE.csv",
        help="response lengths of the mixed settings: column output_tokens (default: a synthetic long-tailed mix)",
    )  # fmt: skip
    parser.add_argument(
        "--tokens", type=int, default=512, metavar="N",
        help="per micro-batch, padding included; with mixed lengths on average (default: 512)",
    )  # fmt: skip
    parser.add_argument("--sequences", type=int, default=2, metavar="N", help="per micro-batch (default: 2)")
    parser.add_argument("--hidden", type=int, default=256, metavar="N", help="hidden size of both (default: 256)")
    parser.add_argument(
        "--solve-seconds", type=float, default=2.0, metavar="S", help="for each fused schedule, at most (default: 2)"
    )
    parser.add_argument("--profile-only", action="store_true", help="print and write the measured costs, and stop")
    parser.add_argument(
        "--emulate", type=int, metavar="N", help="execute schedules of N ranks with operations replaced by waits"
    )
    parser.add_argument(
        "--instances", type=Path, metavar="FILE", help="problems to emulate, as JSON (default: one of N ranks)"
    )
    parser.add_argument(
        "--operation-ms", type=float, default=20.0, metavar="MS",
        help="what the shortest emulated operation takes (default: 20)",
    )  # fmt: skip
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write machine, options and rows to FILE")


def run(arguments: argparse.Namespace) -> int:
    """Measure every setting, print a line each and a table, and write them to `arguments.json`."""
    if arguments.repeats is None:
        arguments.repeats = 9 if arguments.emulate is None else 1
    _check(arguments)
    if arguments.emulate is not None:
        results = _emulate(arguments)
    else:
        results = _train(arguments)
    if arguments.json:
        options = {name: getattr(arguments, name) for name in _OPTIONS}
        plain = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
        write_json(arguments.json, {"machine": describe_machine(), "options": plain, **results})
    return 0


def _check(arguments: argparse.Namespace) -> None:
    counts = {name: getattr(arguments, name) for name in ("repeats", "sequences", "tokens", "hidden")}
    for name, value in [*counts.items(), *(("micro-batches", count) for count in arguments.micro_batches)]:
        if value < 1:
            raise ValueError(f"--{name} is {value}: it must be at least 1")
    if arguments.devices < 2:
        raise ValueError(f"--devices is {arguments.devices}: fused schedules need at least 2")
    if arguments.emulate is not None and arguments.emulate < 2:
        raise ValueError(f"--emulate is {arguments.emulate}: fused schedules need at least 2 ranks")
    if arguments.hidden % 16:
        raise ValueError(f"--hidden is {arguments.hidden}: choose a multiple of 16")
    if arguments.tokens < 4 * arguments.sequences:
        raise ValueError(
            f"--tokens is {arguments.tokens} for {arguments.sequences} sequences: give at least 4 tokens to each"
        )
    if min(arguments.solve_seconds, arguments.operation_ms) <= 0:
        raise ValueError("--solve-seconds and --operation-ms must be positive")
    if arguments.emulate is None and arguments.instances is not None:
        raise ValueError("--instances names problems to emulate: add --emulate N, their number of ranks")
    if arguments.emulate is not None and arguments.profile_only:
        raise ValueError("--profile-only measures and --emulate does not compute: choose one of them")


def _train(arguments: argparse.Namespace) -> dict[str, object]:
    from fuse.benchmarks.training_steps import Models, Trainers, row_of
    from fuse.intrastage.cost_profile import profile_to_json

    load = _workload(arguments)
    total = len(arguments.sizes) * len(load.tasks)
    rows: list[Row] = []
    profiles: dict[str, Profile] = {}
    console = Console()
    with Trainers.start(arguments.devices) as trainers:
        for sizes in arguments.sizes:
            actor, critic = (arguments.devices * layers for layers in LAYERS_PER_DEVICE[sizes])
            models = Models(
                layers={"actor": actor, "critic": critic}, hidden_size=arguments.hidden, vocab_size=_VOCAB_SIZE
            )
            print(f"{sizes}: measuring operations ...", file=sys.stderr, flush=True)
            trainers.build(models)
            profiles[sizes] = trainers.profile(load)
            if arguments.profile_only:
                console.print(profile_table(sizes, profiles[sizes]))
                continue
            for task in load.tasks:
                serial, fused = trainers.compare(
                    load, task, profiles[sizes], repeats=arguments.repeats, solve_s=arguments.solve_seconds
                )
                tokens = [load.shape(samples).size for samples in task.micro_batches]
                rows.append(row_of(sizes, models, task, tokens, serial, fused))
                print(f"[{len(rows)}/{total}] {_line(rows[-1])}", flush=True)
    if rows:
        console.print(steps_table(rows))
        print(_summary(rows))
    return {"rows": rows, "profiles": {sizes: profile_to_json(profile) for sizes, profile in profiles.items()}}


def _workload(arguments: argparse.Namespace) -> Workload:
    from fuse.benchmarks.training_batches import response_lengths, scaled, workload

    num_samples = arguments.sequences * max(arguments.micro_batches)
    sequence_tokens = arguments.tokens // arguments.sequences
    prompt_tokens = max(1, sequence_tokens // 4)
    response_tokens = sequence_tokens - prompt_tokens
    recorded = response_lengths(arguments.lengths, num_samples)
    mixes = {
        UNIFORM: [response_tokens] * num_samples,
        MIXED: scaled(recorded, arguments.sequences, response_tokens),
    }
    return workload(
        mixes,
        arguments.micro_batches,
        num_sequences=arguments.sequences,
        prompt_tokens=prompt_tokens,
        vocab_size=_VOCAB_SIZE,
    )


def _emulate(arguments: argparse.Namespace) -> dict[str, object]:
    from fuse.benchmarks.training_emulated import emulate_instances

    rows = []
    for row in emulate_instances(
        arguments.instances,
        arguments.emulate,
        operation_s=1e-3 * arguments.operation_ms,
        repeats=arguments.repeats,
        solve_s=arguments.solve_seconds,
    ):
        print(f"{row['setting']}: executed in {row['executed_ms']:.0f} ms, planned {row['planned_ms']:.0f}", flush=True)
        rows.append(row)
    Console().print(emulated_table(rows))
    return {"emulated": True, "rows": rows}


def emulated_table(rows: Sequence[EmulatedRow]) -> Table:
    """One line per emulated problem."""
    titles = ("setting", "serial plan", "plan", "executed", "beyond", "bubbles", "late", "overhead")
    caption = "emulated: operations are waits; bubbles: planned, executed; late: waiting for messages already made"
    table = _table("Emulated schedules, ms", titles, caption)
    for row in rows:
        milliseconds = (row["serial_planned_ms"], row["planned_ms"], row["executed_ms"])
        table.add_row(
            row["setting"],
            *(f"{one:.0f}" for one in milliseconds),
            f"{row['beyond_plan']:.1%}",
            f"{row['bubble_planned']:.0%} {row['bubble_executed']:.0%}",
            *(f"{share:.1%}" for share in (row["transfer_share"], row["overhead_share"])),
        )
    return table


def profile_table(sizes: str, profile: Profile) -> Table:
    """Costs of every stage on every shape, and of messages to the next stage."""
    titles = ("stage", "sequences x tokens", "F ms", "B ms", "I ms", "W ms", "send ms", "MB F-B", "MB I-W")
    table = _table(f"{sizes}: medians of measured operations", titles)
    transfers = {(one.pipeline, one.stage, one.shape): one.ticks for one in profile.transfers}
    for costs in profile.stages:
        ticks = (
            costs.forward_ticks,
            costs.backward_ticks,
            costs.input_grad_ticks,
            costs.weight_grad_ticks,
            transfers.get((costs.pipeline, costs.stage, costs.shape)),
        )
        table.add_row(
            f"{costs.pipeline} stage {costs.stage}",
            f"{costs.shape.num_sequences} x {costs.shape.num_tokens}",
            *("-" if one is None else f"{1e3 * profile.tick_s * one:.2f}" for one in ticks),
            *(f"{one / 1e6:.1f}" for one in (costs.activation_bytes, costs.weight_grad_bytes)),
        )
    return table


def steps_table(rows: Sequence[Row]) -> Table:
    """One line per setting."""
    titles = ("setting", "serial", "fused", "ratio", "plan", "gain", "bubbles", "late", "overhead")
    caption = (
        "gain: share of the plan's; bubbles: of serial steps, of fused ones, of the fused plan; "
        "late: waiting for messages already made"
    )
    table = _table("Steps of actor and critic, ms", titles, caption)
    for row in rows:
        bubbles = (row["bubble_serial"], row["bubble_fused"], row["bubble_planned"])
        table.add_row(
            row["setting"],
            f"{row['serial_ms']:.0f}",
            f"{row['fused_ms']:.0f}",
            f"{row['ratio']:.3f}",
            f"{row['predicted_ratio']:.3f}",
            f"{row['gain_share']:.0%}",
            " ".join(f"{share:.0%}" for share in bubbles),
            f"{row['fused']['transfer_share']:.1%}",
            f"{row['overhead_share']:.1%}",
        )
    return table


def _table(title: str, titles: Sequence[str], caption: str | None = None) -> Table:
    table = Table(*titles, title=title, caption=caption, box=SIMPLE, padding=(0, 0, 0, 1))
    for column in table.columns:
        column.no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _line(row: Row) -> str:
    why = f"; {row['why']}" if row["why"] else ""
    return (
        f"{row['setting']}: serial {row['serial_ms']:.0f} ms, fused {row['fused_ms']:.0f}: {row['ratio']:.3f} times as "
        f"fast, predicted {row['predicted_ratio']:.3f}{why}"
    )


def _summary(rows: Sequence[Row]) -> str:
    faster = sum(row["ratio"] > 1 for row in rows)
    gain_share = statistics.median(row["gain_share"] for row in rows)
    overhead = max(row["overhead_share"] for row in rows)
    return (
        f"fused steps were faster in {faster} of {len(rows)} settings; median of {gain_share:.0%} of the predicted "
        f"gain; executor overhead at most {overhead:.2%} of a step"
    )
