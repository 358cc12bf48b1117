"""GRPO runs of seconds: the tiny Llama and the letters of `tiny`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fuse import GRPOConfig, GRPOTrainer

from . import tiny


def rows(count: int = 16) -> list[dict[str, Any]]:
    """Prompts of two letters, and a column."""
    letters = tiny.VOCABULARY[2:]
    return [{"prompt": letters[i % 14] + letters[3 * i % 14], "target": letters[i % 5]} for i in range(count)]


def count_target(completions: list[str], target: list[str], **kwargs: Any) -> list[float]:
    """The share of a letter."""
    return [text.count(letter) / max(1, len(text)) for text, letter in zip(completions, target, strict=True)]


def config(output_dir: Path, kind: type = GRPOConfig, **overrides: Any) -> Any:
    options: dict[str, Any] = {
        "output_dir": str(output_dir),
        "num_devices": 1,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_generations": 4,
        "max_completion_length": 8,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "trace_steps": 0,
    }
    return kind(**(options | overrides))


def trainer(output_dir: Path, *, rewards: Any = count_target, **options: Any) -> GRPOTrainer:
    """`options`: of the configuration, and those of the trainer that _OF_TRAINERS names; algorithm: which trainer."""
    others = {name: options.pop(name) for name in [*options] if name in _OF_TRAINERS}
    kind: Any = options.pop("algorithm", GRPOTrainer)
    others.setdefault("model", tiny.policy())
    others.setdefault("train_dataset", rows())
    others.setdefault("processing_class", tiny.tokenizer())
    args = config(output_dir, kind.CONFIG, **options)
    made: GRPOTrainer = kind(reward_funcs=rewards, args=args, **others)
    return made


_OF_TRAINERS = (
    "model",
    "peft_config",
    "callbacks",
    "eval_dataset",
    "train_dataset",
    "processing_class",
    "reward_processing_classes",
)


def train(output_dir: Path, **options: Any) -> GRPOTrainer:
    """A whole run, as `trainer` makes it."""
    made = trainer(output_dir, **options)
    made.train()
    return made
