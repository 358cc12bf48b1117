"""Rows of text for the policy's optimizer steps: read, tokenised, drawn in an order that a resumed run continues."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from fuse.config.auxiliary import largest_text
from fuse.config.prompt_tokens import PromptTokens
from fuse.config.run import RunConfig
from fuse.engines.limits import num_positions
from fuse.intrastage.cost_profile import Shape
from fuse.trainers.data import MESSAGES, TOKENS, read_rows
from fuse.trainers.prompts import counted_tokens
from fuse.trainers.response_tokens import with_responses
from fuse.trainers.token_ids import token_ids
from fuse.training.auxiliary import Text, text_batches
from fuse.training.steps import OptimizerStep

PROMPT = "prompt"
RESPONSES = ("completion", "response", "chosen")
"""Columns of what follows a prompt."""
_LABELS, _IGNORED = "labels", -100

_logger = logging.getLogger(__name__)

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class AuxiliaryText:
    """What optimizer steps have of the rows. batch_size: rows of a step; None for as many as it has samples.

    coef: as of `text_batches`. largest: the micro-batch that there may be at most.
    """

    rows: Sequence[Text]
    seed: int
    batch_size: int | None
    coef: float
    largest: Shape

    def beside(self, steps: Sequence[OptimizerStep], update: int) -> list[OptimizerStep]:
        """The steps of an update, counted from 1, with rows that are a function of (seed, update, step).

        Each is read once in a pass over all rows; those of updates that do not train the policy are passed over.
        """
        made = []
        for number, step in enumerate(steps, start=(update - 1) * len(steps)):
            count = self.batch_size or sum(map(len, step.micro_batches))
            rows = [self._row(place) for place in range(number * count, (number + 1) * count)]
            texts = text_batches(rows, most_rows=self.largest.num_sequences, coef=self.coef)
            made.append(replace(step, auxiliary=texts))
        return made

    def _row(self, place: int) -> Text:
        number, index = divmod(place, len(self.rows))
        return self.rows[_order(self.seed, number, len(self.rows))[index]]


@lru_cache(maxsize=2)
def _order(seed: int, number: int, count: int) -> Sequence[int]:
    """Of a pass over so many rows."""
    order: list[int] = np.random.default_rng([seed, number, 3]).permutation(count).tolist()
    return order


def auxiliary_text(
    args: RunConfig, tokenizer: PreTrainedTokenizerBase, policy: PretrainedConfig, prompts: PromptTokens
) -> AuxiliaryText | None:
    """What `args` asks for, beside prompts of so many tokens; None for nothing. Says how many rows there are.

    Raises:
        ValueError: no such dataset, or rows that cannot be learnt, naming the first.
    """
    if args.auxiliary_dataset is None:
        return None
    largest = largest_text(
        max_length=args.auxiliary_max_length,
        most_tokens=args.auxiliary_micro_batch_tokens,
        micro_batch_size=args.per_device_train_batch_size,
        longest_sample=(prompts.typical if prompts.most is None else prompts.most) + args.max_response_tokens,
    )
    positions = num_positions(policy)
    if positions is not None and largest.num_tokens > positions:
        raise ValueError(
            f"auxiliary_max_length={largest.num_tokens} is more than the model's context of {positions}: choose at "
            f"most that"
        )
    rows = read_rows(args.auxiliary_dataset)
    try:
        texts = list(text_rows(rows, tokenizer, column=args.auxiliary_text_column, max_length=largest.num_tokens))
        _check_tokens(texts, policy)
    except ValueError as error:
        raise ValueError(f"auxiliary_dataset {args.auxiliary_dataset}: {error}") from error
    return AuxiliaryText(
        rows=texts,
        seed=args.seed,
        batch_size=args.auxiliary_batch_size,
        coef=args.auxiliary_coef,
        largest=largest,
    )


def text_rows(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, *, column: str = "text", max_length: int
) -> Iterator[Text]:
    """The rows, tokenised, of at most so many tokens each. column: of those that are text.

    Of a response that does not fit only what does is learnt; where nothing of it does the row is left out, and a
    warning says how many are.

    Raises:
        ValueError: a row without anything to learn, by its number from 0, or no row is left.
    """
    read = _reader(rows[0], column)
    num_cut = num_left_out = num_rows = 0
    for index, row in enumerate(rows):
        try:
            text, is_document = read(row, index, tokenizer)
        except ValueError as error:
            reason = str(error).removeprefix("dataset row 0 has ")
            raise ValueError(
                reason if reason.startswith("dataset row") else f"dataset row {index}: {reason}"
            ) from error
        if not text.learnt:
            raise ValueError(f"dataset row {index} has nothing to learn: remove it")
        num_cut += len(text.input_ids) > max_length
        pieces = [piece for piece in _pieces(text, max_length, is_document=is_document) if piece.learnt]
        num_left_out += not pieces
        num_rows += len(pieces)
        yield from pieces
    if num_cut:
        _logger.warning(
            "auxiliary_dataset: %d of %d rows have more than %d tokens and are cut, %d of which have nothing to learn "
            "before that and are left out",
            *(num_cut, len(rows), max_length, num_left_out),
        )
    if not num_rows:
        raise ValueError(f"no row has anything to learn in its first {max_length} tokens: raise auxiliary_max_length")


def _pieces(text: Text, most: int, *, is_document: bool) -> Iterator[Text]:
    """All of a document, else the beginning."""
    for start in range(0, len(text.input_ids) if is_document else 1, most):
        ids = text.input_ids[start : start + most]
        yield Text(ids, tuple(place - start for place in text.learnt if start < place < start + len(ids)))


_Read = Callable[[Row, int, PreTrainedTokenizerBase], tuple[Text, bool]]
"""A row, its number -> its tokens, and whether these are a document that may be cut into several."""


def _reader(row: Row, column: str) -> _Read:
    """By the columns of a dataset's first row."""
    if column in row and column not in (PROMPT, MESSAGES, TOKENS):
        return lambda row, index, tokenizer: (_of_text(row.get(column), tokenizer), True)
    if row.get(TOKENS) is not None:
        return lambda row, index, tokenizer: (_of_tokens(row, index), _LABELS not in row)
    if row.get(MESSAGES) is not None:
        return lambda row, index, tokenizer: (_of_messages(row.get(MESSAGES), tokenizer), False)
    for name in RESPONSES:
        if row.get(PROMPT) is not None and row.get(name) is not None:
            return lambda row, index, tokenizer: (_of_response(row.get(PROMPT), row.get(name), tokenizer), False)
    raise ValueError(
        f"rows have the columns {', '.join(row) or 'none'}: give {PROMPT} and {' or '.join(RESPONSES)}, {MESSAGES}, "
        f"{column}, or {TOKENS}"
    )


