"""What the steps that TRL trains have in common: options, data and progress."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from accelerate import PartialState
from transformers import HfArgumentParser, PreTrainedTokenizerBase
from transformers.hf_argparser import DataClassType
from transformers.trainer_callback import PrinterCallback, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from fuse.recipe.preferences import preferences_of
from fuse.recipe.tokens import TokenisedPreference, tokenised
from fuse.trainers.data import read_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingStep:
    """What a step of supervised learning is told.

    model: a Hugging Face directory or name. data, held_out: files of preferences. options: of its TRL configuration,
    as on a command line.
    """

    model: str
    data: str
    held_out: str
    output_dir: str
    seed: int
    options: tuple[str, ...]


def parsed(name: str, step: TrainingStep) -> Any:
    """The step's TRL configuration.

    Raises: ValueError for options that it has not, or that do not go together.
    """
    has_accelerator = torch.accelerator.is_available()
    defaults = {
        "output_dir": step.output_dir,
        "seed": step.seed,
        "report_to": "none",
        "disable_tqdm": True,
        "save_total_limit": 1,
        "bf16": has_accelerator,
        "gradient_checkpointing": has_accelerator,
        "dataloader_pin_memory": has_accelerator,
    }
    given = [*(f"--{name}={value}" for name, value in defaults.items()), *step.options]
    [config] = _parser(name).parse_args_into_dataclasses(given, look_for_args_file=False)
    return config


def check_options(step: str, options: Sequence[str]) -> None:
    """Look at options before anything is done.

    Raises: ValueError for those that the step's configuration has not, or with values that it refuses.
    """
    parsed = _parser(step).parse_args(["--output_dir=unused", *options])
    from fuse.recipe.configs import CHECKS

    if step in CHECKS:
        CHECKS[step](parsed)


def _parser(step: str) -> HfArgumentParser:
    try:
        from fuse.recipe.configs import CONFIGS
    except ModuleNotFoundError as error:
        if error.name != "trl":
            raise
        raise ValueError("steps sft and reward need TRL: pip install 'fuse-rlhf[recipe]'") from error
    return _Options(cast(DataClassType, CONFIGS[step]), prog=f"--{step}", add_help=False, allow_abbrev=False)


class _Options(HfArgumentParser):
    """Answers a mistake by an error."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"options {self.prog}.NAME: {message}")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"there is no {unknown[0].lstrip('-').partition('=')[0]}")
        return parsed, unknown


def read_tokenised(path: str, tokenizer: PreTrainedTokenizerBase) -> list[TokenisedPreference]:
    """Preferences of a file that the recipe has checked; none where it is empty."""
    rows = read_rows(path) if Path(path).stat().st_size else []
    return [tokenised(preference, tokenizer) for preference in preferences_of(rows)[0]]


def train(trainer: Any, name: str) -> None:
    """Train, from the last checkpoint where there is one."""
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_Lines(name))
    directory = trainer.args.output_dir
    checkpoint = get_last_checkpoint(directory) if Path(directory).is_dir() else None
    trainer.train(resume_from_checkpoint=checkpoint)


def say(text: str) -> None:
    """Print a line, once where several processes train."""
    if PartialState().is_main_process:
        print(text, flush=True)


class _Lines(TrainerCallback):
    """Prints how far training is, a line per step."""

    def __init__(self, name: str) -> None:
        self._name, self._loss = name, ""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self._loss = f", loss {float(logs['loss']):.4g}"

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        say(f"{self._name}: step {state.global_step} of {state.max_steps}{self._loss}")
