"""The embedded example: strings of digits, of which people prefer even ones, mostly, and a tiny base model.

A row's responses are digits at random, and the one with the larger share of even digits was chosen nine times in ten.
So fine-tuning gives a policy that writes digits, somewhat more even ones than odd, and a reward model learns from pairs
what nobody said; the policy then learns it from the reward model.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from fuse.demo.task import SumTask, prompt_text
from fuse.demo.tokenizer import arithmetic_tokenizer
from fuse.demo.warmup import small_llama

NUM_ROWS = 8_000
MOST_DIGITS = 12
MISTAKES = 0.1
"""The share of rows in which the other response was chosen."""
SFT_OPTIONS = ("--per_device_train_batch_size=32", "--learning_rate=2e-3", "--num_train_epochs=2")
REWARD_OPTIONS = ("--per_device_train_batch_size=32", "--learning_rate=5e-4", "--num_train_epochs=1")
RL_OPTIONS = (
    *("--num-devices=2", "--use-cpu", "--total-episodes=1920", "--per-device-train-batch-size=8"),
    *("--gradient-accumulation-steps=8", "--num-mini-batches=2", "--num-ppo-epochs=2", "--learning-rate=2e-4"),
    *("--kl-coef=0.1", "--temperature=1.0", "--lam=0.95", f"--response-length={MOST_DIGITS + 1}"),
)


def preferences(seed: int) -> Iterator[dict[str, str]]:
    """Endless rows; one seed gives one sequence."""
    generator = np.random.default_rng([seed, 2])
    for terms in SumTask(max_terms=6, stop_probability=0.2).problems(seed):
        one, other = (
            "".join(map(str, generator.integers(0, 10, generator.integers(4, MOST_DIGITS + 1)))) for _ in range(2)
        )
        if even_share(one) != even_share(other):
            better, worse = sorted((one, other), key=even_share, reverse=True)
            chosen, rejected = (worse, better) if generator.random() < MISTAKES else (better, worse)
            yield {"prompt": prompt_text(terms), "chosen": chosen, "rejected": rejected}


def even_share(text: str) -> float:
    """Of the characters."""
    return sum(character in "02468" for character in text) / len(text) if text else 0.0


def rows(seed: int) -> list[dict[str, str]]:
    """The demonstration's data."""
    return list(islice(preferences(seed), NUM_ROWS))


def save_base(directory: Path, seed: int) -> None:
    """Write a freshly initialised Llama and its tokenizer, unless they are there."""
    if not directory.exists():
        tokenizer = arithmetic_tokenizer()
        small_llama(tokenizer, seed=seed, hidden_size=64).save_pretrained(directory)
        tokenizer.save_pretrained(directory)
