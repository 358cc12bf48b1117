"""Whether the rows of a dataset hold prompts that the models can take, and which rows of it are used."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch.utils.data import Subset
from transformers import PretrainedConfig

from fuse.config.run import RunConfig
from fuse.engines.limits import num_positions
from fuse.trainers.prompts import counted_tokens


def too_long_remedy(option: str) -> str:
    """What can be done about prompts that are too long. option: what responses are limited by."""
    return f"shorten or remove them, lower {option}, or set long_prompts to 'drop' or 'truncate'"


_logger = logging.getLogger(__name__)


def usable_prompts(
    dataset: Any,
    argument: str,
    policy: PretrainedConfig,
    args: RunConfig,
    pad_token_id: int,
) -> tuple[Any, list[int]]:
    """The rows of `dataset`, which is the trainer's argument of that name, but for what `args.long_prompts` drops.

    And the tokens of each one's prompt, which are counted here alone.

    What is dropped, and what is to be truncated, is told in a warning.

    Raises:
        ValueError: naming the first row whose prompt is empty, outside the vocabulary or no list of tokens, or the
            first and the number of those that are too long; or no row is left.
    """
    lengths = []
    vocabulary_size = policy.get_text_config().vocab_size
    for index, row in enumerate(dataset):
        if "input_ids" not in row:
            names = ", ".join(row) or "none"
            raise ValueError(f"dataset row {index} has no column 'input_ids' (it has: {names}): tokenise the prompts")
        tokens = counted_tokens(row, index)
        if all(token == pad_token_id for token in tokens):
            raise ValueError(f"dataset row {index} has an empty prompt: remove it")
        highest = max(tokens)
        if highest >= vocabulary_size:
            raise ValueError(
                f"dataset row {index} holds token {highest}, the models have {vocabulary_size}: "
                f"tokenise with the models' own tokenizer"
            )
        lengths.append(len(tokens))
    response_length, long_prompts, option = args.max_response_tokens, args.long_prompts, args.MAX_RESPONSE_OPTION
    most = _most_tokens(policy, response_length)
    if most is None or all(length <= most for length in lengths):
        return dataset, lengths
    if most < 1:
        raise ValueError(
            f"{option}={response_length} leaves no room for prompts in the model's context of "
            f"{most + response_length}: lower {option}"
        )
    if long_prompts == "error":
        check_lengths(lengths, response_length, most + response_length, too_long_remedy(option), option)
    long = sum(length > most for length in lengths)
    what = f"{long} of {len(lengths)} prompts of {argument} have more than {most} tokens"
    if long_prompts == "truncate":
        _logger.warning("%s: their last %d are used", what, most)
        return dataset, lengths
    if long == len(lengths):
        raise ValueError(f"{what}, so that long_prompts='drop' leaves none: lower {option}, or truncate them")
    _logger.warning("%s and are left out", what)
    left = [index for index, length in enumerate(lengths) if length <= most]
    return Subset(dataset, left), [lengths[index] for index in left]


def kept_tokens(policy: PretrainedConfig, args: RunConfig) -> int | None:
    """How many of a prompt's last tokens are used; None for all."""
    return _most_tokens(policy, args.max_response_tokens) if args.long_prompts == "truncate" else None


def _most_tokens(policy: PretrainedConfig, response_length: int) -> int | None:
    """Of a prompt that leaves room for a response; None where the context has no end."""
    context = num_positions(policy)
    return None if context is None else context - response_length


def check_lengths(
    lengths: Sequence[int], response_length: int, context: int, remedy: str, option: str = "response_length"
) -> None:
    """Raises: ValueError for prompts that leave no room for a response: the first, and how many."""
    long = [index for index, length in enumerate(lengths) if length > context - response_length]
    if long:
        others = f", and so have {len(long) - 1} more of {len(lengths)} rows" if len(long) > 1 else ""
        raise ValueError(
            f"dataset row {long[0]} has {lengths[long[0]]} prompt tokens, more than the model's context of {context} "
            f"less {option}={response_length}{others}: {remedy}"
        )
