"""What `fuse train` can read and check before it loads a model or starts a process."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fuse import checkpoint
from fuse.commands.algorithms import config_class
from fuse.commands.lora import lora_config
from fuse.commands.reward_function import load_reward_function
from fuse.commands.train_paths import check_rewards
from fuse.trainers.data import check_source, read_rows

if TYPE_CHECKING:
    from fuse.intrastage.adapters import LoraConfig


@dataclass(frozen=True, slots=True)
class Inputs:
    """rewards: the functions that score, if any. rows, eval_rows: of the datasets, not tokenised. lora: adapters."""

    config: Any
    rewards: Sequence[Any]
    rows: Sequence[Mapping[str, Any]]
    eval_rows: Sequence[Mapping[str, Any]] | None
    lora: LoraConfig | None = None


def read_inputs(arguments: argparse.Namespace) -> Inputs:
    """The inputs that the options name.

    Raises:
        ValueError: options or data that cannot be trained with.
    """
    check_rewards(arguments.algorithm, arguments.reward_function, arguments.reward_model)
    check_models(arguments)
    lora = lora_config(arguments)
    kind = config_class(arguments.algorithm)
    options = {field.name: getattr(arguments, field.name) for field in fields(kind) if field.init}
    if options["stop_token"] is None and options["stop_token_id"] is None:
        options["stop_token"] = "model"
    config = kind(**options)
    if checkpoint.is_asked_for(resume_from := config.resume_from_checkpoint):
        checkpoint.find(Path(str(config.output_dir)), resume_from)
    rewards = [load_reward_function(name) for name in arguments.reward_function or ()]
    rows = read_rows(arguments.dataset)
    eval_rows = read_rows(arguments.eval_dataset) if arguments.eval_dataset else None
    for dataset in (rows, eval_rows):
        if dataset is not None:
            check_source(dataset[0], prompt_column(arguments))
    return Inputs(config=config, rewards=rewards, rows=rows, eval_rows=eval_rows, lora=lora)


def prompt_column(arguments: argparse.Namespace) -> str | None:
    """Where a row has its prompt; None for tokens."""
    column: str | None = arguments.prompt_column
    return "prompt" if column is None and arguments.algorithm != "ppo" else column


def check_models(arguments: argparse.Namespace) -> None:
    """Raises: ValueError for a model that the algorithm has not."""
    for name in ("ref_model", "value_model"):
        if getattr(arguments, name) is not None and arguments.algorithm != "ppo":
            option = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"{option} with --algorithm {arguments.algorithm}, which has no "
                f"{'critic' if name == 'value_model' else 'reference but the policy it began with'}: leave it out"
            )
