"""The supervised warm-up."""

import pytest
import torch

from fuse.demo import warmup
from fuse.demo.task import SumTask
from fuse.demo.tokenizer import arithmetic_tokenizer
from fuse.demo.warmup import WarmupProgress, exact_share, small_llama, supervise


def test_the_loss_falls_and_the_steps_are_bounded() -> None:
    tokenizer = arithmetic_tokenizer()
    model = small_llama(tokenizer, seed=0, hidden_size=32)
    seen: list[WarmupProgress] = []
    end = supervise(
        model,
        tokenizer,
        SumTask(max_terms=2).demonstrations(0),
        measure=lambda: 0.5,
        max_steps=30,
        learning_rate=2e-3,
        evaluate_every=10,
        report=seen.append,
    )
    assert end == seen[-1]
    assert [(progress.step, progress.exact) for progress in seen] == [(10, 0.5), (20, 0.5), (30, 0.5)]
    assert end.loss < 0.8 * seen[0].loss


def test_it_stops_at_the_target() -> None:
    tokenizer = arithmetic_tokenizer()
    measured = iter([0.1, 0.3, 0.7])
    end = supervise(
        small_llama(tokenizer, seed=0, hidden_size=32),
        tokenizer,
        SumTask(max_terms=2).demonstrations(0),
        measure=lambda: next(measured),
        until=lambda exact: exact >= 0.3,
        max_steps=30,
        learning_rate=2e-3,
        evaluate_every=3,
    )
    assert (end.step, end.exact) == (6, 0.3)


def test_the_warm_up_goes_from_the_careful_to_the_careless_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warmup, "ABLE", 0.0)
    monkeypatch.setattr(warmup, "CARELESS_STEPS", 40)
    monkeypatch.setattr(warmup, "NUM_HELD_OUT", 4)
    tokenizer = arithmetic_tokenizer()
    reports: list[tuple[str, int]] = []
    warmup.warm_up(
        small_llama(tokenizer, seed=0, hidden_size=32),
        tokenizer,
        SumTask(max_terms=2),
        seed=0,
        slip_probability=0.5,
        report=lambda teacher, progress: reports.append((teacher, progress.step)),
    )
    assert reports == [("careful teacher", 15), ("careless teacher", 20), ("careless teacher", 40)]


def test_grouping_rows_by_length_gives_the_gradient_of_one_padded_batch(monkeypatch: pytest.MonkeyPatch) -> None:
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
