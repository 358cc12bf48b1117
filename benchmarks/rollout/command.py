"""`fuse bench rollout`: rollouts under each migration policy, or generation this project's way and others'.

Lengths are forced, by one limit per sample and no stop token, so that everybody generates the same number of tokens.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch

from fuse.benchmarks.lengths import Mix, response_lengths, scaled, scaled_to
from fuse.benchmarks.llama import causal_model
from fuse.benchmarks.measure import describe_machine
from fuse.benchmarks.options import add_engine_option, add_json_option, add_model_options, write_rows
from fuse.benchmarks.rollout import generation, policies
from fuse.commands.options import add_numbers, check_counts

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
    add_numbers(parser, devices=(2, "cores to roll out on"))
    add_engine_option(parser, "what generates under the policies")
    parser.add_argument(
        "--lengths", metavar="FILE.csv", action="append", default=[],
        help="response lengths: column output_tokens, scaled so that the longest fills the context; synthetic: a "
        "long-tailed mix; may be repeated, and responses of one length are always measured, too (default: synthetic)",
    )  # fmt: skip
    add_model_options(parser)
    add_numbers(
        parser,
        num_samples=(128, "responses to generate"),
        batch=(32, "samples that run side by side"),
        prompt_tokens=(32, "tokens of every prompt"),
        context=(256, "tokens of the longest sample"),
        repeats=(3, "timed runs of each side, alternating"),
    )
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
    mixes = _mixes(arguments.lengths, arguments.num_samples, limit)
    model = causal_model(
        arguments.model, context=arguments.context, vocab_size=arguments.vocab_size, kv_heads=arguments.kv_heads
    )
    if arguments.against is None:
        rows = policies.run_policies(model, mixes, arguments)
    else:
        rows = generation.run_comparison(model, mixes, arguments)
    write_rows(arguments, describe_machine(), _OPTIONS, rows=rows)
    return 0


def _mixes(paths: Sequence[str], num_samples: int, limit: int) -> list[Mix]:
    """Of each trace, with lengths of at most `limit`, and the uniform one."""
    sources = {Path(path).stem: None if path == SYNTHETIC else Path(path) for path in paths or [SYNTHETIC]}
    mixes = []
    for name, path in sources.items():
        trace = response_lengths(path, num_samples, (1 + _PAST_BATCHES) * num_samples)
        lengths = scaled_to(trace[:num_samples], limit)
        factor = max(lengths) / max(trace[:num_samples])
        past = trace[num_samples:] or trace  # all of it where nothing comes after the batch
        mixes.append(Mix(name, lengths, [min(limit, length) for length in scaled(past, factor)]))
    uniform = [round(statistics.mean(mixes[0].lengths))] * num_samples
    return [*mixes, Mix(UNIFORM, uniform, uniform)]
