"""`fuse bench rollout`: rollouts under each migration policy, or generation this project's way and others'.

Lengths are forced, by one limit per sample and no stop token, so that everybody generates the same number of tokens.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch

from fuse.benchmarks.lengths import response_lengths, scaled, scaled_to
from fuse.benchmarks.llama import causal_model
from fuse.benchmarks.measure import describe_machine
from fuse.benchmarks.options import add_json_option, add_model_options, check_counts, write_rows
from fuse.benchmarks.rollout import generation, policies

# What a figure depends on, beside the machine.
_OPTIONS = (
    "against", "devices", "engine", "lengths", "model", "vocab_size", "kv_heads", "num_samples", "batch",
    "prompt_tokens", "context", "repeats",
)  # fmt: skip
_PAST_BATCHES = 8
SYNTHETIC, UNIFORM = "synthetic", "uniform"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fuse bench rollout`."""
    parser.add_argument(
        "--against", choices=sorted(generation.COMPARISONS),
        help="measure generation alone, by the transformers engine against: generate: batches of model.generate, each "
        "to its longest sample; vllm: the vLLM engine, both in processes of their own on one core (default: "
        "generation and inference on all devices, under each migration policy)",
    )  # fmt: skip
    parser.add_argument("--devices", type=int, default=2, help="cores to roll out on (default: 2)")
    parser.add_argument(
        "--engine", choices=("transformers", "vllm"), default="transformers",
        help="what generates under the policies (default: transformers)",
    )  # fmt: skip
    parser.add_argument(
        "--lengths", metavar="FILE.csv", action="append", default=[],
        help="response lengths: column output_tokens, scaled so that the longest fills the context; may be repeated "
        "(default: a synthetic long-tailed mix)",
    )  # fmt: skip
    add_model_options(parser)
    parser.add_argument("--num-samples", type=int, default=128, help="responses to generate (default: 128)")
    parser.add_argument("--batch", type=int, default=32, help="samples that run side by side (default: 32)")
    parser.add_argument("--prompt-tokens", type=int, default=32, help="tokens of every prompt (default: 32)")
    parser.add_argument("--context", type=int, default=256, help="tokens of the longest sample (default: 256)")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each side, alternating (default: 3)")
    add_json_option(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure every mix of lengths and the uniform one, print a line each, and write them to `arguments.json`."""
    check_counts(arguments, "devices", "num_samples", "batch", "prompt_tokens", "repeats")
    limit = arguments.context - arguments.prompt_tokens
    if limit < 1:
        raise ValueError(
            f"--context is {arguments.context} and --prompt-tokens {arguments.prompt_tokens}: no room for a response"
        )
    torch.set_num_threads(1)
    mixes, pasts = _mixes(arguments.lengths, arguments.num_samples, limit)
    model = causal_model(
        arguments.model, context=arguments.context, vocab_size=arguments.vocab_size, kv_heads=arguments.kv_heads
    )
    if arguments.against is None:
        rows = policies.run_policies(
            model, {name: (one, pasts.get(name, one)) for name, one in mixes.items()}, arguments
        )
    else:
        rows = generation.run_comparison(model, mixes, arguments)
    write_rows(arguments, describe_machine(), _OPTIONS, rows=rows)
    return 0


def _mixes(paths: Sequence[str], num_samples: int, limit: int) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Lengths of a batch by mix, at most `limit`, and of the past that policies learn from, where there is one."""
    sources: dict[str, Path | None] = {Path(path).stem: Path(path) for path in paths}
    mixes, pasts = {}, {}
    for name, path in (sources or {SYNTHETIC: None}).items():
        trace = response_lengths(path, num_samples, (1 + _PAST_BATCHES) * num_samples)
        mixes[name] = scaled_to(trace[:num_samples], limit)
        factor = max(mixes[name]) / max(trace[:num_samples])
        past = trace[num_samples:] or trace  # all of it where nothing comes after the batch
        pasts[name] = [min(limit, length) for length in scaled(past, factor)]
    mixes[UNIFORM] = [round(statistics.mean(next(iter(mixes.values()))))] * num_samples
    return mixes, pasts
