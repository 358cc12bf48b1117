"""The order of prompts, and how rows become samples."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from fuse.trainers.prompts import batches, make_samples, prompt_loader, row_numbers

ROWS = [{"input_ids": [index + 10], "answer": str(index)} for index in range(7)]


def _order(start: int, count: int, seed: int = 3) -> list[list[int]]:
    loader = prompt_loader(ROWS, 2, seed)
    return [[row["input_ids"][0] for row in batch] for batch in islice(batches(loader, start), count)]


def test_every_pass_is_another_permutation_of_the_seed() -> None:
    passes = _order(0, 6)  # 3 batches a pass: the incomplete one is dropped
    assert len({token for batch in passes[:3] for token in batch}) == 6
    assert passes[:3] != passes[3:]
    assert passes == _order(0, 6)
    assert passes != _order(0, 6, seed=4)


@pytest.mark.parametrize("start", [1, 3, 5, 7])
def test_a_resumed_run_continues_the_order(start: int) -> None:
    assert _order(start, 4) == _order(0, start + 4)[start:]


@pytest.mark.parametrize("start", [0, 1, 3, 5])
def test_rows_are_known_by_their_numbers(start: int) -> None:
    numbers = islice(row_numbers(prompt_loader(ROWS, 2, 3), start), 5)
    assert [[ROWS[row]["input_ids"][0] for row in rows] for rows in numbers] == _order(start, 5)


def test_less_than_a_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="7 rows, fewer than one batch of 8"):
        prompt_loader(ROWS, 8, 0)


def test_rows_become_samples_with_their_columns() -> None:
    samples = make_samples([{"input_ids": [5, 0, 6], "answer": "a"}], first_id=9, pad_token_id=0)
    assert (samples[0].id, samples[0].prompt_ids, samples[0].columns) == (9, (5, 0, 6), {"answer": "a"})


def test_collated_batches_lose_their_padding() -> None:
    batch = {"input_ids": torch.tensor([[0, 0, 5, 6], [7, 0, 8, 9]])}
    assert [sample.prompt_ids for sample in make_samples(batch, 0, 0)] == [(5, 6), (7, 0, 8, 9)]
    assert make_samples(batch, 0, 0, drop_padding=True)[1].prompt_ids == (7, 8, 9)
    masked = {**batch, "attention_mask": torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])}
    assert make_samples(masked, 0, 0)[0].prompt_ids == (0, 5, 6)
