"""`fuse bench rollout --against`: generation alone, by the transformers engine and by another, in turn."""

from __future__ import annotations

import argparse
import copy
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from fuse.benchmarks.engine_process import EngineProcess
from fuse.benchmarks.lengths import Mix
from fuse.benchmarks.measure import interleave
from fuse.benchmarks.options import Row, tell
from fuse.engines.engine import GenerationEngine, GenerationRequest, SamplingParams
from fuse.engines.transformers import TransformersEngine
from fuse.engines.vllm import VllmEngine

Side = Callable[[Sequence[int]], None]
"""Generates one response of each length."""

_LINE = (
    "{lengths}: {num_samples} responses, mean {mean_tokens:.0f} and at most {longest_tokens} tokens, batch {batch}: "
    "{engine} {tokens_per_s:.0f} tokens/s, {against} {against_tokens_per_s:.0f}: {ratio:.2f} times as fast"
)


def run_comparison(model: PreTrainedModel, mixes: Sequence[Mix], arguments: argparse.Namespace) -> list[Row]:
    """A row per mix."""
    rows = []
    with COMPARISONS[arguments.against](model, arguments) as sides:
        for mix in mixes:
            row = _compare(mix, *sides, arguments)
            print(_LINE.format(**row, mean_tokens=row["num_tokens"] / row["num_samples"]), flush=True)
            rows.append(row)
    return rows


def _compare(mix: Mix, engine: Side, against: Side, arguments: argparse.Namespace) -> Row:
    """Seconds are medians; a token counts when it belongs to a response. ratio: how many times as fast `engine` is."""
    lengths, num_tokens = mix.lengths, sum(mix.lengths)
    tell(f"{mix.name}: {num_tokens} tokens, {1 + arguments.repeats} rounds ...")
    measured = interleave({"engine": partial(engine, lengths), "against": partial(against, lengths)}, arguments.repeats)
    seconds, against_seconds = (statistics.median(measured[side]) for side in ("engine", "against"))
    return {
        "lengths": mix.name,
        "engine": "transformers",
        "against": arguments.against,
        "batch": arguments.batch,
        "num_samples": len(lengths),
        "num_tokens": num_tokens,
        "longest_tokens": max(lengths),
        "seconds": seconds,
        "against_seconds": against_seconds,
        "tokens_per_s": num_tokens / seconds,
        "against_tokens_per_s": num_tokens / against_seconds,
        "ratio": against_seconds / seconds,
    }


@contextmanager
def against_generate(model: PreTrainedModel, arguments: argparse.Namespace) -> Iterator[tuple[Side, Side]]:
    """Both sides sample at temperature 1 from the same weights; prompts are equally long, so neither one pads them."""
    generate: Any = model.generate
    engine = TransformersEngine(copy.deepcopy(model), max_batch=arguments.batch, max_context=arguments.context)

    def with_generate(lengths: Sequence[int]) -> None:
        prompts = _prompts(model, len(lengths), arguments.prompt_tokens)
        for first in range(0, len(lengths), arguments.batch):
            batch = prompts[first : first + arguments.batch]
            generate(
                batch, attention_mask=torch.ones_like(batch), do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
                max_new_tokens=max(lengths[first : first + arguments.batch]), eos_token_id=None, pad_token_id=0,
            )  # fmt: skip

    yield lambda lengths: _respond(engine, _requests(model, lengths, arguments)), with_generate


@contextmanager
def against_vllm(model: PreTrainedModel, arguments: argparse.Namespace) -> Iterator[tuple[Side, Side]]:
    """Both engines draw the same tokens, each in a process pinned to the same core, where the other one waits."""
    limits = {"max_batch": arguments.batch, "max_context": arguments.context}
    core = max(os.sched_getaffinity(0))

    def side(process: EngineProcess) -> Side:
        return lambda lengths: process.run(partial(_respond, requests=_requests(model, lengths, arguments)))

    with (
        EngineProcess(partial(TransformersEngine, model, **limits), core=core) as transformers,
        EngineProcess(partial(VllmEngine, model, **limits), core=core) as vllm,
    ):
        yield side(transformers), side(vllm)


def _respond(engine: GenerationEngine, requests: Sequence[GenerationRequest]) -> None:
    """Generate all responses, in full."""
    for request in requests:
        engine.submit(request)
    num_tokens = 0
    while tokens := engine.step():
        num_tokens += len(tokens)
    assert num_tokens == sum(request.params.max_new_tokens for request in requests)


def _requests(model: PreTrainedModel, lengths: Sequence[int], arguments: argparse.Namespace) -> list[GenerationRequest]:
    prompts = _prompts(model, len(lengths), arguments.prompt_tokens).tolist()
    return [
        GenerationRequest(
            sample_id=index,
            prompt_ids=tuple(prompt),
            params=SamplingParams(seed=0, temperature=1.0, max_new_tokens=length),
        )
        for index, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
    ]


def _prompts(model: PreTrainedModel, num_samples: int, num_tokens: int) -> torch.Tensor:
    """Random token ids, int64 [num_samples, num_tokens], on the model's device."""
    generator = torch.Generator().manual_seed(1)
    vocab_size = model.config.get_text_config().vocab_size
    return torch.randint(0, vocab_size, (num_samples, num_tokens), generator=generator).to(model.device)


Comparison = Callable[[PreTrainedModel, argparse.Namespace], AbstractContextManager[tuple[Side, Side]]]
COMPARISONS: Mapping[str, Comparison] = {"generate": against_generate, "vllm": against_vllm}
