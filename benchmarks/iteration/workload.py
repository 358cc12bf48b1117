"""What `fuse bench iteration` iterates on: models, prompts, and how long each response is to be, if that is forced."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from fuse.benchmarks.lengths import response_lengths, scaled_to
from fuse.benchmarks.llama import llama_config, random_llama
from fuse.benchmarks.word_problems import messages, word_problems
from fuse.commands.models import critic_from_policy, load_policy, load_tokenizer
from fuse.engines.limits import num_positions
from fuse.trainers.data import prompt_rows, read_rows

_HEAD_STD = 0.02
_PAD, _EOS = "[PAD]", "[EOS]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Of the embedded model and its prompts."""

    layers: int
    hidden: int
    vocab: int
    prompt_tokens: int
    head_dim: int | None = None


DEFAULT_SIZE = Size(layers=4, hidden=256, vocab=1024, prompt_tokens=32)
"""A head of a third of a layer: beside a larger one four layers cannot be dealt evenly over two stages."""
SMOKE_SIZE = Size(layers=2, hidden=32, vocab=128, prompt_tokens=6)


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """All four of PPO, and the tokenizer whose padding they know."""

    policy: PreTrainedModel
    reference: PreTrainedModel
    reward: PreTrainedModel
    critic: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One batch per round: prompt i and the number of tokens of its response, `lengths[i]`, belong to round i // batch.

    Every round has prompts and lengths of its own, for what is learnt of a prompt's response must not pay here.
    lengths: None for responses that end where the model ends them, or at `max_new_tokens`.
    num_generations: samples side by side that answer one prompt.
    """

    models: Models
    prompts: tuple[tuple[int, ...], ...]
    lengths: tuple[int, ...] | None
    batch: int
    mini_batches: int
    micro_batch: int
    epochs: int
    max_new_tokens: int
    algorithm: Literal["ppo", "grpo"] = "ppo"
    num_generations: int = 1
    bf16: bool = False

    @property
    def num_rounds(self) -> int:
        return len(self.prompts) // self.batch

    @property
    def prompts_per_round(self) -> int:
        return self.batch // self.num_generations

    def rows(self, round_index: int) -> list[dict[str, Any]]:
        """The dataset's rows of a round."""
        size = self.prompts_per_round
        return self.dataset()[round_index * size : (round_index + 1) * size]

    def dataset(self) -> list[dict[str, Any]]:
        """All rounds' rows, one per prompt."""
        rows: list[dict[str, Any]] = [{"input_ids": list(prompt)} for prompt in self.prompts[:: self.num_generations]]
        if self.algorithm == "grpo":
            return [{**row, "prompt": str(index)} for index, row in enumerate(rows)]
        return rows

    def round_lengths(self, round_index: int) -> tuple[int, ...] | None:
        """Response tokens of a round's prompts, where they are forced."""
        first = round_index * self.batch
        return None if self.lengths is None else self.lengths[first : first + self.batch]

    def options(self) -> dict[str, Any]:
        """Under the names that this project's configuration and TRL's share.

        The learning rate is 0: updates cost what they cost, but all rounds of all trainers start from the same weights.
        Gradients are not clipped, for TRL's PPO does not.
        """
        common = {
            "per_device_train_batch_size": self.micro_batch,
            "learning_rate": 0.0,
            "max_grad_norm": 0.0,
            "gradient_checkpointing": False,
            "bf16": self.bf16,
            "use_cpu": not torch.cuda.is_available(),
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "seed": 0,
        }
        micro_batches = self.batch // self.micro_batch
        if self.algorithm == "grpo":
            return common | {
                "gradient_accumulation_steps": micro_batches // self.mini_batches,
                "steps_per_generation": micro_batches,
                "num_iterations": self.epochs,
                "num_generations": self.num_generations,
                "max_completion_length": self.max_new_tokens,
                "max_steps": 1000 * self.mini_batches * self.epochs,
                "beta": 0.04,  # with a reference to infer by
            }
        return common | {
            "gradient_accumulation_steps": micro_batches,
            "num_mini_batches": self.mini_batches,
            "num_ppo_epochs": self.epochs,
            "response_length": self.max_new_tokens,
            "stop_token": "eos" if self.lengths is None else None,
            # Of a long run: planning is allowed what it is worth there.
            "total_episodes": 1000 * self.batch,
            "num_sample_generations": 0,
        }


