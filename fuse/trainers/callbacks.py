"""What callbacks see of a run: the models, the learning-rate schedule, the state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import (
    CallbackHandler,
    DefaultFlowCallback,
    ExportableState,
    PrinterCallback,
    ProgressCallback,
    TrainerState,
)
from transformers.utils.import_utils import is_in_notebook

from fuse.config.ppo import PPOConfig


@dataclass
class PPOState(TrainerState):
    """transformers' TrainerState with the number of prompts consumed so far."""

    episode: int = 0


class PolicyAndValue(nn.Module):
    """The two trained models under the names that TRL's callbacks know: `.policy` and `.value_model`."""

    def __init__(self, policy: PreTrainedModel, value_model: PreTrainedModel) -> None:
        super().__init__()
        self.policy = policy
        self.value_model = value_model
        self.config = policy.config


def learning_rate_schedule(args: PPOConfig, model: nn.Module) -> tuple[torch.optim.Optimizer, LRScheduler]:
    """The schedule that `args` names over `num_total_batches` updates.

    Its optimizer holds the parameters but no gradients: the workers' optimizers are the ones that step.

    Raises:
        ValueError: `lr_scheduler_kwargs` that the schedule does not take.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    num_updates = args.num_total_batches
    assert num_updates is not None
    assert not isinstance(args.lr_scheduler_kwargs, str), "TrainingArguments parses it"
    try:
        schedule = get_scheduler(
            args.lr_scheduler_type,
            optimizer,
            num_warmup_steps=args.get_warmup_steps(num_updates),
            num_training_steps=num_updates,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
    except TypeError as error:
        name = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
        raise ValueError(
            f"lr_scheduler_kwargs={args.lr_scheduler_kwargs!r} do not fit lr_scheduler_type={name!r} ({error}): "
            f"give what transformers.get_scheduler takes for it"
        ) from error
    return optimizer, schedule


def callback_handler(args: PPOConfig, callbacks: list[TrainerCallback] | None, **references: Any) -> CallbackHandler:
    """transformers' default and reporting callbacks, the user's, and a progress bar; `references` go to the handler."""
    every = [DefaultFlowCallback, *get_reporting_integration_callbacks(args.report_to), *(callbacks or [])]
    handler = CallbackHandler(every, **references)
    handler.add_callback(PrinterCallback if args.disable_tqdm else _progress_bar())
    return handler


def _progress_bar() -> type[TrainerCallback]:
    if not is_in_notebook():
        return ProgressCallback
    from transformers.utils.notebook import NotebookProgressCallback  # imports IPython

    return NotebookProgressCallback


def initial_state(handler: CallbackHandler, control: TrainerControl) -> PPOState:
    """The state of a run that has not begun; checkpoints keep what the handler's stateful callbacks remember."""
    stateful: Any = [item for item in [*handler.callbacks, control] if isinstance(item, ExportableState)]
    return PPOState(stateful_callbacks=stateful)
