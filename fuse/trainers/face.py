"""What transformers' Trainer shows to callbacks and scripts, of whatever algorithm."""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, TrainerCallback, TrainerControl
from transformers.trainer_callback import CallbackHandler

from fuse.trainers.callbacks import PPOState
from fuse.trainers.run import Run


class TrainerFace:
    """The part of a trainer that looks into its run."""

    _run: Run

    @property
    def state(self) -> PPOState:
        return self._run.state

    @property
    def control(self) -> TrainerControl:
        return self._run.control

    @property
    def callback_handler(self) -> CallbackHandler:
        return self._run.callback_handler

    @property
    def optimizer(self) -> Optimizer:
        return self._run.optimizer

    @property
    def lr_scheduler(self) -> LRScheduler:
        return self._run.lr_scheduler

    @property
    def ema_model(self) -> PreTrainedModel | None:
        """The average of the policy's weights over optimizer steps, after `train()`; None without `args.ema_decay`."""
        return self._run.average

    def add_callback(self, callback: type[TrainerCallback] | TrainerCallback) -> None:
        self.callback_handler.add_callback(callback)

    def remove_callback(self, callback: type[TrainerCallback] | TrainerCallback) -> None:
        self.callback_handler.remove_callback(callback)

    def pop_callback(self, callback: type[TrainerCallback] | TrainerCallback) -> TrainerCallback | None:
        popped: TrainerCallback | None = self.callback_handler.pop_callback(callback)
        return popped

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the epoch, remember and report to the callbacks; `start_time` is accepted and not used, as in TRL."""
        self._run.log(logs)

    def is_local_process_zero(self) -> bool:
        return True

    def is_world_process_zero(self) -> bool:
        return True
