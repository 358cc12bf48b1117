"""fuse: RLHF training with inter-stage and intra-stage fusion. `from fuse import GRPOConfig, GRPOTrainer`."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    __version__: str
    from fuse import ops as ops
    from fuse.config.grpo import GRPOConfig as GRPOConfig
    from fuse.config.online_dpo import OnlineDPOConfig as OnlineDPOConfig
    from fuse.config.ppo import PPOConfig as PPOConfig
    from fuse.config.reinforce_plus_plus import ReinforcePlusPlusConfig as ReinforcePlusPlusConfig
    from fuse.config.rloo import RLOOConfig as RLOOConfig
    from fuse.trainers.grpo import GRPOTrainer as GRPOTrainer
    from fuse.trainers.online_dpo import OnlineDPOTrainer as OnlineDPOTrainer
    from fuse.trainers.ppo import PPOTrainer as PPOTrainer
    from fuse.trainers.reinforce_plus_plus import ReinforcePlusPlusTrainer as ReinforcePlusPlusTrainer
    from fuse.trainers.rloo import RLOOTrainer as RLOOTrainer

__all__ = [
    "GRPOConfig",
    "GRPOTrainer",
    "OnlineDPOConfig",
    "OnlineDPOTrainer",
    "PPOConfig",
    "PPOTrainer",
    "RLOOConfig",
    "RLOOTrainer",
    "ReinforcePlusPlusConfig",
    "ReinforcePlusPlusTrainer",
    "__version__",
    "ops",
]

# Loaded on first use: `import fuse` needs neither torch nor ray.
_MODULES = {
    "PPO": "ppo",
    "GRPO": "grpo",
    "RLOO": "rloo",
    "ReinforcePlusPlus": "reinforce_plus_plus",
    "OnlineDPO": "online_dpo",
}
_HOMES = {
    f"{name}{kind}": f"fuse.{package}.{module}"
    for name, module in _MODULES.items()
    for kind, package in (("Config", "config"), ("Trainer", "trainers"))
}


def __getattr__(name: str) -> object:
    if name == "ops":
        return import_module("fuse.ops")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name == "__version__":
        return version("fuse-rlhf")
    raise AttributeError(f"module 'fuse' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