def even_tokens(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """A reward that takes next to no time: the share of tokens with even numbers."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def embedded_models(size: Size, max_new_tokens: int) -> Models:
    """Random Llamas, whose weights do not matter, as lengths are forced."""
    words = {f"w{index}": index for index in range(2, size.vocab)} | {_PAD: 0, _EOS: 1}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w2")),
        pad_token=_PAD,
        eos_token=_EOS,
        padding_side="left",
    )
    head = {} if size.head_dim is None else {"head_dim": size.head_dim}
    config = llama_config(
        **head,
        context=size.prompt_tokens + max_new_tokens,
        num_layers=size.layers,
        hidden_size=size.hidden,
        vocab_size=size.vocab,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return _with_classifiers(random_llama(config), tokenizer)


def load_models(path: str, pad_token: str | None) -> Models:
    """The policy at `path`, its copy as reference, and classifiers on its layers as critic and reward model.

    Raises:
        ValueError: no such model or tokenizer, or a tokenizer that pads with nothing.
    """
    disable_progress_bar()  # of loading
    tokenizer = load_tokenizer(path, pad_token)
    tokenizer.padding_side = "left"
    return _with_classifiers(load_policy(path), tokenizer)


def _with_classifiers(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Models:
    return Models(
        policy=policy,
        reference=copy.deepcopy(policy),
        reward=_classifier(policy, tokenizer.pad_token_id, seed=1),
        critic=_classifier(policy, tokenizer.pad_token_id, seed=2),
        tokenizer=tokenizer,
    )


def _classifier(policy: PreTrainedModel, pad_token_id: int, seed: int) -> PreTrainedModel:
    """On the policy's layers, with a random head: that of a new critic is zero, and so would be most gradients."""
    classifier = critic_from_policy(policy, pad_token_id)
    generator = torch.Generator().manual_seed(seed)
    torch.nn.init.normal_(classifier.get_parameter("score.weight"), std=_HEAD_STD, generator=generator)
    return classifier


def random_prompts(models: Models, num_prompts: int, num_tokens: int) -> tuple[tuple[int, ...], ...]:
    """Prompts of equal length, of tokens that are not special."""
    special = set(models.tokenizer.all_special_ids)
    ordinary = [token for token in range(models.policy.config.get_text_config().vocab_size) if token not in special]
    drawn = np.random.default_rng(1).choice(ordinary, (num_prompts, num_tokens))
    return tuple(map(tuple, drawn.tolist()))


def read_prompts(
    path: Path, column: str | None, models: Models, num_prompts: int, max_new_tokens: int
) -> tuple[tuple[int, ...], ...]:
    """The file's prompts, over and over if there are fewer.

    Raises:
        ValueError: the file holds no prompts, or one that leaves no room for a response.
    """
    prompts = _prompt_tokens(itertools.islice(read_rows(path), num_prompts), column, models, max_new_tokens)
    return tuple(itertools.islice(itertools.cycle(prompts), num_prompts))


def word_problem_prompts(models: Models, num_prompts: int, max_new_tokens: int) -> tuple[tuple[int, ...], ...]:
    """Word problems through the tokenizer's chat template.

    Raises:
        ValueError: the tokenizer has no chat template.
    """
    rows = [{"problem": messages(row["question"])} for row in word_problems(num_prompts)]
    return _prompt_tokens(rows, "problem", models, max_new_tokens)


def _prompt_tokens(
    rows: Iterable[Mapping[str, Any]], column: str | None, models: Models, max_new_tokens: int
) -> tuple[tuple[int, ...], ...]:
    context = num_positions(models.policy.config)
    tokenised = prompt_rows(
        rows, models.tokenizer, prompt_column=column, response_length=max_new_tokens, context=context
    )
    return tuple(tuple(row["input_ids"]) for row in tokenised)


def forced_lengths(path: Path | None, num_samples: int, batch: int, longest: int) -> tuple[int, ...]:
    """The first lengths of a trace, scaled so that the longest has `longest` tokens; without a file, a synthetic mix.

    A trace shorter than `num_samples` starts again, but has to fill a batch.
    """
    lengths = scaled_to(response_lengths(path, batch, num_samples), longest)
    return tuple(itertools.islice(itertools.cycle(lengths), num_samples))
