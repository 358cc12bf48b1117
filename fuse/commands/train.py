"""Train a policy by PPO, GRPO, RLOO, REINFORCE++ or online DPO on your own prompts.

  fuse train --model PATH --dataset prompts.jsonl --prompt-column question --reward-function rewards:score
  fuse train --algorithm grpo --model PATH --dataset prompts.jsonl --reward-function rewards:exact rewards:short
  fuse train --algorithm grpo --advantage grpovi --loss rloo ...
  fuse train --algorithm online-dpo --num-generations 4 ...

The dataset is a file of JSON lines, of a JSON array, in CSV or parquet, gzipped or not, a directory made by
Dataset.save_to_disk, or a data set's name on the Hugging Face Hub: NAME, NAME:SPLIT or NAME:CONFIG:SPLIT. A prompt is a
string or a list of chat messages, of which the response continues the last if that is the assistant's. PPO's reward
function gets (prompts, responses, **other_columns), all lists, and returns a list of one number per response; chat
messages are its column `messages`, if it takes one. Those of the others are as TRL calls them, with prompts,
completions, completion_ids and other columns by name. The trained policy goes to the output directory. All of
transformers.TrainingArguments that have an effect here are options too. --help lists those of the --algorithm that is
named beside it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib import import_module
from threading import Thread
from typing import Any, cast, get_args, get_type_hints

from rich.console import Console
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import DataClassType

from fuse.commands.algorithms import NAMES, OPTION, asked_for, config_class
from fuse.commands.lora import add_lora_arguments
from fuse.commands.output import output_file, write_json
from fuse.commands.progress import run_progress
from fuse.commands.results import run_json
from fuse.commands.run_text import how_to_go_on, plan_text
from fuse.commands.train_inputs import read_inputs
from fuse.config.inherited import CANNOT_MATTER, REFUSED_VALUES, REMEDIES
from fuse.config.inherited_help import HELP, ONE_VALUE
from fuse.printable import printable

# What --help shows of TrainingArguments, beside all that is ours; --help-all shows the rest.
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
_NEVER_SHOWN = frozenset({*CANNOT_MATTER, *REMEDIES, *ONE_VALUE})
"""Options that are refused, or have no effect."""


def parents(argv: Sequence[str]) -> list[argparse.ArgumentParser]:
    """A parser of every field of the algorithm's configuration."""
    kind = config_class(asked_for(argv))
    parser = HfArgumentParser(cast(DataClassType, kind), add_help=False)
    hints = get_type_hints(kind)
    for action in parser._actions:
        if action.type is float and action.default is not None and type(None) in get_args(hints[action.dest]):
            action.type = _number_or_none  # else there would be no way to it from a number
    return [parser]


