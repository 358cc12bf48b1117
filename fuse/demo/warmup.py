"""Supervised warm-up: makes a fresh policy able but careless, so that PPO has something to reinforce."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fuse.demo.task import SumTask, exact_match, prompt_text

IGNORED_LABEL = -100
ROWS_PER_GROUP = 16
RAMP_STEPS = 20
NUM_HELD_OUT = 128
ABLE, MAX_CAREFUL_STEPS = 0.75, 500
CARELESS_STEPS = 60

Row = tuple[list[int], list[int]]
"""Token ids of a prompt, and of its worked answer with the end token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmupProgress:
    """After `step` optimizer steps: loss in nats per answer token, share of held-out problems right."""

    step: int
    loss: float
    exact: float
    elapsed_s: float


def small_llama(
    tokenizer: PreTrainedTokenizerFast, *, seed: int, hidden_size: int = 128, num_layers: int = 2
) -> LlamaForCausalLM:
    """A freshly initialised Llama over the tokenizer's vocabulary."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=3 * hidden_size,
            num_hidden_layers=num_layers,
            num_attention_heads=hidden_size // 32,
            max_position_embeddings=256,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )


def warm_up(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    task: SumTask,
    *,
    seed: int,
    slip_probability: float,
    report: Callable[[str, WarmupProgress], None] = lambda teacher, progress: None,
) -> None:
    """Train `model` in place on a careful teacher's answers, then on those of one who slips with `slip_probability`.

    The result is able (at least `ABLE` of the held-out problems right, greedily) and then careless (fewer when
    sampled): it has learned from data with flaws that a reward can tell, which is what PPO is for.
    """
    held_out = list(islice(task.problems(3 * seed + 1), NUM_HELD_OUT))
    supervise(
        model,
        tokenizer,
        task.demonstrations(3 * seed),
        measure=lambda: exact_share(model, tokenizer, task, held_out),
        until=lambda exact: exact >= ABLE,
        max_steps=MAX_CAREFUL_STEPS,
        evaluate_every=15,
        learning_rate=2e-3,
        report=partial(report, "careful teacher"),
    )
    supervise(
        model,
        tokenizer,
        task.demonstrations(3 * seed, slip_probability),
        measure=lambda: exact_share(model, tokenizer, task, held_out, sample=True),
        max_steps=CARELESS_STEPS,
        evaluate_every=20,
        learning_rate=5e-4,  # gently: a habit is to be learned, addition not to be forgotten
        decay=True,
        report=partial(report, "careless teacher"),
    )


def supervise(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    demonstrations: Iterator[tuple[str, str]],
    *,
    measure: Callable[[], float],
    until: Callable[[float], bool] = lambda exact: False,
    max_steps: int,
    evaluate_every: int,
    learning_rate: float,
    decay: bool = False,
    batch_size: int = 32,
    report: Callable[[WarmupProgress], None] = lambda progress: None,
) -> WarmupProgress:
    """Train `model` in place on prompts and answers, for `max_steps` or until `until(measure())`.

    The learning rate ramps up and stays, or with `decay` falls to zero at `max_steps`.
    """
    start_s = time.monotonic()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / RAMP_STEPS, 1 - step / max_steps if decay else 1.0)
    )
    progress = WarmupProgress(step=0, loss=float("nan"), exact=0.0, elapsed_s=0.0)
    for step in range(1, max_steps + 1):
        loss = _accumulate_gradients(
            model, [_tokenised(tokenizer, *pair) for pair in islice(demonstrations, batch_size)]
        )
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % evaluate_every == 0:
            progress = WarmupProgress(step=step, loss=loss, exact=measure(), elapsed_s=time.monotonic() - start_s)
            report(progress)
            if until(progress.exact):
                break
    return progress


@torch.no_grad()
def exact_share(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    task: SumTask,
    problems: list[tuple[int, ...]],
    *,
    sample: bool = False,
) -> float:
    """Share of `problems` that `model` answers exactly right, greedily or by sampling once at temperature 1."""
    prompts = [prompt_text(terms) for terms in problems]
    inputs = tokenizer(prompts, padding=True, return_tensors="pt", return_token_type_ids=False)
    sampling = {"do_sample": True, "top_k": 0} if sample else {"do_sample": False}
    output = model.generate(**inputs, **sampling, max_new_tokens=task.max_response_tokens)
    responses = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(exact_match(prompts, responses)) / len(prompts)


def _tokenised(tokenizer: PreTrainedTokenizerFast, prompt: str, answer: str) -> Row:
    return tokenizer(prompt)["input_ids"], [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]


def _accumulate_gradients(model: LlamaForCausalLM, rows: list[Row]) -> float:
    """Back-propagate the mean loss per answer token, in nats, and return it.

    Rows go through the model in groups of similar length: padding all to the longest would triple the work.
    """
    num_answer_tokens = sum(len(answer) for _, answer in rows)
    ordered = sorted(rows, key=lambda row: len(row[0]) + len(row[1]))
    total = 0.0
    for start in range(0, len(ordered), ROWS_PER_GROUP):
        group = ordered[start : start + ROWS_PER_GROUP]
        width = max(len(prompt) + len(answer) for prompt, answer in group)
        input_ids = torch.zeros((len(group), width), dtype=torch.long)
        labels = torch.full((len(group), width), IGNORED_LABEL)
        for row, (prompt, answer) in enumerate(group):
            end = len(prompt) + len(answer)
            input_ids[row, :end] = torch.tensor(prompt + answer)
            labels[row, len(prompt) : end] = torch.tensor(answer)
        loss = model(input_ids=input_ids, labels=labels, num_items_in_batch=num_answer_tokens).loss
        loss.backward()
        total += float(loss.detach())
    return total
