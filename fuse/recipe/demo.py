"""The embedded example: worked sums by flawed teachers, of which the better one is preferred, and a tiny base model.

Both answers to a sum may have slips in their steps; that with fewer was chosen. So fine-tuning gives a policy that
slips as teachers do, and a reward model learns what neither teacher always does: to add without slips.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from fuse.demo.task import SumTask, prompt_text, worked_answer
from fuse.demo.tokenizer import arithmetic_tokenizer
from fuse.demo.warmup import small_llama

NUM_ROWS = 16_000
DATA_SPLIT = (8.0, 7.0, 1.0)
TASK = SumTask(max_terms=5, stop_probability=0.4)
SLIP_PROBABILITY = 0.3
SLIPS = (-2, -1, 1, 2)
"""To either side: else a reward model could tell by the size of numbers."""
SFT_OPTIONS = ("--per_device_train_batch_size=32", "--learning_rate=2e-3", "--num_train_epochs=2")
REWARD_OPTIONS = ("--per_device_train_batch_size=32", "--learning_rate=1e-3", "--num_train_epochs=3")
RL_OPTIONS = (
    *("--num-devices=2", "--use-cpu", "--total-episodes=2560", "--per-device-train-batch-size=8"),
    *("--gradient-accumulation-steps=8", "--num-mini-batches=2", "--num-ppo-epochs=2", "--learning-rate=1e-4"),
    *("--kl-coef=0.1", "--temperature=1.0", "--lam=0.95", f"--response-length={TASK.max_response_tokens}"),
)


def preferences(seed: int) -> Iterator[dict[str, str]]:
    """Endless rows; one seed gives one sequence."""
    generator = np.random.default_rng([seed, 2])
    for terms in TASK.problems(seed):
        num_steps = len(terms) - 1
        slipped = generator.random((2, num_steps)) < SLIP_PROBABILITY
        better, worse = sorted(slipped * generator.choice(SLIPS, (2, num_steps)), key=np.count_nonzero)
        if np.count_nonzero(better) < np.count_nonzero(worse):
            chosen, rejected = (worked_answer(terms, tuple(slips.tolist())) for slips in (better, worse))
            yield {"prompt": prompt_text(terms), "chosen": chosen, "rejected": rejected}


def rows(seed: int) -> list[dict[str, str]]:
    """The demonstration's data."""
    return list(islice(preferences(seed), NUM_ROWS))


def save_base(directory: Path, seed: int) -> None:
    """Write a freshly initialised Llama and its tokenizer, unless they are there."""
    if not directory.exists():
        tokenizer = arithmetic_tokenizer()
        small_llama(tokenizer, seed=seed).save_pretrained(directory)
        tokenizer.save_pretrained(directory)
