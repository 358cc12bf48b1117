"""`fuse bench kernels`: each native kernel against its torch reference, alternating in one process."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypedDict

import torch
from torch import Tensor

from fuse.benchmarks.measure import describe_machine, interleave, median_ms, peak_bytes, write_json
from fuse.ops import decode_attention, sampling
from fuse.ops.gae import gae, gae_reference, implementation

# `pass` is a keyword, hence the functional form.
Row = TypedDict(
    "Row",
    {
        "kernel": str,
        "pass": str,
        "shape": list[int],
        "dtype": str,
        "implementation": str,
        "ms": float,
        "reference_ms": float,
        "peak_bytes": int,
        "reference_peak_bytes": int,
    },
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fuse bench kernels`."""
    parser.add_argument("--repeats", type=int, default=9, help="timed calls of each implementation (default: 9)")
    parser.add_argument("--json", metavar="FILE", help="write machine and rows to FILE")


def run(arguments: argparse.Namespace) -> int:
    """Measure every kernel, print a line each, and write them to `arguments.json`."""
    torch.set_num_threads(1)
    rows = []
    for benchmark in BENCHMARKS:
        row = benchmark(arguments.repeats)
        print(format_row(row), flush=True)
        rows.append(row)
    if arguments.json:
        write_json(arguments.json, {"machine": describe_machine(), "rows": rows})
    return 0


def gae_row(repeats: int, num_samples: int = 512, max_tokens: int = 2048) -> Row:
    """GAE over `num_samples` responses of 1 to `max_tokens` tokens, uniformly drawn."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, max_tokens + 1, (num_samples,), generator=generator)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    rewards, values = torch.randn(2, int(offsets[-1]), generator=generator)
    return _compare(
        kernel="gae",
        shape=[num_samples, max_tokens],
        example=rewards,
        implementation=implementation(rewards),
        function=lambda: gae(rewards, values, offsets, 0.99, 0.95),
        reference=lambda: gae_reference(rewards, values, offsets, 0.99, 0.95),
        repeats=repeats,
    )


def sample_row(repeats: int, rows: int = 64, vocab_size: int = 32_000) -> Row:
    """One token of each of `rows` samples."""
    logits = 3 * torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(rows)
    arguments = (logits, torch.ones(rows), ids, ids, ids)
    return _compare(
        kernel="sample_tokens",
        shape=[rows, vocab_size],
        example=logits,
        implementation=sampling.implementation(logits),
        function=lambda: sampling.sample_tokens(*arguments),
        reference=lambda: sampling.sample_tokens_reference(*arguments),
        repeats=repeats,
    )


def decode_attention_row(
    repeats: int, rows: int = 64, kv_heads: int = 4, context: int = 512, head_dim: int = 64
) -> Row:
    """A layer's decode step over `rows` samples of 1 to `context` tokens, uniformly drawn."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(rows, kv_heads, head_dim, generator=generator)
    keys, values = torch.randn(2, rows, kv_heads, context, head_dim, generator=generator)
    lengths = torch.randint(1, context + 1, (rows,), generator=generator)
    return _compare(
        kernel="decode_attention",
        shape=[rows, kv_heads, context, head_dim],
        example=query,
        implementation=decode_attention.implementation(query),
        function=lambda: decode_attention.decode_attention(query, keys, values, lengths, 0.125),
        reference=lambda: decode_attention.decode_attention_reference(query, keys, values, lengths, 0.125),
        repeats=repeats,
    )


def format_row(row: Row) -> str:
    """One line for people."""
    shape = " x ".join(map(str, row["shape"]))
    ours = f"{row['ms']:.2f} ms and {row['peak_bytes'] / 2**20:.1f} MiB ({row['implementation']})"
    reference = f"reference {row['reference_ms']:.2f} ms and {row['reference_peak_bytes'] / 2**20:.1f} MiB"
    ratio = row["reference_ms"] / row["ms"]
    return f"{row['kernel']} {row['pass']}, {shape} {row['dtype']}: {ours}; {reference}; {ratio:.1f} times as fast"


def _compare(
    *,
    kernel: str,
    shape: list[int],
    example: Tensor,
    implementation: str,
    function: Callable[[], object],
    reference: Callable[[], object],
    repeats: int,
) -> Row:
    seconds = interleave({"kernel": function, "reference": reference}, repeats)
    return {
        "kernel": kernel,
        "pass": "forward",
        "shape": shape,
        "dtype": str(example.dtype).removeprefix("torch."),
        "implementation": implementation,
        "ms": median_ms(seconds["kernel"]),
        "reference_ms": median_ms(seconds["reference"]),
        "peak_bytes": peak_bytes(function),
        "reference_peak_bytes": peak_bytes(reference),
    }


BENCHMARKS: tuple[Callable[[int], Row], ...] = (gae_row, sample_row, decode_attention_row)
