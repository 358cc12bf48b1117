"""`fuse bench rollout`: rollouts under each migration policy, or generation this project's way and others'.

Lengths are forced, by one limit per sample and no stop token, so that everybody generates the same number of tokens.
"""

from __future__ import annotations

import argparse
import copy
import csv
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from fuse.benchmarks.engine_process import EngineProcess
from fuse.benchmarks.measure import describe_machine, interleave
from fuse.benchmarks.rollout_policies import PolicyRow, run_policies
from fuse.commands.output import write_json
from fuse.engines.engine import GenerationEngine, GenerationRequest, SamplingParams
from fuse.engines.transformers import TransformersEngine
from fuse.engines.vllm import VllmEngine

# What a figure depends on, beside the machine.
_OPTIONS = (
    "against", "devices", "engine", "lengths", "model", "vocab_size", "kv_heads", "num_samples", "batch",
    "prompt_tokens", "context", "repeats",
)  # fmt: skip
_PAST_BATCHES = 8
SYNTHETIC, UNIFORM = "synthetic", "uniform"


class Row(TypedDict):
    """One mix of lengths. Seconds are medians; a token counts when it belongs to a response.

    ratio: how many times as fast `engine` is as what it is measured against.
    """

    lengths: str
    engine: str
    against: str
    batch: int
    num_samples: int
    num_tokens: int
    longest_tokens: int
    seconds: float
    against_seconds: float
    tokens_per_s: float
    against_tokens_per_s: float
    ratio: float


Side = Callable[[Sequence[int]], None]
"""Generates one response of each length."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fuse bench rollout`."""
    parser.add_argument(
        "--against", choices=sorted(COMPARISONS),
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
    parser.add_argument("--model", metavar="PATH", help="causal language model (default: a random Llama, 4 x 256)")
    parser.add_argument("--vocab-size", type=int, default=4096, help="of the random Llama (default: 4096)")
    parser.add_argument("--kv-heads", type=int, default=4, help="of the random Llama's 4 heads (default: 4)")
    parser.add_argument("--num-samples", type=int, default=128, help="responses to generate (default: 128)")
    parser.add_argument("--batch", type=int, default=32, help="samples that run side by side (default: 32)")
    parser.add_argument("--prompt-tokens", type=int, default=32, help="tokens of every prompt (default: 32)")
    parser.add_argument("--context", type=int, default=256, help="tokens of the longest sample (default: 256)")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each side, alternating (default: 3)")
    parser.add_argument("--json", metavar="FILE", help="write machine and rows to FILE")


def run(arguments: argparse.Namespace) -> int:
    """Measure every mix of lengths and the uniform one, print a line each, and write them to `arguments.json`."""
    for name in ("num_samples", "batch", "prompt_tokens"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}: it must be at least 1")
    limit = arguments.context - arguments.prompt_tokens
    if limit < 1:
        raise ValueError(
            f"--context is {arguments.context} and --prompt-tokens {arguments.prompt_tokens}: no room for a response"
        )
    torch.set_num_threads(1)
    num_samples = arguments.num_samples
    traces = {Path(path).stem: read_lengths(path, num_samples) for path in arguments.lengths}
    traces = traces or {SYNTHETIC: synthetic_lengths((1 + _PAST_BATCHES) * num_samples)}
    mixes = {name: scale(lengths[:num_samples], limit) for name, lengths in traces.items()}
    mixes[UNIFORM] = [round(statistics.mean(next(iter(mixes.values()))))] * num_samples
    model = load_model(arguments)
    rows: Sequence[Row | PolicyRow]
    if arguments.against is None:
        past = {name: rescale(traces[name], lengths, limit) for name, lengths in mixes.items() if name in traces}
        rows = run_policies(model, {name: (one, past.get(name, one)) for name, one in mixes.items()}, arguments)
    else:
        rows = run_comparison(model, mixes, arguments)
    if arguments.json:
        options = {name: getattr(arguments, name) for name in _OPTIONS}
        write_json(arguments.json, {"machine": describe_machine(), "options": options, "rows": rows})
    return 0


def run_comparison(
    model: PreTrainedModel, mixes: Mapping[str, Sequence[int]], arguments: argparse.Namespace
) -> list[Row]:
    """A row per mix: generation alone, by two sides in turn."""
    rows = []
    with COMPARISONS[arguments.against](model, arguments) as sides:
        for name, lengths in mixes.items():
            rows.append(compare(name, lengths, *sides, arguments))
            print(format_row(rows[-1]), flush=True)
    return rows


def read_lengths(path: str, num_samples: int) -> list[int]:
    """A CSV file's column output_tokens: at least `num_samples` values, and more for a past to learn from."""
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        if "output_tokens" not in (reader.fieldnames or ()):
            raise ValueError(f"{path} has no column output_tokens: its columns are {reader.fieldnames}")
        lengths = [
            int(row["output_tokens"]) for row, _ in zip(reader, range((1 + _PAST_BATCHES) * num_samples), strict=False)
        ]
    if len(lengths) < num_samples:
        raise ValueError(f"{path} has {len(lengths)} rows, fewer than --num-samples={num_samples}")
    return lengths


def synthetic_lengths(num_samples: int) -> list[int]:
    """Log-normal with sigma 0.6: the longest of 128 is some five times the median, as in chat traces."""
    generator = torch.Generator().manual_seed(0)
    return (100 * (0.6 * torch.randn(num_samples, generator=generator)).exp()).round().long().tolist()


def rescale(trace: Sequence[int], batch: Sequence[int], limit: int) -> list[int]:
    """The trace after a batch, scaled as the batch was and cut at `limit`; all of it where nothing comes after."""
    factor = max(batch) / max(trace[: len(batch)])
    past = trace[len(batch) :] or trace
    return [min(limit, max(1, round(factor * length))) for length in past]


def scale(lengths: Sequence[int], longest: int) -> list[int]:
    """Lengths in proportion, the longest of them `longest` tokens and each at least one."""
    factor = longest / max(lengths)
    return [max(1, round(factor * length)) for length in lengths]


def load_model(arguments: argparse.Namespace) -> PreTrainedModel:
    """The model at a path, or a random Llama whose weights do not matter: lengths are forced."""
    if arguments.model:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
        model.eval()
        return model
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=arguments.vocab_size, hidden_size=256, intermediate_size=688, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=arguments.kv_heads,
        max_position_embeddings=max(1024, arguments.context),
    )  # fmt: skip
    llama = LlamaForCausalLM(config)
    llama.eval()
    return llama


