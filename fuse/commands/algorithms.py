"""The algorithms of `fuse train`, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import fuse
from fuse.options_file import last_value

CLASSES: Mapping[str, str] = MappingProxyType(
    {
        "ppo": "PPO",
        "grpo": "GRPO",
        "rloo": "RLOO",
        "reinforce++": "ReinforcePlusPlus",
        "online-dpo": "OnlineDPO",
    }
)
"""What the names of an algorithm's configuration and trainer begin with."""
NAMES = tuple(CLASSES)
OPTION = "--algorithm"


def asked_for(argv: Sequence[str]) -> str:
    """The algorithm that a command line names last, or the first of NAMES; the parser says where there is none such."""
    name = last_value(argv, OPTION)
    return name if name in NAMES else NAMES[0]


def config_class(name: str) -> Any:
    """What an algorithm's options are."""
    return getattr(fuse, f"{CLASSES[name]}Config")


def trainer_class(name: str) -> Any:
    """What runs an algorithm."""
    return getattr(fuse, f"{CLASSES[name]}Trainer")
