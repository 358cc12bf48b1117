"""What the inherited options that work do here, in the words of this trainer."""

from __future__ import annotations

from collections.abc import Mapping

ONE_VALUE = frozenset({"fp16", "optim", "gradient_checkpointing_kwargs", "hub_strategy"})
"""Options of which every other value than the default is refused, or does the same."""

HELP: Mapping[str, str] = {
    "output_dir": "Directory of the policy, checkpoints, traces and plans. Default: trainer_output.",
    "run_name": "Name of the run for what `report_to` names.",
    "report_to": "Where metrics go: none, all, or names such as tensorboard and wandb.",
    "project": "Project of the run, for Trackio.",
    "disable_tqdm": "Leave out transformers' progress bar; `fuse train` shows its own.",
    "trackio_space_id": "Space on the Hub that Trackio's metrics go to.",
    "trackio_bucket_id": "Bucket on the Hub that Trackio's metrics go to.",
    "trackio_static_space_id": "Static Space on the Hub that Trackio's metrics go to when the run ends.",
    "per_device_train_batch_size": "Samples of a micro-batch, on however many devices.",
    "gradient_accumulation_steps": "Micro-batches of a rollout batch: an update takes "
    "per_device_train_batch_size x gradient_accumulation_steps prompts, on however many devices.",
    "num_train_epochs": "Passes over the dataset, where neither total_episodes nor max_steps is set.",
    "max_steps": "Most updates, in place of num_train_epochs; -1 for no limit.",
    "learning_rate": "Learning rate of AdamW, at its highest.",
    "lr_scheduler_type": "How the learning rate changes from update to update.",
    "lr_scheduler_kwargs": "More of the learning-rate schedule's arguments, as JSON.",
    "warmup_steps": "Updates in which the learning rate rises; below 1, a share of all updates.",
    "weight_decay": "Weight decay of AdamW.",
    "adam_beta1": "Beta 1 of AdamW.",
    "adam_beta2": "Beta 2 of AdamW.",
    "adam_epsilon": "Epsilon of AdamW.",
    "max_grad_norm": "Norm that a model's gradient is clipped to, whatever stages it is cut into; 0 for none.",
    "gradient_checkpointing": "Compute activations again in backward passes instead of keeping them.",
    "use_cpu": "Run on CPU cores although there is a GPU.",
    "seed": "Of sampling, of the order of prompts, and of mini-batches.",
    "eval_strategy": "Whether completions of the evaluation prompts are shown every eval_steps updates.",
    "eval_steps": "Updates between two showings of completions; below 1, a share of all updates. Default: "
    "logging_steps, which is 10.",
    "eval_delay": "Updates before completions are first shown by eval_strategy.",
    "per_device_eval_batch_size": "Evaluation prompts of which completions are shown at a time during training.",
    "save_strategy": "Whether checkpoints are written every save_steps updates.",
    "save_steps": "Updates between two checkpoints; below 1, a share of all updates.",
    "save_total_limit": "Most checkpoints of this run that are kept, of which the oldest are deleted. Default: all.",
    "save_only_model": "Leave what a run needs to be resumed out of checkpoints.",
    "resume_from_checkpoint": "Checkpoint to go on from: its directory, or true for the last one in output_dir.",
    "restore_callback_states_from_checkpoint": "Have callbacks go on with what they remembered at the checkpoint.",
    "push_to_hub": "Upload the policy and the tokenizer to the Hub when the run has ended.",
    "hub_model_id": "Repository to upload to. Default: the name of output_dir.",
    "hub_token": "Token to upload with. Default: that of `hf auth login`.",
    "hub_private_repo": "Make the repository private. Default: as the organisation has it.",
    "hub_revision": "Branch to upload to. Default: main.",
}
