"""`fuse bench training`: steps of actor and critic on the same devices, one after the other and fused.

Random Llamas take real PPO steps on the CPU, by the serial and by the fused schedule in turn. Each setting is a pair of
sizes, a mix of lengths and a number of micro-batches; a row says how much faster fused steps are, how much faster the
plan said, and what explains the difference. Operations are measured while all ranks compute and while the others idle,
for those beside a bubble are faster. With --critic-epochs N the critic takes N steps for one of the actor, whose
micro-batches fused steps deal evenly over them. A step's samples are dealt into micro-batches anew, for both
schedules alike, and for each into as many as should train soonest by it; --drawn-number keeps their number, --as-drawn
the micro-batches that were drawn.

--bidirectional trains the actor alone, of two layers per device: in two opposite replicas against plain 1F1B.
--forward-only trains it on samples that it and a reference score: within the step against before it.

--profile-only stops at what the plan is made of: seconds and memory of every operation. --emulate N executes schedules
of N ranks with waits in place of computation, and says how far that is from the plan.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fuse.benchmarks.measure import describe_machine
from fuse.benchmarks.options import Row, add_json_option, write_rows
from fuse.benchmarks.training import tables
from fuse.commands.options import check_counts
from fuse.commands.tables import print_table

if TYPE_CHECKING:
    from fuse.benchmarks.training.batches import Workload

LAYERS_PER_DEVICE = {"1:1": (2, 2), "2:1": (2, 1), "1:2": (1, 2)}
"""Of actor and critic, by the ratio of their sizes."""
_VOCAB_SIZE = 512
_OPTIONS = (
    "devices", "repeats", "sizes", "micro_batches", "critic_epochs", "lengths", "tokens", "sequences", "hidden",
    "solve_seconds", "emulate", "instances", "operation_ms", "bidirectional", "forward_only",
    "as_drawn", "drawn_number",
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
        "--critic-epochs", type=int, default=1, metavar="N",
        help="optimizer steps of the critic for one of the actor, which fused steps are dealt to (default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--lengths", type=Path, metavar="FILE.csv",
        help="response lengths of the mixed settings: column output_tokens (default: a synthetic long-tailed mix)",
    )  # fmt: skip
    parser.add_argument(
        "--tokens", type=int, default=512, metavar="N",
        help="per micro-batch as drawn, padding included; with mixed lengths on average (default: 512)",
    )  # fmt: skip
    parser.add_argument("--sequences", type=int, default=2, metavar="N", help="per micro-batch (default: 2)")
    parser.add_argument(
        "--as-drawn", action="store_true", help="leave micro-batches as they are drawn, in place of dealt anew"
    )
    parser.add_argument(
        "--drawn-number", action="store_true",
        help="train as many micro-batches as were drawn, in place of as many as should train soonest",
    )  # fmt: skip
    parser.add_argument("--hidden", type=int, default=256, metavar="N", help="hidden size of both (default: 256)")
    parser.add_argument(
        "--solve-seconds", type=float, default=2.0, metavar="S", help="for each fused schedule, at most (default: 2)"
    )
    parser.add_argument(
        "--bidirectional", action="store_true", help="train the actor alone, in two opposite replicas and by plain 1F1B"
    )
    parser.add_argument(
        "--forward-only", action="store_true",
        help="train the actor alone, scoring its samples within the step, and by plain 1F1B after scoring them",
    )  # fmt: skip
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
    add_json_option(parser, "machine, options and rows")


def run(arguments: argparse.Namespace) -> int:
    """Measure every setting, print a line each and a table, and write them to `arguments.json`."""
    if arguments.repeats is None:
        arguments.repeats = 9 if arguments.emulate is None else 1
    _check(arguments)
    train = _train_both_ways if arguments.bidirectional else _train_within if arguments.forward_only else _train
    results = train(arguments) if arguments.emulate is None else _emulate(arguments)
    write_rows(arguments, describe_machine(), _OPTIONS, **results)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    check_counts(arguments, "repeats", "sequences", "tokens", "hidden", "micro_batches", "critic_epochs")
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
    if arguments.bidirectional and (arguments.emulate is not None or min(arguments.micro_batches) < 2):
        raise ValueError(
            "--bidirectional trains two replicas for real: leave out --emulate, and give at least 2 --micro-batches"
        )
    if arguments.forward_only and (arguments.emulate is not None or arguments.bidirectional or arguments.profile_only):
        raise ValueError(
            "--forward-only trains one pipeline for real, and learns costs from that: leave out --emulate, "
            "--bidirectional and --profile-only"
        )
    if (arguments.bidirectional or arguments.forward_only) and arguments.sizes != list(LAYERS_PER_DEVICE):
        one = "--bidirectional" if arguments.bidirectional else "--forward-only"
        raise ValueError(f"{one} trains no critic, and --sizes are of actor and critic: leave one of them out")
    if arguments.emulate is not None and arguments.critic_epochs > 1:
        raise ValueError("--critic-epochs is of real training, and --emulate's problems have their own: leave it out")
    for name in ("as_drawn", "drawn_number"):
        if arguments.emulate is not None and getattr(arguments, name):
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} is of real training, and --emulate's problems have no samples: leave it out")
    if arguments.emulate is not None and arguments.profile_only:
        raise ValueError("--profile-only measures and --emulate does not compute: choose one of them")


def _load(arguments: argparse.Namespace) -> Workload:
    """The lengths to train on."""
    from fuse.benchmarks.training.batches import load_of

    return load_of(
        arguments.lengths,
        arguments.micro_batches,
        num_sequences=arguments.sequences,
        sequence_tokens=arguments.tokens // arguments.sequences,
        vocab_size=_VOCAB_SIZE,
        regroups=not arguments.as_drawn,
        chooses_number=not (arguments.as_drawn or arguments.drawn_number or arguments.bidirectional),
    )


def _train(arguments: argparse.Namespace) -> dict[str, object]:
    # What workers are made of takes seconds to import, and emulation does without.
    from fuse.benchmarks.training.rows import row_of
    from fuse.benchmarks.training.steps import Trainers
    from fuse.intrastage.cost_profile import profile_to_json

    load = _load(arguments)
    total = len(arguments.sizes) * len(load.tasks)
    rows: list[Row] = []
    profiles = {}
    with Trainers.start(arguments.devices) as trainers:
        for sizes in arguments.sizes:
            actor, critic = (arguments.devices * layers for layers in LAYERS_PER_DEVICE[sizes])
            print(f"{sizes}: measuring operations ...", file=sys.stderr, flush=True)
            layers: dict[str, int] = {"actor": actor, "critic": critic}
            trainers.build(layers, hidden_size=arguments.hidden, vocab_size=_VOCAB_SIZE)
            profile = trainers.profile(load)
            profiles[sizes] = profile_to_json(profile)
            if arguments.profile_only:
                print_table(tables.profile_table(sizes, profile))
                continue
            alone = trainers.profile(load, in_turn=True)
            for task in load.tasks:
                critic_epochs: int = arguments.critic_epochs
                sides, times = trainers.compare(
                    load,
                    task,
                    profile,
                    alone,
                    repeats=arguments.repeats,
                    solve_s=arguments.solve_seconds,
                    critic_epochs=critic_epochs,
                )
                trained = {side: load.micro_batches(task, times[side]) for side in sides}
                rows.append(
                    row_of(
                        sizes,
                        layers,
                        task,
                        [load.shape(samples).size for samples in trained["fused"]],
                        sides["serial"],
                        sides["fused"],
                        padding=load.padding(task, times["fused"]),
                        critic_epochs=critic_epochs,
                        num_trained={side: len(of_side) for side, of_side in trained.items()},
                    )
                )
                print(f"[{len(rows)}/{total}] {tables.line(rows[-1])}", flush=True)
    if rows:
        print_table(tables.steps_table(rows))
        print(tables.summary(rows))
    return {"rows": rows, "profiles": profiles}


def _train_both_ways(arguments: argparse.Namespace) -> dict[str, object]:
    from fuse.benchmarks.training.both_ways import BothWays
    from fuse.intrastage.cost_profile import profile_to_json

    load = _load(arguments)
    layers = 2 * arguments.devices
    rows: list[Row] = []
    with BothWays.start(arguments.devices) as trainers:
        print("measuring operations ...", file=sys.stderr, flush=True)
        trainers.build(layers, hidden_size=arguments.hidden, vocab_size=_VOCAB_SIZE)
        profiles = trainers.profiles(load)
        alone = profiles if arguments.profile_only else trainers.profiles(load, in_turn=True)
        repeats, solve_s = arguments.repeats, arguments.solve_seconds
        for task in load.tasks if not arguments.profile_only else ():
            rows.append(trainers.row(load, task, profiles, alone, layers, repeats=repeats, solve_s=solve_s))
            print(f"[{len(rows)}/{len(load.tasks)}] {tables.line(rows[-1])}", flush=True)
    if arguments.profile_only:
        for name, profile in profiles.items():
            print_table(tables.profile_table(name, profile))
    else:
        table = tables.steps_table(rows)
        table.title = "Steps of the actor, ms: plain 1F1B (serial) and two opposite replicas (fused)"
        print_table(table)
        print(tables.summary(rows))
    return {"rows": rows, "profiles": {name: profile_to_json(profile) for name, profile in profiles.items()}}


def _train_within(arguments: argparse.Namespace) -> dict[str, object]:
    from fuse.benchmarks.training.within import Within

    load = _load(arguments)
    layers = 2 * arguments.devices
    rows: list[Row] = []
    with Within.start(arguments.devices) as trainers:
        trainers.build(layers, hidden_size=arguments.hidden, vocab_size=_VOCAB_SIZE)
        for task in load.tasks:
            rows.append(trainers.row(load, task, layers, repeats=arguments.repeats, solve_s=arguments.solve_seconds))
            print(f"[{len(rows)}/{len(load.tasks)}] {tables.line(rows[-1])}", flush=True)
    table = tables.steps_table(rows)
    table.title = "Steps of the actor, ms: scoring first (serial) and scoring within (fused)"
    print_table(table)
    print(tables.summary(rows))
    return {"rows": rows}


def _emulate(arguments: argparse.Namespace) -> dict[str, object]:
    from fuse.benchmarks.training.emulated import emulate_instances

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
    print_table(tables.emulated_table(rows))
    return {"emulated": True, "rows": rows}