def _of_text(text: object, tokenizer: PreTrainedTokenizerBase) -> Text:
    """All tokens, and the end of sequence."""
    if not isinstance(text, str) or not text.strip():
        raise ValueError("there is no text: remove it")
    ids = list(tokenizer(text)[TOKENS])
    ids = ids if ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]
    return Text(tuple(ids), tuple(range(1, len(ids))))


def _of_tokens(row: Row, index: int) -> Text:
    if row.get(_LABELS) is None:
        ids = counted_tokens(row, index)
        return Text(tuple(ids), tuple(range(1, len(ids))))
    ids, labels = token_ids(row[TOKENS], index), list(row[_LABELS])
    if len(labels) != len(ids):
        raise ValueError(f"{len(ids)} {TOKENS} and {len(labels)} {_LABELS}: give one for each")
    return Text(tuple(ids), tuple(place for place in range(1, len(ids)) if labels[place] != _IGNORED))


def _of_messages(messages: Any, tokenizer: PreTrainedTokenizerBase) -> Text:
    is_answered = isinstance(messages, list) and len(messages) > 1 and messages[-1].get("role") == "assistant"
    if not is_answered:
        raise ValueError("messages do not end with the assistant's, which is what is learnt")
    return _of_response(messages[:-1], messages[-1:], tokenizer)


def _of_response(prompt: Any, response: Any, tokenizer: PreTrainedTokenizerBase) -> Text:
    if response is None or not len(response):
        raise ValueError("there is no response to the prompt: remove it")
    if isinstance(prompt, list) and isinstance(response, str):
        response = [{"role": "assistant", "content": response}]
    if isinstance(prompt, str) and not isinstance(response, str):
        raise ValueError("the prompt is a string and the response is not: give both as strings, or as messages")
    prompt_ids, own_ids = with_responses(prompt, (response,), tokenizer)
    ids = (*prompt_ids, *own_ids)
    return Text(ids, tuple(range(len(prompt_ids), len(ids))))


def _check_tokens(texts: Sequence[Text], policy: PretrainedConfig) -> None:
    size = policy.get_text_config().vocab_size
    highest = max(max(text.input_ids) for text in texts)
    if highest >= size:
        raise ValueError(f"rows hold token {highest}, the policy has {size}: tokenise with the policy's own tokenizer")
