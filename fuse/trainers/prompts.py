"""The order of prompts: a function of (seed, pass, position), so a resumed run continues it exactly."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from fuse.config.settings import PromptTokens
from fuse.sample import Sample

Row = Mapping[str, Any]
_TYPICAL_ROWS = 256
NOT_COLUMNS = frozenset({"input_ids", "attention_mask", "token_type_ids"})
"""Columns that are the prompt; the others go to reward functions."""


class PassSampler(Sampler[int]):
    """A permutation of the dataset per pass, drawn from (seed, pass)."""

    def __init__(self, dataset: Sized, seed: int) -> None:
        self._length = len(dataset)
        self._seed = seed
        self.pass_index = 0

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self._seed << 20) + self.pass_index)
        return iter(torch.randperm(self._length, generator=generator).tolist())

    def __len__(self) -> int:
        return self._length


def prompt_loader(
    dataset: Any, batch_size: int, seed: int, collate: Callable[[list[Row]], Any] | None = None
) -> DataLoader[Any]:
    """Shuffled batches of dataset rows; an incomplete last batch of a pass is dropped.

    Raises:
        ValueError: the dataset holds less than one batch.
    """
    if len(dataset) < batch_size:
        raise ValueError(
            f"the dataset has {len(dataset)} rows, fewer than one batch of {batch_size}: add rows, or lower "
            f"per_device_train_batch_size or gradient_accumulation_steps"
        )
    sampler = PassSampler(dataset, seed)
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


def make_samples(batch: Any, first_id: int, pad_token_id: int, *, drop_padding: bool = False) -> list[Sample]:
    """Samples of a batch: a list of rows, or what a data collator made of them (padded `input_ids`).

    An `attention_mask` says which tokens count. Without one a collator's padding is stripped from both ends;
    `drop_padding` drops every padding token wherever it stands, as TRL's masks do.
    """
    collated = not isinstance(batch, Sequence)
    samples = []
    for index, row in enumerate(_rows(batch) if collated else batch):
        prompt = _prompt(row, pad_token_id, strip=collated)
        if drop_padding:
            prompt = [token for token in prompt if token != pad_token_id]
        columns = {name: value for name, value in row.items() if name not in NOT_COLUMNS}
        samples.append(Sample(id=first_id + index, prompt_ids=tuple(prompt), columns=columns))
    return samples


def _prompt(row: Row, pad_token_id: int, *, strip: bool) -> list[int]:
    tokens = [int(token) for token in row["input_ids"]]
    if "attention_mask" in row:
        return [token for token, counts in zip(tokens, row["attention_mask"], strict=True) if counts]
    real = [index for index, token in enumerate(tokens) if token != pad_token_id]
    return tokens[real[0] : real[-1] + 1] if strip and real else tokens


def _rows(columns: Mapping[str, Any]) -> list[Row]:
    length = len(columns["input_ids"])
    return [{name: values[index] for name, values in columns.items()} for index in range(length)]


def prompt_tokens(dataset: Any, eval_dataset: Any = None, *, collates: bool = False) -> PromptTokens:
    """Typically as the median of the dataset's first rows; the most are not known where a collator may change rows."""
    first = range(min(len(dataset), _TYPICAL_ROWS))
    typical = statistics.median_low(len(dataset[index]["input_ids"]) for index in first)
    if collates:
        return PromptTokens(typical)
    return PromptTokens(typical, max(len(row["input_ids"]) for rows in (dataset, eval_dataset or ()) for row in rows))
