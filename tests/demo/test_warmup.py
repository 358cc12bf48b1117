"""The supervised warm-up."""

import pytest
import torch

from fuse.demo.task import SumTask
from fuse.demo.tokenizer import arithmetic_tokenizer
from fuse.demo.warmup import WarmupProgress, exact_share, small_llama, supervise


def test_the_loss_falls_and_the_steps_are_bounded() -> None:
    tokenizer, task = arithmetic_tokenizer(), SumTask(max_terms=2, slip_probability=0.0)
    model = small_llama(tokenizer, seed=0, hidden_size=32)
    seen: list[WarmupProgress] = []
    end = supervise(
        model, tokenizer, task, seed=0, target_exact=1.1, max_steps=30, evaluate_every=10, report=seen.append
    )
    assert end.step == 30
    assert [progress.step for progress in seen] == [10, 20, 30]
    assert end.loss < 0.8 * seen[0].loss


def test_it_stops_at_the_target() -> None:
    tokenizer, task = arithmetic_tokenizer(), SumTask(max_terms=2)
    model = small_llama(tokenizer, seed=0, hidden_size=32)
    assert supervise(model, tokenizer, task, seed=0, target_exact=0.0, max_steps=30, evaluate_every=5).step == 5


def test_grouping_rows_by_length_gives_the_gradient_of_one_padded_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    import fuse.demo.warmup as warmup

    tokenizer = arithmetic_tokenizer()
    pairs = [("7+9=", "7+9=16;#16"), ("1+2+3+4=", "1+2=3;3+3=6;6+4=10;#10"), ("1+1=", "1+1=2;#2")]
    rows = [([*tokenizer(prompt)["input_ids"]], [*tokenizer(answer)["input_ids"], 1]) for prompt, answer in pairs]
    gradients = []
    for rows_per_group in (1, 16):
        monkeypatch.setattr(warmup, "ROWS_PER_GROUP", rows_per_group)
        model = small_llama(tokenizer, seed=0, hidden_size=32)
        warmup._accumulate_gradients(model, rows)
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


def test_a_model_that_knows_nothing_is_never_right() -> None:
    tokenizer = arithmetic_tokenizer()
    model = small_llama(tokenizer, seed=0, hidden_size=32)
    assert exact_share(model, tokenizer, SumTask(max_terms=3), [(7, 9), (1, 2, 3)], sample=True) == 0.0
