"""What `fuse bench iteration` iterates on: prompts, and lengths that are forced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fuse.benchmarks import iteration_workload
from fuse.engines.engine import Evicted, GenerationRequest, SamplingParams
from fuse.engines.replay import ReplayEngine


def request(sample_id: int, **options: Any) -> GenerationRequest:
    params = SamplingParams(seed=0, temperature=1.0, max_new_tokens=9)
    return GenerationRequest(sample_id=sample_id, prompt_ids=(1,), params=params, **options)


def test_the_engine_alone_knows_where_responses_end() -> None:
    recordings = {0: ((5, 6), (-1.0, -1.0)), 1: ((7,), (-1.0,))}
    engine = iteration_workload.ForcedLengths(ReplayEngine(recordings), {0: 2, 1: 1})
    engine.submit(request(0))
    engine.admit(Evicted(request(1)))
    assert [(token.sample_id, token.finished) for token in engine.step()] == [(0, False), (1, True)]
    assert engine.evict(0).request.params.max_new_tokens == 2
    engine.admit(Evicted(request(0, response_ids=(5,), logprobs=(-1.0,))))
    assert [token.token_id for token in engine.step()] == [6]
    engine.close()
    with pytest.raises(KeyError):
        engine.submit(request(2))


def test_lengths_are_scaled_and_start_again(tmp_path: Path) -> None:
    path = tmp_path / "lengths.csv"
    path.write_text("prompt_tokens,output_tokens\n" + "".join(f"7,{length}\n" for length in (10, 40, 20)))
    assert iteration_workload.forced_lengths(path, 5, batch=2, longest=8) == (2, 8, 4, 2, 8)
    with pytest.raises(ValueError, match="has 3 rows, and 4 samples are needed"):
        iteration_workload.forced_lengths(path, 8, batch=4, longest=8)
    synthetic = iteration_workload.forced_lengths(None, 128, batch=64, longest=256)
    assert (len(synthetic), max(synthetic)) == (128, 256)


def test_every_round_has_prompts_of_its_own() -> None:
    figures: dict[str, Any] = {"batch": 2, "mini_batches": 1, "micro_batch": 1, "epochs": 1, "max_new_tokens": 3}
    figures |= {"models": None, "prompts": ((1,), (2,), (3,), (4,))}
    workload = iteration_workload.Workload(lengths=(1, 2, 3, 1), **figures)
    assert workload.num_rounds == 2
    assert workload.rows(1) == [{"input_ids": [3]}, {"input_ids": [4]}]
    assert workload.round_lengths(1) == (3, 1)
    assert workload.options()["stop_token"] is None
    natural = iteration_workload.Workload(lengths=None, **figures)
    assert natural.round_lengths(1) is None
    assert natural.options()["stop_token"] == "eos"


def test_a_file_with_few_prompts_is_read_again(tmp_path: Path) -> None:
    models = iteration_workload.embedded_models(iteration_workload.SMOKE_SIZE, 16)
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"input_ids": [5, 6]}\n{"input_ids": [7]}\n')
    assert iteration_workload.read_prompts(path, None, models, 3, 16) == ((5, 6), (7,), (5, 6))
    with pytest.raises(ValueError, match="no column 'question'"):
        iteration_workload.read_prompts(path, "question", models, 3, 16)


def test_word_problems_go_through_the_chat_template() -> None:
    models = iteration_workload.embedded_models(iteration_workload.SMOKE_SIZE, 16)
    with pytest.raises(ValueError, match="no chat template"):
        iteration_workload.word_problem_prompts(models, 2, 16)
    models.tokenizer.chat_template = "w{{ messages | length }}"
    assert iteration_workload.word_problem_prompts(models, 2, 4) == ((4,), (4,))
