"""What is wrong with the paths that `fuse train` is given, told before anything is imported that takes seconds."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fuse.commands.algorithms import asked_for
from fuse.commands.model_path import check_model_path
from fuse.trainers.hub import SOURCES, is_hub_name
from schedules.files import check_writable

_MODELS = ("model", "ref_model", "reward_model", "value_model", "tokenizer")
_DATASETS = ("dataset", "eval_dataset")
_OTHERS = ("output_dir",)


def check(argv: Sequence[str]) -> None:
    """Look at what is among these options; what is not, or wrong in itself, the command's own parser finds.

    Raises:
        ValueError: a path that does not exist, or cannot be written.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in (*_MODELS, *_DATASETS, *_OTHERS):
        parser.add_argument(f"--{name.replace('_', '-')}", f"--{name}", nargs="?")
    parser.add_argument("--reward-function", "--reward_function", nargs="+")
    given = {name: value for name, value in vars(parser.parse_known_args(argv)[0]).items() if value}
    if given:
        check_rewards(asked_for(argv), given.get("reward_function"), given.get("reward_model"))
    for name in _MODELS:
        if name in given:
            check_model_path(given[name])
    for name in _DATASETS:
        if name in given and not Path(given[name]).exists() and not is_hub_name(given[name]):
            raise ValueError(f"dataset {given[name]} does not exist: give {SOURCES}")
    if "output_dir" in given:
        check_writable(Path(given["output_dir"]), "output_dir")


def check_rewards(algorithm: str, functions: Sequence[str] | None, model: str | None) -> None:
    """Raises: ValueError where nothing rewards, or more than the algorithm takes."""
    if algorithm != "ppo":
        if not functions and model is None:
            raise ValueError("give --reward-function MODULE:FUNCTION or --reward-model PATH: a response needs a score")
    elif (not functions) == (model is None) or len(functions or ()) > 1:
        raise ValueError("give --reward-function MODULE:FUNCTION or --reward-model PATH: a response needs one score")
