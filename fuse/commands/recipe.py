"""From a base model to an aligned one, on preference data: fine-tuning, a reward model, reinforcement learning.

  fuse recipe --model BASE --data preferences.jsonl --output-dir OUT
  fuse recipe ... --steps rl --rl.algorithm grpo --rl.num_generations 8
  fuse recipe --demo

Rows of the data are {"prompt": ..., "chosen": ..., "rejected": ...}: strings, or lists of chat messages. Each goes to
one step: its chosen response to supervised fine-tuning (by TRL's SFTTrainer), the pair to the reward model (by TRL's
RewardTrainer), or the prompt to `fuse train`. At the end the reward model compares the policy's responses with those
of the fine-tuned model, on prompts that no step has seen.

OUT/sft, OUT/reward and OUT/policy are Hugging Face directories, and with --rl.ema_decay OUT/policy_ema. Beside them,
each step has a log and a JSON file of its metrics, and is not repeated when it is complete: the same command goes on
where it was ended.

Options of a step are named behind it: --sft.NAME VALUE those of trl.SFTConfig, --reward.NAME VALUE those of
trl.RewardConfig, loss (pairwise or advantage), advantage_margin, expectation_coefficient, square_coefficient,
length_buckets, lora_r and lora_alpha, --rl.NAME VALUE those of `fuse train`.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fuse import checkpoint
from fuse.cli import Parser
from fuse.commands import train
from fuse.commands.algorithms import config_class
from fuse.commands.model_path import check_model_path
from fuse.commands.output import output_file, write_json
from fuse.commands.progress import run_progress
from fuse.recipe.data import STEPS, data_file, deal_out
from fuse.recipe.steps import Step, locked, run_step
from fuse.trainers.publish import AVERAGE_DIRECTORY
from schedules.files import check_writable, write_whole

_STEP_OPTION = re.compile(rf"--({'|'.join(STEPS)})\.([\w-]+)(=.*)?", re.DOTALL)
_REPORTED = {
    "sft": "loss {held_out_loss_before:.3f} -> {held_out_loss:.3f} nats per token of held-out responses",
    "reward": "{held_out[accuracy]:.1%} of {held_out[num_pairs]} held-out pairs right",
    "rl": "{num_updates} updates",
    "comparison": "score {sft_score:.3f} -> {policy_score:.3f} on {num_prompts} held-out prompts, p = {p_value:.2g}",
}


def parents(argv: Sequence[str]) -> list[argparse.ArgumentParser]:
    """A parser of the steps' options that the command line has; what they may be, the steps know."""
    parser = argparse.ArgumentParser(add_help=False)
    for name in dict.fromkeys(match[0].partition("=")[0] for match in map(_STEP_OPTION.fullmatch, argv) if match):
        parser.add_argument(name, nargs="*", action=_StepOption, help=argparse.SUPPRESS, dest=argparse.SUPPRESS)
    parser.set_defaults(step_options={step: [] for step in STEPS})
    return [parser]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fuse recipe`."""
    parser.usage = "%(prog)s --model BASE --data DATA --output-dir OUT [OPTIONS]"
    parser.add_argument("--model", metavar="PATH", help="base model, and its tokenizer")
    parser.add_argument("--reward-base", metavar="PATH", help="what the reward model begins as (default: OUT/sft)")
    parser.add_argument("--data", metavar="DATA", help="preferences: a file, directory or name, as for `fuse train`")
    parser.add_argument("--output-dir", type=Path, metavar="OUT", help="where everything goes")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), help="what to do (default: all)")
    parser.add_argument(
        "--data-split",
        type=_shares,
        metavar="S,R,P",
        help="shares of the rows for fine-tuning, reward model and policy (default: 2,4,4)",
    )
    parser.add_argument(
        "--held-out", type=float, default=0.1, metavar="SHARE", help="of each step's rows, to measure by (default: 0.1)"
    )
    parser.add_argument("--skip-bad-rows", action="store_true", help="leave out rows that are no preferences")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn (default: 0)")
    parser.add_argument(
        "--accelerate-config", type=Path, metavar="FILE", help="train sft and reward by `accelerate launch` with it"
    )
    parser.add_argument("--demo", action="store_true", help="embedded data and a tiny model: a few minutes")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write scores and seconds to FILE")


def run(arguments: argparse.Namespace) -> int:
    """Do the steps that are not complete, and say what came of all."""
    console, start_s = Console(highlight=False), time.monotonic()
    rows = _with_demo(arguments)
    _check(arguments)
    output_dir: Path = arguments.output_dir
    output_dir.mkdir(parents=True, exist_ok=True)
    records: dict[str, Mapping[str, Any]] = {}
    with run_progress(console, "recipe") as progress, locked(output_dir) as lock:
        tell = progress.activity.tell
        tell("options: checking")
        rl = _check_step_options(arguments)
        tell("data: reading")
        data = _data(arguments, rows, tell)
        for step in _steps(arguments, rl, data):
            records[step.name] = run_step(step, _how_to_make(arguments), tell, lock)
        _move(output_dir / "policy" / AVERAGE_DIRECTORY, output_dir / f"policy_{AVERAGE_DIRECTORY}")
    seconds = time.monotonic() - start_s
    _show(console, records, seconds, output_dir)
    if arguments.json:
        scores = records.get("comparison", {}).get("metrics", {})
        write_json(
            arguments.json,
            {name: scores.get(name) for name in ("sft_score", "policy_score", "p_value")}
            | {"seconds": seconds, "steps": records},
        )
    return 0


class _StepOption(argparse.Action):
    """Keeps an option for its step, as that takes it."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        assert option_string is not None
        step, _, name = option_string.removeprefix("--").partition(".")
        namespace.step_options[step] += [f"--{name}={values[0]}"] if len(values) == 1 else [f"--{name}", *values]


def _shares(text: str) -> tuple[float, ...]:
    try:
        shares = tuple(float(part) for part in text.split(","))
    except ValueError:
        shares = ()
    if len(shares) != len(STEPS) or min(shares) < 0 or not sum(shares):
        raise argparse.ArgumentTypeError(f"{text!r} is not three shares such as 2,4,4")
    return shares


def _with_demo(arguments: argparse.Namespace) -> Sequence[Mapping[str, Any]] | None:
    """Fill in what the demonstration is of; its rows."""
    if not arguments.demo:
        return None
    from fuse.recipe import demo

    for name in ("model", "data"):
        if getattr(arguments, name):
            raise ValueError(f"--demo brings its own {name}: leave out --{name}")
    arguments.output_dir = arguments.output_dir or Path("out/recipe")
    base = arguments.output_dir / "base"
    demo.save_base(base, arguments.seed)
    arguments.model = str(base)
    for step, options in {"sft": demo.SFT_OPTIONS, "reward": demo.REWARD_OPTIONS, "rl": demo.RL_OPTIONS}.items():
        arguments.step_options[step][:0] = options
    return demo.rows(arguments.seed)


def _check(arguments: argparse.Namespace) -> None:
    """Raises: ValueError for what can be seen to be wrong before anything is done."""
    for name in ("model", "data", "output_dir"):
        if getattr(arguments, name) is None and not (arguments.demo and name == "data"):
            raise ValueError(f"--{name.replace('_', '-')} is missing: name one, or see what comes of --demo")
    for path in (arguments.model, arguments.reward_base):
        if path:
            check_model_path(path)
    check_writable(arguments.output_dir, "output_dir")
    if not 0 < arguments.held_out < 1:
        raise ValueError(f"--held-out is {arguments.held_out}: it is a share of the rows, between 0 and 1")
    if arguments.accelerate_config and not arguments.accelerate_config.is_file():
        raise ValueError(
            f"--accelerate-config {arguments.accelerate_config} does not exist: make it by `accelerate config`"
        )


def _check_step_options(arguments: argparse.Namespace) -> argparse.Namespace:
    """The options of `fuse train`, parsed.

    Raises: ValueError for options that a step has not, and where TRL is missing.
    """
    from fuse.recipe.training import check_options

    for step in ("sft", "reward"):
        if step in arguments.steps:
            check_options(step, arguments.step_options[step])
    argv = _train_arguments(arguments)
    parser = Parser(prog="fuse recipe --rl", parents=train.parents(argv))
    train.add_arguments(parser)
    parsed: argparse.Namespace = parser.parse_args(argv)
    return parsed


def _data(
    arguments: argparse.Namespace, rows: Sequence[Mapping[str, Any]] | None, tell: Callable[[str], None]
) -> Mapping[str, Any]:
    """What the steps' files hold; dealt out unless that was done, by the same options, before."""
    from fuse.commands.models import load_reading_tokenizer
    from fuse.trainers.data import read_rows

    record = arguments.output_dir / "data.json"
    dealt = deal_out(
        rows if rows is not None else read_rows(arguments.data),
        load_reading_tokenizer(arguments.model),
        arguments.output_dir,
        shares=arguments.data_split or (2.0, 4.0, 4.0),
        held_out=arguments.held_out,
        seed=arguments.seed,
        skips_bad_rows=arguments.skip_bad_rows,
        tell=tell,
    )
    write_whole(record, json.dumps(dealt, indent=2) + "\n")
    tell("data: " + ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in dealt["rows"].items()))
    return dealt


def _steps(arguments: argparse.Namespace, rl: argparse.Namespace, data: Mapping[str, Any]) -> list[Step]:
    out = arguments.output_dir
    steps = []
    for name, model in (("sft", arguments.model), ("reward", arguments.reward_base or str(out / "sft"))):
        settings = {
            "model": model,
            "data": str(data_file(out, name)),
            "held_out": str(data_file(out, name, held_out=True)),
            "output_dir": str(out / name),
            "seed": arguments.seed,
            "options": arguments.step_options[name],
        }
        inputs = {"sft": out / "sft"} if name == "reward" and not arguments.reward_base else {}
        checkpoints = None if _keeps_checkpoints(arguments.step_options[name]) else out / name
        steps.append(_own_step(out, name, settings, inputs, data, arguments.accelerate_config, checkpoints))
    made = {"sft": out / "sft", "reward": out / "reward"}
    policy = out / "policy"
    argv = _train_arguments(arguments)
    steps.append(
        Step(
            name="rl",
            output_dir=out,
            command=[sys.executable, "-m", "fuse", "train", *argv, f"--json={out / 'rl.results.json'}"],
            resume=lambda: ["--resume-from-checkpoint=true"] if _is_resumable(policy) else [],
            inputs=made,
            settings={"command": argv, "data": data["sha256"]},
        )
    )
    comparison = {
        "before": str(made["sft"]),
        "after": str(policy),
        "reward_model": str(made["reward"]),
        "data": str(data_file(out, "rl", held_out=True)),
        "output_dir": str(out),
        "seed": arguments.seed,
        "temperature": rl.temperature,
        "max_new_tokens": getattr(rl, config_class(rl.algorithm).MAX_RESPONSE_OPTION),
    }
    steps.append(_own_step(out, "comparison", comparison, {**made, "rl": policy}, data))
    asked_for = {*arguments.steps, *(["comparison"] if "rl" in arguments.steps else [])}
    return [step for step in steps if step.name in asked_for]


def _own_step(
    out: Path,
    name: str,
    settings: Mapping[str, Any],
    inputs: Mapping[str, Path],
    data: Mapping[str, Any],
    accelerate_config: Path | None = None,
    checkpoints: Path | None = None,
) -> Step:
    """A step that `fuse.recipe.process` does; its file is written."""
    file = out / f"{name}.settings.json"
    write_whole(file, json.dumps({"step": name, "settings": settings, "results": str(out / f"{name}.results.json")}))
    launcher = [sys.executable]
    if accelerate_config is not None:  # how many processes train decides how many rows are a batch
        settings = {**settings, "accelerate": accelerate_config.read_text(encoding="utf-8")}
        launcher += ["-m", "fuse.recipe.launch", "--config_file", str(accelerate_config)]
    return Step(
        name=name,
        output_dir=out,
        command=[*launcher, "-m", "fuse.recipe.process", str(file)],
        resume=list,
        inputs=inputs,
        settings={**settings, "data": data["sha256"]},
        checkpoints=checkpoints,
    )


def _keeps_checkpoints(options: Sequence[str]) -> bool:
    """Whether the user has said how many there are to be."""
    return any(option.partition("=")[0].replace("-", "_") == "__save_total_limit" for option in options)


def _move(made: Path, place: Path) -> None:
    """Put a directory that a step has just made in its place."""
    if made.is_dir():
        shutil.rmtree(place, ignore_errors=True)
        made.rename(place)


def _train_arguments(arguments: argparse.Namespace) -> list[str]:
    """Of `fuse train`; the user's own come last, so they win."""
    out, own = arguments.output_dir, arguments.step_options["rl"]
    has_adapters = any(option.partition("=")[0] == "--lora-r" for option in own)
    return [
        f"--model={out / 'sft'}",
        f"--reward-model={out / 'reward'}",
        f"--dataset={data_file(out, 'rl')}",
        "--prompt-column=prompt",
        f"--output-dir={out / 'policy'}",
        f"--seed={arguments.seed}",
        *("--report-to=none", "--save-strategy=steps", "--save-steps=0.2", "--save-total-limit=1"),
        *(["--merge-adapters=true"] if has_adapters else []),  # what is written is a model, as every step's is
        *own,
    ]


def _is_resumable(output_dir: Path) -> bool:
    return any(found.is_resumable for found in checkpoint.checkpoints(output_dir))


def _how_to_make(arguments: argparse.Namespace) -> str:
    source = (
        "--demo" if arguments.demo else f"--model {shlex.quote(arguments.model)} --data {shlex.quote(arguments.data)}"
    )
    return f"`fuse recipe {source} --output-dir {shlex.quote(str(arguments.output_dir))}` with --steps"


def _came_of(name: str, metrics: Mapping[str, Any]) -> str:
    return _REPORTED[name].format(**metrics, num_updates=len(metrics.get("rewards", ())))


def _show(console: Console, records: Mapping[str, Mapping[str, Any]], seconds: float, output_dir: Path) -> None:
    table = Table(title=f"what {seconds:.0f} s went into", title_justify="left", box=None)
    table.add_column("step")
    table.add_column("seconds", justify="right")
    table.add_column("what came of it")
    for name, record in records.items():
        table.add_row(name, f"{record['seconds']:.0f}", _came_of(name, record["metrics"]))
    console.print(table)
    console.print(f"everything is in {output_dir}", markup=False, soft_wrap=True)
