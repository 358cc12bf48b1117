"""What `fuse bench iteration` iterates on: prompts, and lengths that are forced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fuse.benchmarks.iteration import workload as made


def test_lengths_are_scaled_and_start_again(tmp_path: Path) -> None:
    path = tmp_path / "lengths.csv"
    path.write_text("prompt_tokens,output_tokens\n" + "".join(f"7,{length}\n" for length in (10, 40, 20)))
    assert made.forced_lengths(path, 5, batch=2, longest=8) == (2, 8, 4, 2, 8)
    with pytest.raises(ValueError, match="has 3 rows, and 4 responses are needed"):
        made.forced_lengths(path, 8, batch=4, longest=8)
    synthetic = made.forced_lengths(None, 128, batch=64, longest=256)
    assert (len(synthetic), max(synthetic)) == (128, 256)


def test_every_round_has_prompts_of_its_own() -> None:
    figures: dict[str, Any] = {"batch": 2, "mini_batches": 1, "micro_batch": 1, "epochs": 1, "max_new_tokens": 3}
    figures |= {"models": None, "prompts": ((1,), (2,), (3,), (4,))}
    workload = made.Workload(lengths=(1, 2, 3, 1), **figures)
    assert workload.num_rounds == 2
    assert workload.rows(1) == [{"input_ids": [3]}, {"input_ids": [4]}]
    assert workload.round_lengths(1) == (3, 1)
    assert workload.options()["stop_token"] is None
    natural = made.Workload(lengths=None, **figures)
    assert natural.round_lengths(1) is None
    assert natural.options()["stop_token"] == "eos"


def test_a_file_with_few_prompts_is_read_again(tmp_path: Path) -> None:
    models = made.embedded_models(made.SMOKE_SIZE, 16)
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"input_ids": [5, 6]}\n{"input_ids": [7]}\n')
    assert made.read_prompts(path, None, models, 3, 16) == ((5, 6), (7,), (5, 6))
    with pytest.raises(ValueError, match="no column 'question'"):
        made.read_prompts(path, "question", models, 3, 16)


def test_word_problems_go_through_the_chat_template() -> None:
    models = made.embedded_models(made.SMOKE_SIZE, 16)
    with pytest.raises(ValueError, match="no chat template"):
        made.word_problem_prompts(models, 2, 16)
    models.tokenizer.chat_template = "w{{ messages | length }}"
    assert made.word_problem_prompts(models, 2, 4) == ((4,), (4,))
