"""Train a policy by PPO on your own prompts.

  fuse train --model PATH --dataset prompts.jsonl --prompt-column question --reward-function rewards:score

The dataset is a file of JSON lines, of a JSON array or in parquet, gzipped or not, or a directory made by
Dataset.save_to_disk. A prompt is a string or a list of chat messages, of which the response continues the last if that
is the assistant's. The reward function gets (prompts, responses, **other_columns), all lists, and returns a list of one
number per response. The trained policy goes to the output directory. All of transformers.TrainingArguments that have an
effect here are options too.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import fields
from importlib import import_module
from threading import Thread
from typing import Any, cast

from rich.console import Console
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import DataClassType

from fuse.commands.output import output_file, write_json
from fuse.commands.progress import run_progress
from fuse.commands.results import run_json
from fuse.commands.train_inputs import read_inputs
from fuse.config.ppo import PPOConfig
from fuse.printable import printable

# What --help shows of TrainingArguments, beside all that is PPO's own; --help-all shows the rest.
_COMMON = frozenset(
    {
        "output_dir",
        "learning_rate",
        "lr_scheduler_type",
        "warmup_steps",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "num_train_epochs",
        "max_grad_norm",
        "bf16",
        "gradient_checkpointing",
        "seed",
        "use_cpu",
        "report_to",
        "save_strategy",
        "save_steps",
        "save_total_limit",
        "resume_from_checkpoint",
    }
)
_NOT_FOR_USERS = ("Filled in by the trainer", "For scripts", "Accepted for compatibility")


def parents() -> list[argparse.ArgumentParser]:
    """A parser of every PPOConfig field."""
    return [HfArgumentParser(cast(DataClassType, PPOConfig), add_help=False)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fuse train` beside those of PPOConfig."""
    parser.usage = "%(prog)s --model PATH --dataset FILE [OPTIONS]"
    hidden = _hide_uncommon(parser)
    parser.add_argument("--help-all", action=_HelpAll, hidden=hidden, help="show every option and exit")
    group = parser.add_argument_group("models and data")
    group.add_argument("--model", required=True, metavar="PATH", help="policy: a causal language model")
    group.add_argument("--ref-model", metavar="PATH", help="what the KL penalty measures from (default: the policy)")
    group.add_argument("--reward-function", metavar="MODULE:FUNCTION", help="Python function that scores responses")
    group.add_argument("--reward-model", metavar="PATH", help="sequence classifier that scores responses instead")
    group.add_argument(
        "--value-model",
        metavar="PATH",
        help="critic (default: the reward model, else the policy with a new head)",
    )
    group.add_argument("--tokenizer", metavar="PATH", help="default: the policy's")
    group.add_argument("--pad-token", metavar="TOKEN", help="padding token, where the tokenizer names none")
    group.add_argument("--dataset", required=True, metavar="FILE", help="prompts to train on")
    group.add_argument("--eval-dataset", metavar="FILE", help="prompts whose completions are shown during training")
    group.add_argument("--prompt-column", metavar="NAME", help="column of the prompt (default: tokens in input_ids)")
    group.add_argument("--json", type=output_file, metavar="FILE", help="write rewards, seconds and phases to FILE")


def run(arguments: argparse.Namespace) -> int:
    """Train, and save the policy to the output directory."""
    start_s = time.monotonic()
    console = Console()
    inputs = read_inputs(arguments)
    with run_progress(console, "PPO") as progress:
        tell = progress.activity.tell
        tell("starting: Ray")
        making = Thread(target=import_module, args=("fuse.commands.make_trainer",))  # takes seconds
        making.start()
        from fuse.config.settings import engine, num_devices
        from fuse.driver.early_start import early_start

        config = inputs.config
        with early_start(num_devices(config), config.ray_address, config.accelerator, engine(config)) as cluster:
            making.join()
            from fuse.commands.make_trainer import make_trainer

            trainer = make_trainer(arguments, inputs, tell, cluster)
            progress.watch(trainer)
            trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
        trainer.save_model()
    written = printable(f"policy written to {trainer.args.output_dir}")
    console.print(written, highlight=False, markup=False, soft_wrap=True)
    if arguments.json:
        write_json(arguments.json, run_json(trainer.state.log_history, time.monotonic() - start_s))
    return 0


def _hide_uncommon(parser: argparse.ArgumentParser) -> dict[argparse.Action, str | None]:
    """Take options that few need out of the help; returns their texts."""
    inherited = {field.name for field in fields(TrainingArguments)}
    hidden = {}
    for action in parser._actions:
        own = action.dest not in inherited and not (action.help or "").startswith(_NOT_FOR_USERS)
        if action.dest != "help" and not own and action.dest not in _COMMON:
            hidden[action] = action.help
            action.help = argparse.SUPPRESS
    return hidden


class _HelpAll(argparse.Action):
    def __init__(self, *, hidden: Mapping[argparse.Action, str | None], **options: Any) -> None:
        super().__init__(nargs=0, dest=argparse.SUPPRESS, default=argparse.SUPPRESS, **_without_dest(options))
        self._hidden = hidden

    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        for action, text in self._hidden.items():
            action.help = text
        parser.print_help()
        parser.exit()


def _without_dest(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in ("dest", "default", "nargs")}