def _number_or_none(text: str) -> float | None:
    return None if text.lower() == "none" else float(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fuse train` beside those of configurations."""
    parser.set_defaults(stop_token=None)  # of no algorithm: what the model ends with is what users expect
    parser.usage = "%(prog)s --model PATH --dataset DATA [OPTIONS]"
    hidden = _hide_uncommon(parser)
    parser.add_argument("--help-all", action=_HelpAll, hidden=hidden, help="show every option and exit")
    group = parser.add_argument_group("models and data")
    group.add_argument(OPTION, choices=NAMES, default=NAMES[0], help="what to train by (default: ppo)")
    group.add_argument("--model", required=True, metavar="PATH", help="policy: a causal language model")
    group.add_argument("--ref-model", metavar="PATH", help="what PPO's KL penalty measures from (default: the policy)")
    group.add_argument(
        "--reward-function",
        nargs="+",
        metavar="MODULE:FUNCTION",
        help="Python function that scores responses; without a critic also several",
    )
    group.add_argument("--reward-model", metavar="PATH", help="sequence classifier that scores responses instead")
    group.add_argument(
        "--value-model",
        metavar="PATH",
        help="PPO's critic (default: the reward model, else the policy with a new head)",
    )
    group.add_argument("--tokenizer", metavar="PATH", help="default: the policy's")
    group.add_argument("--pad-token", metavar="TOKEN", help="padding token, where the tokenizer names none")
    group.add_argument(
        "--dataset", required=True, metavar="DATA", help="prompts to train on: a file, directory or name"
    )
    group.add_argument("--eval-dataset", metavar="DATA", help="prompts whose completions are shown during training")
    group.add_argument(
        "--prompt-column",
        metavar="NAME",
        help="column of the prompt (default: tokens in input_ids for PPO, else prompt)",
    )
    add_lora_arguments(parser)
    group.add_argument("--json", type=output_file, metavar="FILE", help="write rewards, seconds and phases to FILE")
    for action in parser._actions:
        action.metavar = action.metavar or _shown_choices(action)
        if action in hidden:
            hidden[action] = _help_with_default(action, hidden[action])
        elif action.help != argparse.SUPPRESS:
            action.help = _help_with_default(action, action.help or "")


def run(arguments: argparse.Namespace) -> int:
    """Train, and save the policy to the output directory."""
    start_s = time.monotonic()
    console = Console()
    inputs = read_inputs(arguments)
    with run_progress(console, arguments.algorithm.upper()) as progress:
        tell = progress.activity.tell
        tell("starting: Ray")
        from fuse.config.settings import engine, num_devices
        from fuse.driver.early_start import early_start

        # Takes seconds. Not beside imports above: of two threads that import Ray, one may find half of it.
        making = Thread(target=import_module, args=("fuse.commands.make_trainer",))
        making.start()
        config = inputs.config
        asked = num_devices(config), config.ray_address, config.accelerator, engine(config)
        with early_start(*asked, has_adapters=inputs.lora is not None) as cluster:
            making.join()
            from fuse.commands.make_trainer import make_trainer

            trainer = make_trainer(arguments, inputs, tell, cluster)
            progress.watch(trainer)
            progress.announce(plan_text(trainer))
            try:
                trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
            except KeyboardInterrupt as interrupt:
                raise KeyboardInterrupt(f"interrupted: {how_to_go_on(trainer)}") from interrupt
        trainer.save_model()
    written = printable(f"policy written to {trainer.args.output_dir}")
    console.print(written, highlight=False, markup=False, soft_wrap=True)
    if arguments.json:
        write_json(arguments.json, run_json(trainer.state.log_history, time.monotonic() - start_s))
    return 0


def _hide_uncommon(parser: argparse.ArgumentParser) -> dict[argparse.Action, str]:
    """Take options without effect out of the help, and those that few need; returns the latter's texts."""
    inherited = {field.name for field in fields(TrainingArguments)}
    hidden = {}
    for action in parser._actions:
        if action.dest == "help":
            continue
        action.help = HELP.get(action.dest, action.help)
        if action.dest in _NEVER_SHOWN or (action.help or "").startswith(_NOT_FOR_USERS):
            action.help = argparse.SUPPRESS
        elif action.dest in inherited and action.dest not in _COMMON:
            hidden[action] = action.help or ""
            action.help = argparse.SUPPRESS
    return hidden


def _help_with_default(action: argparse.Action, text: str) -> str:
    """The text, and what holds where the option is not given."""
    if isinstance(action, argparse._StoreFalseAction):
        return f"The same as --{action.dest.replace('_', '-')} false."
    if action.required or action.nargs == 0 or "default:" in text.lower():
        return text
    value = getattr(action.default, "value", action.default)
    if isinstance(value, bool):
        value = str(value).lower()
    return f"{text} (default: {'none' if value is None else value})"


def _shown_choices(action: argparse.Action) -> str | None:
    """Those of an option's values that are not refused, as the help lists values."""
    if action.choices is None:
        return None
    refused, _ = REFUSED_VALUES.get(action.dest, ((), ""))
    return "{" + ",".join(str(getattr(value, "value", value)) for value in action.choices if value not in refused) + "}"


class _HelpAll(argparse.Action):
    def __init__(self, *, hidden: Mapping[argparse.Action, str], **options: Any) -> None:
        super().__init__(nargs=0, dest=argparse.SUPPRESS, default=argparse.SUPPRESS, **_without_dest(options))
        self._hidden = hidden

    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        for action, text in self._hidden.items():
            action.help = text
        parser.print_help()
        parser.exit()


def _without_dest(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in ("dest", "default", "nargs")}