def compare(name: str, lengths: Sequence[int], engine: Side, against: Side, arguments: argparse.Namespace) -> Row:
    """Time both sides on the same lengths, in turn."""
    num_tokens = sum(lengths)
    print(f"{name}: {num_tokens} tokens, {1 + arguments.repeats} rounds ...", file=sys.stderr, flush=True)
    measured = interleave({"engine": partial(engine, lengths), "against": partial(against, lengths)}, arguments.repeats)
    seconds, against_seconds = (statistics.median(measured[side]) for side in ("engine", "against"))
    return {
        "lengths": name,
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
        prompts = make_prompts(model, len(lengths), arguments.prompt_tokens)
        for first in range(0, len(lengths), arguments.batch):
            batch = prompts[first : first + arguments.batch]
            generate(
                batch, attention_mask=torch.ones_like(batch), do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
                max_new_tokens=max(lengths[first : first + arguments.batch]), eos_token_id=None, pad_token_id=0,
            )  # fmt: skip

    yield lambda lengths: respond(engine, make_requests(model, lengths, arguments)), with_generate


@contextmanager
def against_vllm(model: PreTrainedModel, arguments: argparse.Namespace) -> Iterator[tuple[Side, Side]]:
    """Both engines draw the same tokens, each in a process pinned to the same core, where the other one waits."""
    limits = {"max_batch": arguments.batch, "max_context": arguments.context}
    core = max(os.sched_getaffinity(0))
    with (
        EngineProcess(partial(TransformersEngine, model, **limits), core=core) as transformers,
        EngineProcess(partial(VllmEngine, model, **limits), core=core) as vllm,
    ):

        def side(process: EngineProcess) -> Side:
            return lambda lengths: process.run(partial(respond, requests=make_requests(model, lengths, arguments)))

        yield side(transformers), side(vllm)


def respond(engine: GenerationEngine, requests: Sequence[GenerationRequest]) -> None:
    """Generate all responses, in full."""
    for request in requests:
        engine.submit(request)
    num_tokens = 0
    while tokens := engine.step():
        num_tokens += len(tokens)
    assert num_tokens == sum(request.params.max_new_tokens for request in requests)


def make_requests(
    model: PreTrainedModel, lengths: Sequence[int], arguments: argparse.Namespace
) -> list[GenerationRequest]:
    """One per length, at temperature 1."""
    prompts = make_prompts(model, len(lengths), arguments.prompt_tokens)
    return [
        GenerationRequest(
            sample_id=sample_id,
            prompt_ids=tuple(prompt_ids),
            params=SamplingParams(seed=0, temperature=1.0, max_new_tokens=length),
        )
        for sample_id, (prompt_ids, length) in enumerate(zip(prompts.tolist(), lengths, strict=True))
    ]


def make_prompts(model: PreTrainedModel, num_samples: int, num_tokens: int) -> torch.Tensor:
    """Random token ids, int64 [num_samples, num_tokens], on the model's device."""
    generator = torch.Generator().manual_seed(1)
    vocab_size = model.config.get_text_config().vocab_size
    return torch.randint(0, vocab_size, (num_samples, num_tokens), generator=generator).to(model.device)


def format_row(row: Row) -> str:
    """One line for people."""
    return (
        f"{row['lengths']}: {row['num_samples']} responses, mean {row['num_tokens'] / row['num_samples']:.0f} and at "
        f"most {row['longest_tokens']} tokens, batch {row['batch']}: {row['engine']} {row['tokens_per_s']:.0f} "
        f"tokens/s, {row['against']} {row['against_tokens_per_s']:.0f}: {row['ratio']:.2f} times as fast"
    )


Comparison = Callable[[PreTrainedModel, argparse.Namespace], AbstractContextManager[tuple[Side, Side]]]
COMPARISONS: dict[str, Comparison] = {"generate": against_generate, "vllm": against_vllm}
