"""A PPO run of seconds: a tiny Llama, a letter tokenizer, a reward one can compute by hand. Also a program."""

from __future__ import annotations

import argparse
import string
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, TrainerCallback

from fuse import PPOConfig, PPOTrainer

from ..tiny_models import build, classifier, language_model, word_tokenizer

VOCABULARY = ["<pad>", "<eos>", *string.ascii_lowercase[:14]]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per letter a..n."""
    return word_tokenizer(VOCABULARY, unknown="<pad>", splits=True, pad_token="<pad>", eos_token="<eos>")


OPTIONS: Mapping[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}


def policy(architecture: str = "llama", **overrides: Any) -> Any:
    return build(language_model(architecture, **{**OPTIONS, **overrides}))


def scorer(seed: int, architecture: str = "llama", **overrides: Any) -> Any:
    return build(classifier(architecture, **{**OPTIONS, **overrides}), seed=seed)


def rows(count: int = 16) -> list[dict[str, Any]]:
    return [{"input_ids": [2 + index % 14, 2 + (3 * index) % 14], "target": index} for index in range(count)]


def count_a(prompts: list[str], responses: list[str], target: list[int]) -> list[float]:
    """The share of the letter a."""
    assert len(prompts) == len(responses) == len(target)
    return [response.count("a") / max(1, len(response)) for response in responses]


def config(output_dir: Path, **overrides: Any) -> PPOConfig:
    options: dict[str, Any] = {
        "output_dir": str(output_dir),
        "num_devices": 1,
        "total_episodes": 16,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "num_ppo_epochs": 2,
        "response_length": 8,
        "stop_token": "eos",
        "learning_rate": STEP,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return PPOConfig(**(options | overrides))


def trainer(
    output_dir: Path,
    *,
    reward: Any = count_a,
    callbacks: Any = None,
    eval_dataset: Any = None,
    models: Mapping[str, Any] = MappingProxyType({}),
    **overrides: Any,
) -> PPOTrainer:
    """`models`: options of their configurations; `overrides`: of the run's."""
    return PPOTrainer(
        args=config(output_dir, **overrides),
        processing_class=tokenizer(),
        model=policy(**models),
        ref_model=None,
        reward_model=reward,
        train_dataset=rows(),
        value_model=scorer(1, **models),
        callbacks=callbacks,
        eval_dataset=eval_dataset,
    )


def train(output_dir: Path, **options: Any) -> PPOTrainer:
    """A whole run, as `trainer` makes it."""
    made = trainer(output_dir, **options)
    made.train()
    return made


STEP = 1e-2
"""Of weights: AdamW's learning rate."""
ROUNDING = 3e-4
"""Of weights after some steps, where micro-batches of inference or CPUs differ; another token makes far more."""


def difference(first: torch.nn.Module, second: torch.nn.Module) -> float:
    """The largest of two models' weights."""
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return max(float((one - other).abs().max()) for one, other in pairs)


class Announce(TrainerCallback):
    """Prints the number of every update that was saved, and of every one that has begun: its first sample is there.

    held: the update that goes on only once there is the file `go`.
    """

    def __init__(self, held: int | None = None, go: Path = Path()) -> None:
        self.begun = self.ended = 0
        self._held, self._go = held, go

    def reward(self, prompts: list[str], responses: list[str], target: list[int]) -> list[float]:
        if self.begun == self.ended:
            self.begun += 1
            print(f"began {self.begun}", flush=True)
            while self.begun == self._held and not self._go.exists():
                time.sleep(0.01)
        return count_a(prompts, responses, target)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ended = state.global_step

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        print(f"saved {state.global_step}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--updates", type=int, default=4)
    parser.add_argument("--save-steps", type=int, default=1)
    parser.add_argument("--grace", type=float, default=25.0)
    parser.add_argument("--held", type=int)
    arguments = parser.parse_args()
    announce = Announce(arguments.held, arguments.output_dir / "go")
    run = trainer(
        arguments.output_dir,
        reward=announce.reward,
        total_episodes=8 * arguments.updates,
        save_strategy="steps",
        save_steps=arguments.save_steps,
        sigterm_grace_s=arguments.grace,
        num_sample_generations=0,
        callbacks=[announce],
    )
    run.train(resume_from_checkpoint=arguments.resume)
