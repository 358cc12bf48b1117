"""Whether a reward model likes one policy's responses better than another's, on the same prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fuse.engines.engine import GenerationRequest
from fuse.recipe import reward
from fuse.trainers.data import TOKENS, prompt_rows, read_rows
from fuse.trainers.lone_engine import lone_engine
from fuse.training.reading import TokenSequence
from fuse.training.scoring import scores

SAMPLES = "comparison.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """before, after, reward_model: directories. data: a file of prompts. output_dir: where samples go.

    temperature, max_new_tokens: of the responses, drawn with the same noise for both policies.
    """

    before: str
    after: str
    reward_model: str
    data: str
    output_dir: str
    seed: int
    temperature: float
    max_new_tokens: int


def compare(comparison: Comparison) -> dict[str, Any]:
    """Mean scores of both, the share of prompts whose second response scores higher, and how likely that is by chance.

    Responses and scores are written beside it, a line per prompt.
    """
    rows = read_rows(comparison.data)
    responses = {}
    for name in ("before", "after"):
        print(f"comparison: responses of {getattr(comparison, name)}", flush=True)
        responses[name] = sampled_responses(
            getattr(comparison, name),
            rows,
            seed=comparison.seed,
            temperature=comparison.temperature,
            max_new_tokens=comparison.max_new_tokens,
        )
    print("comparison: scores", flush=True)
    model, tokenizer = reward.load(comparison.reward_model)
    scored = {name: np.array(scores(model.eval(), list(of))) for name, of in responses.items()}
    lines = [
        {"prompt": row["prompt"]}
        | {name: tokenizer.decode(responses[name][index].response_ids, skip_special_tokens=True) for name in responses}
        | {f"{name}_score": float(scored[name][index]) for name in responses}
        for index, row in enumerate(rows)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (Path(comparison.output_dir) / SAMPLES).write_text(text, encoding="utf-8")
    differences = scored["after"] - scored["before"]
    return {
        "num_prompts": len(rows),
        "sft_score": float(scored["before"].mean()),
        "policy_score": float(scored["after"].mean()),
        "wins": float(np.mean(np.where(differences == 0, 0.5, differences > 0))),
        "p_value": sign_flip_p_value(differences, comparison.seed),
    }


def sign_flip_p_value(differences: Sequence[float], seed: int, num_draws: int = 9999) -> float:
    """Of a paired randomisation test: how often a mean as high as this comes of differences with random signs.

    One-sided, against the hypothesis that a difference is as likely to be one as minus one. It needs no distribution,
    and is never below 1 / (num_draws + 1).
    """
    difference = np.asarray(differences, float)
    generator = np.random.default_rng(seed)
    signs = generator.integers(0, 2, size=(num_draws, len(difference)), dtype=np.int8) * 2 - 1
    at_least = (signs @ difference >= difference.sum() - 1e-12 * np.abs(difference).sum()).sum()
    return float((at_least + 1) / (num_draws + 1))


@torch.inference_mode()
def sampled_responses(
    path: str, rows: Sequence[Any], *, seed: int, temperature: float, max_new_tokens: int
) -> list[TokenSequence]:
    """One to each row's prompt, by the product's own engine. path: of the policy."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    prompts = [
        tuple(row[TOKENS])
        for row in prompt_rows(rows, tokenizer, prompt_column="prompt", response_length=max_new_tokens)
    ]
    engine, params = lone_engine(
        AutoModelForCausalLM.from_pretrained(path),
        tokenizer,
        seed=seed,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        max_context=max(map(len, prompts)) + max_new_tokens,
    )
    for index, prompt in enumerate(prompts):
        engine.submit(GenerationRequest(sample_id=index, prompt_ids=prompt, params=params))
    tokens: list[list[int]] = [[] for _ in prompts]
    while generated := engine.step():
        for token in generated:
            tokens[token.sample_id].append(token.token_id)
    engine.close()
    return [TokenSequence(prompt, response) for prompt, response in zip(prompts, tokens, strict=True)]
