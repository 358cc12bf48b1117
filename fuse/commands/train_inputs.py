"""What `fuse train` can read and check before it loads a model or starts a process."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fuse import checkpoint
from fuse.commands.reward_function import load_reward_function
from fuse.commands.train_paths import check_reward
from fuse.config.ppo import PPOConfig
from fuse.trainers.data import check_source, read_rows


@dataclass(frozen=True, slots=True)
class Inputs:
    """reward: the function, if one scores. rows, eval_rows: of the datasets, not tokenised."""

    config: PPOConfig
    reward: Any
    rows: Sequence[Mapping[str, Any]]
    eval_rows: Sequence[Mapping[str, Any]] | None


def read_inputs(arguments: argparse.Namespace) -> Inputs:
    """The inputs that the options name.

    Raises:
        ValueError: options or data that cannot be trained with.
    """
    check_reward(arguments.reward_function, arguments.reward_model)
    options = {field.name: getattr(arguments, field.name) for field in fields(PPOConfig) if field.init}
    if options["stop_token"] is None and options["stop_token_id"] is None:
        options["stop_token"] = "model"
    config = PPOConfig(**options)
    if checkpoint.is_asked_for(resume_from := config.resume_from_checkpoint):
        checkpoint.find(Path(str(config.output_dir)), resume_from)
    reward = load_reward_function(arguments.reward_function) if arguments.reward_function else None
    rows = read_rows(arguments.dataset)
    eval_rows = read_rows(arguments.eval_dataset) if arguments.eval_dataset else None
    for dataset in (rows, eval_rows):
        if dataset is not None:
            check_source(dataset[0], arguments.prompt_column)
    return Inputs(config=config, reward=reward, rows=rows, eval_rows=eval_rows)
