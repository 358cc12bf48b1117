"""What callbacks see of a run: the models, the state."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl
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

from fuse.config.run import RunConfig

_logger = logging.getLogger(__name__)


@dataclass
class PPOState(TrainerState):
    """transformers' TrainerState with the number of prompts consumed so far.

    kl_coef: of the next update, where it follows a target; None before the first one.
    reference_scores: of the reference's responses, by row of the dataset, as far as they are known. reward_variances:
    of several responses, likewise.
    """

    episode: int = 0
    kl_coef: float | None = None
    reference_scores: list[float | None] = field(default_factory=list)
    reward_variances: list[float | None] = field(default_factory=list)


class PolicyAndValue(nn.Module):
    """The two trained models under the names that TRL's callbacks know: `.policy` and `.value_model`."""

    def __init__(self, policy: PreTrainedModel, value_model: PreTrainedModel) -> None:
        super().__init__()
        self.policy = policy
        self.value_model = value_model
        self.config = policy.config


def callback_handler(args: RunConfig, callbacks: list[TrainerCallback] | None, **references: Any) -> CallbackHandler:
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


def callback_states(handler: CallbackHandler, control: TrainerControl) -> dict[str, Any]:
    """What stateful callbacks remember, by the names of their classes, as a checkpoint of transformers keeps it."""
    stateful: Any = [item for item in [*handler.callbacks, control] if isinstance(item, ExportableState)]
    states: Any = PPOState(stateful_callbacks=stateful).stateful_callbacks
    return dict(states)


def restore_callbacks(handler: CallbackHandler, states: Mapping[str, Any]) -> None:
    """Have the handler's stateful callbacks remember what a checkpoint says of their classes, in their order."""
    left = {name: list(saved) if isinstance(saved, list) else [saved] for name, saved in states.items()}
    for index, callback in enumerate(handler.callbacks):
        if isinstance(callback, ExportableState) and left.get(name := type(callback).__name__):
            saved = left[name].pop(0)
            restored = type(callback)(**saved.get("args", {}))
            for attribute, value in saved.get("attributes", {}).items():
                setattr(restored, attribute, value)
            handler.callbacks[index] = restored
    if absent := [name for name, saved in left.items() if saved and name != TrainerControl.__name__]:
        _logger.warning("the checkpoint has the state of callbacks that this run has not: %s", ", ".join(absent))
