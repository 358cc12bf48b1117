"""Options of commands that train adapters, and what they ask for."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from fuse.commands.options import check_counts

if TYPE_CHECKING:
    from fuse.intrastage.adapters import LoraConfig


def add_lora_arguments(parser: argparse.ArgumentParser) -> None:
    """`--lora-r` and what goes with it."""
    group = parser.add_argument_group("adapters")
    group.add_argument(
        "--lora-r", type=int, metavar="N", help="train LoRA adapters of this rank in place of weights (default: none)"
    )
    group.add_argument(
        "--lora-alpha", type=float, metavar="X", help="their scale, by --lora-r (default: twice --lora-r)"
    )
    group.add_argument("--lora-dropout", type=float, default=0.0, metavar="X", help="must be 0 (default: 0)")
    group.add_argument(
        "--lora-target-modules", nargs="+", metavar="NAME", help="linear layers that have one (default: all of layers)"
    )


def lora_config(arguments: argparse.Namespace) -> LoraConfig | None:
    """What the options ask for; None for no adapters.

    Raises: ValueError for options that do not fit together, or without PEFT.
    """
    check_counts(arguments, "lora_r")
    if arguments.lora_dropout:
        raise ValueError(
            f"--lora-dropout {arguments.lora_dropout}: models are trained without dropout, so that fusion changes no "
            f"number; leave it out"
        )
    if arguments.lora_r is None:
        for name in ("lora_alpha", "lora_target_modules"):
            if getattr(arguments, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} without --lora-r, by which there are adapters: give both")
        return None
    from fuse.intrastage.adapters import lora

    alpha = 2 * arguments.lora_r if arguments.lora_alpha is None else arguments.lora_alpha
    return lora(arguments.lora_r, alpha, arguments.lora_target_modules)
