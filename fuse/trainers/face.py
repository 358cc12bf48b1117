"""What transformers' Trainer shows to callbacks and scripts, of whatever algorithm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainerControl
from transformers.trainer_callback import CallbackHandler

from fuse import checkpoint
from fuse.config.run import RunConfig
from fuse.driver.fleet import Fleet
from fuse.trainers.callbacks import PPOState
from fuse.trainers.publish import push_policy, write_model_card, write_policies
from fuse.trainers.run import Run


class TrainerFace:
    """The part of a trainer that looks into its run, and saves and shares what it has trained."""

    NAME: str
    """Of the algorithm, for people."""
    SOURCE: str
    """Its paper, for people."""

    args: RunConfig
    processing_class: PreTrainedTokenizerBase
    policy_model: PreTrainedModel
    """As users have it: inside of PEFT's where it has adapters."""
    _run: Run
    _fleet: Fleet | None

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

    # Models

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write policy and tokenizer, as `AutoModelForCausalLM.from_pretrained` reads them; into `ema` the average.

        With `args.push_to_hub` policy and tokenizer are uploaded, too.
        """
        if self._fleet is not None:
            self._fleet.fetch_weights(self._run.average)
        directory = Path(output_dir or self._run.output_dir)
        with checkpoint.saving(directory):
            saved = self._run.policy, self._run.average, self.processing_class
            write_policies(directory, *saved, merges=self.args.merge_adapters)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub("Model save")

    def push_to_hub(self, commit_message: str = "End of training", **options: Any) -> str:
        """Upload the policy and the tokenizer to `args.hub_model_id`, by default the output directory's name."""
        args = self.args
        place = {"token": args.hub_token, "private": args.hub_private_repo, "revision": args.hub_revision}
        options = {"commit_message": commit_message, **place, **options}
        return push_policy(self._name, self._run.policy, self.processing_class, **options)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write README.md into the output directory: what was trained, from what, how."""
        tags = [tags] if isinstance(tags, str) else tags or []
        name = model_name or self._name
        write_model_card(
            self._run.output_dir,
            name,
            self._run.policy,
            f"{self.SOURCE} on {self.state.episode} prompts",
            dataset_name,
            [self.NAME.lower(), *tags],
        )

    @property
    def _name(self) -> str:
        return self.args.hub_model_id or self._run.output_dir.name
