"""The order of prompts: a function of (seed, pass, position), so a resumed run continues it exactly."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler, SequentialSampler

from fuse.config.prompt_tokens import PromptTokens
from fuse.sample import Sample
from fuse.trainers.token_ids import token_ids

Row = Mapping[str, Any]
_TYPICAL_ROWS = 256
NOT_COLUMNS = frozenset({"input_ids", "attention_mask", "token_type_ids"})
"""Columns that are the prompt; the others go to reward functions."""


class PassSampler(Sampler[int]):
    """A permutation of the dataset per pass, drawn from (seed, pass). left_out: rows that it does without."""

    def __init__(self, dataset: Sized, seed: int) -> None:
        self._length = len(dataset)
        self._seed = seed
        self.pass_index = 0
        self.left_out: frozenset[int] = frozenset()

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self._seed << 20) + self.pass_index)
        rows = torch.randperm(self._length, generator=generator).tolist()
        return (row for row in rows if row not in self.left_out)

    def __len__(self) -> int:
        return self._length - len(self.left_out)


def prompt_loader(
    dataset: Any,
    batch_size: int,
    seed: int,
    collate: Callable[[list[Row]], Any] | None = None,
    *,
    shuffles: bool = True,
) -> DataLoader[Any]:
    """Batches of dataset rows, shuffled or in their order; an incomplete last batch of a pass is dropped.

    Raises:
        ValueError: the dataset holds less than one batch.
    """
    if len(dataset) < batch_size:
        raise ValueError(
            f"the dataset has {len(dataset)} rows, fewer than one batch of {batch_size}: add rows, or lower "
            f"per_device_train_batch_size or gradient_accumulation_steps"
        )
    sampler = PassSampler(dataset, seed) if shuffles else SequentialSampler(dataset)
    return DataLoader(dataset, batch_size=batch_size, sampler=sampler, collate_fn=collate or list, drop_last=True)


def batches(loader: Iterable[Any], start: int) -> Iterator[Any]:
    """Batches of endless passes over `loader`, beginning with batch number `start` of the run."""
    assert isinstance(loader, Sized)
    first_pass, first_batch = divmod(start, len(loader))
    for pass_index in itertools.count(first_pass):
        sampler = getattr(loader, "sampler", None)
        if isinstance(sampler, PassSampler):
            sampler.pass_index = pass_index
        yield from itertools.islice(iter(loader), first_batch, None)
        first_batch = 0


def row_numbers(loader: DataLoader[Any], start: int) -> Iterator[list[int]]:
    """Which rows of the dataset are in each of these `batches`."""
    assert isinstance(loader.batch_sampler, Sized)
    first_pass, first_batch = divmod(start, len(loader.batch_sampler))
    for pass_index in itertools.count(first_pass):
        if isinstance(loader.sampler, PassSampler):
            loader.sampler.pass_index = pass_index
        yield from itertools.islice(iter(loader.batch_sampler), first_batch, None)
        first_batch = 0


def rows(loader: Iterable[Sequence[Any]], start: int, batch_size: int) -> Iterator[Any]:
    """Rows of the same passes one by one, beginning with row number `start`. batch_size: rows of each batch."""
    first_batch, first_row = divmod(start, batch_size)
    return itertools.islice(itertools.chain.from_iterable(batches(loader, first_batch)), first_row, None)


def make_samples(
    batch: Any, first_id: int, pad_token_id: int, *, drop_padding: bool = False, most_tokens: int | None = None
) -> list[Sample]:
    """Samples of a batch: a list of rows, or what a data collator made of them (padded `input_ids`).

    An `attention_mask` says which tokens count. Without one a collator's padding is stripped from both ends;
    `drop_padding` drops every padding token wherever it stands, as TRL's masks do. Of longer prompts the last
    `most_tokens` are kept.
    """
    collated = not isinstance(batch, Sequence)
    samples = []
    for index, row in enumerate(_rows(batch) if collated else batch):
        prompt = _prompt(row, pad_token_id, strip=collated)
        if drop_padding:
            prompt = [token for token in prompt if token != pad_token_id]
        prompt = prompt if most_tokens is None else prompt[-most_tokens:]
        columns = {name: value for name, value in row.items() if name not in NOT_COLUMNS}
        samples.append(Sample(id=first_id + index, prompt_ids=tuple(prompt), columns=columns))
    return samples


def _prompt(row: Row, pad_token_id: int, *, strip: bool) -> list[int]:
    tokens = [int(token) for token in row["input_ids"]]
    if (mask := row.get("attention_mask")) is not None:
        return [token for token, counts in zip(tokens, mask, strict=True) if counts]
    real = [index for index, token in enumerate(tokens) if token != pad_token_id]
    return tokens[real[0] : real[-1] + 1] if strip and real else tokens


def counted_tokens(row: Row, index: int) -> list[int]:
    """The tokens of dataset row `index` that its `attention_mask` lets count; without one, all.

    Raises:
        ValueError: they are no list of numbers, or the mask is of another length.
    """
    tokens = token_ids(row["input_ids"], index)
    if row.get("attention_mask") is None:
        return tokens
    mask = token_ids(row["attention_mask"], index, "attention_mask")
    if len(mask) != len(tokens):
        raise ValueError(
            f"dataset row {index} has {len(tokens)} input_ids and an attention_mask of {len(mask)}: give one mask "
            f"value per token"
        )
    return [token for token, counts in zip(tokens, mask, strict=True) if counts]


def _rows(columns: Mapping[str, Any]) -> list[Row]:
    length = len(columns["input_ids"])
    return [{name: values[index] for name, values in columns.items()} for index in range(length)]


def prompt_tokens(lengths: Sequence[Sequence[int]], kept: int | None = None, *, collates: bool = False) -> PromptTokens:
    """Typically as the median of the first rows; the most are not known where a collator may change rows.

    lengths: of prompts, of the dataset that is trained on and then of others. kept: of longer ones so many tokens are
        used.
    """

    def used(length: int) -> int:
        return length if kept is None else min(length, kept)

    typical = statistics.median_low(map(used, lengths[0][:_TYPICAL_ROWS]))
    return PromptTokens(typical, None if collates else max(used(length) for each in lengths for length in each))
