"""What is decoded: word problems, alone or after solved ones, or random tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedModel

from fuse.benchmarks.word_problems import word_problems

_MOST_SOLVED = 1000


def random_prompts(model: PreTrainedModel, num_prompts: int, num_tokens: int) -> list[list[int]]:
    """Of so many tokens each, the same every time."""
    vocab_size = model.config.get_text_config().vocab_size
    prompts: list[list[int]] = np.random.default_rng(1).integers(0, vocab_size, (num_prompts, num_tokens)).tolist()
    return prompts


def questions(path: str, num_prompts: int, solved_tokens: int = 0) -> list[list[int]]:
    """Word problems as the model's chat template has them, or as they are.

    solved_tokens: of other ones with their answers, in front of each.
    """
    tokenizer = AutoTokenizer.from_pretrained(path)
    solved = _solved(tokenizer, solved_tokens)
    chats = [[*solved, {"role": "user", "content": one["question"]}] for one in word_problems(num_prompts)]
    if tokenizer.chat_template is None:
        texts = ["\n".join(turn["content"] for turn in chat) for chat in chats]
    else:
        texts = [str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)) for chat in chats]
    return [tokenizer(text)["input_ids"] for text in texts]


def _solved(tokenizer: Any, num_tokens: int) -> Sequence[dict[str, str]]:
    """Questions and answers in turn, of at least so many tokens."""
    turns: list[dict[str, str]] = []
    for one in word_problems(_MOST_SOLVED, seed=1):
        if num_tokens <= 0:
            break
        turns += {"role": "user", "content": one["question"]}, {"role": "assistant", "content": one["answer"]}
        num_tokens -= len(tokenizer(f"{one['question']}\n{one['answer']}")["input_ids"])
    return turns
