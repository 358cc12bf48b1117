"""How benchmarks train an actor and a critic, without Ray or a command line."""

from __future__ import annotations

from functools import partial

from fuse.algorithms.policy_loss import PolicyTargets, clipped_policy_loss
from fuse.algorithms.value_loss import ValueTargets, clipped_value_loss
from fuse.intrastage.optimizer import AdamWConfig
from fuse.training.layout import RaggedLayout
from fuse.training.rank import TrainingSettings

SETTINGS = TrainingSettings(
    backend="transformers",
    split_backward=True,
    losses={
        "actor": partial(clipped_policy_loss, temperature=1.0, cliprange=0.2),
        "critic": partial(clipped_value_loss, vf_coef=0.1, cliprange=0.2),
    },
    targets={"actor": PolicyTargets, "critic": ValueTargets},
    layout=RaggedLayout(packs=True),
    adamw=AdamWConfig(max_grad_norm=1.0),
    autocast=None,
    gradient_checkpointing=False,
    timeout_s=120.0,
)
